"""Hardware counters of our kernels in one forward and backward, by Nsight Compute where it is installed.

python -m benchmarks.device.profile 8192 2304 256000    (what runs under ncu)
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.device.jobs import Job, Row
from benchmarks.device.losses import Case, queued
from benchmarks.device.timing import ON_GPU, Shape
from chunked_ce.cli.implementations import FILTERED, FORWARD

__all__ = ["jobs", "rows_of"]

_METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_percent",
    "launch__registers_per_thread": "registers",
}
_LAUNCHES = 24
_SECONDS = 55.0


def jobs(shapes: tuple[Shape, ...]) -> list[Job]:
    return [Job("ncu", _profile, shapes[:1])]


def _profile(shape: Shape) -> Iterator[Row]:
    if not ON_GPU or shutil.which("ncu") is None:
        yield {"what": "ncu", "skipped": "there is no ncu on the path" if ON_GPU else "it needs a GPU"}
        return
    step = [sys.executable, "-m", __name__, *map(str, shape)]
    with tempfile.TemporaryDirectory(prefix="chunked-ce-") as folder:
        log = Path(folder, "ncu.csv")
        which = ["--kernel-name", "regex:_kernel$", "--launch-count", str(_LAUNCHES), "--clock-control", "none"]
        command = ["ncu", *which, "--metrics", ",".join(_METRICS), "--csv", "--log-file", str(log), *step]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        found = rows_of(log.read_text() if log.exists() else "")
    if not found:
        yield {"what": "ncu", "error": (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]}
    yield from found


def rows_of(text: str) -> list[Row]:
    """A row for each launch in ncu's table, which has a line for each of its metrics."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    launches: dict[str, Row] = {}
    for line in csv.DictReader(lines):
        row = launches.setdefault(line["ID"], {"what": line["Kernel Name"], "grid": line["Grid Size"]})
        row[_METRICS.get(line["Metric Name"], line["Metric Name"])] = float(line["Metric Value"].replace(",", ""))
    return list(launches.values())


def main() -> None:
    inputs = Case(Shape(*map(int, sys.argv[1:]))).inputs()
    for name in (FORWARD, FILTERED):
        queued(name, inputs)


if __name__ == "__main__":
    main()
