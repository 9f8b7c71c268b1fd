"""The tensors that losses are measured on: random, with a softmax as sharp as a trained model's, or a user's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["IGNORED", "TRAINED_ENTROPY", "LossInputs", "load", "softmax_summary"]

IGNORED = -100
TRAINED_ENTROPY = 4.6  # nats; a small language model on real text measured 4.63 with 131,072 vocabulary entries

_RARE = 0.125
_SAMPLED_TOKENS = 64
_BLOCK = 256  # tokens whose logits exist at a time


class LossInputs(NamedTuple):
    """Hidden states, head and targets of a language model's loss."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    target: Tensor  # (N,)

    @classmethod
    def random(
        cls,
        num_tokens: int,
        hidden_size: int,
        vocab_size: int,
        dtype: torch.dtype,
        *,
        ignored: float = 0.0,  # the share of tokens that do not count
        device: str = "cpu",
    ) -> LossInputs:
        """Normal hidden states and a head as it is initialised: logits of 0.02 sqrt(D), a nearly uniform softmax."""
        generator = torch.Generator(device).manual_seed(0)
        hidden = _normal(generator, num_tokens, hidden_size).to(dtype)
        weight = _normal(generator, vocab_size, hidden_size).to(dtype).mul_(0.02)
        target = torch.randint(vocab_size, (num_tokens,), generator=generator, device=device)
        return cls(hidden, weight, target)._ignoring(ignored, generator)._leaves()

    @classmethod
    def trained(
        cls,
        num_tokens: int,
        hidden_size: int,
        vocab_size: int,
        dtype: torch.dtype,
        *,
        ignored: float = 0.0,
        device: str = "cpu",
        entropy: float = TRAINED_ENTROPY,
    ) -> LossInputs:
        """Synthetic, but as sharp as a trained model: Zipf's frequencies times what the context adds.

        One direction of the hidden states carries the entries' frequencies (1 / (rank + 2.7), in random order). The
        others are normal, and an entry's row in them shrinks as the entry gets rarer (rank ** -1/8), so that over 1,024
        tokens about a tenth of 131,072 entries reach a probability of 2^-14 anywhere. Hidden states are scaled until
        the mean entropy is ``entropy`` nats. Targets are drawn from the softmax itself, so the loss is about the
        entropy, as it is for a model that knows its text.
        """
        generator = torch.Generator(device).manual_seed(0)
        rank = torch.randperm(vocab_size, generator=generator, device=device)
        frequency, reach = -torch.log(rank + 2.7), (rank + 1.0) ** -_RARE
        context = _normal(generator, num_tokens, hidden_size - 1)
        own = _normal(generator, vocab_size, hidden_size - 1).mul_(reach[:, None])
        weight = torch.cat((frequency[:, None] / 10, own), 1).to(dtype)
        least, most, scale = 0.0, 30.0, 15.0

        def hidden_of(scale: float, rows: slice = slice(None)) -> Tensor:
            x = context[rows] * (scale / math.sqrt(max(1, hidden_size - 1)))
            return torch.cat((x.new_full((len(x), 1), 10), x), 1).to(dtype)

        for _ in range(20):  # the entropy falls as the scale grows
            scale = (least + most) / 2
            z = hidden_of(scale, slice(_SAMPLED_TOKENS)) @ weight.t()
            above = _entropies(z.float()).mean().item() > entropy
            least, most = (scale, most) if above else (least, scale)
        hidden = hidden_of(scale)
        target = torch.cat([_draw(x @ weight.t(), generator) for x in hidden.split(_BLOCK)])
        return cls(hidden, weight, target)._ignoring(ignored, generator)._leaves()

    def _ignoring(self, share: float, generator: torch.Generator) -> LossInputs:
        order = torch.randperm(len(self.target), generator=generator, device=self.target.device)
        self.target[order[: round(share * len(order))]] = IGNORED
        return self

    def _leaves(self) -> LossInputs:
        return LossInputs(self.hidden.requires_grad_(), self.weight.requires_grad_(), self.target)


def load(path: Path, dtype: torch.dtype | None, device: str = "cpu") -> LossInputs:
    """The inputs in a torch file of a dict: ``hidden`` (N, D), ``weight`` (V, D) and ``target`` (N,).

    Raises ``ValueError`` naming what is wrong.
    """
    try:
        tensors = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a file that is not there, not torch's, or holds more than tensors
        raise ValueError(f"--tensors must be a torch file of a dict of tensors: {str(error).splitlines()[0]}") from None
    names = LossInputs._fields
    if not isinstance(tensors, dict) or not all(isinstance(tensors.get(name), Tensor) for name in names):
        raise ValueError(f"--tensors must hold a dict with the tensors {', '.join(names)}")
    hidden, weight, target = (tensors[name] for name in names)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or target.shape != hidden.shape[:1]:
        shapes = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in names)
        raise ValueError(f"--tensors must have hidden (N, D), weight (V, D) and target (N,), has {shapes}")
    dtype = dtype or hidden.dtype
    return LossInputs(hidden.to(dtype), weight.to(dtype), target.long())._leaves()


def softmax_summary(inputs: LossInputs) -> dict[str, float]:
    """Mean loss and mean entropy in nats of a few tokens that count."""
    hidden, weight, target = (tensor.detach() for tensor in inputs)
    counted = (target != IGNORED).nonzero().squeeze(-1)[:_SAMPLED_TOKENS]
    z = (hidden[counted] @ weight.t()).float()
    loss = torch.nn.functional.cross_entropy(z, target[counted]) if len(counted) else z.new_zeros(())
    return {"loss": round(loss.item(), 3), "entropy": round(_entropies(z).mean().item(), 3)}


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _entropies(z: Tensor) -> Tensor:
    logp = z.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def _draw(z: Tensor, generator: torch.Generator) -> Tensor:
    """One vocabulary entry per row, drawn from the row's softmax with Gumbel noise."""
    noise = torch.rand(z.shape, generator=generator, device=z.device).clamp_(min=1e-20).log_().neg_().log_()
    return (z.float() - noise).argmax(-1)
