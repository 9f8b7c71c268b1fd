"""The cases of ``chunked-ce check``: calls of the library against the formula on full logits in float64.

A case's error is its distance from float64 in root mean square, as a share of the exact value's own. The error of the
plain implementation, full logits in the same dtype, sets what is allowed; see `allowed`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_ce import ChunkOptions, cross_entropy, linear_cross_entropy, linear_logprobs
from chunked_ce.cli.accuracy import gradient_of, relative_error
from chunked_ce.cli.synthetic_inputs import IGNORED, LossInputs

__all__ = [
    "CHUNK",
    "OPTIONS",
    "WAYS",
    "CheckInputs",
    "Kernels",
    "Row",
    "Way",
    "allowed",
    "cases",
    "compare",
    "place",
    "plain",
    "small_cases",
]

Way = Literal["forward", "backward"]  # when gradients are computed
Kernels = Literal["auto", "torch", "triton"]
WAYS: tuple[Way, ...] = ("forward", "backward")
TOKENS, HIDDEN, VOCAB, CHUNK = 110, 520, 701, 48  # odd sizes, several chunks, a last one that is smaller
_LOW = (torch.bfloat16, torch.float16)
_GRADIENTS = ("dX", "dW", "db", "gradient")


class Row(NamedTuple):
    """One line of the table: one quantity of one case."""

    case: str
    where: str  # device, dtype, when gradients are computed, kernels
    quantity: str
    error: float
    plain: float  # the plain implementation's own error in the same dtype
    allowed: float

    @property
    def wrong(self) -> bool:
        return not self.error <= self.allowed  # NaN is wrong


class CheckInputs(NamedTuple):
    """The tensors of a call: hidden states, head and bias in one dtype, optional ones named as their argument is."""

    hidden: Tensor  # (N, D)
    head: Tensor  # (V, D)
    target: Tensor  # (N,)
    linear_bias: Tensor  # (V,)
    weight: Tensor  # (V,) float32, of the classes
    token_weight: Tensor  # (N,) float32
    upstream: Tensor  # (N,) float32

    @classmethod
    def random(
        cls, dtype: torch.dtype, device: str, tokens: int = TOKENS, hidden_size: int = HIDDEN, vocab_size: int = VOCAB
    ) -> CheckInputs:
        """A fifth of the tokens is ignored."""
        generator = torch.Generator().manual_seed(0)
        normal = functools.partial(torch.randn, generator=generator)
        target = torch.randint(vocab_size, (tokens,), generator=generator)
        target[: round(0.2 * tokens)] = IGNORED
        hidden, head, bias = normal(tokens, hidden_size), normal(vocab_size, hidden_size), normal(vocab_size)
        head *= hidden_size**-0.5
        others = normal(vocab_size).exp(), normal(tokens).exp(), normal(tokens)
        return cls(hidden.to(dtype), head.to(dtype), target, bias.to(dtype), *others)._to(device)

    @classmethod
    def trained(cls, dtype: torch.dtype, device: str) -> CheckInputs:
        """A sharp softmax, for the filter."""
        hidden, head, target = (t.detach() for t in LossInputs.trained(TOKENS, HIDDEN, 6 * VOCAB, dtype))
        return cls.random(dtype, "cpu")._replace(hidden=hidden, head=head, target=target)._to(device)

    def _to(self, device: str) -> CheckInputs:
        return CheckInputs(*(tensor.to(device) for tensor in self))

    def leaves(self, train_input: bool = True, train_head: bool = True) -> CheckInputs:
        """Copies of hidden states, head and bias that collect gradients."""
        hidden, head, bias = (t.detach().clone() for t in (self.hidden, self.head, self.linear_bias))
        hidden.requires_grad_(train_input)
        return self._replace(hidden=hidden, head=head.requires_grad_(train_head), linear_bias=bias.requires_grad_())

    def double(self) -> CheckInputs:
        return CheckInputs(*(t.double() if t.is_floating_point() else t for t in self))

    def keywords(self, options: dict[str, Any]) -> dict[str, Any]:
        """Keywords of a call: in ``options`` True stands for the tensor of that name."""
        return {name: getattr(self, name) if value is True else value for name, value in options.items()}


_TOGETHER: dict[str, dict[str, Any]] = {
    "bias": {"linear_bias": True},
    "label smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.01},
    "softcap": {"softcap": 3.0},
    "logit scale": {"logit_scale": 0.5},
    "class weights": {"weight": True},
    "token weights": {"token_weight": True},
}
OPTIONS: dict[str, dict[str, Any]] = {  # by name of the case; see `CheckInputs.keywords`
    "nothing else": {},
    **_TOGETHER,
    "reduction sum": {"reduction": "sum"},
    "reduction none": {"reduction": "none"},
    "num_tokens": {"num_tokens": 1000.0},
    "all together": {name: value for keywords in _TOGETHER.values() for name, value in keywords.items()},
}


def plain(
    hidden: Tensor,  # (N, D)
    head: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    *,
    linear_bias: Tensor | None = None,  # (V,)
    weight: Tensor | None = None,  # (V,)
    token_weight: Tensor | None = None,  # (N,)
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    num_tokens: float | None = None,
) -> Tensor:
    """The loss on full logits, in float32 from the products on; in float64 it is the reference."""
    z = _wide(F.linear(hidden, head, linear_bias)) * logit_scale  # (N, V)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    y = target.clamp(min=0)
    w = z.new_ones(z.shape[1]) if weight is None else weight.to(z.dtype)
    t = (z.new_ones(len(z)) if token_weight is None else token_weight.to(z.dtype)) * (target != IGNORED)
    lse = z.logsumexp(-1)
    losses = (1 - label_smoothing) * w[y] * (lse - z.gather(-1, y[:, None]).squeeze(-1))
    losses = losses + label_smoothing / z.shape[1] * (w.sum() * lse - z @ w) + z_loss * lse**2
    losses = losses * t
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / ((t * w[y]).sum() if num_tokens is None else num_tokens)


def _wide(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def allowed(plain_error: float, rounding: float, dtype: torch.dtype, factor: float = 1.05) -> float:
    """The error that is allowed: 1.05 times the plain implementation's with ``rounding`` on top, and a floor.

    For gradients in a narrow dtype ``rounding`` is half a unit in the last place: where one probability dominates, the
    logits' gradients of all tokens are nearly the same number, which is rounded well or badly with its factor, that is
    by chance. The floor is 8 roundings of float32, or 32 of float64, whose reference is no better than itself.
    """
    floor = 32 * torch.finfo(torch.float64).eps if dtype == torch.float64 else 8 * torch.finfo(torch.float32).eps
    return factor * math.hypot(plain_error, rounding) + floor


def compare(
    case: str,
    where: str,
    inputs: CheckInputs,
    names: tuple[str, ...],
    values: tuple[Tensor | None, ...],
    formula: Callable[[CheckInputs], tuple[Tensor | None, ...]],
    *,
    rounding: dict[str, float] | None = None,
    dtype: torch.dtype | None = None,
    factor: float = 1.05,
) -> Iterator[Row]:
    """A row for every value that is not None, against the formula on the inputs and on their float64 copies.

    ``rounding`` by name is allowed on top of the formula's own error (see `allowed`); ``dtype`` is that of the values,
    the inputs' by default.
    """
    dtype = dtype or inputs.hidden.dtype
    half_unit = torch.finfo(dtype).eps / 2 if dtype in _LOW else 0.0
    rounding = dict.fromkeys(_GRADIENTS, half_unit) | (rounding or {})
    for name, value, by_plain, exact in zip(names, values, formula(inputs), formula(inputs.double()), strict=True):
        if value is not None and by_plain is not None and exact is not None:
            error, plain_error = relative_error(value, exact), relative_error(by_plain, exact)
            bound = allowed(plain_error, rounding.get(name, 0.0), dtype, factor)
            yield Row(case, where, name, error, plain_error, bound)


def cases(device: str, dtype: torch.dtype, backend: Kernels = "auto") -> Iterator[Row]:
    """All rows of one device, dtype and choice of kernels."""
    inputs = CheckInputs.random(dtype, device)
    where = place(device, dtype, backend)
    yield from _losses(inputs, where, backend, CHUNK, tuple(OPTIONS))
    yield from _frozen(inputs, where, backend)
    options = ChunkOptions(chunk_size=CHUNK, backend=backend)
    yield from _logprobs(inputs, where, options)
    yield from _logits(inputs, where, options)
    yield from _stats(inputs, where, options)
    if dtype != torch.float64:
        options = ChunkOptions(chunk_size=CHUNK, gradient_filter="auto", backend=backend)
        # The filter's error may be half as large again as the plain implementation's.
        sharp = CheckInputs.trained(dtype, device)
        yield from _loss("gradient filter, a sharp softmax", where, sharp, {}, options, factor=1.5)


def small_cases(device: str, dtype: torch.dtype, backend: Kernels) -> Iterator[Row]:
    """Few and small cases, for kernels in the interpreter, which takes milliseconds for every row of logits."""
    inputs = CheckInputs.random(dtype, device, tokens=9, hidden_size=64, vocab_size=301)
    where = f"{place(device, dtype, backend)}, interpreted"
    yield from _losses(inputs, where, backend, 4, ("nothing else", "all together"))


def place(device: str, dtype: torch.dtype, backend: Kernels) -> str:
    """Where a case runs, as the table says it."""
    return f"{device}, {str(dtype).removeprefix('torch.')}" + ("" if backend == "auto" else f", {backend} kernels")


def _losses(inputs: CheckInputs, where: str, backend: Kernels, chunk: int, names: tuple[str, ...]) -> Iterator[Row]:
    for name, gradients in itertools.product(names, WAYS):
        if not (gradients == "forward" and OPTIONS[name].get("reduction") == "none"):
            options = ChunkOptions(chunk_size=chunk, gradients=gradients, backend=backend)
            yield from _loss(name, f"{where}, {gradients}", inputs, OPTIONS[name], options)


def _frozen(inputs: CheckInputs, where: str, backend: Kernels) -> Iterator[Row]:
    frozen = {"frozen head": {"train_head": False}, "frozen hidden states": {"train_input": False}}
    for name, gradients in itertools.product(frozen, WAYS):
        options = ChunkOptions(chunk_size=CHUNK, gradients=gradients, backend=backend)
        yield from _loss(name, f"{where}, {gradients}", inputs, {}, options, **frozen[name])


def _loss(
    name: str,
    where: str,
    inputs: CheckInputs,
    keywords: dict[str, Any],
    options: ChunkOptions,
    factor: float = 1.05,
    **trained: bool,
) -> Iterator[Row]:
    def run(loss: Callable[..., Tensor], given: CheckInputs) -> tuple[Tensor | None, ...]:
        own = given.leaves(**trained)
        value = loss(own.hidden, own.head, own.target, **own.keywords(keywords))
        value.backward(own.upstream.to(value.dtype) if value.dim() else torch.full_like(value, 0.7))
        return value.detach(), own.hidden.grad, own.head.grad, own.linear_bias.grad

    values = run(functools.partial(linear_cross_entropy, options=options), inputs)
    # One number can be right by chance, so the errors of its tokens set the bound.
    one_number = keywords.get("reduction") != "none"
    rounding = {"loss": _error_per_token(inputs, keywords) if one_number else 0.0}
    formula = functools.partial(run, plain)
    names = ("loss", "dX", "dW", "db")
    yield from compare(name, where, inputs, names, values, formula, rounding=rounding, factor=factor)


def _error_per_token(inputs: CheckInputs, keywords: dict[str, Any]) -> float:
    """The plain implementation's error in the tokens' losses, as a share of them."""
    per_token = keywords | {"reduction": "none"}

    def losses(own: CheckInputs) -> Tensor:
        return plain(own.hidden, own.head, own.target, **own.keywords(per_token))

    return relative_error(losses(inputs), losses(inputs.double()))


def _logprobs(inputs: CheckInputs, where: str, options: ChunkOptions) -> Iterator[Row]:
    def by_formula(hidden: Tensor, head: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logp = _wide(F.linear(hidden, head)).log_softmax(-1)
        counted = target != IGNORED
        chosen = logp.gather(-1, target.clamp(min=0)[:, None]).squeeze(-1) * counted
        return chosen, -(logp.exp() * logp).sum(-1) * counted

    def run(logprobs: Callable[..., tuple[Tensor, Tensor]], given: CheckInputs) -> tuple[Tensor, ...]:
        own = given.leaves()
        chosen, entropy = logprobs(own.hidden, own.head, own.target)
        upstream = own.upstream.to(chosen.dtype)
        (chosen * upstream + entropy * upstream.flip(0)).sum().backward()
        return chosen.detach(), entropy.detach(), gradient_of(own.hidden), gradient_of(own.head)

    values = run(functools.partial(linear_logprobs, options=options, return_entropy=True), inputs)
    names = ("log-probability", "entropy", "dX", "dW")
    yield from compare("log-probabilities", where, inputs, names, values, functools.partial(run, by_formula))


def _logits(inputs: CheckInputs, where: str, options: ChunkOptions) -> Iterator[Row]:
    def run(loss: Callable[..., Tensor], given: CheckInputs) -> tuple[Tensor, Tensor]:
        z = given.hidden.detach().requires_grad_()
        value = loss(z, given.target)
        value.backward()
        return value.detach(), gradient_of(z)

    logits = inputs._replace(hidden=F.linear(inputs.hidden, inputs.head))  # instead of hidden states
    values = run(functools.partial(cross_entropy, options=options), logits)
    formula = functools.partial(run, lambda z, y: F.cross_entropy(_wide(z), y))
    yield from compare("logits that exist", where, logits, ("loss", "gradient"), values, formula)


def _stats(inputs: CheckInputs, where: str, options: ChunkOptions) -> Iterator[Row]:
    def by_formula(own: CheckInputs) -> tuple[Tensor, ...]:
        counted = own.target != IGNORED
        z = _wide(F.linear(own.hidden, own.head)[counted])
        logp, y = z.log_softmax(-1), own.target[counted]
        hits = (z.argmax(-1) == y).sum()
        return -logp.gather(-1, y[:, None]).sum(), -(logp.exp() * logp).sum(), hits, counted.sum()

    _, stats = linear_cross_entropy(inputs.hidden, inputs.head, inputs.target, options=options, return_stats=True)
    names = ("loss_sum", "entropy_sum", "num_correct", "num_tokens")
    rounding: dict[str, float] = dict.fromkeys(names[:2], _error_per_token(inputs, {}))
    values = tuple(getattr(stats, name) for name in names)
    # Statistics are float32, whatever the inputs' dtype.
    yield from compare("statistics", where, inputs, names, values, by_formula, rounding=rounding, dtype=torch.float32)
