"""The arguments of ``chunked-ce plan``."""

from __future__ import annotations

from pathlib import Path

from chunked_ce.cli.argument_types import (
    DTYPE_NAMES,
    Parser,
    add_json,
    add_shape,
    integer,
    memory_size,
    model_name,
    share,
    size,
)

__all__ = ["add_plan"]

TRAINERS = ("plain", "sft", "dpo", "grpo", "distill")
OPTIMIZERS = ("adamw", "adamw-8bit", "adafactor", "muon", "sgd", "none")
ENGINES = ("none", "ddp", "zero1", "zero2", "zero3", "fsdp")
PRECISIONS = ("mixed", "autocast", "pure")
CHECKPOINTING = ("none", "selective", "full")
PATHS = ("auto", "full", "compiled", "forward", "backward", "filtered", "sharded")


def add_plan(to: Parser) -> None:
    """Model, tokens, training, ranks, memory, and the loss."""
    to.description = (
        "Whether a training step fits into the memory of each rank, which path of the loss to take, the longest "
        "sequence, and the smallest change that makes it fit. Runs nothing. Exit code: 0 if it fits, 1 if not, 2 for "
        "wrong arguments."
    )
    add_shape(to)
    model = to.add_argument_group("model, instead of --model or --config, or in place of some of its sizes")
    model.add_argument("--layers", type=integer(1), metavar="L", help="layers; without, the plan is of head and loss")
    model.add_argument("--heads", type=integer(1), metavar="H", help="attention heads (hidden size / 128)")
    model.add_argument("--kv-heads", type=integer(1), metavar="H", help="heads of keys and values (as many)")
    model.add_argument("--intermediate", type=integer(1), metavar="I", help="width of the MLP (3.5 hidden sizes)")
    model.add_argument("--tied", action="store_true", help="the head is the embedding")

    run = to.add_argument_group("training")
    run.add_argument("--trainer", choices=TRAINERS, help=f"{', '.join(TRAINERS)} (sft; with a teacher distill)")
    run.add_argument(
        "--sequence-length", type=integer(1), metavar="S", help="tokens of a sequence (--tokens / --batch)"
    )
    run.add_argument("--batch", type=integer(1), metavar="B", help="sequences, or pairs of them, in a micro-batch (1)")
    run.add_argument("--accumulation", type=integer(1), default=1, metavar="STEPS", help="micro-batches per step (1)")
    run.add_argument("--ignored", type=share, default=0.0, help="share of tokens that do not count, as of prompts (0)")
    run.add_argument("--dtype", choices=DTYPE_NAMES, default="bf16", help="of weights, activations, products (bf16)")
    run.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="mixed",
        help="mixed: fp32 master weights; autocast: fp32 weights alone; pure: all in --dtype (mixed)",
    )
    run.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help=f"{', '.join(OPTIMIZERS)} (adamw)")
    run.add_argument("--checkpointing", choices=CHECKPOINTING, default="none", help="of activations (none)")
    run.add_argument("--lora", type=integer(0), default=0, metavar="R", help="rank of LoRA on all linear layers")
    run.add_argument("--reference-model", type=model_name, metavar="NAME", help="for dpo and grpo (the trained model)")
    run.add_argument("--teacher-model", type=model_name, metavar="NAME", help="for distill")
    run.add_argument("--teacher-hidden", type=integer(1), metavar="D", help="hidden size of a teacher elsewhere")

    ranks = to.add_argument_group("ranks")
    ranks.add_argument("--gpus", type=integer(1), metavar="R", help="ranks in all (dp * tp * pp * sp)")
    ranks.add_argument("--engine", choices=ENGINES, help=f"{', '.join(ENGINES)} (none; ddp on several ranks)")
    ranks.add_argument("--zero", type=int, choices=range(4), help="ZeRO stage: --engine zeroN; 0 is none or ddp")
    ranks.add_argument("--dp", type=integer(1), metavar="R", help="data-parallel ranks (what --gpus leaves, or 1)")
    ranks.add_argument(
        "--tp", type=integer(1), nargs="+", metavar="R", help="tensor-parallel sizes: the first that fits"
    )
    ranks.add_argument("--pp", type=integer(1), default=1, metavar="R", help="pipeline stages")
    ranks.add_argument(
        "--sp", type=integer(1), default=1, metavar="R", help="sequence-parallel ranks, N / R tokens each"
    )

    device = to.add_argument_group("memory")
    device.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where it would run (cuda)")
    device.add_argument("--memory", type=memory_size, metavar="SIZE", help="of the device, such as 80GiB")
    device.add_argument("--budget", type=size, metavar="SIZE", help="for the loss alone, instead of --memory")
    device.add_argument("--other", type=size, default=0, metavar="SIZE", help="that something else takes")

    loss = to.add_argument_group("loss")
    loss.add_argument("--loss", choices=PATHS, default="auto", help="its path (auto: the fastest exact one that fits)")
    loss.add_argument("--chunk", type=integer(1), metavar="C", help="tokens in a chunk, instead of the plan's choice")
    loss.add_argument("--frozen-head", action="store_true", help="the head needs no gradient")
    loss.add_argument("--frozen-input", action="store_true", help="the hidden states need no gradient")
    loss.add_argument("--ids", type=integer(0), default=0, metavar="K", help="ids per token, as of a top-k teacher")
    loss.add_argument(
        "--adapter", type=integer(0), default=0, metavar="R", help="rank of a low-rank adapter on the head"
    )

    to.add_argument("--html", type=Path, metavar="FILE", help="a calculator in one file: sliders that move the bars")
    to.add_argument("--verify", action="store_true", help="measure the loss and a small model's step on this machine")
    to.add_argument("--details", action="store_true", help="the loss term by term, operations and traffic")
    add_json(to)
