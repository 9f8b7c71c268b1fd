"""Helpers of all checks of arguments: whether a value is of its kind, and how an error describes it."""

from __future__ import annotations

from numbers import Integral, Rational, Real
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

from chunked_ce.light import LIGHT, torch

if TYPE_CHECKING or not LIGHT:
    from torch import Tensor
    from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]  # not in its stub
else:
    Tensor = UninitializedTensorMixin = torch.Tensor

__all__ = [
    "ADAPTER",
    "COUNTS",
    "FLOATING",
    "INDICES",
    "WEIGHTS",
    "check_flag",
    "check_tensor",
    "described",
    "integer",
    "is_dense",
    "is_integer",
    "is_number",
    "is_one_of",
    "number",
    "plain_integer",
]


class Kind(NamedTuple):
    """Dtypes that an argument may have, and what an error calls them."""

    dtypes: tuple[torch.dtype, ...]
    said: str


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FLOATS_SAID = "of a floating-point dtype, float64, float32, bfloat16 or float16"
FLOATING = Kind(_FLOATS, _FLOATS_SAID)
INDICES = Kind((torch.int64, torch.int32), "int32 or int64 class indices")
COUNTS = Kind((*_FLOATS, *_INTEGERS), f"an integer or {_FLOATS_SAID}")
WEIGHTS = Kind((*COUNTS.dtypes, torch.bool), f"boolean, {COUNTS.said}")

ADAPTER = ("linear_adapter[0]", "linear_adapter[1]")  # the factors of a low-rank adapter among named tensors

_INT64_END = 2**63  # one more than the largest integer that an operator takes
_LONGEST = 100  # most characters of a value in an error


def number(name: str, value: object, kind: str = "a number") -> float:
    """``value`` as a Python float; it may be an integer or a numpy scalar."""
    if not is_number(value):
        raise TypeError(f"{name} must be {kind}, was {described(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be {kind} that a float can hold, was {described(value)}") from None


def integer(name: str, value: object, kind: str = "an integer") -> int:
    """``value`` as a Python integer of 64 bits; it may be a numpy scalar."""
    if not is_integer(value):
        raise TypeError(f"{name} must be {kind}, was {described(value)}")
    if not -_INT64_END <= value < _INT64_END:
        raise ValueError(f"{name} must be {kind} of 64 bits, was {described(value)}")
    return plain_integer(value)


def plain_integer(value: int) -> int:
    """A plain Python integer, or a symbolic one as it is."""
    return value if isinstance(value, int | torch.SymInt) else int(value)


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is real; a ``Fraction`` is not accepted: torch has none."""
    real = isinstance(value, Real | torch.SymInt | torch.SymFloat) and not isinstance(value, bool)
    return real and (isinstance(value, Integral) or not isinstance(value, Rational))


def is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral | torch.SymInt) and not isinstance(value, bool)


def is_one_of(value: object, names: tuple[str, ...]) -> bool:
    """Whether ``value`` is one of ``names``: False for an array, whose comparison has no truth value."""
    return isinstance(value, str) and value in names


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, was {described(value)}")


def check_tensor(name: str, value: object, kind: Kind) -> Tensor:
    """``value``; raises unless it is a dense tensor of this kind."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, was {type(value).__name__}")
    if isinstance(value, UninitializedTensorMixin):
        raise ValueError(f"{name} must be initialised, was an {type(value).__name__}: call its module once before")
    if value.is_nested or value.layout != torch.strided:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.").lstrip("_")
        raise TypeError(f"{name} must be a dense tensor, was a {layout} one")
    if value.dtype not in kind.dtypes:
        raise TypeError(f"{name} must be {kind.said}, was {value.dtype}")
    return value


def is_dense(value: object) -> TypeGuard[Tensor]:
    """Whether ``value`` is a tensor whose shape can be read before it is checked."""
    return isinstance(value, Tensor) and not value.is_nested and value.layout == torch.strided


def described(value: object) -> str:
    """``value`` for an error: short, whatever it is."""
    if isinstance(value, Tensor):
        return _described_tensor(value)
    # An array; in compiled code, so is a numpy number.
    shape = getattr(value, "shape", None)
    if shape or (shape is not None and torch.compiler.is_compiling()):
        return f"a {type(value).__name__} of shape {shape}"
    try:
        text = repr(value)
    except Exception:  # an integer of too many digits, or a broken class
        return f"a value of type {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _described_tensor(value: Tensor) -> str:
    if isinstance(value, UninitializedTensorMixin):
        return f"an {type(value).__name__}"
    if value.is_nested:
        return f"a nested {value.dtype} tensor"
    return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
