"""The head sharded over ranks: time, collectives and memory of each rank, beside DeepSpeed's function and one rank.

Every rank is a process with one thread. A round runs every contestant once, on the same ranks, and the order turns by
one from round to round; a time is that of the slowest rank, and is divided by the time of one rank in the same round.
Peak memory is that of a process of its own, above its hidden states: the shard of the head, its gradient, that of the
hidden states, and all that the loss works with.

    python -m benchmarks.vocab_parallel --json benchmarks/results/vocab_parallel.json
    python -m benchmarks.vocab_parallel --tokens 256 --hidden 128 --vocab 8192 --dtype fp32 --repeats 3
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.contestants import DEEPSPEED, DTYPES, FORWARD, why_not
from benchmarks.report import MIB, conditions, print_conditions, print_table, write
from chunked_ce import VocabShard, linear_cross_entropy
from tests.distributed.counting import counted
from tests.distributed.launch import run

__all__ = ["Sizes", "measure_memory", "measure_time"]

ALONE = f"{FORWARD}, 1 rank"


class Sizes(NamedTuple):
    """One problem."""

    tokens: int
    hidden: int
    vocab: int
    dtype: str


class Part(NamedTuple):
    """What one rank holds of it."""

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


def part_of(contestant: str, sizes: Sizes, tokens: tuple[Tensor, Tensor]) -> Part | None:
    """None for a rank that has nothing to do."""
    hidden, target = tokens
    if contestant == ALONE:
        return Part(hidden, head_of(sizes, sizes.vocab), target, None) if dist.get_rank() == 0 else None
    vocab = VocabShard.split(sizes.vocab)
    return Part(hidden, head_of(sizes, vocab.rows), target, vocab)


def step(contestant: str, part: Part | None) -> None:
    """Forward and backward, gradients into fresh memory."""
    if part is None:
        return
    if contestant == DEEPSPEED:
        from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy

        loss = vocab_parallel_linear_cross_entropy(
            part.hidden,
            part.head,
            part.target,
            tp_group=part.vocab.group,
            vocab_start_index=part.vocab.start,
            vocab_end_index=part.vocab.stop,
        )
    else:
        loss = linear_cross_entropy(part.hidden, part.head, part.target, vocab=part.vocab)
    loss.backward()
    part.hidden.grad = part.head.grad = None


def start(contestants: list[str]) -> None:
    if DEEPSPEED in contestants:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for a minute
        deepspeed.init_distributed(dist_backend="gloo")


class Taken(NamedTuple):
    """Seconds of the slowest rank."""

    wall: float
    processor: float  # what it worked, whoever else was on the machine


def slowest(function: Callable[[], None]) -> Taken:
    dist.barrier()
    begin = time.perf_counter(), time.process_time()
    function()
    seconds = torch.tensor([time.perf_counter() - begin[0], time.process_time() - begin[1]], dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return Taken(*seconds.tolist())


def measure_time(
    rank: int, world_size: int, sizes: Sizes, contestants: list[str], repeats: int
) -> tuple[dict[str, list[Taken]], dict[str, tuple[int, int]]]:
    """The seconds of each contestant in each round, and the number and bytes of the collectives of one step."""
    start(contestants)
    tokens = tokens_of(sizes)
    parts = {contestant: part_of(contestant, sizes, tokens) for contestant in contestants}
    seconds, sent = {contestant: [] for contestant in contestants}, {}
    for contestant, part in parts.items():  # to warm up
        with counted() as collectives:
            step(contestant, part)
            sent[contestant] = len(collectives()), sum(collective.bytes for collective in collectives())
    for turn in range(repeats):
        at = turn % len(contestants)
        for contestant in contestants[at:] + contestants[:at]:
            taken = slowest(lambda name=contestant: step(name, parts[name]))
            seconds[contestant].append(taken)
    return seconds, sent


def measure_memory(rank: int, world_size: int, sizes: Sizes, contestant: str) -> int:
    """This rank's peak in bytes, of its resident memory (Linux)."""
    start([contestant])
    small = Sizes(64, 64, 4100, sizes.dtype)
    step(contestant, part_of(contestant, small, tokens_of(small)))
    tokens = tokens_of(sizes)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or the step would use free pages unseen
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    step(contestant, part_of(contestant, sizes, tokens))
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def results_of(sizes: Sizes, contestants: list[str], ranks: int, repeats: int) -> list[dict[str, object]]:
    seconds, sent = run(measure_time, ranks, sizes, contestants, repeats, timeout=3600)[0]
    peaks = {
        contestant: max(run(measure_memory, 1 if contestant == ALONE else ranks, sizes, contestant, timeout=600))
        for contestant in contestants
    }
    found = []
    for contestant, taken in seconds.items():
        ratios = [own.wall / alone.wall for own, alone in zip(taken, seconds[ALONE], strict=True)]
        worked = [own.processor / alone.processor for own, alone in zip(taken, seconds[ALONE], strict=True)]
        number, size = sent[contestant]
        found.append(
            sizes._asdict()
            | {
                "contestant": contestant,
                "ranks": 1 if contestant == ALONE else ranks,
                "seconds": round(statistics.median(own.wall for own in taken), 4),
                "time_to_1_rank": round(statistics.median(ratios), 3),
                "least": round(min(ratios), 3),
                "most": round(max(ratios), 3),
                "processor_time_to_1_rank": round(statistics.median(worked), 3),
                "collectives": number,
                "put_in_mib": round(size / MIB, 2),
                "peak_mib": round(peaks[contestant] / MIB, 1),
                "peak_to_1_rank": round(peaks[contestant] / peaks[ALONE], 3),
                "rounds": repeats,
            }
        )
    return found


def main() -> None:
    arguments = _arguments()
    contestants = [FORWARD, ALONE]
    reason = why_not(DEEPSPEED)
    if reason is None:
        contestants.insert(1, DEEPSPEED)
    torch.set_num_threads(1)  # as in every rank
    where = conditions()
    print_conditions(where)
    print(f"medians of {arguments.repeats} rounds, one thread per rank")
    if reason:
        print(f"left out {DEEPSPEED}: {reason}")
    results = []
    for dtype in arguments.dtype:
        sizes = Sizes(arguments.tokens, arguments.hidden, arguments.vocab, dtype)
        found = results_of(sizes, contestants, arguments.ranks, arguments.repeats)
        results += found
        print()
        columns = list(found[0])[len(Sizes._fields) + 1 :]
        title = f"N={sizes.tokens} D={sizes.hidden} V={sizes.vocab} {dtype}"
        print_table((title, *columns), [(r["contestant"], *(str(r[name]) for name in columns)) for r in found])
        if arguments.json:
            write(arguments.json, where, results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vocab_parallel", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--json", type=Path, help="where to write the results too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
