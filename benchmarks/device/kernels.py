"""Each row kernel on one chunk, with the bytes that it has to move, and the products of that chunk."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.device.jobs import Job, Row
from benchmarks.device.timing import DEVICE, Shape, milliseconds
from benchmarks.roofline import chunk_tokens
from chunked_ce import devices
from chunked_ce.engine.scratch import logits_scratch
from chunked_ce.rows import torch_rows
from chunked_ce.rows.backend import row_kernels
from chunked_ce.rows.columns import ColumnSums
from chunked_ce.rows.statistics import NOTHING, Logits, RowStatistics, names_of

__all__ = ["RowInputs", "jobs", "product_jobs"]

_BF16 = torch.bfloat16
_LOGITS = {"": Logits(), ", softcap": Logits(1.0, 30.0)}


class RowInputs(NamedTuple):
    """A chunk's logits, where their gradients go, and targets."""

    logits: Tensor  # (C, V)
    gradients: Tensor  # (C, V)
    target: Tensor  # (C,)
    kernels: ModuleType

    @classmethod
    def random(cls, tokens: int, vocab: int) -> RowInputs:
        device = torch.device(DEVICE)
        logits, gradients = (logits_scratch(tokens, vocab, dtype=_BF16, device=device) for _ in range(2))
        logits.normal_().mul_(2)
        target = torch.randint(vocab, (tokens,), device=device)
        return cls(logits, gradients, target, row_kernels("auto", device, _BF16))

    @property
    def bytes(self) -> int:
        """Of all logits once."""
        return self.logits.numel() * _BF16.itemsize

    def statistics(self, logits: Logits = _LOGITS[""], names: tuple[str, ...] = ()) -> RowStatistics:
        arguments = self.logits, self.target, None, logits, names_of(names)
        return self.kernels.statistics(*arguments, overwrite=False)

    def write_exponentials(self) -> None:
        """The one pass that replaces statistics and gradients."""
        name = "exponentials" if self.kernels is torch_rows else "triton_exponentials"
        module = importlib.import_module(f"chunked_ce.rows.{name}")
        module.exponentials(self.logits, self.target, _LOGITS[""], self.gradients, per_row=NOTHING)

    def write_gradients(self, known: RowStatistics, logits: Logits, columns: ColumnSums | None = None) -> None:
        one = torch.ones(len(self.target), device=DEVICE)
        slopes = RowStatistics(None, one, -one)
        arguments = self.logits, self.target, None, logits, slopes, known
        self.kernels.logit_gradients(*arguments, out=self.gradients, columns=columns)


def jobs(shapes: tuple[Shape, ...]) -> list[Job]:
    rows = [Job("rows", _row_kernels, (shape,)) for shape in shapes]
    return [*rows, Job("head", _head_kernels, shapes)]


def _row_kernels(shape: Shape) -> Iterator[Row]:
    rows = RowInputs.random(chunk_tokens(shape, DEVICE), shape.vocab)
    size = f"{len(rows.target)} rows"
    for suffix, logits in _LOGITS.items():
        known = rows.statistics(logits)
        columns = ColumnSums(shape.vocab, torch.float32, torch.device(DEVICE))
        passes: dict[str, tuple[int, Callable[[], object]]] = {
            "statistics": (1, lambda logits=logits: rows.statistics(logits)),
            "statistics with entropy": (1, lambda logits=logits: rows.statistics(logits, ("mean",))),
            "gradients": (2, lambda logits=logits, known=known: rows.write_gradients(known, logits)),
            "gradients and column sums": (
                2,
                lambda logits=logits, known=known, columns=columns: rows.write_gradients(known, logits, columns),
            ),
        }
        if not suffix:
            passes["exponentials, one pass"] = 2, rows.write_exponentials
        for name, (times, work) in passes.items():
            row = {"what": f"{name}{suffix}", "rows": size, "bytes": times * rows.bytes}
            try:
                yield row | {"ms": milliseconds(work, 7)}
            except (AttributeError, RuntimeError, TypeError, ValueError) as error:
                yield row | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def _head_kernels(shape: Shape) -> Iterator[Row]:
    """The pass that scales and rounds the head's gradient, in fp32, once for all chunks."""
    total = torch.randn(shape.vocab, shape.hidden, device=DEVICE)
    out, factor = torch.empty_like(total, dtype=_BF16), torch.full((), 0.5, device=DEVICE)
    kernels = row_kernels("auto", torch.device(DEVICE), _BF16)
    ms = milliseconds(lambda: kernels.scale_into(total, factor, out), 7)
    yield {"what": "scale_into, fp32 to bf16", "ms": ms, "bytes": 6 * total.numel()}


def product_jobs(shapes: tuple[Shape, ...]) -> list[Job]:
    return [Job("all tokens", _three_products, shapes), Job("chunk", _chunk_products, shapes)]


def _chunk_products(shape: Shape) -> Iterator[Row]:
    """The products of a chunk, as the plan cuts it and in 4,096 tokens."""
    for tokens in dict.fromkeys((chunk_tokens(shape, DEVICE), min(shape.tokens, 4096))):
        x, weight = _factors(tokens, shape)
        logits = logits_scratch(tokens, shape.vocab, dtype=_BF16, device=torch.device(DEVICE))
        hidden, head = torch.empty_like(x), torch.empty_like(weight)
        products: dict[str, Callable[[], object]] = {
            "logits": lambda x=x, weight=weight, logits=logits: torch.mm(x, weight.t(), out=logits),
            "dX": lambda logits=logits, weight=weight, hidden=hidden: torch.mm(logits, weight, out=hidden),
            "dW in bf16": lambda logits=logits, x=x, head=head: torch.mm(logits.t(), x, out=head),
        }
        if devices.adds_in_product(DEVICE, torch.float32, _BF16):
            wide = torch.zeros(shape.vocab, shape.hidden, device=DEVICE)
            products["dW in fp32"] = lambda logits=logits, x=x, wide=wide: torch.mm(
                logits.t(), x, out_dtype=torch.float32, out=wide
            )
            products["dW added in fp32"] = lambda logits=logits, x=x, wide=wide: torch.addmm(
                wide, logits.t(), x, out_dtype=torch.float32, out=wide
            )
        for name, work in products.items():
            ms = milliseconds(work)
            if name == "logits":
                logits.mul_(1e-3)  # the size of their gradients
            yield {
                "what": name,
                "rows": f"{tokens} rows",
                "ms": ms,
                "operations": shape.floor * tokens // shape.tokens // 3,
            }


def _three_products(shape: Shape) -> Iterator[Row]:
    """The three products of all tokens, each chunk into the same memory."""
    for tokens in dict.fromkeys((min(shape.tokens, 4096), min(shape.tokens, 8192))):
        x, weight = _factors(shape.tokens, shape)
        logits = torch.empty(tokens, shape.vocab, dtype=_BF16, device=DEVICE)
        hidden, head = torch.empty_like(x), torch.empty_like(weight)

        def run(x=x, weight=weight, logits=logits, hidden=hidden, head=head, tokens=tokens) -> None:
            for at, part in enumerate(x.split(tokens)):
                z = torch.mm(part, weight.t(), out=logits[: len(part)])
                torch.mm(z, weight, out=hidden[at * tokens : at * tokens + len(part)])
                torch.mm(z.t(), part, out=head) if at == 0 else head.addmm_(z.t(), part)

        yield {"what": f"three products, {tokens} rows", "ms": milliseconds(run), "operations": shape.floor}


def _factors(tokens: int, shape: Shape) -> tuple[Tensor, Tensor]:
    x = torch.randn(tokens, shape.hidden, device=DEVICE).to(_BF16)
    return x, torch.randn(shape.vocab, shape.hidden, device=DEVICE).mul_(0.02).to(_BF16)
