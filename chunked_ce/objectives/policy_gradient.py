"""The policy gradients of reinforcement learning: PPO, GRPO and DAPO, CISPO, REINFORCE."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from chunked_ce.arguments import described, is_one_of, number
from chunked_ce.objectives.base import Objective, Tokens
from chunked_ce.rows.statistics import RowStatistics

__all__ = ["PolicyGradient"]

KINDS = ("clip", "cispo", "reinforce")


@dataclasses.dataclass(frozen=True)
class PolicyGradient(Objective):
    """The policy gradient of sampled tokens, with a penalty for leaving a reference and a bonus for entropy.

    With ``lp`` the log-probability of the target, ``A`` its advantage, ``r = exp(lp - old_logprob)`` and ``H`` the
    entropy of the row, the loss of a token is one of::

        "clip":       -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
        "cispo":      -stop(min(r, 1 + clip_high)) A lp
        "reinforce":  -A lp

    plus ``kl * (exp(ref_logprob - lp) - (ref_logprob - lp) - 1) - entropy * H``; ``stop`` stops the gradient.
    ``"clip"`` is that of PPO (arXiv:1707.06347, equation 7), GRPO (arXiv:2402.03300, equation 3, with its estimate of
    the KL divergence, equation 4) and, with ``clip_high`` above ``clip_low``, of DAPO (arXiv:2503.14476, equation 8);
    ``"cispo"`` is that of arXiv:2506.13585, equation 4.

    `chunked_ce.linear_loss` takes for each token: ``advantage``; ``old_logprob``, without which ``r`` is 1 with the
    gradient of ``lp``; ``ref_logprob``, needed if ``kl`` is not 0. The mean over tokens is DAPO's; that over sequences
    is one with the ``token_weight`` of `chunked_ce.sequence_weights`.

    `chunked_ce.LossStats` has two more fields: ``clipped``, the number of tokens without a gradient of the surrogate
    since their ratio is out of bounds (``"clip"``), or whose ratio is cut (``"cispo"``); and, if ``ref_logprob`` is
    given, ``kl``, the sum of the estimates of the KL divergence to the reference.

    Raises ``TypeError`` or ``ValueError`` when it is made with a value that is not allowed.

    >>> from chunked_ce import linear_loss
    >>> hidden, head, target = torch.zeros(2, 4), torch.eye(8, 4), torch.tensor([3, 5])
    >>> advantage, old = torch.tensor([1.0, -1.0]), torch.tensor([-2.5, -2.0])
    >>> tensors = {"advantage": advantage, "old_logprob": old}
    >>> loss, stats = linear_loss(PolicyGradient(), hidden, head, target, **tensors, return_stats=True)
    >>> loss, stats.clipped
    (tensor(-0.1382), tensor(1.))
    """

    kind: Literal["clip", "cispo", "reinforce"] = "clip"
    """``"clip"``, ``"cispo"`` or ``"reinforce"``."""

    clip_low: float = 0.2
    """How far below 1 a ratio may be, in [0, 1)."""

    clip_high: float = 0.2
    """How far above 1 a ratio may be, >= 0."""

    kl: float = 0.0
    """Factor of the KL divergence to the reference, >= 0."""

    entropy: float = 0.0
    """Factor of the entropy, >= 0."""

    def __post_init__(self) -> None:
        if not is_one_of(self.kind, KINDS):
            raise ValueError(f"kind must be 'clip', 'cispo' or 'reinforce', was {described(self.kind)}")
        for name in ("clip_low", "clip_high", "kl", "entropy"):
            value = getattr(self, name)
            if not 0.0 <= number(name, value) < (1.0 if name == "clip_low" else math.inf):
                allowed = "in [0, 1)" if name == "clip_low" else "finite and >= 0"
                raise ValueError(f"{name} must be {allowed}, was {described(value)}")
            object.__setattr__(self, name, float(value))

    @property
    def statistics(self) -> tuple[str, ...]:  # type: ignore[override]  # it depends on a field
        return ("mean",) if self.entropy else ()

    @property
    def per_token(self) -> tuple[str, ...]:  # type: ignore[override]  # it depends on a field
        return ("advantage", "ref_logprob") if self.kl else ("advantage",)

    @property
    def optional_per_token(self) -> tuple[str, ...]:  # type: ignore[override]  # it depends on a field
        return ("old_logprob",) if self.kl else ("old_logprob", "ref_logprob")

    def loss(self, rows: RowStatistics, tokens: Tokens) -> Tensor:
        logprob = rows.logprob
        advantage: Tensor = tokens.advantage.to(logprob.dtype)
        if self.kind == "clip":
            loss = -self._clipped_ratio(logprob, advantage, tokens) * advantage
        else:
            loss = -self._weight(logprob.detach(), tokens) * advantage * logprob
        if self.kl:
            loss = loss + self.kl * _divergence(logprob, tokens)
        return loss - self.entropy * rows.entropy if self.entropy else loss

    def slopes(self, rows: RowStatistics, tokens: Tokens) -> RowStatistics:
        logprob = rows.logprob
        advantage = tokens.advantage.to(logprob.dtype)
        if self.kind == "clip":
            ratio = _ratio(logprob, tokens)
            slope = -(ratio * advantage).masked_fill(self._is_flat(ratio, advantage), 0)
        else:
            slope = -self._weight(logprob, tokens) * advantage
        if self.kl:
            slope = slope - self.kl * torch.expm1(tokens.ref_logprob - logprob)
        if not self.entropy:
            return RowStatistics(maximum=None, log_sum=-slope, target=slope)
        mean = torch.full_like(slope, self.entropy)
        return RowStatistics(maximum=None, log_sum=-slope - self.entropy, target=slope, mean=mean)

    def sums(self, rows: RowStatistics, tokens: Tokens) -> dict[str, Tensor]:
        ratio = _ratio(rows.logprob, tokens)
        if self.kind == "clip":
            clipped = self._is_flat(ratio, tokens.advantage) & (tokens.advantage != 0)
        else:
            clipped = ratio > (1 + self.clip_high if self.kind == "cispo" else math.inf)
        sums = {"clipped": clipped.to(ratio.dtype)}
        return sums if tokens.ref_logprob is None else sums | {"kl": _divergence(rows.logprob, tokens)}

    def _clipped_ratio(self, logprob: Tensor, advantage: Tensor, tokens: Tokens) -> Tensor:
        """The ratio that min(r A, clip(r) A) takes, (n,)."""
        difference = _log_ratio(logprob, tokens)
        flat = self._is_flat(difference.detach().exp(), advantage)
        bound = torch.full_like(advantage, 1 - self.clip_low).masked_fill(advantage > 0, 1 + self.clip_high)
        # Not the exponential where it is out of bounds: it may be infinite, and 0 times that is NaN.
        return bound.where(flat, difference.where(~flat, 0).exp())

    def _is_flat(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        """Whether min(r A, clip(r) A) does not depend on r, (n,): r is out of bounds on the side of A, or A is 0."""
        above, below = ratio > 1 + self.clip_high, ratio < 1 - self.clip_low
        return ((advantage > 0) & above) | ((advantage < 0) & below) | (advantage == 0)

    def _weight(self, logprob: Tensor, tokens: Tokens) -> Tensor | float:
        """The constant factor of -A lp, (n,)."""
        return _ratio(logprob, tokens).clamp(max=1 + self.clip_high) if self.kind == "cispo" else 1.0


def _log_ratio(logprob: Tensor, tokens: Tokens) -> Tensor:
    """The log of the ratio of the policy to the one that sampled the tokens, (n,)."""
    return logprob - (logprob.detach() if tokens.old_logprob is None else tokens.old_logprob)


def _ratio(logprob: Tensor, tokens: Tokens) -> Tensor:
    return _log_ratio(logprob, tokens).exp()


def _divergence(logprob: Tensor, tokens: Tokens) -> Tensor:
    """The estimate exp(d) - d - 1 of the KL divergence to the reference, d = ref_logprob - lp, (n,)."""
    difference: Tensor = tokens.ref_logprob - logprob
    return torch.expm1(difference) - difference
