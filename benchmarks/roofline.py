"""What to expect of a GPU: operations and bytes of each phase of a loss, and the times that they take at least.

A model, not a measurement: nothing here has run on a GPU. Chunks come from `chunked_ce.plan`, bytes from what the
kernels read and write (docs/kernels.md).

    python -m benchmarks.roofline
    python -m benchmarks.roofline --shape 8192 4096 128256 --burst 790 --copy 3.0
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from typing import NamedTuple

import torch

from benchmarks.device.timing import SHAPES, Shape
from benchmarks.report import print_table
from chunked_ce.plan import KEPT_SHARE, Plan, Settings

__all__ = ["CARDS", "WAYS", "Card", "chunk_tokens"]


class Card(NamedTuple):
    """Rates that a device reaches, not those of its data sheet."""

    burst: float  # operations per second of a large bf16 product
    copy: float  # bytes per second, read and written
    multiprocessors: int = 132


CARDS = {"H100": Card(790e12, 3.0e12), "H200": Card(790e12, 4.3e12)}

_TILE = 128 * 256  # numbers of a product that a multiprocessor forms at a time
_PRODUCTS = 0.92  # of the burst rate, in a product of full waves of tiles: it has an epilogue, and less power
_PASSES = 0.9  # of the copy rate, in a pass over logits
_EXPOSED = 0.45  # of reading and writing an fp32 sum within a product: the rest is hidden behind it
_HOST = 150e-6  # seconds per call in which the device waits for the host
_BF16, _FP32 = 2, 4  # bytes


def chunk_tokens(shape: Shape, device_type: str = "cuda") -> int:
    """Tokens in a chunk, gradients computed in the forward."""
    n, d, v = shape
    settings = Settings(torch.bfloat16, device_type=device_type)
    return min(n, Plan.by_tokens(n, n, v, d, settings, head_dtype=torch.bfloat16).tokens)


def _product(card: Card, rows: int, columns: int, inner: int, passes_of_sum: int = 0) -> float:
    """Seconds, in whole waves of tiles; ``passes_of_sum``: how often an fp32 sum of that size is read or written."""
    tiles = math.ceil(rows * columns / _TILE)
    waves = [split * tiles / card.multiprocessors for split in (1, 2, 3, 4) if split == 1 or inner >= 4096 * split]
    full = max(wave / math.ceil(wave) for wave in waves)
    multiplied = 2 * rows * columns * inner / (card.burst * _PRODUCTS * full)
    moved = _BF16 * (rows * inner + columns * inner + rows * columns) / card.copy
    return max(multiplied, moved) + _EXPOSED * passes_of_sum * _FP32 * rows * columns / card.copy


def _pass(card: Card, numbers: float, bytes_each: float) -> float:
    """Seconds of a kernel that moves ``bytes_each`` for each of its numbers."""
    return numbers * bytes_each / (card.copy * _PASSES)


def _parts(total: int, most: int) -> list[int]:
    return [min(most, total - start) for start in range(0, total, most)]


def forward_way(card: Card, shape: Shape) -> Counter:
    """Gradients in the forward, chunk by chunk, from exponentials that one pass writes over the logits.

    Several chunks add to an fp32 sum, which is rounded at the end; a single chunk adds to a narrow one of zeros. Where
    that costs more than the pass saves, statistics and gradients take two.
    """
    n, d, v = shape
    sizes = _parts(n, chunk_tokens(shape))
    several = len(sizes) > 1
    phases = Counter(host=_HOST)
    one_pass = several or n > 2 * d
    for at, c in enumerate(sizes):
        sums = 0 if not several else 1 if at == 0 else 2
        phases.update(logits=_product(card, c, v, d), dX=_product(card, c, d, v), dW=_product(card, v, d, c, sums))
        phases.update(passes=_pass(card, c * v, (2 if one_pass else 3) * _BF16))
    if several:
        phases["rounding"] = _pass(card, v * d, _FP32 + _BF16)
    elif one_pass:
        phases["zeros"] = _pass(card, v * d, 2 * _BF16)
    return phases


def backward_way(card: Card, shape: Shape) -> Counter:
    """Statistics first; then logits again, one block of the vocabulary at a time, for all tokens."""
    n, d, v = shape
    phases = Counter(host=_HOST)
    blocks = _parts(v, Plan.by_vocabulary(n, v, Settings(torch.bfloat16, device_type="cuda"), torch.bfloat16).entries)
    for at, e in enumerate(blocks):
        sums = 0 if len(blocks) == 1 else 1 if at == 0 else 2
        phases.update(logits=2 * _product(card, n, e, d), dX=_product(card, n, d, e, sums), dW=_product(card, e, d, n))
        phases.update(passes=_pass(card, n * e, 3 * _BF16))
    return phases


def filtered(card: Card, shape: Shape, kept_share: float = KEPT_SHARE) -> Counter:
    """Products for gradients over the kept columns only, which one more pass over the logits gathers."""
    n, d, v = shape
    kept = math.ceil(kept_share * v)
    phases = Counter(host=_HOST)
    sizes = _parts(n, chunk_tokens(shape))
    for c in sizes:
        phases.update(logits=_product(card, c, v, d), dX=_product(card, c, d, kept), dW=_product(card, kept, d, c, 1))
        phases.update(passes=_pass(card, c * v, 3 * _BF16), compaction=_pass(card, c * (v + kept), _BF16))
        phases.update(tail=_pass(card, v * d, _BF16), kept=_pass(card, kept * d, 2 * _BF16))
    phases["last pass"] = _pass(card, v * d, _BF16) + len(sizes) * _pass(card, kept * d, _FP32)
    return phases


WAYS = {"forward": forward_way, "backward": backward_way, "filtered": filtered}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs=3, type=int, action="append", metavar=("N", "D", "V"))
    parser.add_argument("--burst", type=float, help="TFLOP/s of a large bf16 product")
    parser.add_argument("--copy", type=float, help="TB/s of a copy, read and written")
    arguments = parser.parse_args()
    given = Card((arguments.burst or 790) * 1e12, (arguments.copy or 3.0) * 1e12)
    cards = {"this card": given} if arguments.burst or arguments.copy else CARDS
    shapes = [Shape(*shape) for shape in arguments.shape or SHAPES]
    print("A model, nothing measured. Milliseconds, and multiples of the floor:")
    for name, card in cards.items():
        rows = []
        for shape in shapes:
            totals = [sum(phases_of(card, shape).values()) for phases_of in WAYS.values()]
            floor = shape.floor / card.burst
            rows.append((str(shape), f"{1e3 * floor:.1f}", *(f"{1e3 * t:.1f} = {t / floor:.2f}" for t in totals)))
        print_table((name, "floor", *WAYS), rows)
    name, card = next(iter(cards.items()))
    for way, phases_of in WAYS.items():
        by_shape = {str(shape): phases_of(card, shape) for shape in shapes}
        names = list(dict.fromkeys(phase for phases in by_shape.values() for phase in phases))
        cells = [
            (shape, *(f"{1e3 * phases.get(phase, 0):.2f}" for phase in names)) for shape, phases in by_shape.items()
        ]
        print_table((f"{name}, {way}", *names), cells)


if __name__ == "__main__":
    main()
