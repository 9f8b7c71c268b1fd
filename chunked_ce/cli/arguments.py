"""The arguments of the three commands. A wrong one ends the command with one line that says what is allowed."""

from __future__ import annotations

from pathlib import Path

from chunked_ce import __version__
from chunked_ce.cli.argument_types import (
    DTYPE_NAMES,
    SWEPT,
    Parser,
    add_json,
    add_shape,
    integer,
    share,
    size,
    sweep,
)
from chunked_ce.cli.plan_arguments import add_plan

__all__ = ["KINDS", "parser", "size", "sweep"]

# Of losses that `chunked_ce.cli.implementations` has, which imports torch.
KINDS = ("cross-entropy", "policy", "logprobs", "statistics", "divergence", "top-k", "sharded")


def parser() -> Parser:
    """The parser of ``chunked-ce``."""
    top = Parser(prog="chunked-ce", description="Cross-entropy without the logits: plan it, measure it, check it.")
    top.add_argument("--version", action="version", version=f"chunked_ce {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="plan | bench | check", parser_class=Parser)
    add_plan(commands.add_parser("plan", help="will my run fit, and what is the smallest change that makes it fit"))
    _bench(commands.add_parser("bench", help="time, memory and errors on this machine, beside the peers"))
    _check(commands.add_parser("check", help="does it compute the right thing here, in under a minute"))
    return top


def _bench(to: Parser) -> None:
    to.description = "Forward and backward of every implementation in a process of its own: time, memory and errors."
    add_shape(to)
    loss_help = f"{', '.join(KINDS)}: beside full logits; {KINDS[-1]} is the cross-entropy on --ranks"
    to.add_argument("--loss", choices=KINDS, default=KINDS[0], help=loss_help)
    ranks_help = "processes that share the head, with --loss sharded (2): gloo, or NCCL with a GPU for each"
    to.add_argument("--ranks", type=integer(1), metavar="R", help=ranks_help)
    to.add_argument("--dtype", choices=DTYPE_NAMES, nargs="+", help="fp32 and bf16 on a CPU, else bf16")
    to.add_argument("--sweep", type=sweep, metavar="NAME=A,B", help=f"one of {', '.join(SWEPT)}: vocab=32768,65536")
    to.add_argument("--chunk", type=integer(1), metavar="C", help="tokens in a chunk, where this can be set")
    to.add_argument("--ignored", type=share, default=0.0, help="share of tokens that do not count")
    data = ("random", "trained")
    to.add_argument("--data", choices=data, default="random", help="trained: a softmax as sharp as a trained model's")
    to.add_argument("--tensors", type=Path, metavar="FILE", help="a torch file of a dict: hidden, weight and target")
    to.add_argument(
        "--only", nargs="+", metavar="KEY", help="implementations by key, such as forward full; a wrong one lists all"
    )
    to.add_argument("--rounds", type=integer(1), default=5, help="rounds that count (5)")
    to.add_argument("--timeout", type=integer(1), default=900, metavar="SECONDS", help="per implementation and shape")
    to.add_argument("--memory-limit", type=size, metavar="SIZE", help="more than this is out of memory")
    to.add_argument("--no-errors", action="store_true", help="skip the float64 reference, which costs one more step")
    to.add_argument("--plot", type=Path, metavar="FILE.png", help="memory and time; also .svg or .pdf")
    to.add_argument("--html", type=Path, metavar="FILE", help="a report in one file")
    files = ("OLD", "NEW")
    to.add_argument("--compare", nargs=2, type=Path, metavar=files, help="measure nothing: compare two JSON files")
    add_json(to)


def _check(to: Parser) -> None:
    to.description = "Every option, gradients in forward and backward, against float64. Exit code 1 if one is wrong."
    to.add_argument("--device", choices=("cuda", "cpu"), nargs="+", help="all devices of this machine by default")
    to.add_argument("--no-processes", action="store_true", help="leave out the checks that need other processes")
    add_json(to)
