"""Inputs for comparisons with other packages, and what it means that two results are the same."""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import chunked_ce
from tests.cases import array
from tests.precision import FP32, RMS_SLACK, errors

WIDTH, VOCAB = 32, 300


class Model(NamedTuple):
    """Hidden states and a head."""

    hidden: Tensor  # (..., D)
    weight: Tensor  # (V, D)
    bias: Tensor  # (V,)


def model(*shape: int, width: int = WIDTH, seed: int = 0) -> Model:
    g = torch.Generator().manual_seed(seed)
    sizes = ((*shape, width), 1.0), ((VOCAB, width), 2.0 * width**-0.5), ((VOCAB,), 1.0)
    return Model(*(scale * torch.randn(*size, generator=g) for size, scale in sizes))


def responses(sequences: int, time: int, seed: int = 0) -> Tensor:
    """Targets (sequences, time): a prompt and padding of several lengths are -100."""
    g = torch.Generator().manual_seed(seed)
    start, stop = (torch.randint(low, high, (sequences, 1), generator=g) for low, high in ((0, 4), (5, time + 1)))
    place = torch.arange(time)
    target = torch.randint(VOCAB, (sequences, time), generator=g)
    return target.masked_fill((place < start) | (place >= stop), -100)


def result(call: Callable[..., Tensor], leaves: Iterable[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The value of ``call(*leaves)`` and its gradients, of leaves with the same numbers in ``dtype``."""
    fresh = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    value = call(*fresh)
    # An upstream gradient that is neither 1 nor the same for all tokens.
    upstream = 0.5 + torch.arange(value.numel(), dtype=value.dtype).view(value.shape) / value.numel()
    return [value.detach(), *torch.autograd.grad(value, fresh, upstream)]


def assert_same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], leaves: Iterable[Tensor]) -> None:
    """Value and gradients, in fp32, against our own in float64.

    The package's are that result up to roundings, so that both compute the same; ours are no less exact, in the root
    mean square.
    """
    leaves = list(leaves)
    exact = [array(x) for x in result(ours, leaves, torch.float64)]
    found = result(ours, leaves), result(theirs, leaves)
    for what, (mine, other, right) in enumerate(zip(*found, exact, strict=True)):
        name = f"gradient {what}" if what else "value"
        assert mine.shape == other.shape and mine.dtype == other.dtype == torch.float32, name
        size = math.sqrt((right**2).mean())
        assert size > 1e-6, f"{name} says nothing"
        error, allowed = errors(mine, right)[0], errors(other, right)[0]
        assert allowed <= 1e-5 * size, f"{name} of the package is another quantity"
        # A rounding or two of a value are chance: the package's own may happen to be exact.
        assert error <= RMS_SLACK * allowed + 4 * FP32 * size, f"{name}: {error:.3g}, the package's {allowed:.3g}"


def needs(*names: str) -> pytest.MarkDecorator:
    """Skip what the installed chunked_ce does not have yet: a name of it, or ``function(keyword)``."""
    missing = [name for name in names if not _exists(name)]
    return pytest.mark.skipif(bool(missing), reason=f"chunked_ce has no {', '.join(missing)} yet")


def _exists(name: str) -> bool:
    path, _, keyword = name.removesuffix(")").partition("(")
    found = chunked_ce
    for part in path.split("."):
        found = getattr(found, part, None)
    return found is not None and (not keyword or keyword in inspect.signature(found).parameters)
