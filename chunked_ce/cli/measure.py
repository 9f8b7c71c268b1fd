"""The messages of `chunked_ce.cli.worker`, gathered into one result for each implementation and case."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from chunked_ce.cli.documents import CASE_SIZES, Result
from chunked_ce.cli.implementations import DTYPES, LOSSES
from chunked_ce.cli.memory_models import predicted
from chunked_ce.cli.report import MIB
from chunked_ce.cli.worker import Preparation, Task, Worker

__all__ = ["INTERRUPTED", "Prepared", "measure", "not_measured", "prepared"]

INTERRUPTED = "interrupted"


class Prepared(NamedTuple):
    """A case whose files exist."""

    task: Task
    softmax: dict[str, float]  # loss and entropy in nats


def prepared(worker: Worker, case: Task, data: str, folder: Path, *, errors: bool, timeout: float) -> Prepared | str:
    """The case with its files written to ``folder``, or why its inputs cannot be made."""
    place = tempfile.mkdtemp(dir=folder)
    answer: Prepared | str = "its inputs were not made"
    for kind, content in worker.run(Preparation(case, data, place, errors), timeout):
        if kind == "prepared":
            answer = Prepared(*content)
        elif kind == "failed":
            answer = f"its inputs or their float64 reference: {content}"
    return answer


def measure(worker: Worker, task: Task, timeout: float, tick: Callable[[], None] = lambda: None) -> Result:
    """One implementation on one case. Ctrl-C ends it: the result holds what was measured, its status is INTERRUPTED."""
    result = not_measured(task, "ok")
    rounds: list[tuple[float, float]] = []
    control: list[float] = []
    try:
        for kind, content in worker.run(task, timeout):
            if kind == "memory":
                result["peak_mib"] = round(content / MIB, 1)
            elif kind == "sent":
                result["sent_mib"] = round(content / MIB, 2)
            elif kind == "errors":
                result |= {name: float(f"{error:.4g}") for name, error in content.items()}
            elif kind == "control":
                control.append(float(f"{content:.4g}"))
            elif kind == "shares":
                result |= content
            elif kind == "round":
                rounds.append(content)
            elif kind == "failed":
                result["status"] = content
            if kind in ("memory", "round"):
                tick()
    except KeyboardInterrupt:
        result["status"] = INTERRUPTED
    return result | ({"control_seconds": control} if control else {}) | _times(rounds)


def not_measured(task: Task, status: str) -> Result:
    """The case, the memory law's prediction for it, and a status."""
    sizes = task.tokens, task.vocab, task.hidden
    law = predicted(
        task.implementation,
        *sizes,
        dtype=DTYPES[task.dtype],
        device=task.device,
        chunk=task.chunk,
        ignored=task.ignored,
        ranks=task.ranks,
    )
    exact = task.implementation not in LOSSES or LOSSES[task.implementation].exact
    case = {name: getattr(task, name) for name in CASE_SIZES} | ({"ranks": task.ranks} if task.ranks else {})
    described = {"implementation": task.implementation, "exact": exact} | case
    return described | {"predicted_mib": law and round(law.peak / MIB, 1), "status": status}


def _times(rounds: Sequence[tuple[float, float]]) -> Result:
    """Medians over the rounds; a ratio is that of one round."""
    if not rounds:
        return {"rounds": 0}
    own, products = zip(*rounds, strict=True)
    ratios = [seconds / of_products for seconds, of_products in rounds]
    return {
        "rounds": len(rounds),
        "seconds": float(f"{statistics.median(own):.4g}"),
        "products_seconds": float(f"{statistics.median(products):.4g}"),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_least": round(min(ratios), 3),
        "ratio_most": round(max(ratios), 3),
    }
