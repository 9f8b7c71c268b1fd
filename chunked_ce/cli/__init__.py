"""``chunked-ce plan | bench | check``: will it fit, what does it cost, is it right on this machine.

The extra ``cli`` holds what this needs beyond torch: rich for tables, psutil for the memory of this machine, and
matplotlib for plots alone. The library itself imports nothing from here.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

from chunked_ce.cli.arguments import parser

__all__ = ["load_library", "main"]

_EXTRA = {"rich": "tables and progress", "matplotlib": "plots", "psutil": "memory of this machine"}


_BROKEN_PIPE = 128 + 13  # as a shell reports a program that SIGPIPE ended


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 if all went well, 1 if a check failed, 2 for wrong arguments, 130 after Ctrl-C.

    If the reader of the output goes away, as ``head`` does, the command ends without a word.
    """
    try:
        status = _status(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        _discard_unread()
        status = _BROKEN_PIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def _status(arguments: Sequence[str] | None) -> int | str | None:
    name = "chunked-ce"
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parsed = parser().parse_args(words)
        name = f"chunked-ce {parsed.command}"
        _require(needed_packages(parsed))
        if parsed.command == "plan":
            parsed.words = words  # the calculator shows a command like it
        if parsed.command != "plan" or parsed.verify:
            load_library()
        command = importlib.import_module(f"chunked_ce.cli.{parsed.command}_command")
        status: int = command.run(parsed)
    except SystemExit as ending:  # of the parser, after a help text or an error
        return ending.code
    except ValueError as error:  # arguments that contradict each other: one line, as for a wrong one
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return status


def _discard_unread() -> None:
    """Without this, Python would try again to write what nobody reads, and complain at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def load_library() -> None:
    """Import the library behind `chunked_ce`, which the console script has left out so far."""
    script: Any = sys.modules.get("chunked_ce_command")
    if getattr(script, "is_light", False):
        script.is_light = False
        importlib.reload(sys.modules["chunked_ce"])


def needed_packages(parsed: argparse.Namespace) -> list[str]:
    """The packages beyond torch that the command imports."""
    if parsed.command == "bench" and parsed.compare:
        return ["rich"]
    draws = parsed.command == "bench" and (parsed.plot or parsed.html)
    is_asked = parsed.command == "plan" and (parsed.device != "cpu" or parsed.memory or parsed.budget)
    knows_memory = is_asked and not parsed.verify
    return ["rich", *["matplotlib"] * bool(draws), *["psutil"] * (not knows_memory)]


def _require(names: Sequence[str]) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"chunked-ce needs {' and '.join(missing)} ({', '.join(_EXTRA[name] for name in missing)}): "
            "pip install 'chunked_ce[cli]'",
            file=sys.stderr,
        )
        sys.exit(1)
