"""What a rank holds for the model: weights, gradients, optimizer state, master weights, frozen models.

With P trained parameters of a rank and R data-parallel ranks, mixed precision with AdamW takes 2 P bytes of weights,
2 P of gradients and 12 P of fp32 master weights and moments. ZeRO divides the last by R from stage 1 on, the gradients
from stage 2 on and the weights in stage 3 (Rajbhandari et al. 2020, arXiv 1910.02054, section 3 and figure 1).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from chunked_ce.cli.planning.run import Local, Path, Run, Stage

__all__ = ["State", "state_of"]

_BLOCK = 256  # values of an 8-bit state that share an fp32 scale (Dettmers et al. 2022, arXiv 2110.02861)


class State(NamedTuple):
    """Bytes of a rank that depend on model, engine and optimizer only."""

    weights: int
    gradients: int  # all of them, as they are at the end of a backward
    head_gradient: int  # the part of them that the loss makes
    optimizer: int
    master: int
    frozen_model: int  # a teacher's or a reference model's weights

    @property
    def total(self) -> int:
        """Of the trained model."""
        return self.weights + self.gradients + self.optimizer + self.master


class _Part(NamedTuple):
    """Parameters that are partitioned alike."""

    held: int
    trained: int
    of_layers: bool
    divisors: tuple[int, int, int]  # of weights, gradients, and optimizer state with master weights


def state_of(run: Run, path: Path, stage: Stage) -> State:
    """The state of a rank; the head's rows are divided among data-parallel ranks on the path ``"sharded"``."""
    local = run.local_of(run.model, stage)
    weight, gradient, master = _bytes_per_parameter(run)
    frozen = run.itemsize
    parts = _parts(run, path, local)
    sums = {"weights": 0, "gradients": 0, "optimizer": 0, "master": 0}
    head_gradient = 0
    for part in parts:
        of_weights, of_gradients, of_state = part.divisors
        untrained = max(0, part.held - part.trained) if not run.lora else part.held
        sums["weights"] += math.ceil((part.trained * weight + untrained * frozen) / of_weights)
        gradients = math.ceil(part.trained * gradient / of_gradients)
        sums["gradients"] += gradients
        head_gradient += 0 if part.of_layers else gradients
        sums["optimizer"] += math.ceil(_optimizer_bytes(run, part) / of_state)
        sums["master"] += math.ceil(part.trained * master / of_state)
    return State(**sums, head_gradient=head_gradient, frozen_model=_frozen(run, stage))


def _parts(run: Run, path: Path, local: Local) -> list[_Part]:
    """The layers with an untied embedding, and the head with the embedding tied to it."""
    by_engine = tuple(run.replicas if run.zero >= least else 1 for least in (3, 2, 1))
    divisors = (by_engine[0], by_engine[1], by_engine[2])
    tied = run.model.tied and not local.head and run.model.layers > 0
    head = Local(0, local.embedding, 0) if tied else Local(0, 0, local.head)
    body = local._replace(head=0, embedding=0 if tied else local.embedding)
    sharded = (run.replicas, run.replicas, run.replicas)
    trained_body = run.trained_of(local) if run.lora else run.train_input * sum(body)
    trained_head = 0 if run.lora else run.train_head * sum(head)
    return [
        _Part(sum(body), trained_body, True, divisors),
        _Part(sum(head), trained_head, False, sharded if path == "sharded" else divisors),
    ]


def _bytes_per_parameter(run: Run) -> tuple[int, int, int]:
    """Of weights, gradients and master weights."""
    size = run.itemsize
    if size >= 4 or run.precision == "pure":
        return size, size, 0
    if run.precision == "autocast" or run.engine == "fsdp":  # FSDP's shards are in fp32, and cast as they are gathered
        return 4, 4, 0
    return size, size, 0 if run.optimizer == "none" else 4


def _optimizer_bytes(run: Run, part: _Part) -> float:
    size = run.itemsize if run.precision == "pure" else 4
    match run.optimizer:
        case "adamw":
            return 2 * size * part.trained
        case "adamw-8bit":
            return 2 * (1 + 4 / _BLOCK) * part.trained
        case "muon":  # momentum of the matrices in the layers; AdamW for the rest
            return (1 if part.of_layers else 2) * size * part.trained
        case "adafactor":  # sums of the rows and columns of each matrix (Shazeer & Stern 2018, arXiv 1804.04235)
            if part.of_layers:
                return 4 * run.matrix_sizes * part.held / max(1, run.model.layers_parameters)
            return 4 * (part.trained / run.model.hidden + run.model.hidden) if part.trained else 0
        case "sgd" | "none":
            return 0


def _frozen(run: Run, stage: Stage) -> int:
    model = run.frozen_model
    if model is None:
        return 0
    elements = sum(run.local_of(model, stage)) * run.itemsize
    return math.ceil(elements / (run.replicas if run.zero == 3 else 1))
