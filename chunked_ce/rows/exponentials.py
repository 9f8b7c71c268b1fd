"""One pass over the logits: exponentials in the place of gradients, whose factors are known afterwards.

Where a loss has slopes in ``log_sum`` and ``target`` only, and no softcap, the gradients of a row's logits are its
exponentials times one number, but for the target's. So a single pass writes, for a reference c_i that is known early,

    E_iv = exp(z_iv - c_i), rounded         S_i = sum_v exp(z_iv - c_i), of the unrounded ones

and once the loss has given its slopes, with the factor s_i = slope_log_sum_i / S_i and the target's gradient g_i,

    dz_iv = s_i E_iv  for v != y_i          dz_iy = g_i = p_iy * slope_log_sum_i + slope_target_i

The products take the factors: dX = diag(s) (E W) and dW = E^T (diag(s) X). The gradients of the targets' logits, the
largest ones, would be rounded twice in the latter. So E_iy becomes the rounded e_i = g_i / s_i, and what is missing,
g_i x_i - e_i rounded(s_i x_i) for dW and (g_i - s_i e_i) w_y for dX, is added apart in fp32.

This is the torch version, the specification of `chunked_ce.rows.triton_exponentials`: tests compare the two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from chunked_ce.rows.statistics import Logits, PerRow, RowStatistics, at_target, statistics_of

__all__ = ["STATISTICS", "ScaledExponentials", "add_columns_", "add_targets_", "exponentials"]

STATISTICS = ("maximum", "log_sum", "target")  # what the pass computes, and all that the loss may read


class ScaledExponentials(NamedTuple):
    """The gradients of rows of logits: one factor a row times exponentials, but for the targets'."""

    values: Tensor  # (n, V) E, with ``taken`` at the targets
    column: Tensor  # (n,) of the target
    factor: Tensor  # (n,) s, fp32
    gradient: Tensor  # (n,) g of the target's logit, fp32
    taken: Tensor  # (n,) e, in the dtype of the values, 0 where the factor is 0

    @classmethod
    def of(
        cls,
        values: Tensor,  # (n, V) E; its entries at the targets are overwritten
        sums: Tensor,  # (n,) S
        column: Tensor,  # (n,)
        rows: RowStatistics,  # (n,) each
        slopes: RowStatistics,  # (n,) each
    ) -> ScaledExponentials:
        """The gradients with these slopes; exactly 0 in a row whose slopes are 0."""
        factor = slopes.log_sum / sums
        gradient = at_target(rows.logprob, slopes.log_sum, slopes.target)
        taken = (gradient / factor).masked_fill(factor == 0, 0).to(values.dtype)
        values.scatter_(1, column.unsqueeze(1), taken.unsqueeze(1))
        return cls(values, column, factor, gradient, taken)

    @property
    def residual(self) -> Tensor:
        """What the values leave out of the gradients (n,) of the targets' logits."""
        return self.gradient - self.factor * self.taken

    def scaled(self, x: Tensor) -> Tensor:
        """Hidden states ``x`` (n, D) times the factors, rounded to the dtype of ``x``; contiguous."""
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        return torch.mul(x, self.factor.unsqueeze(1), out=out)


def statistics_and_sums(part: Tensor, column: Tensor) -> tuple[RowStatistics, Tensor]:
    """The statistics (n,) each and the sums S (n,), from the result (n, 4) of `exponentials`."""
    return statistics_of(part[:, :3], column, STATISTICS), part[:, 3]


def exponentials(
    products: Tensor,  # (n, V)
    column: Tensor,  # (n,) of the target
    logits: Logits,  # without a softcap
    out: Tensor,  # (n, V), may be the products
    *,
    per_row: PerRow,
) -> Tensor:
    """Write the exponentials to ``out``; the part (n, 3) of `STATISTICS` in fp32, and beside it the sums S."""
    z = logits(products.float(), per_row.temperature)
    maximum = z.amax(-1)
    relative = z - maximum.clamp(min=torch.finfo(z.dtype).min).unsqueeze(-1)
    at_target = relative.gather(-1, column.unsqueeze(-1)).squeeze(-1)
    values = relative.exp_()
    out.copy_(values)
    sums = values.sum(-1)
    return torch.stack([maximum, sums, at_target, sums], -1)


def add_targets_(total: Tensor, scaled: ScaledExponentials, x: Tensor, scaled_x: Tensor) -> None:
    """Add to ``total`` (V, D) what the product of the exponentials and ``scaled_x`` (n, D) lacks of the targets'
    terms with ``x`` (n, D); each row is summed in fp32 before it is added, always in the same order."""
    terms = scaled.gradient.unsqueeze(1) * x.float() - scaled.taken.float().unsqueeze(1) * scaled_x.float()
    entries, place = torch.unique(scaled.column, return_inverse=True)
    sums = terms.new_zeros(len(entries), x.shape[1]).index_add_(0, place, terms)
    total[entries] = (total[entries].to(torch.promote_types(total.dtype, sums.dtype)) + sums).to(total.dtype)


def add_columns_(total: Tensor, scaled: ScaledExponentials) -> None:
    """Add the column sums of the gradients to ``total`` (V,)."""
    gradients = scaled.values.float() * scaled.factor.unsqueeze(1)
    total.add_(gradients.scatter_(1, scaled.column.unsqueeze(1), scaled.gradient.unsqueeze(1)).sum(0))


def product_exponentials(
    x: Tensor,  # (n, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    column: Tensor,  # (n,) of the target
    logits: Logits,  # without a softcap
    out: Tensor,  # (n, V)
    *,
    per_row: PerRow,
) -> Tensor:
    """`exponentials` of the products ``x @ weight.T + bias``, which are formed in fp32 and kept nowhere."""
    products = x.float() @ weight.float().t()
    return exponentials(products if bias is None else products + bias.float(), column, logits, out, per_row=per_row)
