"""The cases of ``chunked-ce check``: calls of the library against the formula on full logits in float64.

A case's error is its distance from float64 in root mean square, as a share of the exact value's own. The plain
implementation, full logits in the same dtype, sets what is allowed; see `allowed`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_ce import ChunkOptions, cross_entropy, linear_cross_entropy, linear_logprobs
from chunked_ce.cli.problems import IGNORED, Problem

__all__ = ["OPTIONS", "Inputs", "Row", "allowed", "cases", "compare", "plain", "small_cases"]

TOKENS, HIDDEN, VOCAB, CHUNK = 110, 520, 701, 48  # odd sizes, several chunks, a last one that is smaller
_FP32 = torch.finfo(torch.float32).eps
_LOW = (torch.bfloat16, torch.float16)
_GRADIENTS = ("dX", "dW", "db", "gradient")


class Row(NamedTuple):
    """One line of the table: one quantity of one case."""

    case: str
    where: str  # device, dtype, way, kernels
    quantity: str
    error: float
    plain: float  # the plain implementation's own error in the same dtype
    allowed: float

    @property
    def wrong(self) -> bool:
        return not self.error <= self.allowed  # NaN is wrong


class Inputs(NamedTuple):
    """What a call takes, all in one dtype."""

    hidden: Tensor  # (N, D)
    head: Tensor  # (V, D)
    target: Tensor  # (N,)
    bias: Tensor  # (V,)
    class_weight: Tensor  # (V,) float32
    token_weight: Tensor  # (N,) float32
    upstream: Tensor  # (N,) float32

    @classmethod
    def random(
        cls,
        dtype: torch.dtype,
        device: str,
        *,
        tokens: int = TOKENS,
        hidden_size: int = HIDDEN,
        vocab_size: int = VOCAB,
        ignored: float = 0.2,
    ) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        target = torch.randint(vocab_size, (tokens,), generator=generator)
        target[: round(ignored * tokens)] = IGNORED
        hidden, head, bias = normal(tokens, hidden_size), normal(vocab_size, hidden_size), normal(vocab_size)
        head *= hidden_size**-0.5
        options = normal(vocab_size).exp(), normal(tokens).exp(), normal(tokens)
        return cls(*(t.to(dtype) for t in (hidden, head)), target, bias.to(dtype), *options)._to(device)

    @classmethod
    def trained(cls, dtype: torch.dtype, device: str) -> Inputs:
        """A sharp softmax, for the filter."""
        problem = Problem.trained(TOKENS, HIDDEN, 6 * VOCAB, dtype)
        others = Inputs.random(dtype, "cpu")
        return cls(problem.hidden.detach(), problem.weight.detach(), problem.target, *others[3:])._to(device)

    def _to(self, device: str) -> Inputs:
        return Inputs(*(tensor.to(device) for tensor in self))

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(t.detach().clone().requires_grad_() for t in (self.hidden, self.head, self.bias))

    def double(self) -> Inputs:
        return Inputs(*(t.double() if t.is_floating_point() else t for t in self))


OPTIONS: dict[str, dict[str, object]] = {  # keywords by name; True stands for the tensor of that name
    "nothing else": {},
    "bias": {"bias": True},
    "label smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.01},
    "softcap": {"softcap": 3.0},
    "logit scale": {"logit_scale": 0.5},
    "class weights": {"class_weight": True},
    "token weights": {"token_weight": True},
    "reduction sum": {"reduction": "sum"},
    "reduction none": {"reduction": "none"},
    "num_tokens": {"num_tokens": 1000.0},
    "all together": {
        "bias": True,
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "softcap": 3.0,
        "logit_scale": 0.5,
        "class_weight": True,
        "token_weight": True,
    },
}


def plain(
    hidden: Tensor,  # (N, D)
    head: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,  # (V,)
    class_weight: Tensor | None = None,  # (V,)
    token_weight: Tensor | None = None,  # (N,)
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    num_tokens: float | None = None,
) -> Tensor:
    """The loss on full logits, in float32 from the products on; in float64 it is the reference."""
    z = F.linear(hidden, head, bias)
    z = (z if z.dtype == torch.float64 else z.float()) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    counted = target != IGNORED
    y = target.clamp(min=0)
    w = z.new_ones(z.shape[1]) if class_weight is None else class_weight.to(z.dtype)
    t = (z.new_ones(len(z)) if token_weight is None else token_weight.to(z.dtype)) * counted
    lse = z.logsumexp(-1)
    losses = (1 - label_smoothing) * w[y] * (lse - z.gather(-1, y[:, None]).squeeze(-1))
    losses = losses + label_smoothing / z.shape[1] * (w.sum() * lse - z @ w) + z_loss * lse**2
    losses = losses * t
    if reduction == "none":
        return losses
    return (
        losses.sum() if reduction == "sum" else losses.sum() / ((t * w[y]).sum() if num_tokens is None else num_tokens)
    )


def ours(
    hidden: Tensor, head: Tensor, target: Tensor, options: ChunkOptions, *, bias=None, class_weight=None, **keywords
) -> Tensor:
    return linear_cross_entropy(
        hidden, head, target, linear_bias=bias, weight=class_weight, options=options, **keywords
    )


def allowed(plain_error: float, rounding: float, dtype: torch.dtype, factor: float = 1.05) -> float:
    """The error that is allowed: 1.05 times the plain implementation's with ``rounding`` on top, and a floor.

    For gradients in a narrow dtype ``rounding`` is half a unit in the last place: where one probability dominates, the
    logits' gradients of all tokens are nearly the same number, which is rounded well or badly with its factor, that is
    by chance. The floor is 8 roundings of float32, or 32 of float64, whose reference is no better than itself.
    """
    floor = 32 * torch.finfo(torch.float64).eps if dtype == torch.float64 else 8 * _FP32
    return factor * math.hypot(plain_error, rounding) + floor


def compare(
    case: str,
    where: str,
    dtype: torch.dtype,
    names: tuple[str, ...],
    found: tuple[Tensor | None, ...],
    by_plain: tuple[Tensor, ...],
    exact: tuple[Tensor, ...],
    factor: float = 1.05,
) -> Iterator[Row]:
    """A row for every quantity there is."""
    for name, value, other, reference in zip(names, found, by_plain, exact, strict=True):
        if value is None:
            continue
        own, theirs = _distance(value, reference), _distance(other, reference)
        rounding = torch.finfo(dtype).eps / 2 if dtype in _LOW and name in _GRADIENTS else 0.0
        yield Row(case, where, name, own, theirs, allowed(theirs, rounding, dtype, factor))


def _distance(value: Tensor, exact: Tensor) -> float:
    exact = exact.double()
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def cases(device: str, dtype: torch.dtype, backend: str = "auto") -> Iterator[Row]:
    """All that one device, dtype and choice of kernels is checked for."""
    inputs = Inputs.random(dtype, device)
    at = _place(device, dtype, backend)
    yield from _losses(inputs, at, backend, CHUNK, tuple(OPTIONS))
    yield from _frozen(at, inputs, backend)
    yield from _logprobs(at, inputs, backend)
    yield from _logits(at, inputs, backend)
    yield from _stats(at, inputs, backend)
    if dtype != torch.float64:
        yield from _filtered(at, Inputs.trained(dtype, device), backend)


def small_cases(device: str, dtype: torch.dtype, backend: str) -> Iterator[Row]:
    """What kernels are checked for where they are interpreted, which takes milliseconds for every row."""
    inputs = Inputs.random(dtype, device, tokens=9, hidden_size=64, vocab_size=301)
    at = _place(device, dtype, backend)
    yield from _losses(inputs, f"{at}, interpreted", backend, 4, ("nothing else", "all together"))


def _place(device: str, dtype: torch.dtype, backend: str) -> str:
    return f"{device}, {str(dtype).removeprefix('torch.')}" + ("" if backend == "auto" else f", {backend} kernels")


def _losses(inputs: Inputs, at: str, backend: str, chunk: int, names: tuple[str, ...]) -> Iterator[Row]:
    for name, way in itertools.product(names, ("forward", "backward")):
        if not (way == "forward" and OPTIONS[name].get("reduction") == "none"):
            options = ChunkOptions(chunk_size=chunk, gradients=way, backend=backend)
            yield from _loss(name, f"{at}, {way}", inputs, OPTIONS[name], options)


def _loss(
    name: str,
    where: str,
    inputs: Inputs,
    wanted: dict[str, object],
    options: ChunkOptions,
    factor: float = 1.05,
    trained: tuple[bool, bool] = (True, True),  # hidden states, head
) -> Iterator[Row]:
    def run(loss: Callable[..., Tensor], own: Inputs) -> tuple[Tensor | None, ...]:
        hidden, head, bias = own.leaves()
        keywords = dict(wanted)
        for key in ("class_weight", "token_weight"):
            if keywords.get(key) is True:
                keywords[key] = getattr(own, key)
        if keywords.get("bias") is True:
            keywords["bias"] = bias
        hidden.requires_grad_(trained[0])
        head.requires_grad_(trained[1])
        value = loss(hidden, head, own.target, **keywords)
        upstream = own.upstream.to(value.dtype) if value.dim() else torch.full_like(value, 0.7)
        value.backward(upstream)
        return value.detach(), hidden.grad, head.grad, bias.grad

    found = run(lambda *tensors, **keywords: ours(*tensors, options, **keywords), inputs)
    by_plain, exact = run(plain, inputs), run(plain, inputs.double())
    dtype = inputs.hidden.dtype
    loss_bound = _per_token(inputs, wanted) if found[0].dim() == 0 else None
    for row in compare(name, where, dtype, ("loss", "dX", "dW", "db"), found, by_plain, exact, factor):
        if row.quantity == "loss":  # one number can be right by chance, so its tokens' errors set the bound
            rounding = 0.0 if loss_bound is None else loss_bound
            row = row._replace(allowed=allowed(row.plain, rounding, dtype, factor))
        yield row


def _per_token(inputs: Inputs, wanted: dict[str, object]) -> float:
    """The plain implementation's error of the tokens' losses, as a share of them."""
    keywords = {key: value for key, value in wanted.items() if key not in ("reduction", "num_tokens")}

    def losses(own: Inputs) -> Tensor:
        given = {key: getattr(own, key) if value is True else value for key, value in keywords.items()}
        return plain(own.hidden, own.head, own.target, reduction="none", **given)

    return _distance(losses(inputs), losses(inputs.double()))


def _frozen(at: str, inputs: Inputs, backend: str) -> Iterator[Row]:
    for name, trained in (("frozen head", (True, False)), ("frozen hidden states", (False, True))):
        for way in ("forward", "backward"):
            options = ChunkOptions(chunk_size=CHUNK, gradients=way, backend=backend)
            yield from _loss(name, f"{at}, {way}", inputs, {}, options, trained=trained)


def _filtered(at: str, inputs: Inputs, backend: str) -> Iterator[Row]:
    """The filter's error may be half as large again as the plain implementation's."""
    try:
        options = ChunkOptions(chunk_size=CHUNK, gradient_filter="auto", backend=backend)
    except (TypeError, ValueError):
        return
    yield from _loss("gradient filter, a sharp softmax", at, inputs, {}, options, factor=1.5)


def _logprobs(at: str, inputs: Inputs, backend: str) -> Iterator[Row]:
    def exactly(own: Inputs) -> tuple[Tensor, ...]:
        hidden, head, _ = own.leaves()
        z = F.linear(hidden, head)
        logp = (z if z.dtype == torch.float64 else z.float()).log_softmax(-1)
        counted = own.target != IGNORED
        chosen = logp.gather(-1, own.target.clamp(min=0)[:, None]).squeeze(-1) * counted
        entropy = -(logp.exp() * logp).sum(-1) * counted
        return _two_gradients(chosen, entropy, own, hidden, head)

    def chunked(own: Inputs) -> tuple[Tensor, ...]:
        hidden, head, _ = own.leaves()
        options = ChunkOptions(chunk_size=CHUNK, backend=backend)
        chosen, entropy = linear_logprobs(hidden, head, own.target, options=options, return_entropy=True)
        return _two_gradients(chosen, entropy, own, hidden, head)

    names = ("log-probability", "entropy", "dX", "dW")
    results = chunked(inputs), exactly(inputs), exactly(inputs.double())
    yield from compare("log-probabilities", at, inputs.hidden.dtype, names, *results)


def _two_gradients(chosen: Tensor, entropy: Tensor, own: Inputs, hidden: Tensor, head: Tensor) -> tuple[Tensor, ...]:
    upstream = own.upstream.to(chosen.dtype)
    (chosen * upstream + entropy * upstream.flip(0)).sum().backward()
    return chosen.detach(), entropy.detach(), hidden.grad, head.grad


def _logits(at: str, inputs: Inputs, backend: str) -> Iterator[Row]:
    def run(own: Inputs, loss: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        z = F.linear(own.hidden, own.head).detach().requires_grad_()
        value = loss(z, own.target)
        value.backward()
        return value.detach(), z.grad

    narrow = F.linear(inputs.hidden, inputs.head)  # the logits as they exist
    own = inputs._replace(hidden=narrow, head=torch.eye(narrow.shape[1], dtype=narrow.dtype, device=narrow.device))
    options = ChunkOptions(chunk_size=CHUNK, backend=backend)
    results = (
        run(own, lambda z, y: cross_entropy(z, y, options=options)),
        run(own, lambda z, y: F.cross_entropy(z if z.dtype == torch.float64 else z.float(), y)),
        run(own.double(), F.cross_entropy),
    )
    yield from compare("logits that exist", at, inputs.hidden.dtype, ("loss", "gradient"), *results)


def _stats(at: str, inputs: Inputs, backend: str) -> Iterator[Row]:
    options = ChunkOptions(chunk_size=CHUNK, backend=backend)
    _, found = linear_cross_entropy(inputs.hidden, inputs.head, inputs.target, options=options, return_stats=True)

    def by_formula(own: Inputs) -> tuple[Tensor, ...]:
        counted = own.target != IGNORED
        z = F.linear(own.hidden, own.head)[counted]
        logp = (z if z.dtype == torch.float64 else z.float()).log_softmax(-1)
        y = own.target[counted]
        hits = (z.argmax(-1) == y).sum()
        return -logp.gather(-1, y[:, None]).sum(), -(logp.exp() * logp).sum(), hits, counted.sum()

    own = found.loss_sum, found.entropy_sum, found.num_correct, found.num_tokens
    names = ("loss_sum", "entropy_sum", "num_correct", "num_tokens")
    bound = _per_token(inputs, {})
    dtype = inputs.hidden.dtype
    for row in compare("statistics", at, dtype, names, own, by_formula(inputs), by_formula(inputs.double())):
        # They come in float32, whatever the inputs' dtype.
        rounding = bound if "sum" in row.quantity else 0.0
        yield row._replace(allowed=allowed(row.plain, rounding, torch.float32))
