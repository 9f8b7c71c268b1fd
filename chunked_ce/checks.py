"""Checks of arguments: each error names the argument, its value and the allowed ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from chunked_ce.arguments import (
    ADAPTER,
    COUNTS,
    FLOATING,
    INDICES,
    WEIGHTS,
    Kind,
    check_flag,
    check_tensor,
    described,
    integer,
    is_number,
    is_one_of,
    number,
    plain_integer,
)
from chunked_ce.devices import captures, moved
from chunked_ce.engine.accumulation import has_own_dispatch, main_grad_mismatch
from chunked_ce.engine.released_parameters import is_released, where_it_is_whole
from chunked_ce.objectives.base import Objective
from chunked_ce.objectives.cross_entropy import check_class_weight, check_label_smoothing, check_z_loss
from chunked_ce.options import ChunkOptions
from chunked_ce.parallel.fsdp import is_flattened
from chunked_ce.parallel.vocab import VocabShard
from chunked_ce.rows.backend import why_not_triton
from chunked_ce.rows.statistics import STATISTICS, work_dtype
from chunked_ce.torch_options import what_to_write
from chunked_ce.tracing import check_values, has_autocast

__all__ = [
    "check_accumulation",
    "check_backend",
    "check_call",
    "check_class_weight",
    "check_ids",
    "check_ignored",
    "check_keywords",
    "check_layer",
    "check_num_tokens",
    "check_objective",
    "check_options",
    "check_temperatures",
    "check_vocab",
    "compute_dtype_of",
    "described_objective",
]

_ARGUMENTS = {"input", "logits", "linear_weight", "linear_bias", "target", "weight", "token_weight", "temperature"}
_ARGUMENTS |= {"linear_adapter"}
_ARGUMENTS |= {"at", "target_weight", "vocab_size", "weight_sum", "_coefficient"}  # and what `Tokens` has itself


def check_call(
    tensors: dict[str, Tensor | None],
    keywords: dict[str, Any],
    vocab: VocabShard | None,
    options: ChunkOptions | None,
    flags: dict[str, bool],
    objective: Objective | None,
    per_token: Mapping[str, object],
    transformed: bool,  # by `torch.func`
) -> ChunkOptions:
    """Check all arguments of a call, by name; returns the options, the default ones for None."""
    name = "input" if "linear_weight" in tensors else "logits"
    check_per_token(objective, per_token)
    with_ids = () if objective is None or objective.ids is None else (objective.ids, *objective.per_id)
    for at, one in enumerate(with_ids):
        if tensors.get(one) is not None:
            check_tensor(one, tensors[one], INDICES if at == 0 else WEIGHTS)
    input, target = check_tensors(tensors, vocab, name, [one for one in per_token if one not in with_ids])
    if with_ids:
        check_per_id(tensors, target.shape, *with_ids)
    check_keywords(**{key: value for key, value in keywords.items() if key != "num_tokens"})
    check_temperatures(tensors.get("temperature"), target, keywords["ignore_index"])
    for flag, value in flags.items():
        check_flag(flag, value)
    dtype = compute_dtype_of(input) if name == "input" else input.dtype
    check_num_tokens(keywords.get("num_tokens"), work_dtype(dtype))
    options = check_options(options, keywords["reduction"])
    check_backend(options, input.device, dtype)
    check_ignored(options, input.device)
    check_accumulation(options, tensors.get("linear_weight"), vocab, transformed=transformed)
    return options


def check_tensors(
    tensors: dict[str, Tensor | None],
    vocab: VocabShard | None,
    input_name: str,  # "logits" if they exist: there is no linear_weight
    per_token: Iterable[str] = (),
) -> tuple[Tensor, Tensor]:
    """Check shapes, dtypes and devices of the tensors; returns the input and the target."""
    input = check_tensor(input_name, tensors[input_name], FLOATING)
    if input.dim() < 1:
        raise ValueError(f"{input_name} must have at least one dimension, had shape {_shape(input)}")
    check_vocab(vocab)
    rows = input.shape[-1]
    if input_name != "logits":
        rows = _rows(check_tensor("linear_weight", tensors["linear_weight"], FLOATING), input, vocab)
        check_adapter(tensors, input, rows)
    elif vocab is None and rows < 1:
        raise ValueError(f"{input_name} must have at least one class, had shape {_shape(input)}")
    if vocab is not None and rows not in (vocab.rows, vocab.padded_rows):
        raise ValueError(
            f"{'logits' if input_name == 'logits' else 'linear_weight'} must hold the {vocab.rows} words "
            f"[{vocab.start}, {vocab.stop}) of vocab"
            + (f", or {vocab.padded_rows} with padding" if vocab.padded_rows else "")
            + f", had {rows}"
        )
    if vocab is not None and vocab.tokens == "own" and input_name == "logits":
        raise ValueError(
            "vocab.tokens must be 'same' for logits that exist, was 'own': no rank holds its columns of others' logits"
        )
    _check_no_probabilities(tensors["target"], input_name)
    target = check_tensor("target", tensors["target"], INDICES)
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
    weight_shapes = [(rows,)] if vocab is None else [(rows,), (vocab.rows,), (vocab.total,)]
    others: list[tuple[str, Kind, Sequence[tuple[int, ...]]]] = [
        ("linear_bias", FLOATING, [(rows,)]),
        ("weight", FLOATING, weight_shapes),
        *((name, WEIGHTS, [_shape(target)]) for name in ("token_weight", "temperature", *per_token)),
    ]
    for name, kind, shapes in others:
        if tensors.get(name) is None:
            continue
        tensor = check_tensor(name, tensors[name], kind)
        # A list, not a set: symbolic sizes have no hash.
        if not any(_shape(tensor) == shape for shape in shapes):
            allowed = " or ".join(map(str, dict.fromkeys(map(str, shapes))))
            raise ValueError(f"{name} must have shape {allowed}, had {_shape(tensor)}")
        if name != "linear_bias" and tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad, but the loss is not differentiated in it: detach it, or use "
                "reduction='none' and weight the losses"
            )
    for name, given in tensors.items():
        if given is None or given.device == input.device:
            continue
        if name not in ("target", "target ids") or captures(input.device):
            raise ValueError(f"{name} must be on {input_name}'s device {input.device}, was on {given.device}")
        if given.device.type != "cpu":
            allowed = f"{input_name}'s device {input.device} or the CPU"
            raise ValueError(f"target must be on {allowed}, was on {given.device}")
    return input, target


def _check_no_probabilities(target: object, input_name: str) -> None:
    """Refuse class probabilities as targets, which `torch.nn.functional.cross_entropy` takes."""
    if isinstance(target, Tensor) and target.is_floating_point():
        instead = "linear_divergence(input, linear_weight, Teacher(probabilities=target))"
        if input_name == "logits":
            instead = "logits_loss(Divergence(), logits, classes, teacher=Teacher(probabilities=target)), any classes,"
        raise TypeError(
            f"target must be {INDICES.said}, was {target.dtype}: for class probabilities write {instead} or "
            "Teacher(logits=...) of their logarithms. It has the gradients of their cross-entropy, and a value that is "
            "less by their entropy"
        )


def check_adapter(tensors: dict[str, Tensor | None], input: Tensor, rows: int) -> None:
    """Check the factors of a low-rank adapter of a head with ``rows`` rows, if there is one."""
    if "linear_adapter" in tensors:
        given = tensors["linear_adapter"]
        was = f"a {type(given).__name__} of {len(given)}" if isinstance(given, list | tuple) else described(given)
        raise TypeError(
            f"linear_adapter must be None or a pair (input_r, weight_r) of tensors (..., r) and (V, r), was {was}"
        )
    if ADAPTER[0] not in tensors:
        return
    hidden, weight = (check_tensor(name, tensors[name], FLOATING) for name in ADAPTER)
    released = is_released(weight) or (weight.numel() == 0 and rows > 0)
    if weight.dim() != 2 or released or weight.shape[0] != rows or weight.shape[1] < 1:
        raise ValueError(
            f"linear_adapter[1] must be (V, r) with the {rows} rows of linear_weight and r >= 1, had shape "
            f"{_shape(weight)}" + (f". {where_it_is_whole(weight)}" if released else "")
        )
    allowed = (*_shape(input, -1), weight.shape[1])
    if _shape(hidden) != allowed:
        raise ValueError(
            f"linear_adapter[0] must have the shape of input with r = {weight.shape[1]}, that of linear_adapter[1], as "
            f"its last dimension, {allowed}, had {_shape(hidden)}"
        )


def check_keywords(
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> None:
    """Check the values of the loss's keywords."""
    if not is_one_of(reduction, ("mean", "sum", "none")):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', was {described(reduction)}")
    integer("ignore_index", ignore_index)
    check_label_smoothing(label_smoothing)
    check_z_loss(z_loss)
    if softcap is not None and not 0.0 < number("softcap", softcap) < math.inf:
        raise ValueError(f"softcap must be None or finite and > 0, was {described(softcap)}")
    if not -math.inf < number("logit_scale", logit_scale) < math.inf:
        raise ValueError(f"logit_scale must be finite, was {described(logit_scale)}")
    if not 0.0 < number("temperature", temperature, "a number or a tensor in the shape of target") < math.inf:
        raise ValueError(f"temperature must be finite and > 0, was {described(temperature)}")


def check_temperatures(temperature: Tensor | None, target: Tensor, ignore_index: int) -> None:
    """Check that the temperatures of tokens that count are finite and > 0."""
    if temperature is None:
        return
    counted = moved(target.detach() != ignore_index, temperature.device)
    allowed = "temperature must be finite and > 0 for each token that counts"
    check_values(temperature, lambda values: ((values > 0) & (values < math.inf)) | ~counted, allowed)


def check_num_tokens(num_tokens: float | Tensor | None, dtype: torch.dtype) -> None:
    """Check that the mean's denominator is a number >= 0 in the range of ``dtype``, that of the loss."""
    if num_tokens is None:
        return
    limits = torch.finfo(dtype)

    def fits(value: Any) -> Any:  # a number, or a tensor
        in_range = (value >= limits.smallest_normal * limits.eps) & (value <= limits.max)
        return (value == 0) | (in_range & (value < math.inf))  # beside a float32 tensor, the largest float64 is inf

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


def check_objective(objective: Objective) -> Objective:
    """Check that an objective can be passed to an operator."""
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be a chunked_ce.objectives.Objective, was {described(objective)}")
    for field in dataclasses.fields(objective):
        name, value = field.name, getattr(objective, field.name)
        if name == "class_weight":
            continue
        if not (field.compare and field.init):
            kinds = "a field that is compared and that __init__ takes"
            raise TypeError(f"{name} of {type(objective).__name__} must be {kinds}")
        is_plain = value is None or isinstance(value, bool | str) or (is_number(value) and value == value)
        if not is_plain:
            kinds = "a number, a string, a bool or None"
            raise TypeError(f"{name} of {type(objective).__name__} must be {kinds}, was {described(value)}")
    for names in ("per_token", "optional_per_token"):
        reserved = _ARGUMENTS.intersection(getattr(objective, names))
        if reserved:
            raise ValueError(f"objective.{names} must not name an argument of the loss, had {reserved.pop()!r}")
    named = (*objective.per_token, *objective.optional_per_token)
    if objective.ids is not None and objective.ids not in objective.per_token:
        raise ValueError(f"objective.ids must be None or a name among {objective.per_token}, was {objective.ids!r}")
    if objective.ids is None and (objective.per_id or "at_ids" in objective.statistics):
        raise ValueError("objective.ids must name a tensor of per_token for 'at_ids' and per_id, was None")
    for name in objective.per_id:
        if name not in named:
            raise ValueError(f"objective.per_id must be names among {named}, had {name!r}")
    unknown = [name for name in objective.statistics if name not in STATISTICS]
    if unknown:
        raise ValueError(f"objective.statistics must be names among {tuple(STATISTICS)}, had {unknown[0]!r}")
    return objective


def described_objective(objective: Objective) -> str:
    """An objective with all its fields but class weights, which ranks compare."""
    return f"{type(objective).__module__}.{type(objective).__qualname__}({_fields(objective)})"


def _fields(objective: Objective) -> str:
    names = [field.name for field in dataclasses.fields(objective) if field.name != "class_weight"]
    return ", ".join(f"{name}={getattr(objective, name)!r}" for name in names)


def check_per_token(objective: Objective | None, per_token: Mapping[str, object]) -> None:
    """Check that the per-token tensors that an objective needs are given, and no others."""
    if objective is None:  # of functions that take no tensors per token
        return
    required, optional = objective.per_token, objective.optional_per_token
    for name in per_token:
        if name not in (*required, *optional):
            taken = ", ".join((*required, *optional)) or "none"
            raise TypeError(f"{name} is no tensor of {type(objective).__name__}: for each token it takes {taken}")
    for name in required:
        if per_token.get(name) is None:
            needed_by = f"{type(objective).__name__}({_fields(objective)})"
            with_ids = ", K ids for each token," if name in (objective.ids, *objective.per_id) else ""
            raise TypeError(f"{name} must be a tensor in the shape of target{with_ids} for {needed_by}, was None")


def check_ids(
    name: str,
    ids: object,  # (..., K)
    tokens: torch.Size | None,  # their shape; None if the ids are only known to be as many as all ranks' tokens
    *,
    least: int = 1,
) -> Tensor:
    """``ids``, whose type and shape are checked."""
    checked = check_tensor(name, ids, INDICES)
    shape = tuple(checked.shape)
    if len(shape) < 1 or shape[-1] < least or (tokens is not None and shape[:-1] != tuple(tokens)):
        of_tokens = "the shape of the tokens" if tokens is None else f"{tuple(tokens)}, the shape of the tokens,"
        some = f", at least {least}" if least else ""
        raise ValueError(f"{name} must have {of_tokens} and a last dimension of ids{some}, had {shape}")
    return checked


def check_per_id(tensors: dict[str, Tensor | None], tokens: torch.Size, name_of_ids: str, *per_id: str) -> None:
    """Check the shapes of an objective's ids (..., K), and of the tensors with a number for each id."""
    ids = check_ids(name_of_ids, tensors[name_of_ids], tokens)
    for name in per_id:
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if _shape(tensor) != _shape(ids):
            raise ValueError(f"{name} must have the shape of {name_of_ids}, {_shape(ids)}, had {_shape(tensor)}")
        if tensor.requires_grad:
            raise ValueError(f"{name} requires grad, but the loss is not differentiated in it: detach it")


def check_layer(
    in_features: int, vocab_size: int, bias: bool, device: Any, dtype: torch.dtype | None
) -> tuple[int, int]:
    """Check the arguments that make a head's layer; returns the two sizes as Python integers."""
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
    """Check the options, the default ones for None; ``reduction`` is None for functions without one."""
    if options is None:
        return ChunkOptions()
    if not isinstance(options, ChunkOptions):
        instead = what_to_write(options)
        was = described(options) if instead is None else f"torch's {type(options).__name__}: {instead}"
        raise TypeError(f"options must be a ChunkOptions or None, was {was}")
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
    """Check that there is a ``main_grad`` to add to, if the options ask for it and the head needs a gradient."""
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
    """Why no gradient can be added to a ``main_grad`` of this weight, whether it has one or not."""
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
    """Check that the requested row kernels can run on products in ``dtype``."""
    if options.backend != "triton":
        return
    reason = why_not_triton(device, dtype)
    if reason is not None:
        raise ValueError(f"options.backend='triton' cannot run here: {reason}; use 'auto' or 'torch'")


def check_ignored(options: ChunkOptions, device: torch.device) -> None:
    """Check that ignored tokens can be dropped, if they are to be: a graph replays the shapes of its capture."""
    if options.ignored == "drop" and captures(device):
        raise ValueError("options.ignored must be 'auto' or 'mask' while a CUDA graph is captured, was 'drop'")


def compute_dtype_of(input: Tensor) -> torch.dtype:
    """The dtype of the products of hidden states."""
    device_type = input.device.type
    if input.dtype == torch.float64 or not has_autocast(device_type):
        return input.dtype
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else input.dtype


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
