"""The time of forward and backward as a multiple of the three matrix products alone.

Every round runs every implementation once and divides its time by the products' time of the same round, so that a
machine that gets slower or faster meanwhile changes both. The order turns by one from round to round.

    python -m benchmarks.ratios
    python -m benchmarks.ratios --tokens 512 --hidden 256 --vocab 8192 --dtype bf16 --repeats 3
    python -m benchmarks.ratios --tokens 512 --only forward full trl liger-scaled
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from benchmarks.report import conditions, dump, print_conditions, print_table
from chunked_ce.cli.implementations import DEVICE, DTYPES, PRODUCTS, select, train_step
from chunked_ce.cli.synthetic_inputs import LossInputs

__all__ = ["measure"]


def measure(inputs: LossInputs, names: list[str], repeats: int) -> dict[str, list[float]]:
    """The seconds of each implementation in each round, after a round to warm up."""
    seconds = {name: [] for name in names}
    for turn in range(-1, repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            train_step(name, inputs)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    arguments = _arguments()
    names, missing = select(arguments.only)
    where = conditions()
    print_conditions(where)
    sizes = {"tokens": arguments.tokens, "hidden": arguments.hidden, "vocab": arguments.vocab}
    print(*(f"{size} {name}," for name, size in sizes.items()), f"medians of {arguments.repeats} rounds")
    for name, reason in missing.items():
        print(f"left out {name}: {reason}")

    results = []
    for dtype in arguments.dtype:
        for ignored in arguments.ignored:
            inputs = LossInputs.random(*sizes.values(), DTYPES[dtype], ignored=ignored, device=DEVICE)
            seconds = measure(inputs, names, arguments.repeats)
            rows = [
                sizes | {"dtype": dtype, "ignored": ignored, "implementation": name} | _summary(own, seconds[PRODUCTS])
                for name, own in seconds.items()
            ]
            results += rows
            print()
            print_table(
                (f"{dtype}, {ignored:.0%} ignored", "seconds", "ratio", "least", "most"),
                [(row["implementation"], *(f"{row[name]:.3f}" for name in _SUMMARY)) for row in rows],
            )
            if arguments.json:
                dump({"conditions": where, "results": results}, arguments.json)


_SUMMARY = ("seconds", "ratio", "ratio_least", "ratio_most")


def _summary(seconds: list[float], products: list[float]) -> dict[str, float | int]:
    ratios = [own / theirs for own, theirs in zip(seconds, products, strict=True)]
    values = (statistics.median(seconds), statistics.median(ratios), min(ratios), max(ratios))
    return {name: round(value, 4) for name, value in zip(_SUMMARY, values, strict=True)} | {"rounds": len(ratios)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ratios", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--ignored", nargs="+", type=float, default=[0.0, 0.5], help="shares of ignored tokens")
    parser.add_argument("--only", nargs="+", metavar="KEY", help="implementations, by the keys of chunked-ce bench")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
