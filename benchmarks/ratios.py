"""The time of forward and backward as a multiple of the three matrix products alone.

Every round runs every contestant once, and a contestant's time is divided by the products' time of the same round, so
that a machine that gets slower or faster meanwhile changes both. The order turns by one from round to round.

    python -m benchmarks.ratios
    python -m benchmarks.ratios --tokens 512 --hidden 256 --vocab 8192 --dtype bf16 --repeats 3
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from benchmarks.contestants import CONTESTANTS, DEVICE, DTYPES, PRODUCTS, Problem, train_step, why_not
from benchmarks.report import conditions, print_conditions, print_table, write

__all__ = ["measure"]


def measure(problem: Problem, contestants: list[str], repeats: int) -> dict[str, list[float]]:
    """The seconds of each contestant in each round, after a round to warm up."""
    seconds = {contestant: [] for contestant in contestants}
    for turn in range(-1, repeats):
        at = turn % len(contestants)
        for contestant in contestants[at:] + contestants[:at]:
            start = time.perf_counter()
            train_step(contestant, problem)
            if turn >= 0:
                seconds[contestant].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    arguments = _arguments()
    contestants, missing = [], {}
    for contestant in CONTESTANTS:
        reason = why_not(contestant)
        if reason is None:
            contestants.append(contestant)
        else:
            missing[contestant] = reason
    where = conditions()
    print_conditions(where)
    sizes = {"tokens": arguments.tokens, "hidden": arguments.hidden, "vocab": arguments.vocab}
    print(*(f"{size} {name}," for name, size in sizes.items()), f"medians of {arguments.repeats} rounds")
    for contestant, reason in missing.items():
        print(f"left out {contestant}: {reason}")

    results = []
    for dtype in arguments.dtype:
        for ignored in arguments.ignored:
            problem = Problem.random(*sizes.values(), DTYPES[dtype], ignored=ignored, device=DEVICE)
            seconds = measure(problem, contestants, arguments.repeats)
            found = [
                sizes | {"dtype": dtype, "ignored": ignored, "contestant": name} | _summary(taken, seconds[PRODUCTS])
                for name, taken in seconds.items()
            ]
            results += found
            print()
            print_table(
                (f"{dtype}, {ignored:.0%} ignored", "seconds", "ratio", "least", "most"),
                [(r["contestant"], *(f"{r[name]:.3f}" for name in _SUMMARY)) for r in found],
            )
            if arguments.json:
                write(arguments.json, where, results)


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
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--ignored", nargs="+", type=float, default=[0.0, 0.5], help="shares of ignored tokens")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--json", type=Path, help="where to write the results too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
