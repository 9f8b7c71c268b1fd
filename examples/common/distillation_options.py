"""The options of `distill.py`."""

import argparse
from pathlib import Path

import torch

from common.command_line import Parser
from common.comparison import WARM_UP, default_precision
from common.distillation import TAILS
from common.model import ModelConfig
from common.results import RUNS

OUT = RUNS / "distill"


def parse_arguments(description: str) -> argparse.Namespace:
    """The options, with ``teacher`` and ``student``, the configurations of the two models."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--out", type=Path, default=OUT, metavar="DIR", help="(runs/distill)")
    ranks = torch.cuda.device_count() or 2
    option("--ranks", type=int, default=ranks, metavar="N", help=f"processes, unless torchrun starts them ({ranks})")
    option("--teacher-steps", type=int, default=20, metavar="N", help="optimizer steps of the teacher (20)")
    option("--steps", type=int, default=10, metavar="N", help="of each student (10)")
    option("--beta", type=float, default=0.0, metavar="X", help="KL: 0 forward, 1 reverse, or between (0)")
    option("--top-k", type=int, default=64, metavar="K", help="likeliest words of the teacher (64)")
    option("--tail", choices=TAILS, default="bucket", help="top-K: what becomes of the other words (bucket)")
    option("--precision", choices=("bf16", "fp32"), default=default_precision())
    option("--micro-batch", type=int, default=3, metavar="N", help="sequences per rank (3)")
    option("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 text (Python's manual and sources)")
    option("--teacher-width", type=int, default=128, metavar="N", help="(128)")
    option("--student-width", type=int, default=64, metavar="N", help="(64)")
    option("--depth", type=int, default=4, metavar="N", help="of both (4)")
    option("--heads", type=int, default=4, metavar="N", help="of both (4)")
    option("--context", type=int, default=512, metavar="N", help="(512)")
    arguments = parser.parse_args()
    parser.check_least(arguments, {"ranks": 1, "teacher_steps": 1, "steps": WARM_UP + 1, "top_k": 1, "micro_batch": 1})
    if not 0 <= arguments.beta <= 1:
        parser.error(f"--beta must be in [0, 1], got {arguments.beta}")
    if arguments.top_k > ModelConfig.vocab:
        parser.error(f"--top-k must be at most {ModelConfig.vocab}, got {arguments.top_k}")
    shared = {name: getattr(arguments, name) for name in ("depth", "heads", "context")}
    for name in ("teacher", "student"):
        try:
            setattr(arguments, name, ModelConfig(width=getattr(arguments, f"{name}_width"), **shared))
        except ValueError as error:
            parser.error(f"{name}: {error}")
    return arguments
