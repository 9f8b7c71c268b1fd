"""Liger's losses of preference tuning by their own names: those of ``liger_kernel.chunked_loss`` 0.8.5.

Arguments, their order and results are theirs; the formulas are those of `chunked_ce.preference`, on log-probabilities
of `chunked_ce.linear_logprobs`. What a loss returns beside its value has no gradient. A sequence without tokens has a
mean of 0 (there: NaN). ``compiled`` and ``chunk_size`` have no effect: nothing here is compiled, and `chunked_ce.plan`
chooses the chunks. docs/other_names.md says what becomes of each other argument, and what is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chunked_ce import functional, preference
from chunked_ce.arguments import described
from chunked_ce.integrations.liger_options import Options, refuse

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]


class _Sequences:
    """Sums of log-probabilities of sequences, (B,), and what Liger reports of their logits."""

    def __init__(
        self, input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int, averaged: bool
    ) -> None:
        logprobs = functional.linear_logprobs(input, weight, target, linear_bias=bias, ignore_index=ignore_index)
        if target.dim() != 2:
            raise ValueError(f"target must have shape (B, T), had {tuple(target.shape)}")
        self.input, self.weight, self.bias = input.detach(), weight.detach(), None if bias is None else bias.detach()
        self.length = (target != ignore_index).sum(-1)
        self.sums = logprobs.sum(-1)
        self.means = self.sums / self.length.clamp(min=1)
        self.scores = self.means if averaged else self.sums

    def logit_sum(self, of: Tensor | slice = slice(None)) -> Tensor:
        """The sum of all logits of the sequences ``of``, ignored tokens too: the product of two sums."""
        hidden = self.input[of]
        total = hidden.sum((0, 1), dtype=torch.float32) @ self.weight.sum(0, dtype=torch.float32)
        return total if self.bias is None else total + hidden.shape[0] * hidden.shape[1] * self.bias.float().sum()


class _Pairs(_Sequences):
    """The first half of the sequences is chosen, the second rejected."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if len(self.sums) % 2:
            raise ValueError(f"target must hold pairs, first all chosen ones, had {len(self.sums)} sequences")
        self.chosen, self.rejected = self.scores.chunk(2) if len(self.scores) else (self.scores, self.scores)
        self.pairs = len(self.chosen)
        self.lengths = dict(zip(("chosen_length", "rejected_length"), self.length.tensor_split(2), strict=True))

    def nll(self, wanted: bool) -> Tensor:
        """The mean over all chosen tokens, 0 if it is not ``wanted``."""
        if not wanted:
            return self.sums.new_zeros(())
        return -self.sums[: self.pairs].sum() / self.length[: self.pairs].sum().clamp(min=1)

    def reported(self, nll: Tensor, beta: float, *gains: Tensor) -> tuple[Tensor, ...]:
        """What Liger returns beside a loss; ``gains`` are the scores beyond the reference's."""
        numbers = max(self.pairs * self.input.shape[1] * len(self.weight), 1)
        means = [self.logit_sum(half) / numbers for half in (slice(self.pairs), slice(self.pairs, None))]
        rewards = [beta * gain for gain in gains or (self.chosen, self.rejected)]
        return tuple(part.detach() for part in (self.chosen, self.rejected, *means, nll, *rewards))


class LigerFusedLinearDPOLoss(Options):
    """`chunked_ce.preference.dpo` of two heads, ``alpha`` times the likelihood of the chosen responses added.

    The first half of the sequences is chosen, the second rejected. Returns ``(loss, (chosen, rejected, mean chosen
    logit, mean rejected logit, nll, chosen rewards, rejected rewards))``, the first two (B/2,) log-probabilities, the
    mean logits over ignored tokens too.

    Raises:
        ValueError, TypeError: an argument has no counterpart: a ``loss_type`` other than ``"sigmoid"`` and a
            ``label_smoothing``, which has no effect on that one there, or it is not as `chunked_ce.preference` says.

    >>> _ = torch.manual_seed(0)
    >>> input, head = torch.randn(2, 3, 4), torch.randn(8, 4)
    >>> loss, (chosen, *_) = LigerFusedLinearDPOLoss(use_ref_model=False)(head, input, torch.tensor([[1, 2, 3]] * 2))
    >>> loss.shape, chosen.shape
    (torch.Size([]), torch.Size([1]))
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__(locals())
        refuse("chunked_ce.preference has no other", loss_type=(loss_type, "sigmoid"))
        why = "Liger leaves it out with loss_type='sigmoid', chunked_ce.preference.dpo does not"
        refuse(why, label_smoothing=(label_smoothing, 0.0))
        refuse("it belongs to loss_type='discopop'", discopop_tau=(discopop_tau, 0.05))

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        policy = _Pairs(_input, lin_weight, target, bias, self.ignore_index, self.average_log_prob)
        reference = _reference(self, target, ref_input, ref_weight, ref_bias, policy.scores)
        chosen, rejected = reference[: policy.pairs], reference[policy.pairs :]
        nll = policy.nll(self.compute_nll_loss)
        loss = preference.dpo(policy.chosen, policy.rejected, chosen, rejected, beta=self.beta) + self.alpha * nll
        return loss, policy.reported(nll, self.beta, policy.chosen - chosen, policy.rejected - rejected)


class LigerFusedLinearORPOLoss(Options):
    """`chunked_ce.preference.orpo` of a head: arguments and results as of `LigerFusedLinearDPOLoss`.

    ``nll_target`` (B, T), perhaps with the prompt, takes the place of ``target`` in the likelihood. After the rewards,
    the results have the means of ``log sigmoid`` of the log odds ratio, and of that ratio.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        policy = _Pairs(_input, lin_weight, target, bias, self.ignore_index, True)
        if self.compute_nll_loss and nll_target is not None:
            chosen = _input[: policy.pairs], lin_weight, nll_target[: policy.pairs]
            nll = functional.linear_cross_entropy(*chosen, linear_bias=bias, ignore_index=self.ignore_index)
        else:
            nll = policy.nll(self.compute_nll_loss)
        means = policy.chosen, policy.rejected
        loss = preference.orpo(*means, beta=self.beta, nll=nll)
        with torch.no_grad():
            ratio = -preference.orpo(*means, beta=1.0, alpha=0.0)
            eps = torch.finfo(loss.dtype).eps
            odds = [mean.exp().logit(eps) for mean in means]
        return loss, (*policy.reported(nll, self.beta), ratio, (odds[0] - odds[1]).sum() / max(policy.pairs, 1))


class LigerFusedLinearSimPOLoss(Options):
    """`chunked_ce.preference.simpo` of a head, ``alpha`` times the likelihood of the chosen responses added.

    Arguments and results as of `LigerFusedLinearDPOLoss`.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(locals())

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        policy = _Pairs(_input, lin_weight, target, bias, self.ignore_index, True)
        nll = policy.nll(self.compute_nll_loss)
        numbers = {"beta": self.beta, "gamma": self.gamma, "label_smoothing": self.label_smoothing}
        loss = preference.simpo(policy.chosen, policy.rejected, **numbers) + self.alpha * nll
        return loss, policy.reported(nll, self.beta)


class LigerFusedLinearCPOLoss(Options):
    """`chunked_ce.preference.cpo` of a head: arguments and results as of `LigerFusedLinearDPOLoss`."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(locals())

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        policy = _Pairs(_input, lin_weight, target, bias, self.ignore_index, self.average_log_prob)
        nll = policy.nll(self.compute_nll_loss)
        numbers = {"beta": self.beta, "alpha": self.alpha, "label_smoothing": self.label_smoothing}
        return preference.cpo(policy.chosen, policy.rejected, nll=nll, **numbers), policy.reported(nll, self.beta)


class LigerFusedLinearKTOLoss(Options):
    """`chunked_ce.preference.kto` of two heads, for sequences (B, T) of which ``preference_labels`` (B,) are chosen.

    ``kl``, a number or a tensor (B,), is the reference point as it is, below 0 too. Returns ``(loss, (sums over the
    chosen and over the rejected: of log-probabilities, of all logits, of rewards))``.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        policy = _Sequences(_input, lin_weight, target, bias, self.ignore_index, self.average_log_prob)
        labels = _labels(preference_labels, target)
        reference = _reference(self, target, ref_input, ref_weight, ref_bias, policy.scores)
        # Instead of ``kl=``, which is one number, and at least 0.
        point = reference + (0.0 if kl is None else kl)
        of_both = policy.scores[labels], policy.scores[~labels], point[labels], point[~labels]
        loss = preference.kto(*of_both, beta=self.beta)
        rewards = self.beta * (policy.scores - reference)
        logits = [policy.logit_sum(labels), policy.logit_sum(~labels)]
        sums = [(values * labels).sum() for values in (policy.scores, rewards)]
        others = [(values * ~labels).sum() for values in (policy.scores, rewards)]
        return loss, tuple(part.detach() for part in (sums[0], others[0], *logits, sums[1], others[1]))


def _labels(labels: Tensor | None, target: Tensor) -> Tensor:
    if not isinstance(labels, Tensor) or labels.dtype != torch.bool or labels.shape != target.shape[:1]:
        raise ValueError(f"preference_labels must be boolean, {tuple(target.shape[:1])}, was {described(labels)}")
    return labels


def _reference(
    loss: Any, target: Tensor, input: Tensor | None, weight: Tensor | None, bias: Tensor | None, like: Tensor
) -> Tensor:
    """The reference's scores (B,), 0 without a reference."""
    if not loss.use_ref_model:
        for name, tensor in {"ref_input": input, "ref_weight": weight, "ref_bias": bias}.items():
            if tensor is not None:
                raise ValueError(f"{name} must be None with use_ref_model=False, was {described(tensor)}")
        return torch.zeros_like(like)
    if input is None or weight is None:
        name = "ref_input" if input is None else "ref_weight"
        raise ValueError(f"{name} must be a tensor with use_ref_model=True, was None")
    with torch.no_grad():
        scores = _Sequences(input, weight, target, bias, loss.ignore_index, loss.average_log_prob).scores
    return scores.to(like.dtype)
