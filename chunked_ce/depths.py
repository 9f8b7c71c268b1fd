"""Several depths on one head, as in multi-token prediction: arguments that are lists, one tensor for each depth."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from chunked_ce.arguments import ADAPTER, described, is_number, number
from chunked_ce.devices import moved
from chunked_ce.parallel.vocab import VocabShard

__all__ = [
    "are_depths",
    "check_one_depth",
    "check_widths",
    "check_with_depths",
    "depths_of",
    "for_each_depth",
    "in_shapes",
    "joined_depths",
]

_Result = TypeVar("_Result")
_PER_TOKEN = ("target", "token_weight", "temperature", ADAPTER[0])
_LISTS = (list, tuple)  # made once: each call of a loss asks
_NUMBERS = ("token_weight", "temperature")  # where a number stands for as many equal ones as the depth has tokens


def are_depths(value: object) -> bool:
    return isinstance(value, _LISTS)


def depths_of(tensors: dict[str, Any], per_token: Collection[str] = ()) -> list[dict[str, Any]]:
    """The arguments of each depth, by name, from those of a call; the call's own if it has no depths.

    ``per_token`` names the tensors per token besides those of every loss. Raises ``TypeError`` or ``ValueError`` for
    lists that do not fit together.
    """
    input: Any = tensors.get("input")
    if not are_depths(input):
        return [tensors]  # lists among the others are refused as any value that is no tensor
    names = [name for name in (*_PER_TOKEN, *per_token) if tensors.get(name) is not None]
    if len(input) == 0:
        raise ValueError(
            f"input must be a tensor, or a list of tensors, one for each depth and at least one, was {described(input)}"
        )
    for at, hidden in enumerate(input):
        if not isinstance(hidden, Tensor):
            kinds = "a tensor, or a list of tensors, one for each depth"
            raise TypeError(
                f"input must be {kinds}, was a {_listed(input)} whose entry {at} is a {type(hidden).__name__}"
            )
    for name in names:
        value = tensors[name]
        if not are_depths(value):
            raise TypeError(
                f"{name} must be a list of {len(input)}, one for each depth of input, was {described(value)}"
            )
        if len(value) != len(input):
            raise ValueError(
                f"{name} must have one entry for each of the {len(input)} depths of input, had {len(value)}"
            )
    first = input[0]
    for at, hidden in enumerate(input):
        if (hidden.dtype, hidden.device) != (first.dtype, first.device):
            raise ValueError(
                f"input must have one dtype and device, those of its first depth, {first.dtype} on {first.device}, had "
                f"{hidden.dtype} on {hidden.device} at depth {at}"
            )
    return [_depth(tensors, ["input", *names], at) for at in range(len(input))]


def check_one_depth(tensors: dict[str, Any], function: str) -> None:
    """Raise if arguments of a function that takes one depth are lists."""
    for name, value in tensors.items():
        if are_depths(value) and name != "linear_adapter":  # whose own error says more
            raise TypeError(f"{name} must be a tensor, was a {_listed(value)}: {function} takes one depth at a time")


def check_with_depths(num_depths: int, teacher: object | None, vocab: VocabShard | None) -> None:
    """Raise if there is something that goes with one depth only."""
    held = f"must be one tensor, was a list of {num_depths}"
    if teacher is not None:
        raise ValueError(f"input {held}: a teacher goes with one depth, call the loss for each")
    if isinstance(vocab, VocabShard) and vocab.input_grad == "sequence":
        raise ValueError(f"input {held}: vocab.input_grad='sequence' goes with one depth, call the loss for each")


def check_widths(depths: Sequence[dict[str, Any]], per_token: Collection[str]) -> None:
    """Check that tensors (..., K) per token have one K for all depths, whose shapes have been checked."""
    for name in per_token:
        if depths[0].get(name) is not None:
            widths = [tuple(tensors[name].shape[tensors["target"].dim() :]) for tensors in depths]
            if any(width != widths[0] for width in widths):
                raise ValueError(f"{name} must have one last dimension K for all depths, had {widths}")


def for_each_depth(depths: Sequence[dict[str, Any]], function: Callable[[dict[str, Any]], _Result]) -> list[_Result]:
    """``function`` of the arguments of each depth; where there are several, an error says of which."""
    if len(depths) == 1:
        return [function(depths[0])]
    results = []
    for at, tensors in enumerate(depths):
        try:
            results.append(function(tensors))
        except (TypeError, ValueError) as error:
            raise type(error)(f"depth {at}: {error}") from None
    return results


def joined_depths(
    depths: Sequence[dict[str, Any]], per_token: Collection[str] = ()
) -> tuple[dict[str, Any], list[torch.Size]]:
    """The arguments of a call, by name, with the small tensors per token of all depths joined, (N, ...) each, and the
    hidden states as lists; and the shapes of the depths' tokens."""
    shapes = [tensors["target"].shape for tensors in depths]
    joined, device = dict(depths[0]), depths[0]["input"].device
    for name in ("input", ADAPTER[0]):
        if name in joined:
            joined[name] = [tensors[name] for tensors in depths]
    for name in ("target", "token_weight", "temperature", *per_token):
        if joined.get(name) is not None:
            joined[name] = torch.cat(
                [
                    moved(tensors[name].reshape(shape.numel(), *tensors[name].shape[len(shape) :]), device)
                    for tensors, shape in zip(depths, shapes, strict=True)
                ]
            )
    return joined, shapes


def in_shapes(values: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """``values`` (N,) of the tokens of all depths, in the shapes of each."""
    parts = torch.split(values, [shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _depth(tensors: dict[str, Any], names: Collection[str], at: int) -> dict[str, Any]:
    """The arguments of one depth, numbers as tensors."""
    depth = tensors | {name: tensors[name][at] for name in names}
    for name in _NUMBERS:
        if name not in names or isinstance(depth[name], Tensor):
            continue
        if not is_number(depth[name]):
            raise TypeError(f"{name} of depth {at} must be a tensor or a number, was {described(depth[name])}")
        value, hidden = number(name, depth[name]), depth["input"]
        depth[name] = torch.full(hidden.shape[:-1], value, dtype=torch.float64, device=hidden.device)
    return depth


def _listed(value: Sequence[Any]) -> str:
    return f"{type(value).__name__} of {len(value)}"
