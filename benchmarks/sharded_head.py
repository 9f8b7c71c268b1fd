"""A head that no rank ever holds, beside one that FSDP2 gathers: memory, bytes sent and time of each rank.

The ranks have different tokens, as in data parallelism. "sharded" is `VocabShard(tokens="own")`: each rank holds V / R
rows and hidden states travel. "gathered" is an `LMHead` that is a unit of FSDP2 (``fully_shard``): each rank holds
V / R rows between the steps, and all V with their gradient during the loss.

Every rank is a process with one thread. A round runs both on the same ranks, and the order turns from round to round; a
time is that of the slowest rank. Peak memory is that of a process of its own, above its hidden states: rows, gradients,
sums, logits and buffers of collectives. "head part" is the peak with chunks of 32 tokens, whose logits take little.

    python -m benchmarks.sharded_head --json benchmarks/results/sharded_head.json
    python -m benchmarks.sharded_head --tokens 256 --hidden 64 --vocab 8192 --dtype fp32 --ranks 1 2 --repeats 3
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.report import MIB, conditions, dump, print_conditions, print_table
from chunked_ce import ChunkOptions, LMHead, VocabShard, linear_cross_entropy
from chunked_ce.cli import memory
from chunked_ce.cli.counted_collectives import counted, sent_bytes
from chunked_ce.cli.implementations import DTYPES
from chunked_ce.cli.ranked import Taken, slowest
from chunked_ce.cli.worker import WARM_UP
from chunked_ce.sharded.costs import predict_sharded_memory
from tests.distributed.launch import run

__all__ = ["GATHERED", "SHARDED", "Sizes", "measure_time"]

SHARDED, GATHERED = "sharded", "gathered"
_LITTLE = 32  # tokens of a chunk whose logits take little memory


class Sizes(NamedTuple):
    """N of one rank, D, V and the dtype."""

    tokens: int
    hidden: int
    vocab: int
    dtype: str


class Step:
    """Forward and backward of a rank, gradients into fresh memory."""

    def __init__(self, name: str, sizes: Sizes, options: ChunkOptions | None = None) -> None:
        generator = torch.Generator().manual_seed(dist.get_rank())
        dtype = DTYPES[sizes.dtype]
        self._hidden = torch.randn(sizes.tokens, sizes.hidden, generator=generator).to(dtype).requires_grad_()
        self._target = torch.randint(sizes.vocab, (sizes.tokens,), generator=generator)
        self._name, self._sizes, self._options = name, sizes, options
        self._head: Tensor | LMHead | None = None

    def make_head(self) -> Step:
        """Make this rank's rows, a large part of the memory to be measured."""
        sizes, dtype = self._sizes, DTYPES[self._sizes.dtype]
        if self._name == SHARDED:
            self._vocab = VocabShard.split(sizes.vocab, tokens="own")
            rows = torch.empty(self._vocab.rows, sizes.hidden, dtype=dtype)
            self._head = rows.normal_(std=0.02).requires_grad_()
            return self
        with torch.device("meta"):
            head = LMHead(sizes.hidden, sizes.vocab, dtype=dtype, options=self._options)
        fully_shard(head, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        head.to_empty(device="cpu")
        torch.nn.init.normal_(head.weight, std=0.02)
        self._head = head
        return self

    def __call__(self) -> None:
        if self._name == SHARDED:
            keywords = {"vocab": self._vocab, "options": self._options}
            loss = linear_cross_entropy(self._hidden, self._head, self._target, **keywords)
        else:
            loss = F.cross_entropy(self._head(self._hidden), self._target)
        loss.backward()
        self._hidden.grad = None
        for parameter in [self._head] if self._name == SHARDED else self._head.parameters():
            parameter.grad = None


def measure_time(
    rank: int, world_size: int, sizes: Sizes, names: list[str], repeats: int
) -> tuple[dict[str, list[Taken]], dict[str, int]]:
    """The seconds of each in each round, and the bytes that a rank sends in one step."""
    steps = {name: Step(name, sizes).make_head() for name in names}
    seconds: dict[str, list[Taken]] = {name: [] for name in names}
    sent = {}
    for name, step in steps.items():
        step()  # to warm up
        with counted() as collectives:
            step()
            sent[name] = sent_bytes(collectives(), world_size)
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(slowest(steps[name]))
    return seconds, sent


def measure_memory(rank: int, world_size: int, sizes: Sizes, name: str, chunk: int | None) -> int:
    """This rank's peak in bytes, of its resident memory (Linux), with chunks of ``chunk`` tokens."""
    options = None if chunk is None else ChunkOptions(chunk_size=chunk)
    Step(name, Sizes(*WARM_UP, sizes.dtype), options).make_head()()
    step = Step(name, sizes, options)
    return memory.peak_of(lambda: step.make_head()(), "cpu")


def predicted(sizes: Sizes, ranks: int) -> float:
    """The memory law's peak, with the rows themselves, in MiB."""
    dtype = DTYPES[sizes.dtype]
    law = predict_sharded_memory(sizes.tokens, sizes.vocab, sizes.hidden, ranks=ranks, dtype=dtype)
    return round((law.peak + -(-sizes.vocab // ranks) * sizes.hidden * dtype.itemsize) / MIB, 1)


def results_of(sizes: Sizes, ranks: int, repeats: int) -> list[dict[str, object]]:
    names = [SHARDED, GATHERED] if ranks > 1 else [SHARDED]
    seconds, sent = run(measure_time, ranks, sizes, names, repeats, timeout=3600)[0]
    results = []
    for name in names:
        peak, head_part = (
            max(run(measure_memory, ranks, sizes, name, chunk, timeout=600)) for chunk in (None, _LITTLE)
        )
        pairs = zip(seconds[name], seconds[SHARDED], strict=True)
        ratios = [taken.wall / sharded.wall for taken, sharded in pairs]
        results.append(
            sizes._asdict()
            | {
                "implementation": name,
                "ranks": ranks,
                "seconds": round(statistics.median(taken.wall for taken in seconds[name]), 3),
                "time_to_sharded": round(statistics.median(ratios), 3),
                "least": round(min(ratios), 3),
                "most": round(max(ratios), 3),
                "sent_mib": round(sent[name] / MIB, 2),
                "peak_mib": round(peak / MIB, 1),
                "predicted_mib": predicted(sizes, ranks) if name == SHARDED else None,
                "head_part_mib": round(head_part / MIB, 1),
                "rounds": repeats,
            }
        )
    return results


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)  # as in every rank
    where = conditions()
    print_conditions(where)
    print(f"medians of {arguments.repeats} rounds, one thread per rank")
    results: list[dict[str, object]] = []
    for dtype in arguments.dtype:
        sizes = Sizes(arguments.tokens, arguments.hidden, arguments.vocab, dtype)
        rows = [row for ranks in arguments.ranks for row in results_of(sizes, ranks, arguments.repeats)]
        results += rows
        columns = list(rows[0])[len(Sizes._fields) + 1 :]
        title = f"N={sizes.tokens} per rank, D={sizes.hidden} V={sizes.vocab} {dtype}"
        print()
        print_table((title, *columns), [(row["implementation"], *(str(row[name]) for name in columns)) for row in rows])
        if arguments.json:
            dump({"conditions": where, "results": results}, arguments.json)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded_head", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024, help="of each rank")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
