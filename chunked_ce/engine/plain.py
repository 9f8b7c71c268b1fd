"""The slow twin of the sweep: plain differentiable torch on the full logits.

It serves second derivatives and ``torch.func`` transforms, which the sweep does not support.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from chunked_ce.engine.call import Call
from chunked_ce.engine.teacher import teacher_logits
from chunked_ce.rows.statistics import RowStatistics, along, row_statistics, work_dtype

__all__ = ["loss", "statistics"]


def loss(call: Call) -> Tensor:
    """The sum of the losses, ()."""
    rows = statistics(call)
    arguments = call.target, call.ignore_index, call.class_weight, call.vocab_size, call.per_token
    return call.specification.objective.losses(rows, *arguments).sum().to(rows.log_sum.dtype)


def statistics(call: Call) -> RowStatistics:
    """The statistics of every row, (N,) each and 0 where ignored."""
    specification = call.specification
    counted = call.target != call.ignore_index
    products = call.tensors[0].where(counted.unsqueeze(-1), 0)
    if call.is_head:
        cast = [tensor.to(specification.settings.compute_dtype) for tensor in (products, *call.tensors[1:])]
        products = F.linear(*cast)
    temperature, ids = call.temperature, call.ids
    temperature = None if temperature is None else temperature.where(counted, 1)
    ids = None if ids is None else ids.where(ids != call.ignore_index, -1)
    z = specification.logits(products.to(work_dtype(products.dtype)), temperature)
    teacher = {}
    if specification.teacher is not None:
        of_teacher = teacher_logits(call, counted, temperature, z.dtype)
        teacher = {"teacher": of_teacher, "share": specification.teacher.share}
    target = call.target.where(counted, 0)
    rows = row_statistics(z, target, call.class_weight, specification.names, ids, **teacher)
    return rows.map(lambda part: part.where(along(counted, part), 0))
