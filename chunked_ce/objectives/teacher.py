"""`Teacher`: the distributions that a student is trained to follow."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from chunked_ce.arguments import FLOATING, INDICES, check_tensor, described, number

__all__ = ["Teacher"]


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """The distribution of each token that a `Divergence` compares the student's with, by one of three sources.

    It is constant: its tensors are detached, so that no gradient reaches them, and nothing of the size (N, V) is
    computed or copied as a whole. Its dtype may differ from the student's: the products of ``hidden`` run in the
    autocast dtype if autocast is on, else in the dtype of ``hidden``.

    Args:
        hidden: hidden states (..., D_t) of the teacher, for the same tokens as the student's; D_t may differ from the
            student's D.
        weight: the teacher's head (V, D_t); ``bias``: (V,).
        softcap, logit_scale: of the teacher's logits, as in `chunked_ce.linear_cross_entropy`.
        logits: logits (..., V) that exist, instead of ``hidden`` and ``weight``; -inf for a probability of 0.
        probabilities: probabilities (..., V) that exist, instead; the softmax of their logarithms divided by the
            temperature counts, so that they need not sum to 1.
        words: for a student with a vocabulary of its own, such as a draft model: the teacher's entry (V,) that each
            entry of the student stands for, int32 or int64. The teacher's probabilities are renormalised over them.

    With a sharded vocabulary, ``weight`` and ``bias``, or the last dimension of ``logits`` or ``probabilities``, may be
    this rank's entries or the whole vocabulary; ``words``, and with it the teacher, are whole. With
    ``input_grad="sequence"``, the teacher's tensors hold the tokens of all ranks, as ``target`` does. With
    ``tokens="own"`` they hold this rank's tokens, and ``logits`` and ``probabilities`` the whole vocabulary.

    Raises ``TypeError`` or ``ValueError`` when it is made with a value that is not allowed.

    >>> import torch
    >>> Teacher(torch.zeros(2, 4), torch.eye(8, 4)).tensors.keys()
    dict_keys(['hidden', 'weight'])
    """

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    _: dataclasses.KW_ONLY
    logits: Tensor | None = None
    probabilities: Tensor | None = None
    words: Tensor | None = None

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            check_tensor(f"teacher.{name}", tensor, INDICES if name == "words" else FLOATING)
        sources = [name for name in ("hidden", "logits", "probabilities") if getattr(self, name) is not None]
        if len(sources) != 1:
            had = " and ".join(sources) or "none of them"
            raise ValueError(f"teacher must have hidden and weight, or logits, or probabilities, had {had}")
        for name in ("weight", "bias"):
            required = name == "weight" and sources == ["hidden"]
            if required and self.weight is None:
                raise ValueError("teacher.weight must be (V, D) beside teacher.hidden, was None")
            if sources != ["hidden"] and getattr(self, name) is not None:
                raise ValueError(f"teacher.{name} belongs to teacher.hidden, was given with teacher.{sources[0]}")
        if self.softcap is not None and not 0.0 < number("teacher.softcap", self.softcap) < math.inf:
            raise ValueError(f"teacher.softcap must be None or finite and > 0, was {described(self.softcap)}")
        if not -math.inf < number("teacher.logit_scale", self.logit_scale) < math.inf:
            raise ValueError(f"teacher.logit_scale must be finite, was {described(self.logit_scale)}")
        if self.probabilities is not None and (self.softcap is not None or self.logit_scale != 1.0):
            raise ValueError("teacher.softcap and teacher.logit_scale belong to logits, were given with probabilities")

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it has, by name."""
        names = ("hidden", "weight", "bias", "logits", "probabilities", "words")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
