"""What the layers keep from forward to backward, per token and layer, and what one layer's backward takes besides.

The tensors are counted as in "Reducing Activation Recomputation in Large Transformer Models" (Korthikanti et al. 2022,
arXiv 2205.05198), for the layers of today: RMS norms in fp32, grouped keys and values, a gated MLP, no dropout, and
attention that keeps no matrix of scores (FlashAttention, or torch's fused attention). Tensor parallelism divides the
tensors between the two matrices of attention and MLP; sequence parallelism divides the tokens. Transformers' Llama,
Qwen and Mixtral keep as much within 1 %, other families within 12 %.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from chunked_ce.cli.planning.run import Run, Stage

__all__ = ["Activations", "activations_of", "layer_bytes"]


class Activations(NamedTuple):
    """Bytes of a rank, in proportion to its tokens."""

    kept: int  # from forward to backward, of all layers of the rank
    layer: int  # recomputed for one layer, with the gradients of its tensors


class _PerToken(NamedTuple):
    """Bytes per token of one layer."""

    inputs: float  # also of its second half
    norms: float
    products: float  # outputs of matrix products and attention
    pointwise: float  # activation function and its product
    gradients: float  # of tensors that exist at a time in its backward


def layer_bytes(run: Run) -> float:
    """Bytes per token that a layer keeps without checkpointing.

    >>> from chunked_ce.cli.model_shapes import MODELS
    >>> layer_bytes(Run(MODELS["llama-3-8b"], tokens=8192)) / 4096  # in multiples of the hidden size
    49.03125
    """
    parts = _per_token(run)
    return parts.norms + parts.products + parts.pointwise


def activations_of(run: Run, stage: Stage) -> Activations:
    """The activations of a rank; the first of several pipeline stages keeps those of as many micro-batches."""
    model, n = run.model, run.local_tokens
    if not model.layers or not run.train_input:
        return Activations(n * model.hidden * run.itemsize if stage != "first" else 0, 0)  # the loss's hidden states
    parts, whole = _per_token(run), layer_bytes(run)
    match run.checkpointing:
        case "none":
            kept, again = whole, 0.0
        case "selective":
            kept, again = 2 * parts.inputs + parts.products, parts.norms + parts.pointwise
        case "full":
            kept, again = parts.inputs, whole
    layers = math.ceil(model.layers / run.pipeline)
    in_flight = min(run.pipeline, run.accumulation) if stage == "first" else 1
    last_norm = _norm(run) if stage != "first" else 0
    return Activations(math.ceil(n * (layers * kept * in_flight + last_norm)), math.ceil(n * (again + parts.gradients)))


def _norm(run: Run) -> float:
    """A norm keeps its input in fp32, the normalized input and the output, which a product reads."""
    return run.model.hidden * (4 + 2 * run.itemsize)


def _per_token(run: Run) -> _PerToken:
    model, size, tensor = run.model, run.itemsize, run.tensor
    d, width, shared = model.hidden, model.heads * model.head_dim, 2 * model.kv_heads * model.head_dim
    if model.latent:
        _, _, plain, rotary, value = model.latent
        width, shared = model.heads * (plain + rotary), model.heads * (plain + rotary + value)
    norms = model.norms * _norm(run)
    if model.qk_norm:
        norms += (width + shared / 2) * (4 + size) / tensor
    attention = 2 * width + shared  # queries, the output, keys and values
    matrices = 2 if model.gated else 1
    mlp = float(matrices * model.intermediate)
    experts = 0.0  # the input and the output of each expert that a token passes
    if model.experts:
        mixtures = 1 - model.dense_layers / model.layers
        inner = model.active_experts * model.expert_intermediate + model.shared_intermediate
        mlp = mlp * (1 - mixtures) + mixtures * matrices * inner
        experts = mixtures * 2 * model.active_experts * d
    adapters = 7 * run.lora if run.lora else 0
    widest = max(model.intermediate, model.active_experts * model.expert_intermediate) / tensor
    return _PerToken(
        inputs=d * size,
        norms=norms,
        products=size * ((attention + mlp) / tensor + experts + adapters) + 4 * model.heads / tensor,
        pointwise=size * mlp / tensor,
        gradients=size * (3 * widest + 3 * d),
    )
