"""Draws the pictures of the concepts from the library's own numbers.

python docs/pictures.py    # writes docs/pictures/*.svg
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chunked_ce import ChunkOptions
from chunked_ce.cli.memory_models import full_logits
from chunked_ce.plan import MemoryPrediction, Plan, Settings, predict_memory

FOLDER = Path(__file__).resolve().parent / "pictures"
N, D, V = 8192, 2304, 256000  # the head of Gemma-2 2B
DTYPE = torch.bfloat16
GIB = 2**30

# Readable on white and on black; text has the colour of the page.
BLUE, GREEN, AMBER, RED, VIOLET, GREY = "#3b82f6", "#16a34a", "#d97706", "#dc2626", "#8b5cf6", "#808890"
RANKS = (BLUE, GREEN, AMBER, VIOLET)
TAIL = (VIOLET, AMBER, GREEN, GREY)


class Point(NamedTuple):
    x: float
    y: float


class Picture:
    """An SVG, as the list of its elements."""

    def __init__(self, name: str, title: str, width: int, height: int):
        self.name, self.title, self.width, self.height = name, title, width, height
        self.elements: list[str] = []

    def box(
        self,
        at: tuple[float, float],
        width: float,
        height: float,
        color: str = GREY,
        fill: float = 0.0,
        *,
        dashed: bool = False,
    ) -> None:
        """A rectangle by its upper left corner; ``fill`` is the opacity of its inside."""
        dash = ' stroke-dasharray="4 4"' if dashed else ""
        self.elements.append(
            f'<rect x="{at[0]:.1f}" y="{at[1]:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" fill="{color}" '
            f'fill-opacity="{fill:.2f}" stroke="{color}" stroke-width="1.5"{dash}/>'
        )

    def text(
        self, at: tuple[float, float], words: str, *, size: int = 13, anchor: str = "start", color: str = "currentColor"
    ) -> None:
        self._write(at, words, f'font-size="{size}" text-anchor="{anchor}" fill="{color}"')

    def heading(self, at: tuple[float, float], words: str) -> None:
        self._write(at, words, 'font-size="15" font-weight="600" fill="currentColor"')

    def _write(self, at: tuple[float, float], words: str, attributes: str) -> None:
        escaped = words.replace("&", "&amp;").replace("<", "&lt;")
        self.elements.append(f'<text x="{at[0]:.1f}" y="{at[1]:.1f}" {attributes}>{escaped}</text>')

    def line(self, start: tuple[float, float], end: tuple[float, float], color: str = GREY) -> None:
        self.elements.append(
            f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" stroke="{color}" '
            'stroke-width="1.5"/>'
        )

    def arrow(self, start: tuple[float, float], end: tuple[float, float], color: str = GREY) -> None:
        """A line with a head at its end."""
        self.line(start, end, color)
        dx, dy = end[0] - start[0], end[1] - start[1]
        length = (dx * dx + dy * dy) ** 0.5
        ux, uy = dx / length, dy / length
        left = Point(end[0] - 8 * ux + 4 * uy, end[1] - 8 * uy - 4 * ux)
        right = Point(end[0] - 8 * ux - 4 * uy, end[1] - 8 * uy + 4 * ux)
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (end, left, right))
        self.elements.append(f'<polygon points="{points}" fill="{color}"/>')

    def svg(self) -> str:
        """The file. Its style is for readers who see it by itself; the site's pages have their own colour of text."""
        body = "\n".join(self.elements)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{self.title}" font-family="system-ui, sans-serif">\n'
            "<style>svg { color: #1f2328 } @media (prefers-color-scheme: dark) { svg { color: #e6edf3 } }</style>\n"
            f"{body}\n</svg>\n"
        )


def prediction(**options: object) -> MemoryPrediction:
    return predict_memory(N, V, D, dtype=DTYPE, options=ChunkOptions(**options))  # type: ignore[arg-type]


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def bars(picture: Picture, at: Point, rows: Sequence[tuple[str, float, str]], width: float) -> None:
    """Horizontal bars with their values, the longest as wide as ``width``."""
    most = max(value for _, value, _ in rows)
    for index, (label, value, color) in enumerate(rows):
        y = at.y + 44 * index
        picture.text((at.x, y), label)
        picture.box((at.x, y + 6), width * value / most, 14, color, 0.75)
        picture.text((at.x + width * value / most + 8, y + 18), gib(value))


def chunks() -> Picture:
    """One chunk of the logits exists at a time."""
    tokens = Plan.by_tokens(N, N, V, D, Settings(DTYPE), head_dtype=DTYPE).tokens
    count = -(-N // tokens)
    picture = Picture("chunks", "The logits of one chunk of tokens exist at a time", 760, 310)
    left, top, wide, high = 120, 90, 250, 180
    picture.heading((20, 28), f"{N:,} tokens, {V:,} words, width {D:,}, in bf16")
    picture.box((left, top - 34), wide, 22, GREEN, 0.25)
    picture.text((left + wide / 2, top - 18), f"head: {D:,} x {V:,}", anchor="middle")
    picture.text((20, top + 8), "hidden")
    for chunk in range(count):
        y, step = top + chunk * high / count, high / count
        now = chunk == 1
        picture.box((left - 40, y), 26, step - 4, BLUE, 0.6 if now else 0.2)
        picture.box((left, y), wide, step - 4, RED if now else GREY, 0.45 if now else 0.0, dashed=not now)
        words = f"{tokens:,} tokens: {gib(tokens * V * DTYPE.itemsize)} of logits" if now else "not in memory"
        picture.text((left + wide / 2, y + step / 2 + 3), words, anchor="middle")
        picture.arrow((left + wide + 8, y + step / 2), (left + wide + 34, y + step / 2), RED if now else GREY)
    picture.box((left + wide + 40, top), 12, high - 4, AMBER, 0.6)
    picture.text((left + wide + 46, top + high + 16), "a few numbers", anchor="middle", size=12)
    picture.text((left + wide + 46, top + high + 31), "per token", anchor="middle", size=12)
    full = full_logits(N, V, D, dtype=DTYPE).peak
    picture.heading((490, 68), "Peak memory, predicted")
    rows = [
        ("full logits", full, RED),
        ("gradients in the forward", prediction().peak, BLUE),
        ("gradients in the backward", prediction(gradients="backward").peak, GREEN),
    ]
    bars(picture, Point(490, 96), rows, 180)
    return picture


def gradients() -> Picture:
    """Both ways to get gradients, side by side."""
    tokens = Plan.by_tokens(N, N, V, D, Settings(DTYPE), head_dtype=DTYPE).tokens
    entries = Plan.by_vocabulary(N, V, Settings(DTYPE), DTYPE).entries or V
    picture = Picture("gradients", "Gradients in the forward pass, and in the backward pass", 760, 328)
    _forward_way(picture, -(-N // tokens), tokens)
    _backward_way(picture, entries)
    return picture


def _forward_way(picture: Picture, count: int, tokens: int) -> None:
    picture.heading((20, 28), 'gradients="forward"')
    picture.text((20, 50), "forward: for each chunk of tokens", color=GREY)
    for chunk in range(count):
        y = 66 + 62 * chunk
        picture.box((20, y), 90, 44, RED, 0.4 if chunk == 0 else 0.1)
        picture.text((65, y + 27), "logits", anchor="middle")
        picture.arrow((114, y + 22), (134, y + 22))
        picture.box((138, y), 90, 44, RED, 0.4 if chunk == 0 else 0.1)
        picture.text((183, y + 20), "their", anchor="middle")
        picture.text((183, y + 36), "gradients", anchor="middle")
        picture.arrow((232, y + 22), (256, y + 22))
        picture.text((262, y + 19), "dX: its rows", color=BLUE)
        picture.text((262, y + 37), "dW: added up", color=GREEN)
    y = 66 + 62 * count
    picture.text((20, y + 12), "backward: multiplies by the upstream gradient", color=GREY)
    peak = prediction().peak
    picture.text((20, y + 42), "6 N V D operations: three products")
    picture.text((20, y + 62), f"{gib(peak)} with {tokens:,} tokens in a chunk")


def _backward_way(picture: Picture, entries: int) -> None:
    x = 410
    picture.heading((x, 28), 'gradients="backward"')
    picture.text((x, 50), "forward: for each block of words", color=GREY)
    blocks = 5
    for block in range(blocks):
        picture.box((x + 34 * block, 66), 28, 60, RED, 0.4 if block == 0 else 0.1)
    picture.arrow((x + 178, 96), (x + 206, 96))
    picture.text((x + 212, 92), "statistics", color=AMBER)
    picture.text((x + 212, 110), "of each token", color=AMBER)
    picture.text((x, 158), "backward: the same blocks again", color=GREY)
    for block in range(blocks):
        picture.box((x + 34 * block, 174), 28, 60, RED, 0.4 if block == 0 else 0.1)
    picture.arrow((x + 178, 204), (x + 206, 204))
    picture.text((x + 212, 192), "dX: added up", color=BLUE)
    picture.text((x + 212, 210), "dW: its rows,", color=GREEN)
    picture.text((x + 212, 228), "written once", color=GREEN)
    peak = prediction(gradients="backward").peak
    picture.text((x, 294), "8 N V D operations: the logits twice")
    picture.text((x, 314), f"{gib(peak)} with {entries:,} words in a block")


def shards() -> Picture:
    """Ranks that hold the same tokens, and ranks that hold their own."""
    picture = Picture("shards", "A head sharded over ranks with the same tokens, and with their own", 760, 340)
    _ranks_with_the_same_tokens(picture)
    _ranks_with_their_own(picture)
    return picture


def _ranks_with_the_same_tokens(picture: Picture) -> None:
    picture.heading((20, 28), 'tokens="same": tensor parallelism')
    for rank in range(4):
        y, color = 52 + 52 * rank, RANKS[rank]
        picture.text((20, y + 24), f"rank {rank}")
        picture.box((70, y), 24, 38, GREY, 0.4)
        picture.text((100, y + 24), "x")
        picture.box((114 + 32 * rank, y), 32, 38, color, 0.5)
        picture.box((114, y), 128, 38, GREY, 0.0, dashed=True)
        picture.arrow((248, y + 19), (276, y + 19), color)
    picture.box((282, 52), 14, 194, AMBER, 0.6)
    picture.text((304, 136), "statistics,")
    picture.text((304, 153), "combined")
    picture.text((20, 280), "Every rank has all tokens and 1/4 of the head's rows.")
    picture.text((20, 300), "For each chunk travel: a few numbers per token,")
    picture.text((20, 320), "and the sum of the hidden states' gradients.")


def _ranks_with_their_own(picture: Picture) -> None:
    x = 400
    picture.heading((x, 28), 'tokens="own": data parallelism')
    for rank in range(4):
        y, color = 52 + 52 * rank, RANKS[rank]
        picture.text((x, y + 24), f"rank {rank}")
        picture.box((x + 50, y + 9), 24, 20, color, 0.6)
        picture.line((x + 78, y + 19), (x + 96, 148), color)
        picture.arrow((x + 116, 148), (x + 136, y + 19), color)
        picture.box((x + 142 + 32 * rank, y), 32, 38, color, 0.5)
        picture.box((x + 142, y), 128, 38, GREY, 0.0, dashed=True)
    picture.box((x + 98, 130), 16, 36, GREY, 0.4)
    picture.text((x, 280), "A rank has its own tokens and 1/4 of the head's rows.")
    picture.text((x, 300), "For each chunk travel: hidden states of all ranks,")
    picture.text((x, 320), "and their gradients back. The head never travels.")


def mean() -> Picture:
    """How much a token weighs in a mean of means, and in the mean over all tokens."""
    counts = (3, 9)
    total = sum(counts)
    picture = Picture("mean", "The weight of a token in the mean of means, and in the mean over tokens", 760, 285)
    ways = (
        ("The mean of the ranks' means", [1 / (len(counts) * count) for count in counts], 20),
        ("TokenMean: the mean over all tokens", [1 / total for _ in counts], 400),
    )
    for words, weights, x in ways:
        picture.heading((x, 28), words)
        for rank, (count, weight) in enumerate(zip(counts, weights, strict=True)):
            y = 100 + 92 * rank
            picture.text((x, y - 38), f"rank {rank}: {count} tokens, each with a weight of 1/{round(1 / weight)}")
            side = 70 * weight**0.5  # the area is the weight
            for token in range(count):
                picture.box((x + 33 * token, y + 12 - side), side, side, RANKS[rank], 0.6)
    picture.text((20, 252), "Tokens of rank 0 count three times as much:")
    picture.text((20, 272), "their rank has fewer of them.")
    picture.text((400, 252), "Every token counts equally. A rank calls backward")
    picture.text((400, 272), f"on its sum times {len(counts)}/{total}; DDP then divides by {len(counts)} ranks.")
    return picture


def gradient_filter() -> Picture:
    """The words that a chunk keeps, and the groups that replace the others."""
    picture = Picture("filter", "Words of a chunk by their largest probability, kept or averaged in groups", 760, 328)
    words, groups, threshold = 4096, 4, 2.0**-14  # "auto" in bf16
    # Zipf's law with an exponent as steep as to keep a share like those of trained models.
    weights = [(rank + 1.0) ** -1.4 for rank in range(words)]
    total = sum(weights)
    largest = [weight / total for weight in weights]
    kept = sum(p > threshold for p in largest)
    tail = sum(largest[kept:])
    picture.heading((20, 28), "Words of a chunk, by their largest probability at any of its tokens")
    x0, y0, width, height, columns, floor = 60, 250, 640, 190, 64, 2.0**-19
    for power in range(0, 20, 4):
        y = y0 - height * (1 - power / 19)
        picture.text((52, y + 4), f"2^-{power}" if power else "1", anchor="end", size=11, color=GREY)
        picture.line((56, y), (60, y))
    edges = _edges_of_equal_mass(largest, kept, groups)
    for column in range(columns):
        first = column * words // columns
        p = largest[first]
        high = height * max(0.0, 1 - _log2(p) / _log2(floor))
        color = BLUE if first < kept else TAIL[sum(first >= edge for edge in edges[1:])]
        picture.box((x0 + column * width / columns, y0 - high), width / columns - 2, high, color, 0.7)
    y = y0 - height * (1 - 14 / 19)
    picture.line((x0, y), (x0 + width, y), RED)
    picture.text((x0 + width, y - 6), "threshold", anchor="end", color=RED)
    picture.text((60, 280), f"kept: {kept:,} of {words:,} words, exact products", color=BLUE)
    picture.text(
        (60, 300),
        f"the tail: {groups} groups of equal mass, {tail:.1%} of the probability together. Each is one average;",
    )
    picture.text((60, 318), "every word still gets a gradient, and each token's gradients still sum to 0.")
    return picture


def _log2(p: float) -> float:
    return float(torch.tensor(p, dtype=torch.float64).log2())


def _edges_of_equal_mass(largest: list[float], kept: int, groups: int) -> list[int]:
    """The first word of each group of the tail."""
    share, mass, edges = sum(largest[kept:]) / groups, 0.0, [kept]
    for word in range(kept, len(largest)):
        mass += largest[word]
        if mass >= share * len(edges) and len(edges) < groups:
            edges.append(word + 1)
    return edges


PICTURES = (chunks, gradients, shards, mean, gradient_filter)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for draw in PICTURES:
        picture = draw()
        path = FOLDER / f"{picture.name}.svg"
        path.write_text(picture.svg(), "utf-8")
        print(path)


if __name__ == "__main__":
    main()
