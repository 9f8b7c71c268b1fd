"""Ranks that share a vocabulary compare each call: facts that differ, or an error of one rank, raise on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from chunked_ce.arguments import ADAPTER
from chunked_ce.parallel.checksum import checksum
from chunked_ce.parallel.vocab import WHOLE_WEIGHT, VocabShard

__all__ = ["agreed", "checksums", "facts_of_call"]

_Result = TypeVar("_Result")
_ALWAYS = ("input", "logits", "linear_weight", "target")


def agreed(
    check: Callable[[], _Result], facts_of: Callable[[_Result], dict[str, Any]], vocab: VocabShard | None, device: Any
) -> _Result:
    """Run ``check()`` on every rank of ``vocab`` and compare ``facts_of`` its result; an error of one rank is raised
    on all."""
    if vocab is None:
        return check()
    on_cpu = getattr(device, "type", "cpu") == "cpu"
    try:
        result = check()
    except NotImplementedError:
        raise  # on every rank
    except Exception as refused:
        if isinstance(vocab, VocabShard) and not torch.compiler.is_compiling():
            vocab.agree({}, refused, on_cpu=on_cpu)
        raise
    if torch.compiler.is_compiling():
        return result
    call: dict[str, Any] = {}
    error: Exception | None = None
    if vocab.compares(on_cpu=on_cpu):
        try:  # facts read values from the device, and take memory
            call = facts_of(result)
        except Exception as raised:
            error = raised
    vocab.agree(call, error, on_cpu=on_cpu)
    return result


def facts_of_call(
    tensors: dict[str, Any], keywords: dict[str, Any], compute_dtype: torch.dtype, vocab: VocabShard
) -> dict[str, Any]:
    """The facts that must be equal on every rank of a vocabulary group, by name.

    ``tensors`` are the arguments by name: "input" (..., D) and "linear_weight" (V_r, D), or "logits" (..., V_r),
    "target", "linear_bias", "weight" and the two factors of an adapter; all others are per token.
    """
    input, target = tensors["logits" if "logits" in tensors else "input"], tensors["target"]
    linear_weight, weight = (tensors.get(name) for name in ("linear_weight", "weight"))
    is_own = vocab.tokens == "own"
    facts: dict[str, object] = {"input dtype": input.dtype}
    if not is_own:
        facts |= {"target": tuple(target.shape), **checksums({"target": target})}
    if linear_weight is not None:
        facts |= {
            "input's last dimension": input.shape[-1],
            "linear_weight dtype": linear_weight.dtype,
            "linear_weight.requires_grad": linear_weight.requires_grad,
            "autocast": compute_dtype,
        }
    facts |= {"input.requires_grad": input.requires_grad, "grad mode": torch.is_grad_enabled()}
    if ADAPTER[0] in tensors:
        hidden = tensors[ADAPTER[0]]
        facts |= {f"{ADAPTER[0]}'s rank r": hidden.shape[-1], f"{ADAPTER[0]}.requires_grad": hidden.requires_grad}
    optional = {name: tensor for name, tensor in tensors.items() if name not in _ALWAYS}
    facts |= {name: tensor is not None for name, tensor in optional.items()}
    facts |= {
        WHOLE_WEIGHT: weight is not None and weight.numel() == vocab.total,
        "check": vocab.check,
        "input_grad": vocab.input_grad,
        "tokens": vocab.tokens,
        "reduce_dtype": vocab.reduce_dtype,
    }
    number = keywords.get("num_tokens")
    facts |= keywords | {"num_tokens": None if number is None or is_own else float(number)}
    if linear_weight is not None and vocab.input_grad != "sequence" and not is_own:
        facts |= checksums({"input": input}, ": dropout with a seed of each rank's own makes them differ")
    local: tuple[str, ...] = ("linear_bias", ADAPTER[1])
    if not facts[WHOLE_WEIGHT]:
        local += ("weight",)
    if vocab.input_grad == "sequence":
        local += (ADAPTER[0],)
    if is_own:  # only a weight of the whole vocabulary is the same everywhere
        local += tuple(name for name in optional if name != "weight")
    same = {name: tensor for name, tensor in optional.items() if tensor is not None and name not in local}
    return facts | checksums({name: tensor.double() for name, tensor in same.items()})


def checksums(tensors: dict[str, Tensor], why: str = "") -> dict[str, int]:
    """Facts about the values of tensors, by name; ``why`` they may differ is part of the names."""
    return {
        f"{name}'s values (a checksum){why}": checksum(tensor)
        for name, tensor in tensors.items()
        if tensor.device.type != "meta"
    }
