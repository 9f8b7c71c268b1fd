"""``chunked-ce plan | bench | check``: will it fit, what does it cost, is it right on this machine.

Everything it needs beyond torch is in the extra ``cli``. The library itself imports nothing from here.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

from chunked_ce.cli.arguments import parser

__all__ = ["main"]

_EXTRA = {"rich": "tables and progress", "matplotlib": "plots", "psutil": "memory of this machine"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 if all went well, 1 if a check failed, 2 for arguments that are not allowed."""
    parsed = parser().parse_args(arguments)
    _require_extra()
    command = importlib.import_module(f"chunked_ce.cli.{parsed.command}")
    try:
        status = command.run(parsed)
    except ValueError as error:  # what the arguments say together cannot be: one line, as for each of them
        print(f"chunked-ce {parsed.command}: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def _require_extra() -> None:
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"chunked-ce needs {' and '.join(missing)} ({', '.join(_EXTRA[name] for name in missing)}): "
            "pip install 'chunked_ce[cli]'",
            file=sys.stderr,
        )
        sys.exit(1)
