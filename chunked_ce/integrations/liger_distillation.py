"""Liger's Jensen-Shannon divergences by their own names: two of ``liger_kernel.transformers`` and one of its
``chunked_loss``, 0.8.5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chunked_ce import functional
from chunked_ce.arguments import number
from chunked_ce.integrations.liger_options import Options, chunk_options
from chunked_ce.objectives import Teacher

__all__ = ["LigerFusedLinearJSD", "LigerFusedLinearJSDLoss", "liger_fused_linear_jsd"]


def liger_fused_linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    shift_labels: Tensor | None = None,
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """The mean Jensen-Shannon divergence of a teacher and a student: `chunked_ce.linear_divergence` of both heads.

    Args:
        student_input: (..., D).
        student_weight: (V, D).
        teacher_input: (..., D').
        teacher_weight: (V, D').
        shift_labels: (...), says which tokens count: those that are not ``ignore_index``; None: all.
        jsd_beta: in [0, 1]: KL(teacher || student) for 0, KL(student || teacher) for 1.
        temperature: > 0, divides the logits of both.
        accum_dtype: as in `liger_fused_linear_cross_entropy`.

    >>> import torch
    >>> hidden = torch.eye(2, 4)
    >>> liger_fused_linear_jsd(hidden, torch.zeros(8, 4), hidden, torch.eye(8, 4), jsd_beta=0.0)
    tensor(0.0851)
    """
    return functional.linear_divergence(
        student_input,
        student_weight,
        Teacher(teacher_input, teacher_weight),
        target=shift_labels,
        beta=jsd_beta,
        ignore_index=ignore_index,
        temperature=temperature,
        options=chunk_options(accum_dtype),
    )


class LigerFusedLinearJSD(Options):
    """`liger_fused_linear_jsd` as a module."""

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        return liger_fused_linear_jsd(
            student_input, student_weight, teacher_input, teacher_weight, shift_labels, **self.options()
        )


class LigerFusedLinearJSDLoss(Options):
    """``weight_soft_loss`` times the divergence of a teacher and a student, plus ``weight_hard_loss`` times the mean
    cross-entropy of the student at temperature 1: `chunked_ce.linear_divergence` and `chunked_ce.linear_cross_entropy`.

    With ``return_soft_hard_loss`` it returns ``(loss, soft, hard)``, whose last two have no gradient. A cross-entropy
    of weight 0 is not computed. ``compiled`` and ``chunk_size`` have no effect: nothing here is compiled, and
    `chunked_ce.plan` chooses the chunks. Student and teacher have the same vocabulary: there is no padding of the
    student's logits with zeros.

    >>> import torch
    >>> hidden, labels = torch.eye(2, 4), torch.tensor([1, -100])
    >>> LigerFusedLinearJSDLoss(beta=0.0)(hidden, torch.zeros(8, 4), hidden, torch.eye(8, 4), labels)
    tensor(1.0823)
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__(locals())
        number("weight_hard_loss", weight_hard_loss)
        number("weight_soft_loss", weight_soft_loss)

    def forward(
        self,
        student_input: Tensor,  # (..., D)
        student_weight: Tensor,  # (V, D)
        teacher_input: Tensor,  # (..., D')
        teacher_weight: Tensor,  # (V, D')
        true_labels: Tensor,  # (...)
        student_bias: Tensor | None = None,  # (V,)
        teacher_bias: Tensor | None = None,  # (V,)
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        student = student_input, student_weight
        keywords: dict[str, Any] = {"linear_bias": student_bias, "ignore_index": self.ignore_index}
        soft = functional.linear_divergence(
            *student,
            Teacher(teacher_input, teacher_weight, bias=teacher_bias),
            target=true_labels,
            beta=self.beta,
            temperature=self.temperature,
            **keywords,
        )
        hard = torch.zeros_like(soft)
        if self.weight_hard_loss or self.return_soft_hard_loss:
            hard = functional.linear_cross_entropy(*student, true_labels, **keywords)
        loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss
