"""`estimate`: the bytes of a training step on its fullest rank, term by term.

A step has three moments at which memory peaks. At the loss all activations and the loss's own tensors exist, but no
gradient of the layers yet. When the backward enters the layers the loss has left its gradients, and one layer is
recomputed or has gradients of its tensors. At the end of the backward all gradients of parameters exist, and the
activations are gone. The estimate is that of the worst moment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple

from chunked_ce.cli.planning.activations import activations_of
from chunked_ce.cli.planning.loss import loss_of
from chunked_ce.cli.planning.run import Path, Run, Stage
from chunked_ce.cli.planning.state import State, state_of

__all__ = ["TERMS", "Estimate", "Moment", "Term", "estimate"]

Moment = Literal["loss", "backward", "end"]

TERMS = {  # by name, in the order of the table
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "master": "fp32 master weights",
    "frozen_model": "reference model or teacher",
    "activations": "activations",
    "layer": "one layer's backward",
    "cast": "weights cast by autocast",
    "gathered": "gathered weights",
    "buckets": "gradient buckets",
    "loss": "loss",
    "overhead": "CUDA context and libraries",
    "other": "something else",
}
_CONTEXT = 3 * 2**28  # CUDA's context with torch's kernels and the workspaces of matrix libraries: 0.75 GiB
_COLLECTIVES = 2**29  # NCCL's buffers: 0.5 GiB
_BUCKET = 500_000_000  # elements: DeepSpeed's default of reduce_bucket_size


class Term(NamedTuple):
    """Bytes of a rank; ``exact`` if they follow from shapes and dtypes alone."""

    bytes: int
    exact: bool


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A run on one path of the loss, on the fullest rank."""

    path: Path
    stage: Stage  # of the pipeline
    moments: Mapping[Moment, Mapping[str, Term]]
    loss_terms: Mapping[str, int]  # of the loss alone, at its own peak
    state: State

    @property
    def moment(self) -> Moment:
        """The worst one."""
        return max(self.moments, key=lambda name: _sum(self.moments[name]))

    @property
    def terms(self) -> Mapping[str, Term]:
        """Those of the worst moment."""
        return self.moments[self.moment]

    @property
    def total(self) -> int:
        """Bytes at the worst moment."""
        return _sum(self.terms)

    @property
    def loss(self) -> int:
        """Bytes that the loss takes at its own peak."""
        return sum(self.loss_terms.values())


def _sum(terms: Mapping[str, Term]) -> int:
    return sum(term.bytes for term in terms.values())


def estimate(run: Run, path: Path) -> Estimate:
    """The estimate of ``run`` with the loss on ``path``.

    >>> from chunked_ce.cli.model_shapes import MODELS
    >>> found = estimate(Run(MODELS["llama-3-8b"], tokens=8192), "forward")
    >>> found.state.total / MODELS["llama-3-8b"].parameters  # bytes per parameter: 2 + 2 + 12
    16.0
    """
    stages = [_of_stage(run, path, stage) for stage in run.stages]
    return max(stages, key=lambda one: one.total)


def _of_stage(run: Run, path: Path, stage: Stage) -> Estimate:
    state, activations = state_of(run, path, stage), activations_of(run, stage)
    loss = {name: size for name, size in loss_of(run, path).peak_terms.items() if size} if stage != "first" else {}
    gathered_head, gathered_layers = _gathered(run, path, stage)
    lasting = {
        "weights": Term(state.weights, True),
        "optimizer": Term(state.optimizer, run.optimizer in ("adamw", "sgd", "none")),
        "master": Term(state.master, True),
        "frozen_model": Term(state.frozen_model, True),
        "cast": Term(_cast(run, stage), False),
        "buckets": Term(_buckets(run, stage), False),
        "overhead": Term(_overhead(run), False),
        "other": Term(run.other, True),
    }
    from_before = Term(state.gradients if run.accumulation > 1 else 0, True)
    of_head = Term(max(from_before.bytes, state.head_gradient if loss else 0), True)
    moments: dict[Moment, dict[str, Term]] = {
        "loss": lasting
        | {
            "gradients": from_before,
            "activations": Term(activations.kept, False),
            "gathered": Term(gathered_head, False),
            "loss": Term(sum(loss.values()), path not in ("full", "compiled")),
        },
        "backward": lasting
        | {
            "gradients": of_head,
            "activations": Term(activations.kept, False),
            "layer": Term(activations.layer, False),
            "gathered": Term(gathered_layers, False),
        },
        "end": lasting
        | {
            "gradients": Term(state.gradients, True),
            "layer": Term(activations.layer, False),
            "gathered": Term(gathered_layers, False),
        },
    }
    kept: dict[Moment, dict[str, Term]] = {
        name: {key: terms[key] for key in TERMS if terms.get(key, (0,))[0]} for name, terms in moments.items()
    }
    return Estimate(path, stage, kept, loss, state)


def _gathered(run: Run, path: Path, stage: Stage) -> tuple[int, int]:
    """Weights that an engine gathers whole, at the loss and in the layers: the head, and two layers at a time.

    FSDP gathers embedding and head with the first module and keeps them until the end of the backward; the gradient of
    a layer exists whole before it is reduced.
    """
    if run.zero < 3 or run.replicas == 1:
        return 0, 0
    local = run.local_of(run.model, stage)
    tied = run.model.tied and not local.head and stage != "first"
    head = 0 if path == "sharded" else local.embedding if tied else local.head
    layers = 2 * local.layers * run.pipeline // max(1, run.model.layers)
    embedding = 0 if tied else local.embedding
    if run.engine == "fsdp":
        always = head + embedding
        return (always + layers) * run.itemsize, (always + layers) * run.itemsize + layers // 2 * (run.itemsize + 4)
    return head * run.itemsize, (layers + layers // 2) * run.itemsize


def _buckets(run: Run, stage: Stage) -> int:
    """DDP keeps a copy of all gradients in buckets, DeepSpeed one bucket."""
    if run.replicas == 1 or run.engine in ("none", "fsdp"):
        return 0
    trained = run.trained_of(run.local_of(run.model, stage))
    if run.engine == "ddp":
        return trained * (4 if run.precision == "autocast" else run.itemsize)
    return min(trained, _BUCKET) * run.itemsize


def _cast(run: Run, stage: Stage) -> int:
    """Autocast keeps a narrow copy of every trained matrix until the backward."""
    if run.precision != "autocast" or run.itemsize >= 4 or run.zero == 3:
        return 0
    return run.trained_of(run.local_of(run.model, stage)) * run.itemsize


def _overhead(run: Run) -> int:
    if run.device == "cpu":
        return 0
    return _CONTEXT + _COLLECTIVES * (run.ranks > 1)
