"""The three matrix products, with sums over chunks in a wider dtype than the products'."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "PROJECTED_ROWS",
    "add_product_",
    "adds_in_product",
    "product_rows",
    "project",
    "rounds_products",
    "rounds_within",
    "unrounded",
    "wide_product",
]

# Rows of the head in one product on a CPU. A block of the head is packed once and stays in cache: with 512 tokens,
# D=768 and V=50257 on two cores, the logits took 0.084 s in bf16 and 0.430 s in fp32, one product 0.124 and 0.467.
# Smaller blocks are no faster, and much slower where other work keeps one of the cores busy.
PROJECTED_ROWS = 8192
# Rows of a sum in another dtype than its products: product and sum meet in cache.
_SUMMED_ROWS = 2048


def product_rows(rows: int, device_type: str) -> int:
    """How many rows of a sum in another dtype than its products one product covers."""
    return min(rows, _SUMMED_ROWS) if device_type == "cpu" else rows


def adds_in_product(device_type: str, total: torch.dtype, factor: torch.dtype) -> bool:
    """Whether the device adds products of such factors to a sum in the dtype of ``total`` as it forms them."""
    return device_type == "cuda" and factor in (torch.bfloat16, torch.float16) and total == torch.float32


def unrounded(dtype: torch.dtype) -> torch.dtype:
    """What a gradient in ``dtype`` is kept in until the upstream gradient is known, so that it is rounded once."""
    return torch.promote_types(dtype, torch.float32)


def rounds_products(device_type: str, factor: torch.dtype) -> bool:
    """Whether the device rounds products of such factors to the factors' own, narrow dtype."""
    return device_type == "cpu" and factor in (torch.bfloat16, torch.float16)


def rounds_within(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the device rounds to the precision of a total in ``dtype`` with every few terms that a product adds to
    it. Narrow totals are added to a sum of all terms."""
    return device_type == "cpu" and dtype.itemsize >= 4


def project(
    hidden: Tensor,  # (n, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    out: Tensor,  # (n, V)
) -> Tensor:
    """``hidden @ weight.T + bias`` into ``out``."""
    step = PROJECTED_ROWS if weight.device.type == "cpu" else max(1, len(weight))
    for start in range(0, len(weight), step):
        block = slice(start, start + step)
        if bias is None:
            torch.mm(hidden, weight[block].t(), out=out[:, block])
        else:
            torch.addmm(bias[block], hidden, weight[block].t(), out=out[:, block])
    return out


def wide_product(
    left: Tensor,  # (m, j)
    right: Tensor,  # (j, k)
) -> Tensor:
    """``left @ right`` (m, k) in float32 where a device can form it in that, in the factors' dtype elsewhere.

    An fp16 product, which could overflow, is always formed in float32.
    """
    if adds_in_product(left.device.type, torch.float32, left.dtype):
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.dtype != torch.float16:
        return left @ right
    total = left.new_zeros(len(left), right.shape[1], dtype=torch.float32)
    step = PROJECTED_ROWS if left.device.type == "cpu" else max(1, len(right))
    for start in range(0, len(right), step):
        block = slice(start, start + step)
        total.addmm_(left[:, block].float(), right[block].float())
    return total


def add_product_(
    total: Tensor,  # (m, k)
    left: Tensor,  # (m, j)
    right: Tensor,  # (j, k)
    *,
    first: bool,
    apart: bool = False,
) -> None:
    """``total += left @ right``, or ``total = left @ right`` if it is the first of a sum.

    With ``apart`` nothing is added within the product where `rounds_within` says that this costs precision: the total
    may be much larger than what is added.

    Where ``total`` is wider than the factors, a CUDA device adds in fp32 within the product. Elsewhere a bf16 product
    is rounded to bf16 before it is added; an fp16 product, which could overflow, is formed in the dtype of ``total``.
    """
    if total.dtype == left.dtype and not (apart and rounds_within(total.device.type, total.dtype)):
        if first:
            torch.mm(left, right, out=total)
        else:
            total.addmm_(left, right)
        return
    if adds_in_product(total.device.type, total.dtype, left.dtype):
        if first:
            torch.mm(left, right, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        return
    factors = torch.promote_types(total.dtype, left.dtype) if left.dtype == torch.float16 else left.dtype
    right = right.to(factors)
    step = max(1, product_rows(len(total), total.device.type))
    # Scratch of one address: the C allocator hardly ever gives an aligned block just freed to a request of its size.
    part = total.new_empty(step, total.shape[1], dtype=factors)
    wide = None if first or factors == total.dtype else total.new_empty(step, total.shape[1])
    for start in range(0, len(total), step):
        block = total[start : start + step]
        product = torch.mm(left[start : start + step].to(factors), right, out=part[: len(block)])
        if first:
            block.copy_(product)
        else:
            block.add_(product if wide is None else wide[: len(block)].copy_(product))
