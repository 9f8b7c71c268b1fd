"""Every way to compute the loss against float64, beside the plain loss's own error in bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.device.jobs import Job, Row
from benchmarks.device.timing import DEVICE, ON_GPU, Shape
from benchmarks.device.ways import one_pass, two_passes
from chunked_ce import ChunkOptions, linear_cross_entropy
from chunked_ce.cli.accuracy import relative_error
from chunked_ce.cli.self_checks import allowed, plain
from chunked_ce.cli.synthetic_inputs import LossInputs

__all__ = ["jobs"]

SIZES = (Shape(1000, 512, 50257), Shape(513, 256, 32000), Shape(2731, 256, 8192), Shape(300, 64, 4097))
_TINY = (Shape(33, 16, 301),)
_FILTER = 1.5  # the filter's error may be half as large again


class Case(NamedTuple):
    """Options and keywords of a call. Each bound on its errors is ``factor`` times the plain loss's own."""

    options: Mapping[str, object] = MappingProxyType({})
    keywords: Mapping[str, object] = MappingProxyType({})
    ignored: float = 0.15
    factor: float = 1.05
    way: Callable[[], AbstractContextManager] = nullcontext  # in which the loss is computed


def _cases(tokens: int) -> dict[str, Case]:
    several = {"chunk_size": -(-tokens // 7)}
    backward = {"gradients": "backward"}
    filtered = {"gradient_filter": "auto"}
    terms = {"softcap": 30.0, "linear_bias": True}
    return {
        "forward": Case(),
        "forward, 7 chunks": Case(several),
        "forward, all tokens": Case(ignored=0.0),
        "one pass": Case(way=one_pass),
        "two passes": Case(way=two_passes),
        "two passes, 7 chunks": Case(several, way=two_passes),
        "ignored tokens dropped": Case({"ignored": "drop"}, ignored=0.5),
        "ignored tokens masked": Case({"ignored": "mask"}, ignored=0.5),
        "ignored tokens masked, 7 chunks": Case({"ignored": "mask"} | several, ignored=0.5),
        "backward": Case(backward),
        "backward, blocks": Case(backward | several),
        "filtered": Case(filtered, factor=_FILTER),
        "filtered, 7 chunks": Case(filtered | several, factor=_FILTER),
        "torch kernels": Case({"backend": "torch"}),
        "fp32 logits": Case({"logits_dtype": torch.float32}),
        "softcap": Case({}, {"softcap": 30.0}),
        "bias": Case({}, {"linear_bias": True}),
        "softcap and bias, 7 chunks": Case(several, terms),
        "softcap and bias, backward": Case(backward, terms),
        "label smoothing and z-loss": Case({}, {"label_smoothing": 0.1, "z_loss": 1e-3}),
    }


def jobs(shapes: tuple[Shape, ...]) -> list[Job]:
    return [Job("bf16", _errors, (size,)) for size in (SIZES if ON_GPU else _TINY)]


def _errors(size: Shape) -> Iterator[Row]:
    known: dict[object, tuple[list[Tensor], list[float], float]] = {}  # the exact results, and the plain loss's errors
    for name, case in _cases(size.tokens).items():
        inputs = LossInputs.trained(*size, torch.bfloat16, ignored=case.ignored, device=DEVICE)
        key = case.ignored, *case.keywords.items()
        if key not in known:
            exact = _results(_plain, inputs, case, torch.float64)
            known[key] = exact, _relative(_results(_plain, inputs, case), exact), _per_token(inputs, case)
        exact, by_plain, per_token = known[key]
        try:
            found = _relative(_results(_ours, inputs, case), exact)
        except Exception as error:  # the other cases still say something
            yield {"what": name, "ok": False, "error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            continue
        half_unit = torch.finfo(torch.bfloat16).eps / 2
        bounds = [
            allowed(of_plain, rounding, torch.bfloat16, case.factor)
            for of_plain, rounding in zip(by_plain, (per_token, half_unit, half_unit), strict=True)
        ]
        row = {"what": name, "ok": all(a <= b for a, b in zip(found, bounds, strict=True))}
        names = ("loss", "hidden_grad", "weight_grad")
        row |= {f"{name}_error": float(f"{error:.4g}") for name, error in zip(names, found, strict=True)}
        yield row | {f"plain_{name}_error": float(f"{error:.4g}") for name, error in zip(names, by_plain, strict=True)}


def _ours(hidden: Tensor, weight: Tensor, target: Tensor, case: Case, keywords: dict[str, object]) -> Tensor:
    with case.way():
        return linear_cross_entropy(hidden, weight, target, options=ChunkOptions(**case.options), **keywords)


def _plain(hidden: Tensor, weight: Tensor, target: Tensor, case: Case, keywords: dict[str, object]) -> Tensor:
    return plain(hidden, weight, target, **keywords)


def _results(
    loss: Callable[..., Tensor], inputs: LossInputs, case: Case, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """The loss and its gradients, of the same numbers in ``dtype``."""
    hidden, weight = (leaf.detach().to(dtype).requires_grad_() for leaf in inputs[:2])
    value = loss(hidden, weight, inputs.target, case, _keywords(case, inputs, dtype))
    value.backward()
    return [value.detach(), hidden.grad, weight.grad]


def _per_token(inputs: LossInputs, case: Case) -> float:
    """The plain loss's error in the tokens' losses: their mean can be right by chance."""
    narrow, exact = (
        plain(
            *(leaf.detach().to(dtype) for leaf in inputs[:2]), inputs.target, **_keywords(case, inputs, dtype, "none")
        )
        for dtype in (torch.bfloat16, torch.float64)
    )
    return relative_error(narrow, exact)


def _keywords(case: Case, inputs: LossInputs, dtype: torch.dtype, reduction: str = "mean") -> dict[str, object]:
    keywords = {**case.keywords, "reduction": reduction}
    if "linear_bias" in keywords:
        keywords["linear_bias"] = torch.linspace(-1, 1, len(inputs.weight), device=DEVICE).bfloat16().to(dtype)
    return keywords


def _relative(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [relative_error(a, b) for a, b in zip(found, exact, strict=True)]
