"""The memory of a rank: as asked, this machine's, or that of the cards most planned for."""

from __future__ import annotations

import shutil
import subprocess
from typing import NamedTuple

__all__ = ["Room", "room_of"]

_CARD = 80 * 2**30
_SECONDS = 5  # that the driver may take to answer


class Room(NamedTuple):
    """Bytes, and where the number is from."""

    size: int
    source: str


def room_of(device: str, asked: int | None) -> Room:
    """The memory of a rank, in bytes."""
    if asked is not None:
        return Room(asked, "as given")
    if device == "cpu":
        import psutil

        return Room(psutil.virtual_memory().total, "this machine's")
    found = _this_card()
    return Room(_CARD, "assumed; --memory sets it") if found is None else Room(found, "this machine's card")


def _this_card() -> int | None:
    """The memory of the first card, which the driver's own program tells without torch."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SECONDS, check=True)
        return int(done.stdout.split()[0]) * 2**20
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None
