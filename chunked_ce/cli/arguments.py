"""The arguments of the three commands. A wrong one ends the command with one line that says what is allowed."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from chunked_ce.cli.heads import HEADS
from chunked_ce.cli.implementations import DTYPES, KINDS

__all__ = ["parser", "size", "sweep"]

SWEPT = ("tokens", "hidden", "vocab", "chunk")
_UNITS = {"": 1} | {
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
    return int(float(match[1]) * _UNITS[match[2]])


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


def parser() -> Parser:
    """The parser of ``chunked-ce``."""
    top = Parser(prog="chunked-ce", description="Cross-entropy without the logits: plan it, measure it, check it.")
    commands = top.add_subparsers(dest="command", required=True, metavar="plan | bench | check", parser_class=Parser)
    _plan(commands.add_parser("plan", help="will it fit: memory, operations and communication, without running"))
    _bench(commands.add_parser("bench", help="time, memory and errors on this machine, beside the peers"))
    _check(commands.add_parser("check", help="does it compute the right thing here, in under a minute"))
    return top


def _json(to: Parser) -> None:
    to.add_argument("--json", nargs="?", const="-", metavar="FILE", help="as JSON into FILE, or onto the output")


def _shape(to: Parser) -> None:
    to.add_argument("--tokens", type=integer(1), metavar="N", help="tokens in one call of the loss")
    to.add_argument("--hidden", type=integer(1), metavar="D", help="hidden size")
    to.add_argument("--vocab", type=integer(1), metavar="V", help="vocabulary entries")
    to.add_argument("--model", choices=HEADS, metavar="NAME", help=f"a known head: {', '.join(HEADS)}")
    to.add_argument("--config", type=Path, metavar="FILE", help="a Transformers config.json, for D and V")


def _plan(to: Parser) -> None:
    to.description = "Peak memory per rank term by term, operations, communication, and what fits. Runs nothing."
    _shape(to)
    to.add_argument("--dtype", choices=DTYPES, default="bf16", help="of hidden states, head and products (bf16)")
    to.add_argument("--frozen-head", action="store_true", help="the head needs no gradient")
    to.add_argument("--frozen-input", action="store_true", help="the hidden states need no gradient")
    to.add_argument("--tp", type=integer(1), nargs="+", default=[1, 2, 4, 8], metavar="R", help="tensor-parallel sizes")
    to.add_argument("--dp", type=integer(1), default=1, metavar="R", help="data-parallel ranks")
    to.add_argument("--sp", type=integer(1), default=1, metavar="R", help="sequence-parallel ranks, N / R tokens each")
    to.add_argument("--zero", type=int, choices=range(4), default=0, help="ZeRO stage")
    to.add_argument("--accumulation", type=integer(1), default=1, metavar="STEPS", help="micro-batches per step")
    to.add_argument("--chunk", type=integer(1), metavar="C", help="tokens in a chunk, instead of the plan's choice")
    to.add_argument("--teacher-hidden", type=integer(1), metavar="D", help="hidden size of a teacher, to distil from")
    to.add_argument("--ids", type=integer(0), default=0, metavar="K", help="ids per token, as of a top-k teacher")
    to.add_argument("--adapter", type=integer(0), default=0, metavar="R", help="rank of a low-rank adapter on the head")
    to.add_argument("--memory", type=size, metavar="SIZE", help="memory of the device, such as 80GiB")
    to.add_argument("--other", type=size, default=0, metavar="SIZE", help="memory that the rest of the model takes")
    to.add_argument("--budget", type=size, metavar="SIZE", help="memory for the loss alone, instead of --memory")
    to.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where it would run (cuda)")
    _json(to)


def _bench(to: Parser) -> None:
    to.description = "Forward and backward of every implementation in a process of its own: time, memory and errors."
    _shape(to)
    to.add_argument("--loss", choices=KINDS, default=KINDS[0], help=f"{', '.join(KINDS)}: beside full logits")
    to.add_argument("--dtype", choices=DTYPES, nargs="+", help="fp32 and bf16 on a CPU, else bf16")
    to.add_argument("--sweep", type=sweep, metavar="NAME=A,B", help=f"one of {', '.join(SWEPT)}: vocab=32768,65536")
    to.add_argument("--chunk", type=integer(1), metavar="C", help="tokens in a chunk, where this can be set")
    to.add_argument("--ignored", type=share, default=0.0, help="share of tokens that do not count")
    data = ("random", "trained")
    to.add_argument("--data", choices=data, default="random", help="trained: a softmax as sharp as a trained model's")
    to.add_argument("--tensors", type=Path, metavar="FILE", help="a torch file of a dict: hidden, weight and target")
    to.add_argument("--only", nargs="+", metavar="KEY", help="implementations, by the keys that the table shows")
    to.add_argument("--rounds", type=integer(1), default=5, help="rounds that count (5)")
    to.add_argument("--timeout", type=integer(1), default=900, metavar="SECONDS", help="per implementation and shape")
    to.add_argument("--memory-limit", type=size, metavar="SIZE", help="more than this is out of memory")
    to.add_argument("--no-errors", action="store_true", help="skip the float64 reference, which costs one more step")
    to.add_argument("--plot", type=Path, metavar="FILE.png", help="memory and time; also .svg or .pdf")
    to.add_argument("--html", type=Path, metavar="FILE", help="a report in one file")
    _json(to)


def _check(to: Parser) -> None:
    to.description = "Every option, gradients in forward and backward, against float64. Exit code 1 if one is wrong."
    to.add_argument("--device", choices=("cuda", "cpu"), nargs="+", help="all devices of this machine by default")
    to.add_argument("--no-processes", action="store_true", help="leave out the checks that need other processes")
    _json(to)
