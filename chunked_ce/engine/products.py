"""The three matrix products, with sums over chunks in a dtype that may be wider than the factors'."""

from __future__ import annotations

import torch
from torch import Tensor

from chunked_ce import devices
from chunked_ce.devices import PROJECTED_ROWS
from chunked_ce.engine.scratch import with_padding

__all__ = ["add_product_", "project", "wide_product"]


def project(
    hidden: Tensor,  # (n, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    out: Tensor,  # (n, V), in the factors' dtype or a wider one
    low_rank: tuple[Tensor, Tensor] | None = None,  # (n, r) and (V, r)
) -> Tensor:
    """Write ``hidden @ weight.T + bias`` to ``out``, plus the product of the two factors of ``low_rank``.

    The bias is in the dtype of ``out``. Where this is wider than the factors', a CUDA device forms the products in it.
    Elsewhere the factors are cast to it, a block of the head at a time, so that no wide copy of the head exists.
    """
    if out.dtype != weight.dtype:
        return _wide_projection(hidden, weight, bias, out, low_rank)
    step = PROJECTED_ROWS if weight.device.type == "cpu" else max(1, len(weight))
    for start in range(0, len(weight), step):
        block = slice(start, start + step)
        if bias is None:
            torch.mm(hidden, weight[block].t(), out=out[:, block])
        elif not _project_densely(hidden, weight, bias, out):
            torch.addmm(bias[block], hidden, weight[block].t(), out=out[:, block])
        if low_rank is not None:
            out[:, block].addmm_(low_rank[0], low_rank[1][block].t())
    return out


def _project_densely(hidden: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> bool:
    """Write the product with the padding of ``out``, if that of head and bias can be read; whether it was done.

    cuBLAS adds a bias within the product if ``out`` is dense. Elsewhere it is written to ``out``, and read again.
    """
    if not devices.is_accelerator(out.device.type) or out.is_contiguous():
        return False
    into, rows, added = with_padding(out, 1), with_padding(weight), with_padding(bias)
    if into is None or rows is None or added is None:
        return False
    torch.addmm(added, hidden, rows.t(), out=into)
    return True


def _wide_projection(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, low_rank: tuple[Tensor, Tensor] | None
) -> Tensor:
    dtype = out.dtype
    if devices.adds_in_product(weight.device.type, dtype, weight.dtype):
        torch.mm(hidden, weight.t(), out_dtype=dtype, out=out)
        if low_rank is not None:
            torch.addmm(out, low_rank[0], low_rank[1].t(), out_dtype=dtype, out=out)
        return out if bias is None else out.add_(bias)
    hidden = hidden.to(dtype)
    low_rank = None if low_rank is None else (low_rank[0].to(dtype), low_rank[1])
    step = devices.widened_rows(len(weight))
    scratch = weight.new_empty(step, weight.shape[1], dtype=dtype)
    for start in range(0, len(weight), step):
        block = slice(start, min(start + step, len(weight)))
        part = scratch[: block.stop - start].copy_(weight[block])
        adapter = None if low_rank is None else (low_rank[0], low_rank[1][block].to(dtype))
        project(hidden, part, None if bias is None else bias[block], out[:, block], adapter)
    return out


def wide_product(
    left: Tensor,  # (m, j)
    right: Tensor,  # (j, k)
) -> Tensor:
    """``left @ right`` (m, k) in float32 where a device can form it so, else in the factors' dtype.

    An fp16 product, which could overflow, is always formed in float32.
    """
    if devices.adds_in_product(left.device.type, torch.float32, left.dtype):
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

    With ``apart``, the product is formed before it is added, where `rounds_within` says that adding within it costs
    precision: the total may be much larger than the product.

    Where ``total`` is wider than the factors, a CUDA device adds in fp32 within the product. Elsewhere a bf16 product
    is rounded to bf16 before it is added; an fp16 product, which could overflow, is formed in the dtype of ``total``.
    """
    if total.dtype == left.dtype and not (apart and devices.rounds_within(total.device.type, total.dtype)):
        if first:
            torch.mm(left, right, out=total)
        else:
            total.addmm_(left, right)
        return
    if devices.adds_in_product(total.device.type, total.dtype, left.dtype):
        if first:
            torch.mm(left, right, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        return
    factors = torch.promote_types(total.dtype, left.dtype) if left.dtype == torch.float16 else left.dtype
    right = right.to(factors)
    step = max(1, devices.product_rows(len(total), total.device.type))
    # One scratch tensor: the C allocator rarely reuses an aligned block just freed for a request of the same size.
    part = total.new_empty(step, total.shape[1], dtype=factors)
    wide = None if first or factors == total.dtype else total.new_empty(step, total.shape[1])
    for start in range(0, len(total), step):
        block = total[start : start + step]
        product = torch.mm(left[start : start + step].to(factors), right, out=part[: len(block)])
        if first:
            block.copy_(product)
        else:
            block.add_(product if wide is None else wide[: len(block)].copy_(product))
