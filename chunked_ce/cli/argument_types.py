"""What arguments may be: integers, sizes, shares and sweeps, and errors of one line."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from chunked_ce.cli.model_shapes import MODELS

__all__ = [
    "DTYPE_NAMES",
    "Parser",
    "add_json",
    "add_shape",
    "integer",
    "memory_size",
    "model_name",
    "share",
    "size",
    "sweep",
]

DTYPE_NAMES = ("fp32", "bf16", "fp16")
SWEPT = ("tokens", "hidden", "vocab", "chunk")
_LEAST_MEMORY = 2**20
_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for unit, base in (("", 1024), ("b", 1000), ("ib", 1024))
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def integer(least: int) -> Callable[[str], int]:
    """The parser of an integer of at least ``least``."""

    def parse(text: str) -> int:
        try:
            value = int(text.replace("_", ""))
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be an integer >= {least}, was {text!r}")
        return value

    return parse


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1), was {text!r}")
    return value


def size(text: str) -> int:
    """Bytes from ``"80GiB"``, ``"24 GB"`` or ``"512M"``; G, M and K alone are powers of 1024.

    >>> size("2GiB") == size("2G") == 2 * 2**30, size("24GB")
    (True, 24000000000)
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"must be a size such as 80GiB, 24GB or 512MiB, was {text!r}")
    if not match[2] and float(match[1]) < _LEAST_MEMORY:
        raise argparse.ArgumentTypeError(f"{text} bytes? Write {text}GiB, or {text}B for as few")
    return int(float(match[1]) * _UNITS[match[2]])


def memory_size(text: str) -> int:
    """`size` of a device's memory: at least 1 MiB."""
    found = size(text)
    if found < _LEAST_MEMORY:
        raise argparse.ArgumentTypeError(f"must be at least 1MiB, was {text!r}")
    return found


def sweep(text: str) -> tuple[str, list[int]]:
    """``"tokens=1024,2048"`` as a name and its values.

    >>> sweep("vocab=32768,65536")
    ('vocab', [32768, 65536])
    """
    name, _, values = text.partition("=")
    numbers = values.split(",")
    if name not in SWEPT or not all(re.fullmatch(r"[1-9][0-9]*", number) for number in numbers):
        raise argparse.ArgumentTypeError(
            f"must be one of {', '.join(SWEPT)} with integers >= 1, such as tokens=1024,2048, was {text!r}"
        )
    return name, [int(number) for number in numbers]


def model_name(text: str) -> str:
    """The name of a known model.

    >>> model_name("llama3-8b")
    Traceback (most recent call last):
        ...
    argparse.ArgumentTypeError: must be a known model, such as llama-3-8b, was 'llama3-8b'; ...
    """
    if text not in MODELS:
        near = difflib.get_close_matches(text.lower(), MODELS, n=1) or list(MODELS)
        raise argparse.ArgumentTypeError(
            f"must be a known model, such as {near[0]}, was {text!r}; --help lists them, --config takes "
            "any other's config.json"
        )
    return text


def add_json(to: Parser) -> None:
    to.add_argument("--json", nargs="?", const="-", metavar="FILE", help="as JSON into FILE, or onto the output")


def add_shape(to: Parser) -> None:
    to.add_argument("--tokens", type=integer(1), metavar="N", help="tokens in one call of the loss (plan: 8192)")
    to.add_argument("--hidden", type=integer(1), metavar="D", help="hidden size")
    to.add_argument("--vocab", type=integer(1), metavar="V", help="vocabulary entries")
    to.add_argument("--model", type=model_name, metavar="NAME", help=f"a known model: {', '.join(MODELS)}")
    to.add_argument("--config", type=Path, metavar="FILE", help="a Transformers config.json")
