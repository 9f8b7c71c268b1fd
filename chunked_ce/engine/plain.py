"""The slow twin of the sweep: plain differentiable torch on the full logits.

It serves second derivatives and ``torch.func`` transforms, which the sweep does not support.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_ce.engine import plan_log
from chunked_ce.engine.call import Call
from chunked_ce.engine.teacher import teacher_logits
from chunked_ce.narrowing import not_none
from chunked_ce.rows.statistics import RowStatistics, along, row_statistics, work_dtype

__all__ = ["loss", "statistics"]


def loss(call: Call) -> Tensor:
    """The sum of the losses, ()."""
    rows = statistics(call)
    arguments = call.target, call.ignore_index, call.class_weight, call.vocab_size, call.per_token
    return not_none(call.specification.objective).losses(rows, *arguments).sum().to(rows.log_sum.dtype)


def statistics(call: Call) -> RowStatistics:
    """The statistics of every row, (N,) each and 0 where ignored."""
    if plan_log.LOGS_PLANS:
        plan_log.log_plain(call)
    specification = call.specification
    counted = call.target != call.ignore_index
    products = _head_products(call, counted) if call.is_head else call.tensors[0].where(counted.unsqueeze(-1), 0)
    temperature, ids = call.temperature, call.ids
    temperature = None if temperature is None else temperature.where(counted, 1)
    ids = None if ids is None else ids.where(ids != call.ignore_index, -1)
    z = specification.logits(products.to(work_dtype(products.dtype)), temperature)
    teacher, share = None, 0.0
    if specification.teacher is not None:
        teacher, share = teacher_logits(call, counted, temperature, z.dtype), specification.teacher.share
    target = call.target.where(counted, 0)
    rows = row_statistics(z, target, call.class_weight, specification.names, ids, teacher, share)
    return rows.map(lambda part: part.where(along(counted, part), 0))


def _head_products(call: Call, counted: Tensor) -> Tensor:
    """The products (N, V) of hidden states, 0 where they do not count, and head, with bias and adapter."""

    def factors(hidden: str, weight: str) -> tuple[Tensor, Tensor]:
        depths = call.named(hidden)
        whole = depths[0] if len(depths) == 1 else torch.cat(depths)
        settings = call.specification.settings

        def rounded(part: Tensor) -> Tensor:
            return part.to(settings.compute_dtype).to(settings.logits_dtype)

        return rounded(whole.where(counted.unsqueeze(-1), 0)), rounded(call.named(weight)[0])

    hidden, weight = factors("hidden", "weight")
    products = F.linear(hidden, weight, *[bias.to(hidden.dtype) for bias in call.named("bias")])
    adapted = "adapter_weight" in call.specification.parts
    return products + F.linear(*factors("adapter_hidden", "adapter_weight")) if adapted else products
