"""Files that are whole or not there: a command replaces a file in one step, so it can be ended at any moment."""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["dump", "prepare", "write_whole"]


def prepare(path: Path, option: str) -> Path | None:
    """The folder that was made for a file, None if it was there; the file itself is not touched.

    Raises ``ValueError`` naming the option if the file cannot be written.
    """
    folder = path.resolve().parent
    try:
        missing = not folder.is_dir()
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        if not _is_device(path):
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise ValueError(f"{option} must be a file that can be written: {error}") from None
    return path.parent if missing else None


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or an end in the middle, finds all of it or what was there before."""
    data = content.encode() if isinstance(content, str) else content
    if _is_device(path):
        path.write_bytes(data)
        return
    place = path.resolve()  # of a link the file, which the link goes on pointing to
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


def dump(document: Mapping[str, Any], to: str | Path) -> None:
    """A document as JSON into a file, whose folder is made, or onto the output for ``"-"``."""
    text = json.dumps(document, indent=1) + "\n"
    if str(to) == "-":
        sys.stdout.write(text)
        return
    path = Path(to)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def _is_device(path: Path) -> bool:
    """Whether it is something like /dev/null or a pipe, which a file must not replace."""
    return path.exists() and not path.is_file()
