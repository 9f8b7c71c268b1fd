"""Losses of preference tuning: functions of the summed log-probabilities of sequences, (B,), not of logits.

The sums come from `chunked_ce.linear_logprobs`, which never holds the logits, (N, V), and takes a sharded vocabulary
(``vocab=VocabShard(...)``) too: its result is then the same on every rank, and so are these losses.

>>> import torch
>>> from chunked_ce import linear_logprobs, preference
>>> hidden, head = torch.randn(6, 5, 4), torch.randn(8, 4)  # (2B, T, D): B chosen sequences, then B rejected ones
>>> target = torch.randint(8, (6, 5))  # the prompt and the padding are -100
>>> policy_chosen, policy_rejected = linear_logprobs(hidden, head, target).sum(-1).chunk(2)  # (B,) each
>>> chosen_length, rejected_length = (target != -100).sum(-1).chunk(2)  # (B,) each
>>> preference.simpo(
...     policy_chosen, policy_rejected, chosen_length=chosen_length, rejected_length=rejected_length
... ).shape
torch.Size([])

What all of them share:

- ``policy_*`` are sums over the tokens of a response, (B,), of a floating-point dtype, and differentiable.
- ``reference_*``, the same sums of the frozen reference model, and ``*_length``, the numbers of tokens in these sums,
  are constant, (B,). The mean of a sequence without tokens is 0.
- The result is the mean over the B pairs (or all sequences), a 0-d tensor in float32 (float64 if one of the sums is
  float64). For B = 0 it is 0, attached to the graph.
- ``ValueError`` or ``TypeError`` says which argument was wrong: a shape, a dtype, a device, a number out of range, or a
  constant that requires grad.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_ce.arguments import COUNTS, FLOATING, check_tensor, described, number

__all__ = ["cpo", "dpo", "ipo", "kto", "orpo", "simpo"]


def dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation (arXiv:2305.18290, equation 7).

    With h the difference of the log-ratios ``policy - reference`` of the chosen and the rejected response::

        -log sigmoid(beta * h)

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: sums of log-probabilities, (B,).
        beta: > 0, how closely the policy is held to the reference.
        label_smoothing: the probability in [0, 0.5) that the labels of a pair are the wrong way round: "conservative
            DPO", ``-(1 - label_smoothing) * log sigmoid(beta * h) - label_smoothing * log sigmoid(-beta * h)``.

    >>> import torch
    >>> dpo(torch.tensor([-10.0]), torch.tensor([-12.0]), torch.tensor([-11.0]), torch.tensor([-11.0]))
    tensor(0.5981)
    """
    beta = _positive("beta", beta)
    label_smoothing = _label_smoothing(label_smoothing)
    margin = _log_ratio_margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return _mean(_classified(beta * margin, label_smoothing))


def ipo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    chosen_length: Tensor | None = None,
    rejected_length: Tensor | None = None,
) -> Tensor:
    """Identity preference optimisation (arXiv:2310.12036, equation 17), whose tau is ``beta``.

    With h as in `dpo`::

        (h - 1 / (2 * beta)) ** 2

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: sums of log-probabilities, (B,).
        beta: > 0.
        chosen_length, rejected_length: numbers of tokens, (B,); if given, h is the difference of the log-ratios per
            token, as in TRL.

    >>> import torch
    >>> ipo(torch.tensor([-10.0]), torch.tensor([-12.0]), torch.tensor([-11.0]), torch.tensor([-11.0]))
    tensor(9.)
    """
    beta = _positive("beta", beta)
    margin = _log_ratio_margin(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, chosen_length, rejected_length
    )
    return _mean((margin - 1 / (2 * beta)).square())


def simpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    chosen_length: Tensor | None = None,
    rejected_length: Tensor | None = None,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Simple preference optimisation (arXiv:2405.14734, equation 6), which needs no reference.

    With a the mean log-probability per token, ``policy / length``::

        -log sigmoid(beta * (a_chosen - a_rejected) - gamma)

    Args:
        policy_chosen, policy_rejected: sums of log-probabilities, (B,).
        chosen_length, rejected_length: numbers of tokens, (B,); None for sums that are divided by them already.
        beta: > 0.
        gamma: >= 0, the margin by which the chosen response should win. It is not multiplied by ``beta``.
        label_smoothing: as in `dpo`.

    >>> import torch
    >>> length = torch.tensor([4])
    >>> simpo(torch.tensor([-4.0]), torch.tensor([-8.0]), chosen_length=length, rejected_length=length)
    tensor(0.2014)
    """
    beta = _positive("beta", beta)
    gamma = _not_negative("gamma", gamma)
    label_smoothing = _label_smoothing(label_smoothing)
    chosen, rejected = _means_per_token(policy_chosen, policy_rejected, chosen_length, rejected_length)
    return _mean(_classified(beta * (chosen - rejected) - gamma, label_smoothing))


def orpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    chosen_length: Tensor | None = None,
    rejected_length: Tensor | None = None,
    beta: float = 0.1,
    alpha: float = 1.0,
    nll: Tensor | None = None,
) -> Tensor:
    """Odds ratio preference optimisation (arXiv:2403.07691, equations 6 and 7), whose lambda is ``beta``.

    With a the mean log-probability per token, ``policy / length``, and ``log_odds(a) = a - log(1 - exp(a))``::

        alpha * -a_chosen - beta * log sigmoid(log_odds(a_chosen) - log_odds(a_rejected))

    Args:
        policy_chosen, policy_rejected: sums of log-probabilities, (B,).
        chosen_length, rejected_length: numbers of tokens, (B,); None for sums that are divided by them already.
        beta: > 0, the factor of the odds ratio.
        alpha: >= 0, the factor of the first term, the negative log-likelihood of the chosen responses: 1 in the paper.
        nll: a tensor of one element that takes the place of the mean of ``-a_chosen``; differentiable. TRL and Liger
            have the mean over all chosen tokens, ``-policy_chosen.sum() / chosen_length.sum()``, and TRL's counts the
            tokens of the prompts too: a `chunked_ce.linear_cross_entropy`.

    >>> import torch
    >>> length = torch.tensor([4])
    >>> orpo(torch.tensor([-4.0]), torch.tensor([-8.0]), chosen_length=length, rejected_length=length)
    tensor(1.0238)
    """
    beta = _positive("beta", beta)
    alpha = _not_negative("alpha", alpha)
    chosen, rejected = _means_per_token(policy_chosen, policy_rejected, chosen_length, rejected_length)
    loss = beta * _mean(_classified(_log_odds(chosen) - _log_odds(rejected)))
    return loss + _likelihood_term(alpha, nll, chosen)


def cpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    nll: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Contrastive preference optimisation (arXiv:2401.08417, section 3), which needs no reference.

    The paper's L_prefer + L_NLL::

        -log sigmoid(beta * (policy_chosen - policy_rejected)) + alpha * -policy_chosen

    Args:
        policy_chosen, policy_rejected: sums of log-probabilities, (B,).
        beta: > 0.
        alpha: >= 0, the factor of the second term, the negative log-likelihood of the chosen responses: 1 in the paper.
        nll: a tensor of one element that takes the place of the mean of ``-policy_chosen``; differentiable. The
            authors' code, TRL and Liger have the mean over all chosen tokens,
            ``-policy_chosen.sum() / chosen_length.sum()``.
        label_smoothing: as in `dpo`.

    >>> import torch
    >>> cpo(torch.tensor([-4.0]), torch.tensor([-8.0]))
    tensor(4.5130)
    """
    beta = _positive("beta", beta)
    alpha = _not_negative("alpha", alpha)
    label_smoothing = _label_smoothing(label_smoothing)
    chosen, rejected = _sums({"policy_chosen": policy_chosen, "policy_rejected": policy_rejected})
    loss = _mean(_classified(beta * (chosen - rejected), label_smoothing))
    return loss + _likelihood_term(alpha, nll, chosen)


def kto(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    kl: float | Tensor = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimisation (arXiv:2402.01306, equation 8): sequences are labelled one by one, not in pairs.

    With r the log-ratio ``policy - reference`` and z = max(kl, 0) the reference point::

        desirable_weight * (1 - sigmoid(beta * (r - z)))        of a chosen (desirable) sequence
        undesirable_weight * (1 - sigmoid(beta * (z - r)))      of a rejected (undesirable) one

    Args:
        policy_chosen, reference_chosen: sums of log-probabilities of the desirable sequences, (B,).
        policy_rejected, reference_rejected: those of the undesirable ones, (B',), perhaps of another number.
        beta: > 0.
        kl: the estimated divergence of the policy from the reference, a number or a tensor of one element, constant.
            The paper's estimate is the mean log-ratio of responses to other prompts than their own:
            ``(policy_mismatched - reference_mismatched).mean().detach()``, over all ranks if there are several. 0
            leaves the reference point out.
        desirable_weight, undesirable_weight: >= 0, the paper's lambda_D and lambda_U.

    Returns:
        The mean over all B + B' sequences.

    >>> import torch
    >>> kto(*(torch.tensor([sum]) for sum in (-4.0, -6.0, -5.0, -5.0)), kl=0.5)
    tensor(0.4750)
    """
    beta = _positive("beta", beta)
    desirable_weight = _not_negative("desirable_weight", desirable_weight)
    undesirable_weight = _not_negative("undesirable_weight", undesirable_weight)
    policy_chosen, reference_chosen = _sums({"policy_chosen": policy_chosen}, {"reference_chosen": reference_chosen})
    of_rejected = {"policy_rejected": policy_rejected}, {"reference_rejected": reference_rejected}
    policy_rejected, reference_rejected = _sums(*of_rejected)
    _check_device("policy_rejected", policy_rejected, policy_chosen)
    point = _reference_point(kl, policy_chosen)
    # 1 - sigmoid(x) as sigmoid(-x), which does not cancel where the loss is small.
    chosen = desirable_weight * torch.sigmoid(-beta * (policy_chosen - reference_chosen - point))
    rejected = undesirable_weight * torch.sigmoid(beta * (policy_rejected - reference_rejected - point))
    return _mean(torch.cat([chosen, rejected]))


def _log_ratio_margin(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    chosen_length: Tensor | None = None,
    rejected_length: Tensor | None = None,
) -> Tensor:
    """By how much the chosen response gained more on the reference than the rejected one, (B,)."""
    constants = {"reference_chosen": reference_chosen, "reference_rejected": reference_rejected}
    tensors = _sums({"policy_chosen": policy_chosen, "policy_rejected": policy_rejected}, constants)
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = tensors
    # Policy and reference first: two large sums that are close to each other.
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    chosen, rejected = _over_lengths(chosen, rejected, chosen_length, rejected_length)
    return chosen - rejected


def _means_per_token(
    policy_chosen: Tensor, policy_rejected: Tensor, chosen_length: Tensor | None, rejected_length: Tensor | None
) -> tuple[Tensor, Tensor]:
    chosen, rejected = _sums({"policy_chosen": policy_chosen, "policy_rejected": policy_rejected})
    return _over_lengths(chosen, rejected, chosen_length, rejected_length)


def _over_lengths(
    chosen: Tensor, rejected: Tensor, chosen_length: Tensor | None, rejected_length: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sums over the numbers of tokens, if these are given."""
    if chosen_length is None and rejected_length is None:
        return chosen, rejected
    if chosen_length is None or rejected_length is None:
        missing = "chosen_length" if chosen_length is None else "rejected_length"
        raise TypeError(f"{missing} was None: give the lengths of both sides of a pair, or of neither")
    return (
        _per_token("chosen_length", chosen, chosen_length),
        _per_token("rejected_length", rejected, rejected_length),
    )


def _per_token(name: str, sums: Tensor, length: Tensor) -> Tensor:
    check_tensor(name, length, COUNTS)
    _check_like(name, length, sums)
    _check_constant(name, length)
    return sums / length.clamp(min=1).to(sums.dtype)


def _classified(logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The cross-entropy of "the chosen response is the better one", (B,)."""
    losses = -F.logsigmoid(logits)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-logits)
    return losses


def _log_odds(mean: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean), (B,), with 1 - p as -expm1(mean), exact for confident sequences too.

    A mean of 0, where rounding takes a p close to 1, has the odds of the largest mean below 0.
    """
    below_0 = mean.clamp(max=-torch.finfo(mean.dtype).tiny)
    return mean - torch.log(-torch.expm1(below_0))


def _likelihood_term(alpha: float, nll: Tensor | None, chosen: Tensor) -> Tensor | float:
    if nll is not None:
        check_tensor("nll", nll, FLOATING)
        _check_one_element("nll", nll)
        _check_device("nll", nll, chosen)
    if not alpha:
        return 0.0  # rather than 0 times what may be infinite
    return alpha * (_mean(-chosen) if nll is None else nll.reshape(()).to(chosen.dtype))


def _mean(losses: Tensor) -> Tensor:
    """0 of an empty batch."""
    sequences = torch.sym_max(losses.shape[0], 1)
    mean: Tensor = losses.sum() / sequences
    return mean


# ---- checks ----


def _sums(policy: dict[str, Tensor], reference: dict[str, Tensor] | None = None) -> list[Tensor]:
    """The tensors in the dtype of the loss."""
    named = policy | (reference or {})
    first = next(iter(policy.values()))
    for name, tensor in named.items():
        check_tensor(name, tensor, FLOATING)
        if tensor.dim() != 1:
            raise ValueError(
                f"{name} must have shape (B,), one sum of log-probabilities for each sequence, "
                f"had {tuple(tensor.shape)}"
            )
        _check_like(name, tensor, first)
    for name in reference or {}:
        _check_constant(name, named[name])
    double = any(tensor.dtype == torch.float64 for tensor in named.values())
    return [tensor.to(torch.float64 if double else torch.float32) for tensor in named.values()]


def _reference_point(kl: float | Tensor, policy: Tensor) -> Tensor | float:
    if not isinstance(kl, Tensor):
        if not -math.inf < number("kl", kl, "a number or a tensor of one element") < math.inf:
            raise ValueError(f"kl must be finite, was {described(kl)}")
        return max(float(kl), 0.0)
    check_tensor("kl", kl, FLOATING)
    _check_one_element("kl", kl)
    _check_constant("kl", kl)
    _check_device("kl", kl, policy)
    return kl.reshape(()).to(policy.dtype).clamp(min=0)


def _check_like(name: str, tensor: Tensor, policy: Tensor) -> None:
    if tensor.shape != policy.shape:
        raise ValueError(f"{name} must have the shape of the sums, {tuple(policy.shape)}, had {tuple(tensor.shape)}")
    _check_device(name, tensor, policy)


def _check_device(name: str, tensor: Tensor, policy: Tensor) -> None:
    if tensor.device != policy.device:
        raise ValueError(f"{name} must be on the device of the other tensors, {policy.device}, was on {tensor.device}")


def _check_one_element(name: str, tensor: Tensor) -> None:
    if tensor.numel() != 1:
        raise ValueError(f"{name} must have one element, had shape {tuple(tensor.shape)}")


def _check_constant(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(f"{name} requires grad, but the loss is not differentiated in it: detach it")


def _positive(name: str, value: float) -> float:
    if not 0.0 < number(name, value) < math.inf:
        raise ValueError(f"{name} must be finite and > 0, was {described(value)}")
    return float(value)


def _not_negative(name: str, value: float) -> float:
    if not 0.0 <= number(name, value) < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, was {described(value)}")
    return float(value)


def _label_smoothing(value: float) -> float:
    if not 0.0 <= number("label_smoothing", value) < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), was {described(value)}")
    return float(value)
