"""The losses of the trainers that are planned for, on the paths that are measured: full logits and ours."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_ce import Teacher, linear_cross_entropy, linear_divergence, linear_logprobs, linear_loss, preference
from chunked_ce.cli.planning.loss import options_of
from chunked_ce.cli.planning.run import DTYPES, Path, Run
from chunked_ce.objectives import PolicyGradient

__all__ = ["LossTensors", "loss_on"]

_POLICY = PolicyGradient(kl=0.04)


class _HasHead(Protocol):
    @property
    def head(self) -> Tensor: ...

    def __call__(self, tokens: Tensor) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class LossTensors:
    """What the loss reads besides hidden states and head; N tokens."""

    target: Tensor  # (N,)
    advantage: Tensor | None = None  # (N,)
    reference: Tensor | None = None  # (N,) log-probabilities
    teacher_hidden: Tensor | None = None  # (N, D_t)
    teacher_weight: Tensor | None = None  # (V, D_t)

    @classmethod
    def random(cls, run: Run) -> LossTensors:
        n, vocab, device, dtype = run.local_tokens, run.model.vocab, run.device, DTYPES[run.dtype]
        target = torch.randint(vocab, (n,), device=device)
        target[: round(run.ignored * n)] = -100
        if run.trainer in ("dpo", "grpo"):
            reference = torch.full((n,), -5.0, device=device)
            return cls(target, advantage=torch.randn(n, device=device), reference=reference)
        if run.teacher_width is not None:
            width = run.teacher_width
            hidden, weight = (torch.randn(rows, width, device=device) for rows in (n, vocab))
            return cls(target, teacher_hidden=hidden.to(dtype), teacher_weight=(weight / width**0.5).to(dtype))
        return cls(target)

    def with_frozen(self, run: Run, frozen: _HasHead | None, model: _HasHead, tokens: Tensor) -> LossTensors:
        """With what a frozen model says of ``tokens`` in place of random values."""
        if frozen is None:
            return self
        with torch.no_grad():
            hidden = frozen(tokens).flatten(0, 1)
            if run.trainer == "distill":
                return dataclasses.replace(self, teacher_hidden=hidden, teacher_weight=frozen.head)
            return dataclasses.replace(self, reference=linear_logprobs(hidden, frozen.head, self.target))


def loss_on(run: Run, path: Path, hidden: Tensor, weight: Tensor, tensors: LossTensors) -> Tensor:
    """The trainer's loss of ``hidden`` (N, D) and the head ``weight`` (V, D)."""
    if path == "full":
        return _full(run, hidden, weight, tensors)
    options, target = options_of(run, path), tensors.target
    if run.trainer == "dpo":
        return _preference(linear_logprobs(hidden, weight, target, options=options), tensors)
    if run.trainer == "grpo":
        return linear_loss(
            _POLICY,
            hidden,
            weight,
            target,
            options=options,
            advantage=tensors.advantage,
            old_logprob=None,
            ref_logprob=tensors.reference,
        )
    if tensors.teacher_hidden is not None and tensors.teacher_weight is not None:
        teacher = Teacher(tensors.teacher_hidden, tensors.teacher_weight)
        return linear_divergence(hidden, weight, teacher, target=target, options=options)
    return linear_cross_entropy(hidden, weight, target, options=options)


def _full(run: Run, hidden: Tensor, weight: Tensor, tensors: LossTensors) -> Tensor:
    if run.trainer in ("dpo", "grpo"):
        logprobs = _gathered(F.log_softmax(F.linear(hidden, weight).float(), -1), tensors.target)
        return _preference(logprobs, tensors) if run.trainer == "dpo" else _policy(logprobs, tensors)
    if tensors.teacher_hidden is not None and tensors.teacher_weight is not None:
        with torch.no_grad():
            teacher = F.log_softmax(F.linear(tensors.teacher_hidden, tensors.teacher_weight).float(), -1)
        student = F.log_softmax(F.linear(hidden, weight).float(), -1)
        return F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    return F.cross_entropy(F.linear(hidden, weight).float(), tensors.target)


def _gathered(values: Tensor, target: Tensor) -> Tensor:
    counts = target >= 0
    return values.gather(-1, target.clamp(min=0)[:, None])[:, 0] * counts


def _preference(logprobs: Tensor, tensors: LossTensors) -> Tensor:
    """DPO of a pair: the first half of the tokens is chosen."""
    assert tensors.reference is not None
    chosen, rejected = (half.sum()[None] for half in logprobs.chunk(2))
    of_reference = [half.sum()[None] for half in tensors.reference.chunk(2)]
    return preference.dpo(chosen, rejected, *of_reference)


def _policy(logprobs: Tensor, tensors: LossTensors) -> Tensor:
    assert tensors.reference is not None and tensors.advantage is not None
    ratio = (logprobs - logprobs.detach()).exp()
    clipped = ratio.clamp(0.8, 1.2)
    apart = tensors.reference - logprobs
    gain = torch.minimum(ratio * tensors.advantage, clipped * tensors.advantage)
    return (_POLICY.kl * (apart.exp() - apart - 1) - gain).mean()
