"""Whole losses, forward and backward, at the shapes that people quote: ours, and every other package's."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.device.jobs import Job, Row
from benchmarks.device.timing import DEVICE, ON_GPU, Shape, milliseconds, peak_mib
from chunked_ce.cli.accuracy import Reference, errors_of, reference
from chunked_ce.cli.implementations import (
    BACKWARD,
    CCE,
    CCE_EXACT,
    CCE_PRETRAINING,
    COMPILED,
    CROSS_ENTROPY,
    FILTERED,
    FORWARD,
    FULL,
    LIGER,
    LIGER_CUTE,
    LIGER_SCALED,
    LOSSES,
    QUACK,
    TRL,
    loss_of,
    train_step,
    why_not,
)
from chunked_ce.cli.memory_models import predicted
from chunked_ce.cli.synthetic_inputs import IGNORED, LossInputs

__all__ = ["OURS", "PEERS", "Case", "jobs", "peer_jobs", "queued", "step_of"]

OURS = (FORWARD, BACKWARD, FILTERED, "logprobs, chunked_ce", "statistics, chunked_ce")
PEERS = (QUACK, CCE, CCE_EXACT, LIGER, LIGER_CUTE, LIGER_SCALED, TRL, COMPILED, FULL, CCE_PRETRAINING)
_PROMPT = 64  # tokens: as many are ignored, then as many count


class Case(NamedTuple):
    """A shape, all of whose tokens count, or half of them."""

    shape: Shape
    halved: bool = False

    def __str__(self) -> str:
        return f"{self.shape}, half ignored" if self.halved else str(self.shape)

    def inputs(self, whole: LossInputs | None = None) -> LossInputs:
        """As sharp as a trained model, or ``whole`` with half of its tokens ignored."""
        whole = LossInputs.trained(*self.shape, torch.bfloat16, device=DEVICE) if whole is None else whole
        if not self.halved:
            return whole
        places = torch.arange(self.shape.tokens, device=DEVICE)
        return whole._replace(
            target=whole.target.masked_fill(places // min(_PROMPT, len(places) // 2) % 2 == 0, IGNORED)
        )


def jobs(shapes: Sequence[Shape]) -> list[Job]:
    """Ours, in a process for each shape."""
    return [Job("ours", _losses, (shape,), (OURS, True)) for shape in shapes]


def peer_jobs(shapes: Sequence[Shape], keys: Sequence[str] | None = None) -> list[Job]:
    """One process for each of the others, which goes through all shapes.

    ``keys`` are those of `chunked-ce bench --only`, None for all.
    """
    names = [name for name in PEERS if keys is None or LOSSES[name].key in keys]
    return [Job(name, _losses, tuple(shapes), ((name,), name == FULL)) for name in names]


def _losses(shape: Shape, names: Sequence[str], compares: bool) -> Iterator[Row]:
    """Time, peak and, with ``compares``, errors of each loss on the same inputs; then with half of them ignored."""
    reasons = {name: why_not(name) for name in names}
    yield from ({"what": name, "skipped": reason} for name, reason in reasons.items() if reason)
    names = [name for name, reason in reasons.items() if not reason]
    if not names:
        return
    if any(LOSSES[name].compiles for name in names):
        torch.compiler.reset()  # or a second shape would be compiled for all shapes
        loss_of.cache_clear()
    whole = Case(shape).inputs()
    exact = reference(whole) if compares else None
    for case in (Case(shape), Case(shape, halved=True)):
        inputs = case.inputs(whole)
        for name in names:
            is_compared = not case.halved and LOSSES[name].kind == CROSS_ENTROPY
            row = {"item": str(case), "what": name, "exact": LOSSES[name].exact}
            try:
                found = _measured(case, name, inputs, exact if is_compared else None)
            except (RuntimeError, ValueError) as error:
                found = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            if "error" in found:
                inputs.hidden.grad = inputs.weight.grad = None
                gc.collect()
                if ON_GPU:
                    torch.cuda.synchronize()  # raises if nothing runs any more
                    torch.cuda.empty_cache()
            yield row | found


def _measured(case: Case, name: str, inputs: LossInputs, exact: Reference | None) -> Row:
    def step() -> None:
        train_step(name, inputs)

    step()  # compiles
    share = 0.5 if case.halved else 0.0
    row: Row = {"peak_mib": peak_mib(step)}
    n, d, v = case.shape
    law = predicted(name, n, v, d, dtype=torch.bfloat16, device=DEVICE, ignored=share)
    row["law_mib"] = law and round(law.peak / 2**20, 1)
    row["ms"] = milliseconds(lambda: queued(name, inputs))
    row["operations"] = round(case.shape.floor * (1 - share))
    if exact is not None:
        loss = loss_of(name)(*inputs)
        loss.backward()
        errors = errors_of(exact, loss.detach(), inputs.hidden.grad, inputs.weight.grad)
        row |= {name: float(f"{error:.4g}") for name, error in errors.items()}
        inputs.hidden.grad = inputs.weight.grad = None
    return row


def queued(name: str, inputs: LossInputs, chunk: int | None = None) -> None:
    """`train_step`, without waiting for the device at the end."""
    step_of(loss_of(name, chunk), inputs)


def step_of(loss: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: LossInputs) -> None:
    """Forward and backward of a loss, queued."""
    loss(*inputs).mean().backward()
    inputs.hidden.grad = inputs.weight.grad = None
