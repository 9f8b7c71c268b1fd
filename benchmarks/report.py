"""Results for people and for programs: a table, and JSON that says where, when and with what it was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.contestants import DEVICE

__all__ = ["MIB", "conditions", "print_conditions", "print_table", "write"]

MIB = 2**20
_PACKAGES = ("chunked_ce", "torch", "deepspeed", "numpy", "pytest-benchmark")


def conditions() -> dict[str, object]:
    """Device, threads, versions and date; nothing that names the machine."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
    }


def print_conditions(found: dict[str, object]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    print(f"{found['date']}: {found['device']}, {found['threads']} threads, load average {found['load_average']}")
    print(versions, flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need; the first one to the left, the others to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    for row in (header, *rows):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join((first.strip().ljust(widths[0]), *others)), flush=True)


def write(path: Path, found: dict[str, object], results: Sequence[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"conditions": found, "results": list(results)}, indent=1) + "\n")


def _cpu_name() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({capability})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
