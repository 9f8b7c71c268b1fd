"""Random calls against float64, with errors bounded by those of the plain loss in the same dtype.

    python -m tests.fuzz --seconds 60            # random cases; exit code 1 if one fails
    python -m tests.fuzz --case 1234 --verbose   # one of them again
    python -m tests.fuzz --cases 10000 --report  # the ratios of errors to the plain loss's, by dtype and way

A case is drawn from its number alone. The rule is that of `tests.precision`: the root mean square of an error may be
5 % above the plain loss's, and the maximum 25 %, with a few fp32 roundings. Single roundings are luck, the plain loss's
too, so a case of few elements may exceed that; the mean over all cases of a dtype, a way and a result may not.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import math
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_ce import ChunkOptions, linear_cross_entropy
from tests.precision import FP32, MAX_SLACK, RMS_SLACK

__all__ = ["Case", "Finding", "Ratios", "check", "draw"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
UPSTREAMS = (1.0, 1.0, 0.37, 1 / 3, -2.5, 1e-4, 1 / 1024, 64.0, 65536.0)
NAMES = ("loss", "input", "linear_weight", "linear_bias")
LEAVES = ("hidden", "head", "bias")
# What luck adds to the rule, over the square root of the roundings that are independent: at most
# that many in the gradients of one token's logits, which are rounded once and meet all of its elements.
_LUCK, _INDEPENDENT = 10.0, 16
# From so many cases on their mean ratio says something.
_ENOUGH = 40


@dataclasses.dataclass(frozen=True)
class Case:
    """One call and its backward."""

    number: int
    dtype: torch.dtype
    tokens: int
    hidden: int
    vocab: int
    way: str
    reduction: str
    chunk: int | None
    upstream: float
    spread: float  # standard deviation of the logits
    confidence: float  # what is added to the target's logit
    bias: bool
    ignored: float
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float
    class_weight: float | None  # their size
    token_weight: float | None
    decades: float  # over which the weights are spread
    num_tokens: float | None
    accumulate: float | None  # size of the gradient that the head's is added to
    masks: bool = False  # ignored tokens, rather than dropping them


def draw(number: int) -> Case:
    """The case of this number."""
    r = random.Random(number)

    def some(share: float, *values: Any, otherwise: Any) -> Any:
        return r.choice(values) if r.random() < share else otherwise

    reduction = r.choice(("mean", "mean", "sum", "none"))
    way = "backward" if reduction == "none" else r.choice(("forward", "backward"))
    dtype = r.choices(DTYPES, (3, 3, 3, 1))[0]
    tokens = some(0.002, 5000, otherwise=r.choice((1, 2, 3, 5, 17, 40, 64, 100)))
    # Of two or three words the gradients cancel out in the plain loss, and so do their roundings: only of luck.
    few_words = (1, 2, 3) if dtype.itemsize >= 4 else ()
    num_tokens = some(0.2, 1.0, 1e6, 1e-3, otherwise=None) if reduction == "mean" else None
    tiny = (1e-39,) if reduction == "mean" and num_tokens is None else ()  # of weights whose mean is none
    return Case(
        number,
        dtype,
        tokens,
        r.choice((1, 2, 7, 16, 33, 64)),
        r.choice((*few_words, 17) if tokens > 100 else (*few_words, 17, 64, 101, 300)),
        way,
        reduction,
        some(0.8, 1, 2, 3, 7, 16, 40, otherwise=None),
        r.choice(UPSTREAMS),
        r.choice((0.1, 1.0, 2.0, 5.0)),
        some(0.3, 5.0, 10.0, 17.0, 30.0, otherwise=0.0),
        r.random() < 0.3,
        some(0.4, 0.2, 0.7, 1.1, otherwise=0.0),
        some(0.2, 0.1, 0.5, otherwise=0.0),
        some(0.2, 1e-4, 0.1, otherwise=0.0),
        some(0.2, 3.0, 30.0, otherwise=None),
        some(0.2, 0.5, 3.0, otherwise=1.0),
        some(0.25, 1.0, 2e-5, 1e-7, 1e5, otherwise=None),
        some(0.25, 1.0, 2e-5, 1e-7, 1e5, *tiny, otherwise=None),
        r.choice((1.0, 1.0, 5.0)),
        num_tokens,
        some(0.3, 1.0, 1e3, otherwise=None) if way == "backward" else None,
        r.random() < 0.3,
    )


@dataclasses.dataclass(frozen=True)
class Finding:
    """The errors of one result beside those of the plain loss."""

    name: str
    rms: float  # of the error, in units of what the plain loss's may be
    max: float
    ratio: float  # of the rms to the plain loss's, NaN where roundings of fp32 are all there is
    size: int = 0  # elements
    problem: str | None = None  # what else is wrong

    @property
    def fails(self) -> bool:
        return self.problem is not None or self.rms > 1 or self.max > 1


def inputs(case: Case) -> dict[str, Tensor | None]:
    """The tensors of a case, in its dtype."""
    g = torch.Generator().manual_seed(case.number)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def weights(size: float | None, n: int) -> Tensor | None:
        return None if size is None else (size * 10 ** (-case.decades * torch.rand(n, generator=g))).float()

    target = torch.randint(case.vocab, (case.tokens,), generator=g)
    head = case.spread * case.hidden**-0.5 * normal(case.vocab, case.hidden)
    hidden = normal(case.tokens, case.hidden)
    of_target = head[target]
    hidden += case.confidence * of_target / of_target.square().sum(1, keepdim=True).clamp(min=1e-3)
    ignored = torch.rand(case.tokens, generator=g) < case.ignored
    bias = normal(case.vocab)
    return {
        "hidden": hidden.to(case.dtype),
        "head": head.to(case.dtype),
        "bias": bias.to(case.dtype) if case.bias else None,
        "target": target.masked_fill(ignored, -100),
        "class_weight": weights(case.class_weight, case.vocab),
        "token_weight": weights(case.token_weight, case.tokens),
        "upstream": normal(case.tokens) * case.upstream if case.reduction == "none" else torch.tensor(case.upstream),
        "before": normal(case.vocab, case.hidden),
    }


def plain(case: Case, given: dict[str, Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Value and gradients by the formulas of the loss on full logits, with products in ``dtype``."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [None if given[name] is None else given[name].to(dtype).clone().requires_grad_() for name in LEAVES]
    target = given["target"]
    counted = target != -100
    z = F.linear(leaves[0][counted], *leaves[1:]).to(work) * case.logit_scale
    z = z if case.softcap is None else torch.tanh(z / case.softcap) * case.softcap
    y = target[counted]
    w = z.new_ones(case.vocab) if case.class_weight is None else given["class_weight"].to(work)
    t = z.new_ones(case.tokens) if case.token_weight is None else given["token_weight"].to(work)
    logp = z.log_softmax(1)
    loss = (1 - case.label_smoothing) * w[y] * -logp.gather(1, y[:, None])[:, 0]
    loss = loss - case.label_smoothing / case.vocab * (logp @ w)
    loss = (loss + case.z_loss * z.logsumexp(1).square()) * t[counted]
    value = loss.new_zeros(case.tokens).masked_scatter(counted, loss) if case.reduction == "none" else loss.sum()
    if case.reduction == "mean":
        denominator = (t[counted] * w[y]).sum() if case.num_tokens is None else case.num_tokens
        value = value / denominator if counted.any() else value
    return [value, *differentiated(case, value, given, leaves)]


def differentiated(case: Case, value: Tensor, given: dict[str, Tensor | None], leaves: list[Tensor | None]):
    """The gradients of the leaves; the head's with what was there before."""
    if case.accumulate is not None:
        leaves[1].grad = (given["before"] * case.accumulate).to(leaves[1].dtype)
    value.backward(given["upstream"].to(value.dtype))
    return [None if leaf is None else leaf.grad for leaf in leaves]


def ours(case: Case, given: dict[str, Tensor | None]) -> list[Tensor | None]:
    leaves = [None if given[name] is None else given[name].clone().requires_grad_() for name in LEAVES]
    size = {} if case.chunk is None else {"chunk_size": case.chunk}
    way = {"gradients": case.way} if case.accumulate is None else {"accumulate_into": "grad"}
    value = linear_cross_entropy(
        leaves[0],
        leaves[1],
        given["target"],
        linear_bias=leaves[2],
        weight=given["class_weight"],
        token_weight=given["token_weight"],
        reduction=case.reduction,
        label_smoothing=case.label_smoothing,
        z_loss=case.z_loss,
        softcap=case.softcap,
        logit_scale=case.logit_scale,
        num_tokens=case.num_tokens,
        options=ChunkOptions(**size, **way, ignored="mask" if case.masks else "drop"),
    )
    return [value, *differentiated(case, value, given, leaves)]


def check(case: Case) -> list[Finding]:
    """The errors of value and gradients of a case."""
    given = inputs(case)
    got, theirs, expected = ours(case, given), plain(case, given, case.dtype), plain(case, given, torch.float64)
    results = zip(NAMES, got, theirs, expected, terms(case, given), strict=True)
    return [compare(case, name, *rest) for name, *rest in results if rest[0] is not None]


def terms(case: Case, given: dict[str, Tensor | None]) -> list[float]:
    """The largest term of each result's sums: fp32 rounds it, whatever the terms add up to."""
    counted = given["target"] != -100
    y = given["target"][counted]
    if len(y) == 0:
        return [0.0] * 4
    w = torch.ones(case.vocab) if case.class_weight is None else given["class_weight"]
    t = (torch.ones(case.tokens) if case.token_weight is None else given["token_weight"])[counted].double()
    if case.reduction == "mean":
        t = t / ((t * w[y]).sum() if case.num_tokens is None else case.num_tokens)
    z = F.linear(given["hidden"].double()[counted], given["head"].double()) * case.logit_scale
    lse = z.logsumexp(1).abs() if case.softcap is None else case.softcap + math.log(case.vocab)
    slope = t * (w.max() + 2 * case.z_loss * lse)
    upstream = given["upstream"].abs().max().item()
    gradient = upstream * abs(case.logit_scale) * slope.max().item()
    value = (t * (w.max() + case.z_loss * lse) * lse).max().item()
    gradient *= len(y) ** (1.0 if case.vocab == 1 else 0.5)  # gradients of one word add up to 0, their roundings do not
    return [value, *(gradient * x.abs().max().item() for x in (given["head"], given["hidden"][counted])), gradient]


def compare(case: Case, name: str, got: Tensor, theirs: Tensor, expected: Tensor, largest: float) -> Finding:
    dtype, limits = got.dtype, torch.finfo(got.dtype)
    got, theirs, expected = (x.detach().double() for x in (got, theirs, expected))
    if expected.abs().max() > limits.max / 2 or not theirs.isfinite().all():
        return Finding(name, 0.0, 0.0, math.nan)  # beyond the range of the dtype, or of the plain loss
    if not got.isfinite().all():
        return Finding(name, math.inf, math.inf, math.nan, problem="not finite")
    errors, plain_errors = (got - expected).abs(), (theirs - expected).abs()
    # The reference of a float64 result has roundings of its own.
    roundings = 16 * limits.eps if dtype == torch.float64 else 4 * FP32
    floor = roundings * max(expected.abs().max().item(), largest) + limits.smallest_normal * limits.eps
    luck = _LUCK / math.sqrt(independent(expected, case.tokens))
    rms, plain_rms, size = (x.square().mean().sqrt().item() for x in (errors, plain_errors, expected))
    most, plain_most, largest = (x.abs().max().item() for x in (errors, plain_errors, expected))
    # The plain loss may be lucky too: a few of its roundings may be none.
    allowed = RMS_SLACK * plain_rms + luck * max(plain_rms, limits.eps / 4 * size) + floor
    allowed_most = MAX_SLACK * plain_most + 2 * luck * max(plain_most, limits.eps / 4 * largest) + floor
    ratio = rms / plain_rms if plain_rms > floor else math.nan
    return Finding(name, rms / allowed, most / allowed_most, ratio, errors.numel())


def independent(result: Tensor, tokens: int) -> float:
    """How many roundings that are independent of each other decide the error of a result, about."""
    squares = result.flatten(1).square() if result.dim() > 1 else result.square().reshape(-1, 1)
    rows = _participating(squares.sum(1))
    return min(_participating(squares.flatten()), _INDEPENDENT * min(rows, tokens))


def _participating(sizes: Tensor) -> float:
    """How many sizes there are, where they are alike; 1 where one is above all others."""
    return (sizes.sum().square() / sizes.square().sum().clamp(min=1e-300)).item() or 1.0


class Ratios:
    """The ratios of errors to the plain loss's by dtype, way and result."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str], list[tuple[float, int, int]]] = collections.defaultdict(list)

    def add(self, case: Case, findings: list[Finding]) -> None:
        for one in findings:
            if math.isfinite(one.ratio):
                self._found[str(case.dtype), case.way, one.name].append((one.ratio, one.size, case.number))

    def __iter__(self) -> Iterator[tuple[str, float, int, str]]:
        """What they are of, their geometric mean, how many there are, and the worst of those that are no luck."""
        for key, found in sorted(self._found.items()):
            mean = math.exp(sum(math.log(min(16, max(1 / 16, ratio))) for ratio, *_ in found) / len(found))
            worst = max(((ratio, number) for ratio, size, number in found if size >= 256), default=None)
            said = "" if worst is None else f", worst {worst[0]:.2f} (case {worst[1]})"
            yield " ".join(key), mean, len(found), said

    def failures(self) -> list[str]:
        return [
            f"{key}: the errors of {n} cases are {mean:.3f} times the plain loss's"
            for key, mean, n, _ in self
            if n >= _ENOUGH and mean > RMS_SLACK
        ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to go on")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, help="how many cases, whatever time they take")
    parser.add_argument("--case", type=int, help="one case, by its number")
    parser.add_argument("--verbose", action="store_true", help="say what every case gave")
    parser.add_argument("--report", action="store_true", help="the ratios of errors for each dtype and way")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    numbers = itertools.count(arguments.seed) if arguments.case is None else [arguments.case]
    end = time.monotonic() + arguments.seconds
    ratios, seen, failed = Ratios(), 0, 0
    for number in numbers:
        if seen == arguments.cases or (arguments.cases is None and time.monotonic() > end):
            break
        case = draw(number)
        findings = check(case)
        ratios.add(case, findings)
        seen += 1
        failed += any(finding.fails for finding in findings)
        for finding in findings:
            if finding.fails or arguments.verbose:
                print(f"{'FAILED' if finding.fails else 'ok'} {finding}\n    {case}", flush=True)
    if arguments.report:
        for key, mean, n, worst in ratios:
            print(f"{key}: mean {mean:.3f} in {n} cases{worst}")
    failures = ratios.failures()
    print(*failures, f"{seen} cases, {failed} failed", sep="\n")
    return 1 if failed or failures else 0


if __name__ == "__main__":
    sys.exit(main())
