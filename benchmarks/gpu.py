"""Everything about a GPU in one short run, most important first; each line is written as soon as it is known.

Sections, in order: the device's own rates; what the code relies on in torch; errors against float64; the row kernels
and products of one chunk; whole losses of this library; those of every installed peer; sweeps over what was chosen
without a device; hardware counters; the tests on a device. Every implementation has a process of its own, which may
hang or die, for at most ``--cap`` seconds, and the run ends by itself after ``--seconds``. On a CPU it runs with tiny
shapes, to show that it works.

    python -m benchmarks.gpu --out runs/gpu
    python -m benchmarks.gpu --only ceilings peers --peers quack cce --seconds 200
    python -m benchmarks.gpu --only ceilings behaviour correctness
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.device import behaviour, ceilings, correctness, filter_kernels, kernels, losses, profile, sweeps
from benchmarks.device.jobs import Job, Processes, Row
from benchmarks.device.timing import ON_GPU, SHAPES, TINY, Shape
from benchmarks.device.verdict import Rates, claims, markdown, skipped
from benchmarks.report import conditions, dump, print_conditions
from chunked_ce.cli import memory
from chunked_ce.cli.implementations import DEVICE, LOSSES

__all__ = ["SECTIONS", "main"]

_TESTS = ("tests/engine/test_cuda.py",)
_LATE = "left out: the time was up"
_LEAST_SECONDS = 5.0  # with less than that left, a job is not begun


def _test_jobs(shapes: Sequence[Shape]) -> list[Job]:
    return [Job("pytest", _tests, _TESTS)]


def _tests(path: str) -> Iterator[Row]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [done.stderr]
    yield {"what": "tests", "ok": done.returncode == 0, "summary": lines[-1]}
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            yield {"what": "tests", "ok": False, "summary": line[:300]}


SECTIONS: dict[str, Callable[[tuple[Shape, ...]], list[Job]]] = {
    "ceilings": ceilings.jobs,
    "behaviour": behaviour.jobs,
    "correctness": correctness.jobs,
    "kernels": lambda shapes: [*kernels.jobs(shapes), *filter_kernels.jobs(shapes)],
    "products": kernels.product_jobs,
    "losses": losses.jobs,
    "peers": losses.peer_jobs,
    "sweeps": sweeps.jobs,
    "profile": profile.jobs,
    "tests": _test_jobs,
}
_CAPS = {"tests": 180.0}  # seconds, where ``--cap`` would be too short


class Run:
    """The rows of a run, in a file that has every one as soon as it is known."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = []
        self._file = (folder / "gpu.jsonl").open("a", buffering=1)
        self._rates, self._start = Rates(), time.monotonic()

    def add(self, section: str, job: str, row: Row) -> None:
        row = {"t": round(time.monotonic() - self._start, 1), "section": section, "job": job} | row
        row |= self._rates.derived(row)
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        rest = {name: value for name, value in row.items() if name not in ("t", "section", "job", "item", "what")}
        title = ", ".join(dict.fromkeys(str(row[name]) for name in ("job", "item", "what") if name in row))
        text = " ".join(f"{name}={value}" for name, value in rest.items() if value is not None)
        print(f"{row['t']:6.1f} {section}: {title}: {text}", flush=True)

    def close(self) -> None:
        self._file.close()


def main(given: list[str] | None = None) -> int:
    arguments = _arguments(given)
    end = time.monotonic() + arguments.seconds
    shapes = tuple(Shape(*shape) for shape in arguments.shape) if arguments.shape else SHAPES if ON_GPU else TINY
    run = Run(arguments.out)
    where = conditions() | _device()
    print_conditions(where)
    run.add("where", DEVICE, where)
    try:
        # The server that forks is for a CPU: CUDA's driver does not survive a fork.
        method = "spawn" if ON_GPU or arguments.spawn else "forkserver"
        with Processes(arguments.out / "stderr.log", method) as processes:
            for section in arguments.only or SECTIONS:
                for job in _jobs(section, shapes, arguments.peers):
                    left = end - time.monotonic()
                    if left < _LEAST_SECONDS:
                        run.add(section, job.name, {"skipped": _LATE})
                        continue
                    for row in processes.rows(job, min(left, _CAPS.get(section, arguments.cap))):
                        run.add(section, job.name, row)
    except KeyboardInterrupt:
        print("interrupted: what was measured until then is kept")
    finally:
        run.close()
    _summary(run.rows, shapes, where, arguments.out)
    return 0


def _jobs(section: str, shapes: tuple[Shape, ...], peers: Sequence[str] | None) -> list[Job]:
    return losses.peer_jobs(shapes, peers) if section == "peers" else SECTIONS[section](shapes)


def _device() -> Row:
    if not ON_GPU:
        return {"memory_mib": round(memory.total(DEVICE) / 2**20)}
    found = torch.cuda.get_device_properties(0)
    names = ("multi_processor_count", "L2_cache_size", "major", "minor")
    free = {"memory_mib": round(found.total_memory / 2**20), "free_mib": round(memory.available(DEVICE) / 2**20)}
    return {name: getattr(found, name) for name in names if hasattr(found, name)} | free


def _summary(rows: Sequence[Row], shapes: Sequence[Shape], where: Row, folder: Path) -> None:
    verdicts = claims(rows, shapes)
    reasons = [f"{name}: {reason}" for name, reason in skipped(rows).items()]
    text = "\n".join([markdown(rows), "", *reasons, "", *map(str, verdicts)])
    (folder / "gpu.md").write_text(text + "\n")
    dump(
        {"conditions": where, "rows": list(rows), "claims": [claim._asdict() for claim in verdicts]},
        folder / "gpu.json",
    )
    print(text)


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    keys = [LOSSES[name].key for name in losses.PEERS]
    parser.add_argument("--peers", nargs="*", choices=keys, metavar="KEY", help=f"of {', '.join(keys)}; all by default")
    parser.add_argument("--shape", nargs=3, type=int, action="append", metavar=("N", "D", "V"))
    parser.add_argument("--seconds", type=float, default=540.0, help="the longest that the whole run takes, about")
    parser.add_argument(
        "--cap", type=float, default=60.0, help="seconds for each implementation and each part of a section"
    )
    parser.add_argument("--spawn", action="store_true", help="start processes as on a GPU, which takes longer")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for gpu.jsonl, gpu.json and gpu.md")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
