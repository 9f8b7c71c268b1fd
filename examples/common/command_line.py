"""How the examples refuse bad input: with one line on stderr and status 2."""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn


def stop(message: object) -> NoReturn:
    """Ends this process with one line on stderr and status 2.

    If one rank refuses the settings, the other ranks on the machine refuse them too. They leave the line to
    the first rank, whose end makes the launcher end them; they print it themselves only if they live on.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(10)
    print(f"{Path(sys.argv[0]).stem}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        stop(f"{message} (--help lists the options)")

    def check_least(self, arguments: argparse.Namespace, least: dict[str, int]) -> None:
        """Refuses a number that is smaller than the least one allowed."""
        for name, minimum in least.items():
            value = getattr(arguments, name)
            if value is not None and value < minimum:
                self.error(f"--{name.replace('_', '-')} must be at least {minimum}, got {value}")

    def check_rotary(self, arguments: argparse.Namespace) -> None:
        """Refuses a Llama's width whose share for each head cannot be halved, as rotary embedding does."""
        if arguments.width % (2 * arguments.heads):
            self.error(f"--width must be a multiple of twice --heads, got {arguments.width} and {arguments.heads}")


@contextlib.contextmanager
def quiet_interrupt() -> Iterator[None]:
    """Ends the process after Ctrl-C with one line and status 130, instead of a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).stem}: interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


@contextlib.contextmanager
def refused_input() -> Iterator[None]:
    """Stops at an `OSError` or a `ValueError`, whose message then is the line."""
    try:
        yield
    except OSError as error:
        stop(f"{error.filename}: {error.strerror}")
    except ValueError as error:
        stop(error)


def read_config(path: Path) -> dict:
    """A DeepSpeed configuration. Raises `OSError`, or `ValueError` if the file holds no JSON object."""
    try:
        config = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config
