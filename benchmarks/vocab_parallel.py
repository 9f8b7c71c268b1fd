"""The head sharded over ranks: time, collectives and memory of each rank, beside DeepSpeed's function and one rank.

Every rank is a process with one thread. A round runs every implementation once, on the same ranks, and the order turns
by one from round to round. A time is that of the slowest rank, divided by the time of one rank in the same round. Peak
memory is that of a process of its own, above its hidden states: the shard of the head, its gradient, the gradient of
the hidden states, and the memory that the loss works with.

    python -m benchmarks.vocab_parallel --json benchmarks/results/vocab_parallel.json
    python -m benchmarks.vocab_parallel --tokens 256 --hidden 128 --vocab 8192 --dtype fp32 --repeats 3
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.report import MIB, conditions, dump, print_conditions, print_table
from chunked_ce import VocabShard, linear_cross_entropy
from chunked_ce.cli import memory
from chunked_ce.cli.counted_collectives import counted
from chunked_ce.cli.implementations import DEEPSPEED, DTYPES, FORWARD, why_not
from chunked_ce.cli.ranked import Taken, slowest
from chunked_ce.cli.worker import WARM_UP
from tests.distributed.launch import run

__all__ = ["Sizes", "measure_memory", "measure_time"]

ALONE = f"{FORWARD}, 1 rank"


class Sizes(NamedTuple):
    """N, D, V and the dtype."""

    tokens: int
    hidden: int
    vocab: int
    dtype: str


class RankInputs(NamedTuple):
    """The tensors of one rank."""

    hidden: Tensor  # (N, D)
    head: Tensor  # (V_r, D)
    target: Tensor  # (N,)
    vocab: VocabShard | None


def tokens_of(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Hidden states and targets, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sizes.tokens, sizes.hidden, generator=generator).to(DTYPES[sizes.dtype])
    return hidden.requires_grad_(), torch.randint(sizes.vocab, (sizes.tokens,), generator=generator)


def head_of(sizes: Sizes, rows: int) -> Tensor:
    head = torch.empty(rows, sizes.hidden, dtype=DTYPES[sizes.dtype])
    return head.normal_(std=0.02).requires_grad_()


def inputs_of(name: str, sizes: Sizes, tokens: tuple[Tensor, Tensor]) -> RankInputs | None:
    """None for a rank that has nothing to do."""
    hidden, target = tokens
    if name == ALONE:
        return RankInputs(hidden, head_of(sizes, sizes.vocab), target, None) if dist.get_rank() == 0 else None
    vocab = VocabShard.split(sizes.vocab)
    return RankInputs(hidden, head_of(sizes, vocab.rows), target, vocab)


def step(name: str, inputs: RankInputs | None) -> None:
    """Forward and backward, gradients into fresh memory."""
    if inputs is None:
        return
    if name == DEEPSPEED:
        from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy

        loss = vocab_parallel_linear_cross_entropy(
            inputs.hidden,
            inputs.head,
            inputs.target,
            tp_group=inputs.vocab.group,
            vocab_start_index=inputs.vocab.start,
            vocab_end_index=inputs.vocab.stop,
        )
    else:
        loss = linear_cross_entropy(inputs.hidden, inputs.head, inputs.target, vocab=inputs.vocab)
    loss.backward()
    inputs.hidden.grad = inputs.head.grad = None


def start(names: list[str]) -> None:
    if DEEPSPEED in names:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for a minute
        deepspeed.init_distributed(dist_backend="gloo")


def measure_time(
    rank: int, world_size: int, sizes: Sizes, names: list[str], repeats: int
) -> tuple[dict[str, list[Taken]], dict[str, tuple[int, int]]]:
    """The seconds of each implementation in each round, and the number and bytes of the collectives of one step."""
    start(names)
    tokens = tokens_of(sizes)
    inputs = {name: inputs_of(name, sizes, tokens) for name in names}
    seconds, sent = {name: [] for name in names}, {}
    for name in names:  # to warm up
        with counted() as collectives:
            step(name, inputs[name])
            sent[name] = len(collectives()), sum(collective.bytes for collective in collectives())
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(slowest(lambda name=name: step(name, inputs[name])))
    return seconds, sent


def measure_memory(rank: int, world_size: int, sizes: Sizes, name: str) -> int:
    """This rank's peak in bytes, of its resident memory (Linux)."""
    start([name])
    small = Sizes(*WARM_UP, sizes.dtype)
    step(name, inputs_of(name, small, tokens_of(small)))
    tokens = tokens_of(sizes)
    return memory.peak_of(lambda: step(name, inputs_of(name, sizes, tokens)), "cpu")


def results_of(sizes: Sizes, names: list[str], ranks: int, repeats: int) -> list[dict[str, object]]:
    seconds, sent = run(measure_time, ranks, sizes, names, repeats, timeout=3600)[0]
    ranks_of = {name: 1 if name == ALONE else ranks for name in names}
    peaks = {name: max(run(measure_memory, ranks_of[name], sizes, name, timeout=600)) for name in names}
    results = []
    for name, taken in seconds.items():
        ratios = [own.wall / alone.wall for own, alone in zip(taken, seconds[ALONE], strict=True)]
        worked = [own.processor / alone.processor for own, alone in zip(taken, seconds[ALONE], strict=True)]
        number, size = sent[name]
        results.append(
            sizes._asdict()
            | {
                "implementation": name,
                "ranks": ranks_of[name],
                "seconds": round(statistics.median(own.wall for own in taken), 4),
                "time_to_1_rank": round(statistics.median(ratios), 3),
                "least": round(min(ratios), 3),
                "most": round(max(ratios), 3),
                "processor_time_to_1_rank": round(statistics.median(worked), 3),
                "collectives": number,
                "put_in_mib": round(size / MIB, 2),
                "peak_mib": round(peaks[name] / MIB, 1),
                "peak_to_1_rank": round(peaks[name] / peaks[ALONE], 3),
                "rounds": repeats,
            }
        )
    return results


def main() -> None:
    arguments = _arguments()
    reason = why_not(DEEPSPEED)
    names = [FORWARD, *[DEEPSPEED] * (reason is None), ALONE]
    torch.set_num_threads(1)  # as in every rank
    where = conditions()
    print_conditions(where)
    print(f"medians of {arguments.repeats} rounds, one thread per rank")
    if reason:
        print(f"left out {DEEPSPEED}: {reason}")
    results = []
    for dtype in arguments.dtype:
        sizes = Sizes(arguments.tokens, arguments.hidden, arguments.vocab, dtype)
        rows = results_of(sizes, names, arguments.ranks, arguments.repeats)
        results += rows
        print()
        columns = list(rows[0])[len(Sizes._fields) + 1 :]
        title = f"N={sizes.tokens} D={sizes.hidden} V={sizes.vocab} {dtype}"
        print_table((title, *columns), [(row["implementation"], *(str(row[name]) for name in columns)) for row in rows])
        if arguments.json:
            dump({"conditions": where, "results": results}, arguments.json)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vocab_parallel", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
