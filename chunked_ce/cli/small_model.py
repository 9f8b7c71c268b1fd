"""A decoder in plain torch, whose memory ``chunked-ce plan --verify`` measures: it trains on random tokens."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from chunked_ce.cli.model_shapes import ModelShape
from chunked_ce.cli.planning.run import Checkpointing

__all__ = ["SmallModel"]

_KEPT = {  # by selective checkpointing: outputs of matrix products and attention
    "mm",
    "addmm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
}


class SmallModel(nn.Module):
    """Embedding, layers and last norm; ``head`` (V, D) is the embedding of a tied model.

    With ``lora``, its rank, all weights are frozen but the adapters of the layers' matrices.
    """

    def __init__(self, shape: ModelShape, *, lora: int = 0, checkpointing: Checkpointing = "none") -> None:
        super().__init__()
        if shape.experts or shape.latent:
            raise ValueError("a small model is dense: mixtures of experts and latent attention cannot be measured")
        self.checkpointing = checkpointing
        self.embedding = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(_Layer(shape, lora) for _ in range(shape.layers))
        self.norm = _Norm(shape.hidden)
        self.own_head = None if shape.tied else nn.Parameter(torch.randn(shape.vocab, shape.hidden) / shape.hidden**0.5)
        if lora:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_("adapter" in name)

    @property
    def head(self) -> Tensor:
        """The head's weight (V, D)."""
        return self.embedding.weight if self.own_head is None else self.own_head

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states (B, S, D) of ``tokens`` (B, S)."""
        hidden = self.embedding(tokens)
        if self.checkpointing != "none" and not hidden.requires_grad:
            hidden.requires_grad_(torch.is_grad_enabled())  # a frozen embedding: checkpointing needs a gradient to pass
        for layer in self.layers:
            hidden = self._layer(layer, hidden)
        out: Tensor = self.norm(hidden)
        return out

    def _layer(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        more: dict[str, Any] = {}
        if self.checkpointing == "selective":
            more["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keeps_products)
        out: Tensor = (
            layer(hidden)
            if self.checkpointing == "none" or not torch.is_grad_enabled()
            else checkpoint(layer, hidden, use_reentrant=False, **more)
        )
        return out


def _keeps_products(context: object, operator: Any, *arguments: object, **keywords: object) -> CheckpointPolicy:
    name = operator.overloadpacket.__name__ if hasattr(operator, "overloadpacket") else ""
    return CheckpointPolicy.MUST_SAVE if name in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


class _Norm(nn.Module):
    """An RMS norm as Transformers computes it: in fp32, then cast, then scaled."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class _Linear(nn.Module):
    """A matrix, with a low-rank adapter beside it if ``lora``."""

    def __init__(self, inputs: int, outputs: int, lora: int, bias: bool = False) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=bias)
        factors = (inputs, lora), (lora, outputs)
        self.adapter = nn.Sequential(*(nn.Linear(*sizes, bias=False) for sizes in factors)) if lora else None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        return out if self.adapter is None else out + self.adapter(x)


class _Layer(nn.Module):
    """Causal attention with grouped keys and values, and a gated MLP, or a plain one."""

    def __init__(self, shape: ModelShape, lora: int) -> None:
        super().__init__()
        d, width, shared = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.head_dim, self.gated = shape.head_dim, shape.gated
        self.query = _Linear(d, width, lora, shape.qkv_bias)
        self.key, self.value = (_Linear(d, shared, lora, shape.qkv_bias) for _ in range(2))
        self.output = _Linear(width, d, lora)
        self.up, self.down = _Linear(d, shape.intermediate, lora), _Linear(shape.intermediate, d, lora)
        self.gate = _Linear(d, shape.intermediate, lora) if shape.gated else None
        self.before = nn.ModuleList(_Norm(d) for _ in range(2))
        self.after = nn.ModuleList(_Norm(d) if shape.norms == 4 else nn.Identity() for _ in range(2))
        self.of_heads = nn.ModuleList(_Norm(shape.head_dim) if shape.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.after[0](self._attention(self.before[0](x)))
        out: Tensor = x + self.after[1](self._mlp(self.before[1](x)))
        return out

    def _attention(self, x: Tensor) -> Tensor:
        query, key, value = (
            one(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for one in (self.query, self.key, self.value)
        )
        query, key = self.of_heads[0](query), self.of_heads[1](key)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        out: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return out

    def _mlp(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x) if self.gate is not None else F.gelu(self.up(x)))
        return out
