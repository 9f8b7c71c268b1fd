"""Takes one training step with a whole head on each rank and with a sharded one, and compares the memory.

    python examples/sharded_head.py
    python examples/sharded_head.py --ranks 4 --width 256

Each rank has tokens of its own, as in data parallelism. With a whole head, every rank holds all rows of the weight, of
their gradient and of Adam's two moments. With a sharded head it holds its share; the hidden states travel instead, and
no rank ever has the whole weight. `LMHead.shard` does the same to a model. The ranks are processes on the CPU.
Takes some ten seconds on 2 cores.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from common.command_line import Parser, quiet_interrupt
from common.launch import run_ranks
from common.peak_memory import PeakMemory
from torch import Tensor

from chunked_ce import TokenMean, VocabShard, linear_cross_entropy

HEADS = ("whole", "sharded")
SIZES = {"ranks": 2, "vocab": 131_072, "width": 128, "tokens": 32}


def compare_heads(**sizes: int) -> list[dict[str, dict[str, float]]]:
    """For each rank and each of `HEADS`: the loss, the rows of the head held, and the peak memory in bytes.

    Takes other values of `SIZES` as keywords.
    """
    sizes = SIZES | sizes
    with tempfile.TemporaryDirectory() as folder:
        options = [f"--{name}={value}" for name, value in sizes.items()]
        status = run_ranks(Path(__file__), [*options, "--out", folder], sizes["ranks"])
        if status:
            sys.exit(f"sharded_head: a rank failed with status {status}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(sizes["ranks"])]


def run_rank(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for head in HEADS:  # the memory of first calls would count
        train_step(head, 2 * dist.get_world_size(), options.width, tokens=2)
    found = {head: train_step(head, options.vocab, options.width, options.tokens) for head in HEADS}
    (options.out / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def train_step(head: str, vocab: int, width: int, tokens: int) -> dict[str, float]:
    """A step of Adam on a head (V, D), or on this rank's rows of it, for tokens that are this rank's own.

    Adam is written out here, because torch's optimizers import its compiler, whose memory would count.
    """
    torch.manual_seed(dist.get_rank())
    hidden = torch.randn(tokens, width, requires_grad=True)
    target = torch.randint(vocab, (tokens,))
    mean = TokenMean.over(target)
    memory = PeakMemory()

    shard = VocabShard.split(vocab, tokens="own") if head == "sharded" else None
    rows = range(shard.start, shard.stop) if shard else range(vocab)
    weight = torch.nn.Parameter(torch.linspace(-0.1, 0.1, vocab)[rows.start : rows.stop, None].repeat(1, width))
    moments = torch.zeros_like(weight), torch.zeros_like(weight)
    loss_sum = linear_cross_entropy(hidden, weight, target, reduction="sum", vocab=shard)
    mean(loss_sum).backward()
    if shard is None:  # as DDP does it; the gradient of a shard's rows is complete already
        dist.all_reduce(weight.grad)
        weight.grad /= dist.get_world_size()
    adam(weight.data, weight.grad, *moments)
    return {"loss": mean.report(loss_sum).item(), "rows": len(rows), "peak": memory.bytes()}


def adam(weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, rate: float = 1e-3) -> None:
    mean.lerp_(grad, 0.1)
    square.mul_(0.95).addcmul_(grad, grad, value=0.05)
    weight.sub_(torch.sqrt(square, out=grad).add_(1e-8).reciprocal_().mul_(mean), alpha=rate)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"({default})")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)  # for the ranks
    options = parser.parse_args()
    parser.check_least(options, dict.fromkeys(SIZES, 1))
    if "RANK" in os.environ and options.out:
        run_rank(options)
        return
    for rank, heads in enumerate(compare_heads(**{name: getattr(options, name) for name in SIZES})):
        for head, step in heads.items():
            held = f"{step['rows']:7,} rows, loss {step['loss']:.6f}, the step took {step['peak'] / 2**20:4.0f} MiB"
            print(f"rank {rank}, {head:>7} head: {held} at its peak")


if __name__ == "__main__":
    with quiet_interrupt():
        main()
