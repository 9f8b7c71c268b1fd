"""Changing the class of a module in place, as `LMHead.wrap` and engines do."""

from __future__ import annotations

import functools
from typing import Any

from torch.func import functional_call

from chunked_ce.lazy.peft_layers import TrainableTokensLayer

__all__ = ["TokenAdapter", "in_front", "joined", "without"]


def joined(front: type, back: type) -> type:
    """A class that inherits from both, ``front`` first."""
    return _joined(front, back)


@functools.cache
def _joined(front: type, back: type) -> type:
    names = {"__module__": __name__, "__reduce_ex__": _reduce, "_joined": (front, back)}
    return type(f"{front.__name__}{back.__name__}", (front, back), names)


def _reduce(module: Any, protocol: int) -> tuple[Any, ...]:
    """Copy and pickle by the two classes, because a joined class cannot be imported by its name."""
    reduced = object.__reduce_ex__(module, max(protocol, 2))
    assert isinstance(reduced, tuple)
    pair = vars(type(module)).get("_joined")
    return reduced if pair is None else (_blank, pair, *reduced[2:])


def _blank(front: type, back: type) -> Any:
    cls: Any = joined(front, back)
    return cls.__new__(cls)


def without(cls: type, front: type, plain: type) -> type:
    """``cls`` with ``front`` taken out and all later changes kept; ``front`` itself becomes ``plain``."""
    if cls is front:
        return plain
    if not issubclass(cls, front):
        return cls
    pair = vars(cls).get("_joined")
    if pair is not None:
        first, second = pair
        return first if second is front else without(second, front, plain)
    bases = tuple(without(base, front, plain) for base in cls.__bases__)
    return _rebuilt(cls, bases)


def in_front(front: type, cls: type, plain: type, is_parametrized: bool) -> type:
    """``cls`` with ``front`` before it; ``plain`` itself becomes ``front``."""
    if cls is plain:
        return front
    if is_parametrized:  # torch undoes a parametrization by going back to the first base
        return _rebuilt(cls, tuple(in_front(front, base, plain, False) for base in cls.__bases__))
    return joined(front, cls)


def _rebuilt(cls: type, bases: tuple[type, ...]) -> type:
    name = cls.__name__
    for before, after in zip(cls.__bases__, bases, strict=True):
        name = name.replace(before.__name__, after.__name__)
    return type(cls)(name, bases, {key: v for key, v in vars(cls).items() if key not in ("__dict__", "__weakref__")})


class TokenAdapter(TrainableTokensLayer):
    """Goes before PEFT's ``TrainableTokensLayer`` around an `LMHead`, and calls the head with the merged weight.

    PEFT's own code multiplies by the weight itself, which would form the logits.
    """

    base_layer: Any

    def forward_adapters(self, x: Any, active_adapters: list[str], *args: Any, **kwargs: Any) -> Any:
        merged = self.disable_adapters or self.merged or not active_adapters
        if merged or self.base_layer.bias is not None:  # PEFT ignores a bias
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        self._check_overlapping_tokens(active_adapters)
        return functional_call(self.base_layer, {"weight": self.get_merged_weights(active_adapters)}, (x,))
