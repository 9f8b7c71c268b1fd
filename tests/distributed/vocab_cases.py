"""Cases of losses with a sharded vocabulary, and the check of one on every rank of its group.

A case is a dict of options (see `DIMENSIONS`). `check` runs it on this rank and compares the value, the statistics and
the gradients of this rank's tensors with the float64 reference of the whole problem.
"""

import dataclasses
import itertools
import random
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from chunked_ce import ChunkOptions, VocabShard, cross_entropy, linear_cross_entropy, linear_logprobs
from tests.cases import array, arrays, assert_close, loss_dtype, problem, random_like
from tests.distributed.covering import Case, covering
from tests.reference import Rows, rows

VOCAB = 11
# The rows of each rank, by the size of the group. "padded": an even split whose last shards are filled up.
SHARDS = {
    2: {"even": (6, 5), "uneven": (3, 8), "one empty": (0, 11), "padded": (6, 5)},
    3: {"even": (4, 4, 3), "uneven": (1, 8, 2), "one empty": (5, 0, 6), "padded": (4, 4, 3)},
    4: {"even": (3, 3, 3, 2), "uneven": (5, 1, 3, 2), "one empty": (4, 3, 4, 0), "padded": (3, 3, 3, 2)},
}
# The tokens of each rank, by the size of the group, where each has its own: as many together as 6 for each.
OWN = {2: (9, 3), 3: (11, 0, 7), 4: (9, 1, 14, 0)}
ROUNDS, MORE_ROUNDS = (0, 1), (2,)  # seeds; `make thorough` runs those of the latter
JUNK = float("nan")  # in rows of padding, which nobody may read

_TERMS = {
    "weight": (None, "whole", "shard"),
    "token_weight": (False, True),
    "label_smoothing": (0.0, 0.1, 1.0),
    "z_loss": (0.0, 0.01),
    "softcap": (None, 1.5),
    "logit_scale": (1.0, -0.7),
}
_COMMON = {
    "ranks": (2, 3, 4),
    "shards": ("even", "uneven", "one empty", "padded"),
    "dtype": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "ignored": (0.0, 0.4, 1.0),
    "frozen": (None, "input", "head"),
}
_CALLS = (("mean", "forward"), ("mean", "backward"), ("sum", "forward"), ("sum", "backward"), ("none", "backward"))
_INPUT = {
    "input_grad": ("complete", "partial", "sequence", "own"),
    "bias": (False, True),
    "chunk_size": (1, 4, "auto"),
}
DIMENSIONS = {
    "loss": _COMMON
    | _INPUT
    | _TERMS
    | {"call": _CALLS, "num_tokens": (None, 7), "stats": (False, True), "check": ("auto", "first")},
    "logprobs": _COMMON | _INPUT | {"softcap": (None, 1.5), "logit_scale": (1.0, -0.7), "entropy": (False, True)},
    "logits": _COMMON
    | _TERMS
    | {"call": (("mean", "auto"), ("sum", "auto"), ("none", "auto")), "num_tokens": (None, 7), "stats": (False, True)},
}


def cases(function: str, rounds: tuple[int, ...] = ROUNDS) -> list[Case]:
    """Every pair of values of two options, in a random way for each of ``rounds``."""

    def allowed(case: Case) -> bool:
        has_denominator = case.get("num_tokens") is None or case["call"][0] == "mean"
        return has_denominator and not (function == "logits" and case["frozen"] == "head")

    found = [covering(DIMENSIONS[function], allowed, seed) for seed in rounds]
    return list(itertools.chain.from_iterable(found))


def name(case: Case) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


class Mine(NamedTuple):
    """A problem, and this rank's part of it as leaves."""

    whole: object  # a Problem
    vocab: VocabShard
    words: slice
    tokens: slice
    hidden: Tensor
    head: Tensor
    bias: Tensor | None

    @property
    def is_own(self) -> bool:
        return self.vocab.tokens == "own"

    @property
    def target(self) -> Tensor:
        return self.whole.target[self.tokens] if self.is_own else self.whole.target

    def share(self, expected: Rows, rank: int | None = None) -> Rows:
        """Of the reference's rows, those of a rank's own tokens, by default this one's."""
        if not self.is_own:
            return expected
        tokens = _own_tokens(self.vocab.size, dist.get_rank(self.vocab.group) if rank is None else rank)
        return Rows(**{field.name: getattr(expected, field.name)[tokens] for field in dataclasses.fields(expected)})


def _own_tokens(ranks: int, rank: int) -> slice:
    first = sum(OWN[ranks][:rank])
    return slice(first, first + OWN[ranks][rank])


def shard(case: Case, group: dist.ProcessGroup, **keywords) -> tuple[VocabShard, slice]:
    way = case.get("input_grad", "complete")
    of_tokens = {"tokens": "own"} if way == "own" else {"input_grad": way}
    keywords = of_tokens | {"check": case.get("check", "auto")} | keywords
    sizes = SHARDS[case["ranks"]][case["shards"]]
    start = sum(sizes[: dist.get_rank(group)])
    stop = start + sizes[dist.get_rank(group)]
    if case["shards"] == "padded":
        vocab = VocabShard.split(VOCAB, group, **keywords)
        assert (vocab.start, vocab.stop) == (start, stop)
    elif case["shards"] == "uneven":
        vocab = VocabShard.from_local(stop - start, group, **keywords)
    else:
        vocab = VocabShard(group, start, stop, VOCAB, **keywords)
    return vocab, slice(start, stop)


def mine(case: Case, group: dist.ProcessGroup, seed: int) -> Mine:
    ranks, rank = case["ranks"], dist.get_rank(group)
    whole = problem(
        6 * ranks,
        5,
        VOCAB,
        dtype=case["dtype"],
        bias=case.get("bias", False),
        ignored=case["ignored"],
        ignore_index=random.Random(seed).choice([-100, -100, 3]),
        seed=seed,
    )
    vocab, words = shard(case, group)
    tokens = slice(6 * rank, 6 * rank + 6) if vocab.input_grad == "sequence" else slice(None)
    tokens = _own_tokens(ranks, rank) if vocab.tokens == "own" else tokens
    return Mine(
        whole,
        vocab,
        words,
        tokens,
        _leaf(whole.hidden[tokens], case["frozen"] != "input"),
        _leaf(padded(whole.head[words], vocab), case["frozen"] != "head"),
        None if whole.bias is None else _leaf(padded(whole.bias[words], vocab)),
    )


def padded(values: Tensor, vocab: VocabShard, dim: int = 0) -> Tensor:
    """Filled up with junk along ``dim`` where the shard has rows of padding."""
    missing = (vocab.padded_rows or vocab.rows) - vocab.rows
    shape = list(values.shape)
    shape[dim] = missing
    return torch.cat([values.detach(), values.new_full(shape, JUNK)], dim)


def _leaf(values: Tensor, trained: bool = True) -> Tensor:
    return values.detach().clone().requires_grad_(trained)


def weights(case: Case, seed: int) -> dict[str, Tensor]:
    """The class and token weights of the whole problem."""
    generator = torch.Generator().manual_seed(seed + 1)
    sizes = {"weight": VOCAB, "token_weight": 6 * case["ranks"]}
    return {
        name: (0.1 + torch.rand(size, generator=generator)).to(case["dtype"])
        for name, size in sizes.items()
        if case.get(name)
    }


def check(function: str, case: Case, group: dist.ProcessGroup, seed: int) -> None:
    """Compare what this rank gets with the reference."""
    part = mine(case, group, seed)
    terms = {name: case[name] for name in ("label_smoothing", "z_loss", "softcap", "logit_scale") if name in case}
    tensors = weights(case, seed)
    given = dict(tensors)
    if part.is_own and "token_weight" in given:
        given["token_weight"] = given["token_weight"][part.tokens]
    if case.get("weight") == "shard":
        given["weight"] = padded(tensors["weight"][part.words], part.vocab)
    keywords = terms | given | {"ignore_index": part.whole.ignore_index, "vocab": part.vocab}
    _CHECKS[function](case, part, keywords, arrays(terms | tensors))


def _check_loss(case: Case, part: Mine, keywords: dict, terms: dict) -> None:
    reduction, way = case["call"]
    value = linear_cross_entropy(
        part.hidden,
        part.head,
        part.target,
        linear_bias=part.bias,
        reduction=reduction,
        num_tokens=case["num_tokens"],
        options=ChunkOptions(chunk_size=case["chunk_size"], gradients=way),
        return_stats=case["stats"],
        **keywords,
    )
    value, stats = value if case["stats"] else (value, None)
    upstreams = _upstreams(part, value, differ=reduction == "none" or case["num_tokens"] is None)
    found = _gradients(case, part, (value * upstreams[dist.get_rank(part.vocab.group)]).sum())
    expected = part.whole.rows(**terms)
    mine = part.share(expected)
    _check_stats(stats, mine, case)
    _check_value(value, *mine.reduce(reduction, case["num_tokens"]), case)
    shares = [part.share(expected, rank) for rank in range(len(upstreams) if part.is_own else 1)]
    coefficients = [
        array(upstream) * share.coefficient(reduction, case["num_tokens"])
        for upstream, share in zip(upstreams, shares, strict=False)
    ]
    _check_gradients(case, part, found, [("loss", np.concatenate(coefficients))], expected)


def _check_logprobs(case: Case, part: Mine, keywords: dict, terms: dict) -> None:
    values = linear_logprobs(
        part.hidden,
        part.head,
        part.target,
        linear_bias=part.bias,
        options=ChunkOptions(chunk_size=case["chunk_size"]),
        return_entropy=case["entropy"],
        **keywords,
    )
    values = dict(zip(("logprob", "entropy"), values if case["entropy"] else (values,), strict=False))
    upstreams = {of: _upstreams(part, value, seed=len(of)) for of, value in values.items()}
    rank = dist.get_rank(part.vocab.group)
    found = _gradients(case, part, sum((values[of] * upstreams[of][rank]).sum() for of in values))
    expected = part.whole.rows(**terms)
    mine = part.share(expected)
    for of, value in values.items():
        _check_value(value, getattr(mine, of), getattr(mine, f"{of}_scale"), case)
    of_all = [(of, array(torch.cat(parts) if part.is_own else parts[0])) for of, parts in upstreams.items()]
    _check_gradients(case, part, found, of_all, expected)


def _check_logits(case: Case, part: Mine, keywords: dict, terms: dict) -> None:
    whole = (part.whole.hidden @ part.whole.head.t()).detach()  # (N, V)
    logits = _leaf(padded(whole[:, part.words], part.vocab, dim=1), case["frozen"] != "input")
    reduction, _ = case["call"]
    value = cross_entropy(
        logits,
        part.whole.target,
        reduction=reduction,
        num_tokens=case["num_tokens"],
        return_stats=case["stats"],
        **keywords,
    )
    expected = rows(array(whole), array(part.whole.target), ignore_index=part.whole.ignore_index, **terms)
    value, stats = value if case["stats"] else (value, None)
    _check_stats(stats, expected, case)
    _check_value(value, *expected.reduce(reduction, case["num_tokens"]), case)
    if not logits.requires_grad:
        assert not value.requires_grad
        return
    upstream = random_like(value)
    (gradient,) = torch.autograd.grad(value, logits, upstream)
    assert gradient.dtype == logits.dtype and not gradient[:, part.vocab.rows :].any()
    coefficient = (array(upstream) * expected.coefficient(reduction, case["num_tokens"]))[:, None]
    exact, scale = coefficient * expected.d_loss, abs(coefficient) * expected.d_loss_scale
    assert_close(
        gradient[:, : part.vocab.rows], exact[:, part.words], scale[:, part.words], case["dtype"], "gradient of logits"
    )


def _upstreams(part: Mine, value: Tensor, *, seed: int = 0, differ: bool = True) -> list[Tensor]:
    """The upstream gradients of the value on each rank; they are equal unless tokens are own and they ``differ``."""
    ranks, dtype = part.vocab.size, value.dtype
    if not part.is_own:
        return [random_like(value, seed)] * ranks
    sizes = OWN[ranks] if value.dim() else [()] * ranks
    return [random_like(torch.empty(size, dtype=dtype), seed + differ * rank) for rank, size in enumerate(sizes)]


_CHECKS = {"loss": _check_loss, "logprobs": _check_logprobs, "logits": _check_logits}


def _check_stats(stats, expected, case: Case) -> None:
    if stats is None:
        return
    near = {"dtype": case["dtype"] if case["dtype"] != torch.float64 else torch.float32}
    exact = expected.stats()
    scales = {
        "loss_sum": expected.loss_scale.sum(),
        "num_tokens": exact["num_tokens"],
        "entropy_sum": expected.entropy_scale.sum(),
        "lse_max": expected.logprob_scale.max(initial=0.0),
    }
    for name, scale in scales.items():
        assert_close(getattr(stats, name), exact[name], scale, what=name, **near)
    if case["dtype"] in (torch.float64, torch.float32):  # rounded logits may tie
        assert stats.num_correct.item() == exact["num_correct"]


def _check_value(value: Tensor, exact, scale, case: Case) -> None:
    assert value.dtype == loss_dtype(case["dtype"])
    assert_close(value, exact, scale, case["dtype"], "value")


def _gradients(case: Case, part: Mine, total: Tensor) -> dict[str, Tensor]:
    """Of this rank's tensors; what "partial" leaves is summed over the ranks here.

    A check that fails on one rank alone must come after the last collective.
    """
    leaves = {"input": part.hidden, "linear_weight": part.head, "linear_bias": part.bias}
    trained = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    found = dict(zip(trained, torch.autograd.grad(total, list(trained.values())), strict=True))
    if "input" in found and case["input_grad"] == "partial":
        whole = found["input"].double()
        dist.all_reduce(whole, group=part.vocab.group)
        found["input"] = whole.to(found["input"].dtype)
    for name, gradient in found.items():
        assert gradient.dtype == leaves[name].dtype and gradient.shape == leaves[name].shape
    return found


def _check_gradients(case: Case, part: Mine, found: dict[str, Tensor], upstreams: list, expected) -> None:
    hidden, head = array(part.whole.hidden), array(part.whole.head)
    sums = [expected.gradients(of, hidden, head, upstream) for of, upstream in upstreams]
    places = {"input": part.tokens, "linear_weight": part.words, "linear_bias": part.words}
    for at, (name, mine) in enumerate(places.items()):
        if name not in found:
            continue
        gradient = found[name]
        if name != "input":
            assert not gradient[part.vocab.rows :].any(), "rows of padding got a gradient"
            gradient = gradient[: part.vocab.rows]
        exact, scale = (sum(parts[at][i][mine] for parts in sums) for i in range(2))
        if part.is_own and name != "input":
            exact, scale = exact / part.vocab.size, scale / part.vocab.size
        assert_close(gradient, exact, scale, case["dtype"], f"gradient of {name}")


def all_cases(rounds: tuple[int, ...] = ROUNDS) -> list[tuple[str, Case]]:
    return [(function, case) for function in _CHECKS for case in cases(function, rounds)]
