"""Every claim about a GPU, measured in one run: time, memory and errors beside every peer, and the kernels' tests.

At the shapes that people quote, on a softmax as sharp as a trained model's, it measures chunked_ce, exact and filtered,
and every peer that is installed; then it runs the tests of the kernels. The run ends by itself within ``--minutes`` and
names what it left out for lack of time. It writes JSON and says which claims hold. On a CPU it runs with small shapes.

    python -m benchmarks.gpu --json benchmarks/results/gpu.json
    python -m benchmarks.gpu --shape 64 32 500 --rounds 1 --no-tests --only forward full
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import conditions, markdown, print_conditions
from chunked_ce.cli import memory, report
from chunked_ce.cli.implementations import BACKWARD, CHUNKED, DEVICE, DTYPES, FILTERED, FORWARD, PRODUCTS, select
from chunked_ce.cli.measure import INTERRUPTED, Result, measure, not_measured, prepared
from chunked_ce.cli.worker import Task, Worker

__all__ = ["claims", "main"]

SHAPES = {  # N, D, V
    "Gemma-2 2B": (8192, 2304, 256000),
    "Llama-3 8B": (8192, 4096, 128256),
    "Qwen-3 8B": (8192, 4096, 151936),
    "V=248320": (16384, 2048, 248320),
}
_TESTS = ("tests/engine",)
_TESTS_SECONDS = 120.0  # reserved for the kernels' tests
_LATE = "left out: the time was up"


def main(given: list[str] | None = None) -> int:
    arguments = _arguments(given)
    end = time.monotonic() + 60 * arguments.minutes
    where = conditions()
    print_conditions(where)
    names, missing = select(arguments.only)
    for name, reason in missing.items():
        print(f"left out {name}: {reason}")
    shapes = [tuple(shape) for shape in arguments.shape or SHAPES.values()]
    cases = [Task(PRODUCTS, arguments.dtype, *shape, device=DEVICE, rounds=arguments.rounds) for shape in shapes]
    document: dict[str, object] = {"conditions": where, "left_out": missing, "results": [], "data": []}
    document["limits"] = {"memory_mib": round(memory.total(DEVICE) / report.MIB)}
    stop = end - (0 if arguments.no_tests else _TESTS_SECONDS)
    with tempfile.TemporaryDirectory(prefix="chunked-ce-") as folder:
        document["results"] = _measure(cases, names, Path(folder), stop, document["data"])
    if not arguments.no_tests:
        document["tests"] = _run_tests(max(30.0, end - time.monotonic()))
        print(f"tests of the kernels: {document['tests']['summary']}")
    document["claims"] = claims(document["results"])
    print(markdown(document))
    for claim, holds in document["claims"].items():
        print(f"{'holds' if holds else 'DOES NOT HOLD' if holds is False else 'not measured'}: {claim}")
    if arguments.json:
        report.dump(document, arguments.json)
    return 0


def _measure(cases: list[Task], names: list[str], folder: Path, stop: float, notes: list) -> list[Result]:
    """One process per implementation, which goes through all shapes; a new one after a failure."""
    ready = []
    with Worker(DEVICE) as worker:
        for case in cases:
            made = prepared(worker, case, "trained", folder, errors=True, timeout=max(1.0, stop - time.monotonic()))
            if isinstance(made, str):
                raise SystemExit(f"{case.title}: {made}")
            notes.append({"case": case.title, "kind": "trained"} | made.softmax)
            ready.append(made.task)
    results = []
    for name in sorted(names, key=lambda name: name not in (PRODUCTS, *CHUNKED)):
        worker = Worker(DEVICE)
        for task in ready:
            task = task._replace(implementation=name)
            left = stop - time.monotonic()
            if left <= 0:
                row = not_measured(task, _LATE)
            else:
                if not worker.alive:
                    worker.__exit__()
                    worker = Worker(DEVICE)
                row = measure(worker, task, left)
                if row["status"] == INTERRUPTED:
                    raise KeyboardInterrupt
            results.append(row)
            print(f"{task.title}, {name}: {row.get('ratio', '-')} x products, {row['status']}", flush=True)
        worker.__exit__()
    return results


def _run_tests(seconds: float) -> dict[str, object]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", *_TESTS]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"passed": None, "summary": f"not done after {seconds:.0f} s"}
    return {"passed": done.returncode == 0, "summary": (done.stdout.strip().splitlines() or [done.stderr])[-1]}


def claims(results: list[Result]) -> dict[str, bool | None]:
    """The claims, and whether each holds at every shape; None where that was not measured."""
    shapes = {(row["tokens"], row["hidden"], row["vocab"]): {} for row in results}
    for row in results:
        shapes[row["tokens"], row["hidden"], row["vocab"]][row["contestant"]] = row

    def everywhere(holds) -> bool | None:
        verdicts = [holds(rows) for rows in shapes.values()]
        return None if any(verdict is None for verdict in verdicts) or not verdicts else all(verdicts)

    def ratio_within(name: str, most: float):
        return lambda rows: None if rows.get(name, {}).get("ratio") is None else rows[name]["ratio"] <= most

    def beats(ours: tuple[str, ...], quantity: str, exact_only: bool):
        def holds(rows: dict[str, Result]) -> bool | None:
            own = [rows[name][quantity] for name in ours if rows.get(name, {}).get(quantity) is not None]
            peers = [
                row[quantity]
                for name, row in rows.items()
                if name not in (PRODUCTS, *CHUNKED)
                and (row["exact"] or not exact_only)
                and row.get(quantity) is not None
            ]
            return min(own) < min(peers) if own and peers else None

        return holds

    return {
        "exact: at most 1.15 times the three products": everywhere(ratio_within(FORWARD, 1.15)),
        "filtered: at most 0.6 times the three products": everywhere(ratio_within(FILTERED, 0.6)),
        "exact: faster than every exact peer": everywhere(beats((FORWARD,), "ratio", True)),
        "faster than every peer, ours being exact or filtered": everywhere(beats((FORWARD, FILTERED), "ratio", False)),
        "exact, either way: less memory than every exact peer": everywhere(
            beats((FORWARD, BACKWARD), "peak_mib", True)
        ),
    }


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs=3, type=int, action="append", metavar=("N", "D", "V"))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="KEY", help="implementations, by the keys of chunked-ce bench")
    parser.add_argument("--minutes", type=float, default=8.0, help="the longest that the whole run takes, about")
    parser.add_argument("--no-tests", action="store_true", help="leave out the tests of the kernels")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
