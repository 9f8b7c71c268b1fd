"""What `chunked_ce.cli.worker` tells, gathered into one result for each contestant and case."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from chunked_ce.cli.contestants import DTYPES, LOSSES, PRODUCTS
from chunked_ce.cli.laws import predicted
from chunked_ce.cli.report import MIB
from chunked_ce.cli.worker import Preparation, Task, Worker

__all__ = ["Prepared", "Result", "measure", "not_measured", "prepared"]

Result = dict[str, object]
OK, INTERRUPTED = "ok", "interrupted"


class Prepared(NamedTuple):
    """A case whose files there are."""

    task: Task
    softmax: dict[str, float]  # loss and entropy in nats


def prepared(worker: Worker, case: Task, data: str, folder: Path, *, errors: bool, timeout: float) -> Prepared | str:
    """The case, or why its inputs cannot be made; its files are written to ``folder``."""
    place = tempfile.mkdtemp(dir=folder)
    for kind, found in worker.run(Preparation(case, data, place, errors), timeout):
        if kind == "prepared":
            ready = Prepared(*found)
        elif kind == "failed":
            return f"its inputs or their float64 reference: {found}"
    return ready


def measure(
    worker: Worker, task: Task, timeout: float, tick: Callable[[], None] = lambda: None
) -> tuple[Result, KeyboardInterrupt | None]:
    """One contestant on one case. Ctrl-C ends it with what there is by then, and is returned."""
    result: Result = _described(task)
    rounds: list[tuple[float, float]] = []
    status, interrupt = OK, None
    try:
        for kind, found in worker.run(task, timeout):
            if kind == "memory":
                result["peak_mib"] = round(found / MIB, 1)
            elif kind == "errors":
                result |= {name: float(f"{error:.4g}") for name, error in found.items()}
            elif kind == "round":
                rounds.append(found)
            elif kind == "failed":
                status = found
            if kind in ("memory", "round"):
                tick()
    except KeyboardInterrupt as pressed:
        status, interrupt = INTERRUPTED, pressed
    result["status"] = status
    return result | _times(rounds), interrupt


def not_measured(task: Task, why: str) -> Result:
    return _described(task) | {"status": why}


def _described(task: Task) -> Result:
    law = predicted(
        task.contestant,
        task.tokens,
        task.vocab,
        task.hidden,
        dtype=DTYPES[task.dtype],
        device=task.device,
        chunk=task.chunk,
        ignored=task.ignored,
    )
    return {
        "contestant": task.contestant,
        "exact": task.contestant == PRODUCTS or LOSSES[task.contestant].exact,
        "dtype": task.dtype,
        "tokens": task.tokens,
        "hidden": task.hidden,
        "vocab": task.vocab,
        "chunk": task.chunk,
        "ignored": task.ignored,
        "predicted_mib": law and round(law.peak / MIB, 1),
    }


def _times(rounds: Sequence[tuple[float, float]]) -> Result:
    """Medians over the rounds; a ratio is that of one round."""
    own = [seconds for seconds, _ in rounds]
    if not own:
        return {"rounds": 0}
    ratios = [seconds / products for seconds, products in rounds]
    return {
        "rounds": len(own),
        "seconds": float(f"{statistics.median(own):.4g}"),
        "products_seconds": float(f"{statistics.median(products for _, products in rounds):.4g}"),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_least": round(min(ratios), 3),
        "ratio_most": round(max(ratios), 3),
    }
