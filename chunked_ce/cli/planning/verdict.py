"""`verdict`: whether a run fits into the memory of a rank, on which path of the loss, and what would."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

from chunked_ce.cli.planning.changes import Change, smallest_changes
from chunked_ce.cli.planning.estimate import Estimate, estimate
from chunked_ce.cli.planning.loss import DEFAULTS, LABELS, paths_of
from chunked_ce.cli.planning.run import Path, Run
from chunked_ce.cli.units import bytes_text

__all__ = ["Verdict", "largest_tokens", "verdict"]

_MOST_TOKENS = 2**40
_OPTIMIZERS = {"adamw": "AdamW", "adamw-8bit": "8-bit AdamW", "adafactor": "Adafactor", "muon": "Muon", "sgd": "SGD"}


class Verdict(NamedTuple):
    """All paths of a run beside the memory of a rank."""

    run: Run
    memory: int  # bytes of a rank
    loss_only: bool  # whether the memory is for the loss alone
    path: Path  # the one that the verdict is on
    estimates: Mapping[Path, Estimate]
    largest_tokens: Mapping[Path, int]  # of a micro-batch that fit; 0 for none
    changes: tuple[Change, ...]  # that make it fit, the smallest first; empty if it fits or nothing helps

    @property
    def total(self) -> int:
        """Bytes on the verdict's path."""
        return self.taken(self.path)

    def taken(self, path: Path) -> int:
        """Bytes that count against the memory, on another path."""
        found = self.estimates[path]
        return found.loss if self.loss_only else found.total

    @property
    def fits(self) -> bool:
        return self.total <= self.memory

    @property
    def text(self) -> str:
        """One line: whether it fits, and why."""
        taken = f"{bytes_text(self.total)} of {bytes_text(self.memory)}"
        subject = "" if self.run.model.layers else "head and loss alone take "
        if self.loss_only:
            return f"{'Fits' if self.fits else 'Does not fit'}: the loss takes {taken}{self._beside_full}."
        if self.fits:
            return f"{'Just fits' if self.is_close else 'Fits'}: {subject}{taken} per rank{self._beside_full}."
        return f"Does not fit: {subject}{taken} per rank; {self._reason}."

    @property
    def _beside_full(self) -> str:
        if self.path == "full":
            return ""
        full = self.taken("full")
        return f"; with full logits {bytes_text(full)}{'' if full <= self.memory else ', which does not fit'}"

    @property
    def _reason(self) -> str:
        found = self.estimates[self.path]
        state = found.state.total
        names = ["weights", "gradients"]
        names += [f"{_OPTIMIZERS[self.run.optimizer]}'s state"] if self.run.optimizer in _OPTIMIZERS else []
        what = f"{', '.join(names[:-1])} and {names[-1]}"
        if state > self.memory:
            return f"{what} alone take {bytes_text(state)}"
        largest = sorted(found.terms.items(), key=lambda item: -item[1].bytes)[:3]
        return "the most is " + ", ".join(f"{bytes_text(term.bytes)} of {_SAID[name]}" for name, term in largest)

    @property
    def advice(self) -> str:
        """Which path of the loss to take."""
        if not self.fits:
            return f"{LABELS[self.path].capitalize()} take the least of the exact ways."
        if self.path == "forward":
            return "Take the library's default: gradients in the forward, the fastest exact way."
        if self.path == "backward" and self.run.trainer != "dpo":
            return "Take gradients in the backward: those in the forward do not fit."
        if self.path == "backward":
            return "Take log-probabilities in chunks: their gradients are computed in the backward."
        return f"Take the {LABELS[self.path]}."

    @property
    def code(self) -> str:
        """The line of code for it."""
        return _code(self.run, self.path)

    @property
    def is_close(self) -> bool:
        """Whether it fits with less than a twentieth to spare, which the estimated terms may take."""
        return self.memory * 0.95 < self.total <= self.memory

    def sequence_length(self, path: Path) -> int:
        """The longest sequences of which as many as in the run fit."""
        return self.largest_tokens[path] // self.run.batch

    def batch(self, path: Path) -> int:
        """How many sequences of the run's length fit."""
        return self.largest_tokens[path] // max(1, self.run.tokens // self.run.batch)


_SAID = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "master": "master weights",
    "frozen_model": "the frozen model",
    "activations": "activations",
    "layer": "one layer's backward",
    "cast": "weights cast by autocast",
    "gathered": "gathered weights",
    "buckets": "gradient buckets",
    "loss": "the loss",
    "overhead": "CUDA's context",
    "other": "something else",
}


def verdict(run: Run, memory: int, path: Path | None = None, *, loss_only: bool = False) -> Verdict:
    """Compare ``run`` with ``memory`` bytes of a rank, or its loss alone.

    ``path`` is that of the loss; None is the fastest exact one that fits, else the one that takes the least. Raises
    ``ValueError`` for a path that the run has not.

    >>> from chunked_ce.cli.model_shapes import MODELS
    >>> verdict(Run(MODELS["llama-3-8b"], tokens=8192, data=8, engine="zero3"), 80 * 2**30).fits
    True
    """
    paths = paths_of(run)
    if path is not None and path not in paths:
        raise ValueError(f"--loss must be one of auto, {', '.join(paths)} for this run, was {path}")
    estimates: dict[Path, Estimate] = {one: estimate(run, one) for one in paths}

    def taken(found: Estimate) -> int:
        return found.loss if loss_only else found.total

    exact: list[Path] = [one for one in DEFAULTS if one in paths]
    fitting: list[Path] = [one for one in exact if taken(estimates[one]) <= memory]
    # A stable sort: of those that take as much, the fastest.
    by_default: list[Path] = fitting or sorted(exact, key=lambda one: taken(estimates[one]))
    chosen: Path = path or by_default[0]

    def most_of(one: Path) -> int:
        return largest_tokens(run, lambda run: taken(estimate(run, one)) <= memory)

    largest: dict[Path, int] = {one: most_of(one) for one in paths}
    fits = taken(estimates[chosen]) <= memory
    start: Path = path or exact[0]
    changes = () if fits or loss_only else tuple(smallest_changes(run, start, memory, asked=path is not None))
    return Verdict(run, memory, loss_only, chosen, estimates, largest, changes)


def largest_tokens(run: Run, fits: Callable[[Run], bool]) -> int:
    """The most tokens of a micro-batch, all else as asked, for which ``fits`` is true; 0 for none."""

    def holds(tokens: int) -> bool:
        return fits(dataclasses.replace(run, tokens=tokens))

    if not holds(1):
        return 0
    least, most = 1, 2
    while most < _MOST_TOKENS and holds(most):
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if holds(middle) else (least, middle)
    return least


def _code(run: Run, path: Path) -> str:
    if path == "sharded":
        return "model = LMHead.shard(model, data_parallel_group)  # before FSDP, DDP or DeepSpeed"
    if path == "full":
        return "loss = F.cross_entropy(F.linear(hidden, lm_head.weight).float(), target)"
    if path == "compiled":
        return (
            "loss = torch.compile(lambda h, w, y: F.cross_entropy(F.linear(h, w).float(), y))(hidden, weight, target)"
        )
    options = {"backward": 'gradients="backward"', "filtered": 'gradient_filter="auto"'}.get(path)
    asked = f", options=ChunkOptions({options})" if options and run.trainer != "dpo" else ""
    match run.trainer:
        case "dpo":
            return "logprobs = linear_logprobs(hidden, lm_head.weight, target)  # then preference.dpo of their sums"
        case "grpo":
            tensors = "advantage=advantage, old_logprob=old"
            return f"loss = linear_loss(PolicyGradient(), hidden, lm_head.weight, target, {tensors}{asked})"
        case "distill":
            return f"loss = linear_divergence(hidden, lm_head.weight, Teacher(teacher_hidden, teacher_weight){asked})"
    return f"loss = linear_cross_entropy(hidden, lm_head.weight, target{asked})  # or LMHead.wrap(model)"
