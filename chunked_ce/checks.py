"""Arguments are checked at the door: each error names the argument, what it was and what is allowed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from chunked_ce.arguments import (
    COUNTS,
    FLOATING,
    INDICES,
    WEIGHTS,
    check_flag,
    check_tensor,
    described,
    integer,
    is_one_of,
    number,
    plain_integer,
)
from chunked_ce.distributed.fsdp import is_flattened
from chunked_ce.distributed.vocab import VocabShard
from chunked_ce.engine.accumulation import has_own_dispatch, main_grad_mismatch
from chunked_ce.engine.kernels import why_not_triton
from chunked_ce.engine.presence import is_released, where_it_is_whole
from chunked_ce.engine.tracing import check_values
from chunked_ce.options import ChunkOptions

__all__ = [
    "check_accumulation",
    "check_backend",
    "check_class_weight",
    "check_keywords",
    "check_layer",
    "check_num_tokens",
    "check_options",
    "check_tensors",
    "check_vocab",
]


def check_tensors(
    input: Tensor,
    linear_weight: Tensor | None,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
    vocab: VocabShard | None = None,
    *,
    input_name: str = "input",  # "logits": they exist, there is no linear_weight
) -> None:
    """Shapes, dtypes and devices of the tensors."""
    check_tensor(input_name, input, FLOATING)
    if input.dim() < 1:
        raise ValueError(f"{input_name} must have at least one dimension, had shape {_shape(input)}")
    check_vocab(vocab)
    rows = input.shape[-1]
    if input_name != "logits":
        check_tensor("linear_weight", linear_weight, FLOATING)
        rows = _rows(linear_weight, input, vocab)
    elif vocab is None and rows < 1:
        raise ValueError(f"{input_name} must have at least one class, had shape {_shape(input)}")
    if vocab is not None and rows not in (vocab.rows, vocab.padded_rows):
        raise ValueError(
            f"{'linear_weight' if linear_weight is not None else input_name} must hold the {vocab.rows} words "
            f"[{vocab.start}, {vocab.stop}) of vocab"
            + (f", or {vocab.padded_rows} with padding" if vocab.padded_rows else "")
            + f", had {rows}"
        )
    check_tensor("target", target, INDICES)
    if vocab is not None and vocab.input_grad == "sequence" and input_name != "logits":
        tokens = vocab.size * (input.numel() // max(1, input.shape[-1]))
        if target.numel() != tokens:
            raise ValueError(
                f"target must hold the tokens of all {vocab.size} ranks, {tokens}, for input_grad='sequence', "
                f"had shape {_shape(target)}"
            )
    elif target.shape != input.shape[:-1]:
        raise ValueError(
            f"target must have the shape of {input_name} without its last dimension, {_shape(input, -1)}, "
            f"had {_shape(target)}"
        )
    words = [(rows,)] if vocab is None else [(rows,), (vocab.rows,), (vocab.total,)]
    for name, tensor, kind, shapes in (
        ("linear_bias", linear_bias, FLOATING, [(rows,)]),
        ("weight", weight, FLOATING, words),
        ("token_weight", token_weight, WEIGHTS, [_shape(target)]),
    ):
        if tensor is None:
            continue
        check_tensor(name, tensor, kind)
        # A list, not a set: symbolic sizes have no hash.
        if not any(_shape(tensor) == shape for shape in shapes):
            allowed = " or ".join(map(str, dict.fromkeys(map(str, shapes))))
            raise ValueError(f"{name} must have shape {allowed}, had {_shape(tensor)}")
    for name, tensor in (("weight", weight), ("token_weight", token_weight)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad, but the loss is not differentiated in it: detach it, or use "
                "reduction='none' and weight the losses"
            )
    others = {
        "linear_weight": linear_weight,
        "target": target,
        "linear_bias": linear_bias,
        "weight": weight,
        "token_weight": token_weight,
    }
    for name, tensor in others.items():
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{name} must be on {input_name}'s device {input.device}, was on {tensor.device}")


def check_keywords(
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """Values of the options of the loss."""
    if not is_one_of(reduction, ("mean", "sum", "none")):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', was {described(reduction)}")
    integer("ignore_index", ignore_index)
    if not 0.0 <= number("label_smoothing", label_smoothing) <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], was {described(label_smoothing)}")
    if not 0.0 <= number("z_loss", z_loss) < math.inf:
        raise ValueError(f"z_loss must be finite and >= 0, was {described(z_loss)}")
    if softcap is not None and not 0.0 < number("softcap", softcap) < math.inf:
        raise ValueError(f"softcap must be None or finite and > 0, was {described(softcap)}")
    if not -math.inf < number("logit_scale", logit_scale) < math.inf:
        raise ValueError(f"logit_scale must be finite, was {described(logit_scale)}")


def check_num_tokens(num_tokens: float | Tensor | None, dtype: torch.dtype) -> None:
    """Whether the mean's denominator is a number >= 0 of ``dtype``, that of the loss."""
    if num_tokens is None:
        return
    limits = torch.finfo(dtype)

    def fits(value: float | Tensor) -> bool | Tensor:
        in_range = (value >= limits.smallest_normal * limits.eps) & (value <= limits.max)
        return (value == 0) | (in_range & (value < math.inf))  # the largest float64 is inf beside a float32 tensor

    allowed = f"num_tokens must be finite and >= 0, within the range of {dtype}"
    if not isinstance(num_tokens, Tensor):
        if not fits(number("num_tokens", num_tokens)):
            raise ValueError(f"{allowed}, was {described(num_tokens)}")
        return
    check_tensor("num_tokens", num_tokens, COUNTS)
    if num_tokens.numel() != 1:
        raise ValueError(f"num_tokens must be one number >= 0, was {described(num_tokens)}")
    if num_tokens.requires_grad:
        raise ValueError("num_tokens requires grad, but the loss is not differentiated in it: detach it")
    check_values(num_tokens, fits, allowed)


def check_vocab(vocab: VocabShard | None) -> None:
    if vocab is not None and not isinstance(vocab, VocabShard):
        raise TypeError(f"vocab must be a VocabShard or None, was {type(vocab).__name__}")


def check_class_weight(weight: Tensor | None) -> None:
    """Class weights, before a call says how many words there are."""
    if weight is None:
        return
    check_tensor("weight", weight, FLOATING)
    if weight.dim() != 1:
        raise ValueError(f"weight must have shape (V,), had {_shape(weight)}")
    if weight.requires_grad:
        raise ValueError("weight requires grad, but the loss is not differentiated in it: detach it")


def check_layer(
    in_features: int, vocab_size: int, bias: bool, device: object, dtype: torch.dtype | None
) -> tuple[int, int]:
    """What makes a head's layer; the two sizes as Python's own integers."""
    for name, size in (("in_features", in_features), ("vocab_size", vocab_size)):
        if integer(name, size, "an integer >= 1") < 1:
            raise ValueError(f"{name} must be an integer >= 1, was {described(size)}")
    check_flag("bias", bias)
    try:
        torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be None or what torch.device takes, was {described(device)}") from None
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in FLOATING.dtypes):
        raise TypeError(f"dtype must be None or {FLOATING.said}, was {described(dtype)}")
    return plain_integer(in_features), plain_integer(vocab_size)


def check_options(options: ChunkOptions | None, reduction: str | None) -> ChunkOptions:
    """The options, those that choose well for None; ``reduction`` is None where there is none to choose."""
    if options is None:
        return ChunkOptions()
    if not isinstance(options, ChunkOptions):
        raise TypeError(f"options must be a ChunkOptions or None, was {described(options)}")
    if options.gradients == "forward" and reduction == "none":
        raise ValueError(
            "options.gradients='forward' needs one loss to differentiate, reduction 'mean' or 'sum', "
            "was given with 'none': use gradients='backward' or 'auto'"
        )
    return options


def check_accumulation(
    options: ChunkOptions,
    linear_weight: Tensor | None,
    vocab: VocabShard | None,
    *,
    transformed: bool,  # by `torch.func`
) -> None:
    """Whether there is a ``main_grad`` to add to, where one was asked for and a gradient is wanted."""
    if options.accumulate_into != "main_grad" or linear_weight is None:
        return
    if not linear_weight.requires_grad or not torch.is_grad_enabled():
        return
    refused = _no_main_grad(linear_weight, vocab, transformed)
    if refused is not None:
        raise ValueError(
            "options.accumulate_into='main_grad' needs a linear_weight that is a leaf, without padding, of a class "
            f"without a __torch_dispatch__ of its own, outside of torch.compile and torch.func, had {refused}"
        )
    mismatch = main_grad_mismatch(linear_weight)
    if mismatch is not None:
        raise ValueError(mismatch)


def _no_main_grad(linear_weight: Tensor, vocab: VocabShard | None, transformed: bool) -> str | None:
    """Why nothing can be added to a ``main_grad``, whether there is one or not."""
    if torch.compiler.is_compiling():
        return "compiling=True"
    if transformed:
        return "transformed=True"
    if vocab is not None and linear_weight.shape[0] != vocab.rows:
        return f"{linear_weight.shape[0]} rows for the {vocab.rows} words of vocab"
    if not linear_weight.is_leaf:
        return "is_leaf=False"
    if has_own_dispatch(linear_weight):
        return f"a {type(linear_weight).__name__}"
    return None


def check_backend(options: ChunkOptions, device: torch.device, dtype: torch.dtype) -> None:
    """Whether the row kernels that were asked for can run on products in ``dtype``."""
    if options.backend != "triton":
        return
    reason = why_not_triton(device, dtype)
    if reason is not None:
        raise ValueError(f"options.backend='triton' cannot run here: {reason}; use 'auto' or 'torch'")


def _rows(linear_weight: Tensor, input: Tensor, vocab: VocabShard | None) -> int:
    if linear_weight.numel() == 0 and (vocab is None or vocab.rows > 0):
        raise ValueError(
            f"linear_weight must be (V, D) with at least one row, had shape {_shape(linear_weight)}. "
            f"{where_it_is_whole(linear_weight)}"
        )
    if is_released(linear_weight) or (is_flattened(linear_weight) and linear_weight.dim() != 2):
        raise ValueError(
            f"linear_weight must be (V, D) with values, had shape {_shape(linear_weight)} and "
            f"{linear_weight.untyped_storage().nbytes()} bytes of memory. {where_it_is_whole(linear_weight)}"
        )
    if linear_weight.dim() != 2 or linear_weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"linear_weight must be (V, D) with D = {input.shape[-1]}, the last dimension of input, "
            f"had shape {_shape(linear_weight)}"
        )
    return linear_weight.shape[0]


def _shape(tensor: Tensor, stop: int | None = None) -> tuple[int, ...]:
    return tuple(tensor.shape[:stop])
