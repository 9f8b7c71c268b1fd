"""Liger's policy gradients by their own name: `LigerFusedLinearGRPOLoss` of ``liger_kernel.chunked_loss`` 0.8.5."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from chunked_ce import functional
from chunked_ce.arguments import WEIGHTS, check_tensor, described, is_one_of, number
from chunked_ce.integrations.liger_options import Options, refuse
from chunked_ce.objectives import PolicyGradient
from chunked_ce.objectives.base import Tokens
from chunked_ce.rows.statistics import RowStatistics

__all__ = ["LigerFusedLinearGRPOLoss"]

_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
_IGNORED = -100


@dataclasses.dataclass(frozen=True)
class _PolicyGradient(PolicyGradient):
    """`PolicyGradient`, with the tokens that Liger calls clipped."""

    def sums(self, rows: RowStatistics, tokens: Tokens) -> dict[str, Tensor]:
        sums = super().sums(rows, tokens)
        return sums | {"clipped": sums["clipped"].where(tokens.advantage > 0, 0)} if self.kind == "cispo" else sums


class LigerFusedLinearGRPOLoss(Options):
    """`chunked_ce.objectives.PolicyGradient` of a head, with the means of several methods.

    Arguments and results are Liger's: ``(loss, metrics)``, where the metrics are, over the tokens that count, the mean
    of the divergence from the reference (unless ``beta`` is 0) and the share of clipped tokens. ``loss_type`` may be
    ``"grpo"`` (the mean over sequences of their means), ``"bnpo"`` (over tokens), ``"dapo"`` and ``"cispo"`` (over the
    tokens of all ranks, or ``num_items_in_batch``) or ``"dr_grpo"`` (over ``max_completion_length`` places of each
    sequence). ``compiled`` and ``chunk_size`` have no effect: nothing here is compiled, and `chunked_ce.plan` chooses
    the chunks. For ``"cispo"``, ``epsilon_high`` >= 1 bounds the ratio itself and ``epsilon_low`` has no effect, as
    there.

    Raises:
        ValueError, TypeError: an argument is not as described, or has no counterpart: other kinds of ``loss_type`` and
            their numbers, ``importance_sampling_level="sequence"``, ``delta`` and ``use_bias_correction_kl``.

    >>> _ = torch.manual_seed(0)
    >>> ids, advantages = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([1.0, -0.5])
    >>> loss, (clipped,) = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)(
    ...     torch.randn(2, 3, 4), torch.randn(8, 4), ids, ids != 0, advantages
    ... )
    >>> loss, clipped
    (tensor(-0.4000), tensor(0.))
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__(locals())
        if not is_one_of(loss_type, _TYPES):
            raise ValueError(f"loss_type must be one of {', '.join(map(repr, _TYPES))}, was {described(loss_type)}")
        refuse(
            "chunked_ce.objectives.PolicyGradient has no other",
            importance_sampling_level=(importance_sampling_level, "token"),
            delta=(delta, None),
            use_bias_correction_kl=(use_bias_correction_kl, False),
        )
        refuse(
            f"it has no effect with loss_type={loss_type!r}",
            sapo_temperature_pos=(sapo_temperature_pos, 1.0),
            sapo_temperature_neg=(sapo_temperature_neg, 1.05),
            vespo_k_pos=(vespo_k_pos, 2.0),
            vespo_lambda_pos=(vespo_lambda_pos, 3.0),
            vespo_k_neg=(vespo_k_neg, 3.0),
            vespo_lambda_neg=(vespo_lambda_neg, 2.0),
        )
        if loss_type == "dr_grpo" and not number("max_completion_length", max_completion_length) > 0:
            raise ValueError(f"max_completion_length must be > 0, was {described(max_completion_length)}")
        for name, value, most in (("epsilon_low", epsilon_low, 1.0), ("epsilon_high", epsilon_high, math.inf)):
            if not 0.0 <= number(name, value) < most:
                raise ValueError(f"{name} must be in [0, {most}), was {described(value)}")
        self._objective()

    def _objective(self) -> _PolicyGradient:
        # Without a reference model the reference is the policy itself: no divergence, and no gradient of one.
        kl = self.beta if self.use_ref_model else 0.0
        if self.loss_type != "cispo":
            return _PolicyGradient("clip", self.epsilon_low, self.epsilon_high, kl)
        if number("epsilon_high", self.epsilon_high) < 1:
            raise ValueError(
                f"epsilon_high must be >= 1 with loss_type='cispo', where it bounds the ratio, was {self.epsilon_high}"
            )
        return _PolicyGradient("cispo", clip_high=self.epsilon_high - 1, kl=kl)

    def forward(
        self,
        _input: Tensor,  # (B, T, D)
        lin_weight: Tensor,  # (V, D)
        selected_token_ids: Tensor,  # (B, T)
        attention_mask: Tensor,  # (B, T), 0 where a token does not count
        advantages: Tensor,  # (B,)
        bias: Tensor | None = None,  # (V,)
        ref_per_token_logps: Tensor | None = None,  # (B, T)
        old_per_token_logps: Tensor | None = None,  # (B, T)
        ref_input: Tensor | None = None,  # (B, T, D')
        ref_weight: Tensor | None = None,  # (V, D')
        ref_bias: Tensor | None = None,  # (V,)
        vllm_is_ratio: Tensor | None = None,  # (B, T), (B, 1) or (B,), >= 0
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        shape = selected_token_ids.shape
        check_tensor("attention_mask", attention_mask, WEIGHTS)
        for name, tensor, allowed in (("attention_mask", attention_mask, shape), ("advantages", advantages, shape[:1])):
            if tensor.shape != allowed:
                raise ValueError(f"{name} must have shape {tuple(allowed)}, had {tuple(tensor.shape)}")
        mask = attention_mask.to(torch.float32)
        target = selected_token_ids.masked_fill(attention_mask == 0, _IGNORED)
        reference = ref_per_token_logps
        objective = self._objective()
        if not objective.kl:
            reference = None
        elif reference is None:
            if ref_input is None or ref_weight is None:
                raise ValueError("ref_per_token_logps, or ref_input and ref_weight, must be given with use_ref_model")
            with torch.no_grad():
                reference = functional.linear_logprobs(
                    ref_input, ref_weight, target, linear_bias=ref_bias, temperature=self.temperature
                )
        # A factor >= 0 of the loss, but not of its divergence, is one of the advantage.
        advantage = advantages.unsqueeze(1) * (1.0 if vllm_is_ratio is None else _per_token(vllm_is_ratio, shape))
        loss, stats = functional.linear_loss(
            objective,
            _input,
            lin_weight,
            target,
            linear_bias=bias,
            temperature=self.temperature,
            return_stats=True,
            advantage=advantage.expand(shape),
            old_logprob=old_per_token_logps,
            ref_logprob=reference,
            **self._mean(mask, num_items_in_batch),
        )
        tokens = mask.sum().clamp(min=1)
        divergence = stats.kl / tokens if objective.kl else torch.zeros_like(loss)
        clipped = stats.clipped / tokens
        return loss, ((divergence.detach(), clipped) if self.beta else (clipped,))

    def _mean(self, mask: Tensor, num_items: float | Tensor | None) -> dict[str, Any]:
        """The weights of tokens and the number that the sum is divided by."""
        if self.loss_type == "grpo":
            return {"token_weight": mask / mask.sum(-1, keepdim=True).clamp(min=1), "num_tokens": len(mask)}
        if self.loss_type == "dr_grpo":
            return {"token_weight": mask, "num_tokens": len(mask) * self.max_completion_length}
        tokens = mask.sum()
        if self.loss_type != "bnpo":
            ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
            if num_items is not None:
                tokens = torch.as_tensor(num_items, dtype=torch.float32, device=mask.device)
            elif ranks > 1:
                dist.all_reduce(tokens)
            tokens = tokens / ranks
        return {"token_weight": mask, "num_tokens": tokens.clamp(min=1)}


def _per_token(ratio: Tensor, shape: torch.Size) -> Tensor:
    """The ratio of each token or sequence, (B, T) or (B, 1)."""
    ratio = ratio.unsqueeze(-1) if ratio.dim() == 1 else ratio
    if ratio.dim() != 2 or ratio.shape[0] != shape[0] or ratio.shape[1] not in (1, shape[1]):
        allowed = f"{tuple(shape)}, {(shape[0], 1)} or {tuple(shape[:1])}"
        raise ValueError(f"vllm_is_ratio must have shape {allowed}, was {described(ratio)}")
    return ratio
