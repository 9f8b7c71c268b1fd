"""The conditions of a measurement (where, when, with which versions), and its results as JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from chunked_ce.cli.files import dump
from chunked_ce.cli.implementations import DEVICE
from chunked_ce.cli.units import GIB, MIB, bytes_text, threads_text

__all__ = ["GIB", "MIB", "bytes_text", "conditions", "conditions_text", "dump"]

_PEERS = ("deepspeed", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")
PACKAGES = ("chunked_ce", "torch", "triton", *_PEERS, "numpy")
_VENDORS = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}


def conditions(device: str = DEVICE) -> dict[str, Any]:
    """Device, threads, versions and date, but nothing that names the machine."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version()}
        | {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def conditions_text(measured: dict[str, Any]) -> str:
    """Two lines for people."""
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    where, load = (
        f"{measured['device']}, {threads_text(measured['threads'])}",
        f"load average {measured['load_average']}",
    )
    return f"{measured['date']}: {where}, {load}\n{versions}"


def _cpu_name() -> str:
    """The processor with its maker, which a virtual machine's model name may lack, and the instructions torch uses."""
    capability = torch.backends.cpu.get_cpu_capability()
    try:
        fields = dict(re.findall(r"^(\S[^:]*?)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE))
    except OSError:
        fields = {}
    name = fields.get("model name") or platform.processor() or platform.machine()
    maker = _VENDORS.get(fields.get("vendor_id", ""), "")
    return f"{name if maker in name else f'{maker} {name}'} ({capability})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
