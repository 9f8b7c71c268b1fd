"""How much a busy machine slows each implementation: another process multiplies matrices on all cores meanwhile.

Forward and backward are timed alone and then beside that process, which takes about half of each core: work takes
about twice as long. Work that is divided into many small parallel regions waits at the end of each for a core that is
taken, and is slowed more.

    python -m benchmarks.busy
    python -m benchmarks.busy --tokens 1024 --hidden 256 --vocab 32768 --dtype bf16 --seconds 60
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.report import conditions, dump, print_conditions, print_table
from chunked_ce.cli.implementations import BACKWARD, DTYPES, FORWARD, FULL, PRODUCTS, train_step
from chunked_ce.cli.synthetic_inputs import LossInputs

__all__ = ["busy_machine", "measure"]

_NAMES = (PRODUCTS, FULL, FORWARD, BACKWARD)
_SIZE = 1024  # of the other process's matrices


@contextlib.contextmanager
def busy_machine() -> Iterator[None]:
    """Another process multiplies matrices, on as many threads as this one computes on."""
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=_multiply, args=(torch.get_num_threads(), started), daemon=True)
    process.start()
    try:
        started.wait()
        yield
    finally:
        process.kill()
        process.join()


def _multiply(threads: int, started: multiprocessing.synchronize.Event) -> None:
    torch.set_num_threads(threads)
    left, right = torch.rand(_SIZE, _SIZE), torch.rand(_SIZE, _SIZE)
    product = left @ right
    started.set()
    while True:
        torch.mm(left, right, out=product)


def measure(inputs: LossInputs, repeats: int, seconds: float) -> dict[str, list[float]]:
    """The seconds of each implementation in up to ``repeats`` rounds; after ``seconds``, only the first is finished."""
    times: dict[str, list[float]] = {name: [] for name in _NAMES}
    end = time.perf_counter() + seconds
    for turn, name in itertools.product(range(repeats), _NAMES):
        start = time.perf_counter()
        if turn and start > end:
            break
        train_step(name, inputs)
        times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    arguments = _arguments()
    where = conditions()
    print_conditions(where)
    sizes = {"tokens": arguments.tokens, "hidden": arguments.hidden, "vocab": arguments.vocab}
    print(*(f"{size} {name}," for name, size in sizes.items()), f"medians of up to {arguments.repeats} rounds")
    share = arguments.seconds / (2 * len(arguments.dtype))
    results = []
    for dtype in arguments.dtype:
        inputs = LossInputs.random(*sizes.values(), DTYPES[dtype])
        for name in _NAMES:
            train_step(name, inputs)  # warms up
        alone = measure(inputs, arguments.repeats, share)
        with busy_machine():
            busy = measure(inputs, arguments.repeats, share)
        rows = [sizes | {"dtype": dtype, "implementation": name} | _summary(alone, busy, name) for name in _NAMES]
        results += rows
        print()
        print_table(
            (dtype, "alone", "busy", "slowing", "to plain's"),
            [(row["implementation"], *(f"{row[name]:.2f}" for name in _SUMMARY)) for row in rows],
        )
        if arguments.json:
            dump({"conditions": where, "results": results}, arguments.json)


_SUMMARY = ("alone", "busy", "slowing", "slowing_to_plain")


def _summary(alone: dict[str, list[float]], busy: dict[str, list[float]], name: str) -> dict[str, float | int]:
    """Medians in seconds, their ratio, and this as a multiple of the ratio of full logits."""
    slowing, plain = (statistics.median(busy[one]) / statistics.median(alone[one]) for one in (name, FULL))
    values = statistics.median(alone[name]), statistics.median(busy[name]), slowing, slowing / plain
    summary = {key: round(value, 4) for key, value in zip(_SUMMARY, values, strict=True)}
    return summary | {"rounds": len(busy[name])}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.busy", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=5, help="the most rounds, alone and beside the other process")
    parser.add_argument("--seconds", type=float, default=100, help="after which no further round starts")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
