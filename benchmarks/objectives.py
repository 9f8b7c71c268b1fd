"""The time of every loss as a multiple of the matrix products that it cannot do without, in the same rounds.

Those are three products for cross-entropy, policy gradients and top-K divergences, and four where logits are formed
again (log-probabilities and statistics) or where a teacher has its own.

    python -m benchmarks.objectives
    python -m benchmarks.objectives --tokens 512 --hidden 256 --vocab 8192 --dtype bf16 --repeats 3
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchmarks.ratios import measure
from benchmarks.report import conditions, dump, print_conditions, print_table
from chunked_ce.cli.implementations import DEVICE, DTYPES, FORWARD, FOUR_PRODUCTS, KINDS, PRODUCTS, yardstick_of
from chunked_ce.cli.synthetic_inputs import LossInputs

__all__ = ["summary"]

OURS = (FORWARD, *(f"{kind}, {FORWARD}" for kind in KINDS[1:]))


def summary(name: str, seconds: dict[str, list[float]]) -> dict[str, object]:
    """The median seconds of an implementation, and of its ratio to its products in the same round."""
    own, products = seconds[name], seconds[yardstick_of(name)]
    ratios = [one / other for one, other in zip(own, products, strict=True)]
    return {
        "implementation": name,
        "products": yardstick_of(name),
        "seconds": round(statistics.median(own), 4),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_of_minima": round(min(own) / min(products), 4),
        "rounds": len(own),
    }


def main() -> None:
    arguments = _arguments()
    where = conditions()
    print_conditions(where)
    sizes = {"tokens": arguments.tokens, "hidden": arguments.hidden, "vocab": arguments.vocab}
    results = []
    for dtype in arguments.dtype:
        inputs = LossInputs.random(*sizes.values(), DTYPES[dtype], device=DEVICE)
        seconds = measure(inputs, [PRODUCTS, FOUR_PRODUCTS, *OURS], arguments.repeats)
        rows = [summary(name, seconds) for name in OURS]
        results += [sizes | {"dtype": dtype} | row for row in rows]
        print_table((dtype, *list(rows[0])[1:]), [tuple(map(str, row.values())) for row in rows])
        if arguments.json:
            dump({"conditions": where, "results": results}, arguments.json)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.objectives", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
