"""The contestants of `chunked_ce.cli.contestants`, which the installed command line has too."""

from chunked_ce.cli import contestants
from chunked_ce.cli.contestants import (
    BACKWARD,
    CONTESTANTS,
    DEEPSPEED,
    DEVICE,
    FILTERED,
    FORWARD,
    FULL,
    LOSSES,
    PRODUCTS,
    train_step,
    why_not,
)
from chunked_ce.cli.problems import Problem

__all__ = [
    "BACKWARD",
    "CONTESTANTS",
    "DEEPSPEED",
    "DEVICE",
    "DTYPES",
    "FILTERED",
    "FORWARD",
    "FULL",
    "LOSSES",
    "PRODUCTS",
    "Problem",
    "train_step",
    "why_not",
]

DTYPES = {name: contestants.DTYPES[name] for name in ("fp32", "bf16")}
