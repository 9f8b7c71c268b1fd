"""Random wrong calls of every public name: each is refused, by the argument's name, before any work.

    python -m tests.fuzz_arguments --seconds 60 --seed 0

One argument of a call that is otherwise right is drawn from all that it may not be: types, ranges, dtypes, layouts,
shapes and devices. Calls in which all is right are drawn as well, and must pass.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from chunked_ce import (
    ChunkOptions,
    LinearCrossEntropyLoss,
    LMHead,
    TokenMean,
    VocabShard,
    count_tokens,
    cross_entropy,
    linear_cross_entropy,
    linear_logprobs,
    sequence_weights,
)

N, D, V = 6, 4, 9
REFUSALS = (TypeError, ValueError, IndexError)
_LONGEST = 500  # characters of a message that somebody reads


class Wrong(NamedTuple):
    """A value that an argument may not have."""

    said: str
    value: Any
    blamed: tuple[str, ...] = ()  # arguments that the error may name instead: a size that two disagree about


class Argument(NamedTuple):
    right: tuple[Any, ...]
    wrong: tuple[Wrong, ...]
    optional: bool = True  # whether a call may leave it out


class Call(NamedTuple):
    """A public name: what it is called with, and by what its errors call the arguments where it is another name."""

    call: Callable[..., Any]
    arguments: dict[str, Argument]
    names: dict[str, str] = {}  # noqa: RUF012


class Failure(NamedTuple):
    call: str
    argument: str
    said: str
    what: str

    def __str__(self) -> str:
        return f"{self.call}({self.argument}={self.said}): {self.what}"


# --- values ---


class _Broken:
    def __repr__(self) -> str:
        raise RuntimeError("a class whose repr is broken")


def said(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.layout} {value.dtype} {type(value).__name__}"
    try:
        return f"{type(value).__name__} {str(value)[:40]!r}"
    except Exception:
        return type(value).__name__


def wrongs(*values: Any, blamed: tuple[str, ...] = ()) -> tuple[Wrong, ...]:
    return tuple(Wrong(said(value), value, blamed) for value in values)


ARRAYS = (np.ones(2), np.array(["forward", "mean"]), np.array(2.0), torch.ones(2), torch.tensor(2.0), torch.ones(0))
OBJECTS = ("", "large", b"1", [], [1], {}, (1, 2), object(), int, len, _Broken(), 1j, *ARRAYS)
HUGE = (10**400, -(10**400), 10**5000)
NOT_NUMBERS = (*OBJECTS, True, False, np.bool_(True), Fraction(1, 2), Decimal("0.5"), np.complex64(1))
NOT_FINITE = (math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf"), *HUGE)
NOT_INTEGERS = (*NOT_NUMBERS, 2.0, 0.5, np.float64(2.0), math.nan, 2**63, 2**64, -(2**63) - 1, *HUGE)
NOT_FLAGS = (*OBJECTS, 0, 1, 2.0, None, "no", "True", np.bool_(True))
FLOAT8 = [
    dtype
    for name in dir(torch)
    if name.startswith("float8_") and isinstance(dtype := getattr(torch, name), torch.dtype)
]


def strange_layouts(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Tensors of the right shape and dtype whose elements are no dense block of memory."""
    dense = torch.ones(shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield dense.to_sparse()
        if len(shape) == 2:
            yield dense.to_sparse_csr()
            yield dense.to_sparse_csc()
        if dtype == torch.float32:
            yield torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8)
            if shape:
                yield dense.to_mkldnn()
        parts = [torch.ones((2, *shape[1:]), dtype=dtype), torch.ones((3, *shape[1:]), dtype=dtype)]
        for layout in (torch.strided, torch.jagged):
            yield torch.nested.nested_tensor(parts, layout=layout)
    if dtype.is_floating_point:
        yield nn.UninitializedParameter(dtype=dtype)
    yield nn.UninitializedBuffer(dtype=dtype)


def other_dtypes(shape: tuple[int, ...], allowed: tuple[torch.dtype, ...]) -> Iterator[torch.Tensor]:
    every = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float32)
    for dtype in (*every, torch.float64, torch.bfloat16, torch.float16, torch.complex128):
        if dtype not in allowed:
            yield torch.ones(shape, dtype=dtype)
    for dtype in FLOAT8:
        yield (
            torch.ones(shape).to(dtype)
            if dtype != torch.float8_e8m0fnu
            else torch.ones(shape).to(torch.uint8).view(dtype)
        )


def other_shapes(shape: tuple[int, ...], dtype: torch.dtype, free: int | None) -> Iterator[torch.Tensor]:
    """``free`` is a dimension that may have any size but 0."""
    yield torch.ones((1, 1, *shape), dtype=dtype)
    yield torch.ones((*shape, 3), dtype=dtype)
    yield torch.ones((), dtype=dtype)
    for dim in range(len(shape)):
        for size in (0,) if dim == free else (shape[dim] + 1, shape[dim] - 1, 0):
            yield torch.ones((*shape[:dim], size, *shape[dim + 1 :]), dtype=dtype)


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def tensor(
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    *,
    blamed: tuple[str, ...] = (),  # where the shape or the device does not fit
    optional: bool = True,
    free: int | None = None,
    constant: bool = False,  # refused where a gradient is wanted
    devices: tuple[str, ...] = ("meta",),  # on which the others are not
) -> Argument:
    scalars = (0.5, 3, True, "x", [1.0] * N, {}, np.ones(shape), object(), int)
    dtype = dtypes[0] if torch.float32 not in dtypes else torch.float32
    values = [*scalars, *strange_layouts(shape, dtype), *other_dtypes(shape, dtypes)]
    if not optional:
        values.append(None)
    if constant:
        values.append(torch.ones(shape, requires_grad=True))
    elsewhere = [torch.ones(shape, dtype=dtype, device=device) for device in devices]
    misfits = [*other_shapes(shape, dtype, free), *elsewhere]
    right = (*(torch.ones(shape).to(dtype) for dtype in dtypes), *((None,) if optional else ()))
    return Argument(right, wrongs(*values) + wrongs(*misfits, blamed=blamed), optional)


def number(*right: float | None, wrong: tuple[float, ...], finite: bool = True) -> Argument:
    values = (*NOT_NUMBERS, *wrong, *(NOT_FINITE if finite else ()), *(() if None in right else (None,)))
    return Argument(right, wrongs(*values))


def one_of(*names: Any) -> Argument:
    others = ("other", *OBJECTS, 0, 1.0, True, names[0] + "s", np.array([names[0]] * 2), [names[0]])
    return Argument(names, wrongs(*others, *(() if None in names else (None,))))


def instance(*right: Any) -> Argument:
    return Argument(right, wrongs(*(value for value in OBJECTS), 0, 1.5, True, {"chunk_size": 4}))


FLAG = Argument((True, False), wrongs(*NOT_FLAGS))
INDEX = Argument((-100, -1, 2**40, -(2**63), np.int64(-100)), wrongs(*NOT_INTEGERS, None))
INDEX_OR_NONE = Argument((*INDEX.right, None), wrongs(*NOT_INTEGERS))
COUNT = Argument(
    (None, 0, 3, 2.5, np.float32(7), np.int64(7), torch.tensor(3), torch.tensor([2.0]), torch.tensor(2.0).double()),
    wrongs(
        *(value for value in NOT_NUMBERS if not isinstance(value, torch.Tensor)),
        *NOT_FINITE,
        *(-1, -0.5, np.int64(-1)),
        *(torch.tensor(value) for value in (-1, -0.5, math.nan, math.inf, -math.inf, True, 1j)),
        *(torch.ones(2), torch.ones(0), torch.ones((), requires_grad=True)),
        *strange_layouts((1,), torch.float32),
        *other_dtypes((), (*FLOATS, *INTEGERS)),
    ),
)
OPTIONS = {
    "chunk_size": Argument(("auto", 1, 5, np.int64(4), 2**63 - 1), wrongs(*NOT_INTEGERS, None, 0, -1, np.int64(0))),
    "memory_budget": Argument((None, 1, 2**20, np.int32(64)), wrongs(*NOT_INTEGERS, 0, -1, "auto")),
    "gradients": one_of("auto", "backward"),
    "accumulate_dtype": Argument(
        (torch.float32, torch.float64, torch.bfloat16),
        wrongs(*OBJECTS, None, torch.float16, torch.int32, torch.bool, "float32", *FLOAT8),
    ),
    "logits_dtype": Argument(
        (None, torch.float32),
        wrongs(*OBJECTS, torch.bfloat16, torch.float16, torch.float64, torch.int32, "float32", *FLOAT8),
    ),
    "ignored": one_of("auto", "drop", "mask"),
    "gradient_filter": Argument(
        (None, "auto", 0, 0.25, np.float32(0.5)), wrongs(*NOT_NUMBERS, *NOT_FINITE, 1, 1.0, -0.1, -1)
    ),
    "backend": one_of("auto", "torch"),
    "accumulate_into": one_of("grad", "main_grad", None),
    "invariant": FLAG,
}
MATHS = {
    "softcap": number(None, 30, 2.5, np.float32(3), wrong=(0, 0.0, -1.5)),
    "logit_scale": number(1.0, 2, -0.5, np.float64(0.5), wrong=()),
}
TERMS = {
    **MATHS,
    "label_smoothing": number(0, 0.1, 1, np.float32(0.5), wrong=(-0.1, 1.1, 2)),
    "z_loss": number(0.0, 1e-4, 1, np.float64(0.1), wrong=(-1e-9, -1)),
}
LOSS = {
    **TERMS,
    "reduction": one_of("mean", "sum", "none"),
    "ignore_index": INDEX,
    "options": instance(None, ChunkOptions(), ChunkOptions(chunk_size=2)),
    "vocab": instance(None),
}


def _tensors(other: str) -> dict[str, Argument]:
    """Target and weights of a call whose tokens are those of the argument ``other``."""
    everything = ("target", other, "linear_weight")
    return {
        "target": tensor((N,), (torch.int64, torch.int32), blamed=everything, optional=False),
        "weight": tensor((V,), FLOATS, constant=True, blamed=("weight", other)),
        "token_weight": tensor((N,), (*FLOATS, *INTEGERS, torch.bool), constant=True, blamed=("token_weight", other)),
    }


def _linear() -> dict[str, Argument]:
    blamed = ("input", "linear_weight", "target")
    return {
        "input": tensor((N, D), FLOATS, blamed=blamed, optional=False),
        "linear_weight": tensor((V, D), FLOATS, blamed=blamed, free=0, optional=False),
        "linear_bias": tensor((V,), FLOATS, blamed=("linear_bias", "input")),
    }


def _module(**keywords: Any) -> LinearCrossEntropyLoss:
    return LinearCrossEntropyLoss(**keywords)


def _forward(**keywords: Any) -> Any:
    return LinearCrossEntropyLoss()(**keywords)


def _head(**keywords: Any) -> LMHead:
    return LMHead(**{"in_features": D, "vocab_size": V} | keywords)


def _wrap(**keywords: Any) -> nn.Module:
    return LMHead.wrap(nn.Sequential(nn.Embedding(V, D), nn.Linear(D, V)), **keywords)


def _mean(**keywords: Any) -> TokenMean:
    return TokenMean(**{"num_tokens": 3} | keywords)


def _shard(**keywords: Any) -> VocabShard:
    return VocabShard(**{"group": None, "start": 0, "stop": V, "total": V} | keywords)


def _calls() -> dict[str, Call]:
    linear, tokens = _linear(), _tensors("input")
    as_torch = {**LOSS, "ignore_index": INDEX_OR_NONE}  # torch's linear_cross_entropy has None
    size = Argument((1, 3, np.int64(2)), wrongs(*NOT_INTEGERS, None, 0, -1))
    place = Argument((V, np.int64(V)), wrongs(*NOT_INTEGERS, None, -1, V + 1, blamed=("start", "stop", "total")))
    group = Argument((None,), wrongs(*OBJECTS, 0, -100, True))
    targets = tensor((N,), (torch.int64, torch.int32), blamed=("a call",), optional=False)
    target = _alone(targets, [torch.ones(2, dtype=torch.int64)])
    targets = _alone(targets, [torch.ones(2)], [3], [torch.ones(2, dtype=torch.int64), None])
    weights = tensor((N,), (*FLOATS, *INTEGERS, torch.bool), constant=True, blamed=("weights", "targets"))
    sums = tensor((), FLOATS, blamed=("a call",), optional=False)
    head = {**TERMS, "options": LOSS["options"], "vocab": LOSS["vocab"], "lazy": one_of("auto", "always")}
    mean = {
        "num_tokens": COUNT._replace(
            right=(0, 3, 2.5, np.int64(4), torch.tensor(3), torch.tensor(2.5)),
            wrong=COUNT.wrong + wrongs(None, torch.ones(1)),
        ),
        "divisor": number(None, 1, 2.5, np.float32(2), wrong=(0, 0.0, -1)),
        "group": group,
    }
    ignored = {"ignore_index": INDEX, "group": group}
    return {
        "linear_cross_entropy": Call(
            linear_cross_entropy, {**linear, **tokens, **as_torch, "num_tokens": COUNT, "return_stats": FLAG}
        ),
        "cross_entropy": Call(
            cross_entropy,
            {
                # A target may be on the CPU wherever the logits are.
                "logits": tensor((N, V), FLOATS, blamed=("logits", "target"), free=1, optional=False, devices=()),
                **_tensors("logits"),
                **LOSS,
                "num_tokens": COUNT,
                "return_stats": FLAG,
            },
        ),
        "linear_logprobs": Call(
            linear_logprobs,
            {
                **linear,
                "target": tokens["target"],
                **MATHS,
                **{name: LOSS[name] for name in ("ignore_index", "options", "vocab")},
                "return_entropy": FLAG,
            },
        ),
        "LinearCrossEntropyLoss": Call(
            _module,
            {**as_torch, "return_stats": FLAG, "weight": _alone(tokens["weight"])},
        ),
        "LinearCrossEntropyLoss()": Call(
            _forward,
            {**linear, "target": tokens["target"], "token_weight": tokens["token_weight"], "num_tokens": COUNT},
        ),
        "ChunkOptions": Call(ChunkOptions, OPTIONS),
        "LMHead": Call(
            _head,
            {
                **head,
                "in_features": size,
                "vocab_size": size,
                "bias": FLAG,
                "dtype": Argument((None, *FLOATS), wrongs(*OBJECTS, 1, "float32", torch.int64, torch.bool, *FLOAT8)),
                "device": Argument((None, "cpu", "meta", torch.device("cpu")), wrongs("abacus", 2.5, [], object())),
            },
        ),
        "LMHead.wrap": Call(_wrap, {**head, "module": Argument((None, "1"), wrongs(3, "x", [], object(), np.ones(2)))}),
        "count_tokens": Call(count_tokens, {"targets": targets, **ignored}),
        "TokenMean": Call(_mean, mean),
        "TokenMean.over": Call(
            TokenMean.over,
            {"targets": targets, **ignored, "divisor": mean["divisor"], "weights": weights},
        ),
        "sequence_weights": Call(sequence_weights, {"target": target, "ignore_index": INDEX}),
        "TokenMean()": Call(TokenMean(3), {"loss_sum": _alone(sums, torch.ones(2))}),
        "TokenMean.report": Call(TokenMean(3).report, {"loss_sums": _alone(sums, [1.0], [torch.tensor(1)])}),
        "VocabShard": Call(
            _shard,
            {
                "group": group,
                "start": place._replace(right=(0, 1, V)),
                "stop": place,
                "total": place._replace(wrong=tuple(w for w in place.wrong if w.value is not V + 1)),
                "input_grad": one_of("complete", "partial", "sequence"),
                "reduce_dtype": Argument((None, *FLOATS), wrongs(*OBJECTS, 1, "float32", torch.int64, *FLOAT8)),
                "check": one_of("auto", "always", "first"),
                "padded_rows": Argument((None, V, V + 3), wrongs(*NOT_INTEGERS, -1)),
            },
        ),
    }


def _alone(argument: Argument, *wrong: Any) -> Argument:
    """An argument without others beside it: what only misfits them is right, and so is a dict of no tensors."""
    kept = tuple(w for w in argument.wrong if not w.blamed and not isinstance(w.value, dict))
    return argument._replace(wrong=kept + wrongs(*wrong))


# --- calls ---


class NoWork(TorchDispatchMode):
    """Raises where an operator of the library runs."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "chunked_ce":
            raise AssertionError(f"work was begun: {func}")
        return func(*args, **(kwargs or {}))


def right_call(rng: random.Random, call: Call) -> dict[str, Any]:
    """Arguments that are all right; those that can be left out are there half of the time."""
    chosen = {
        name: rng.choice(argument.right)
        for name, argument in call.arguments.items()
        if not argument.optional or rng.random() < 0.5
    }
    for name, other in (
        ("gradients", "accumulate_into"),
        ("start", "stop"),
        ("total", "stop"),
        ("padded_rows", "stop"),
    ):
        if name in chosen and other in chosen:
            del chosen[name]  # together they may be wrong
    return chosen


def check_right(name: str, call: Call, arguments: dict[str, Any]) -> Failure | None:
    try:
        call.call(**arguments)
    except Exception as error:
        given = ", ".join(f"{key}={said(value)}" for key, value in arguments.items())
        return Failure(name, given, "right", f"{type(error).__name__}: {str(error)[:300]}")
    return None


def check_wrong(name: str, call: Call, argument: str, wrong: Wrong, arguments: dict[str, Any]) -> Failure | None:
    def failed(what: str) -> Failure:
        return Failure(name, argument, wrong.said, what)

    try:
        with NoWork():
            call.call(**arguments | {argument: wrong.value})
    except REFUSALS as error:
        message = str(error)
        names = "|".join(map(re.escape, wrong.blamed or (argument,)))
        if not re.match(rf"(options\.)?({names})\b", message):
            return failed(f"another argument is named: {message[:300]}")
        return failed(f"{len(message)} characters") if len(message) > _LONGEST else None
    except Exception as error:
        return failed(f"{type(error).__name__}: {str(error)[:300]}")
    return failed("accepted")


@contextlib.contextmanager
def _one_rank() -> Iterator[None]:
    """A process group of this process alone, for shards of the vocabulary."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def every_wrong_value(seed: int) -> Iterator[Failure | None]:
    """Each wrong value of each argument once."""
    rng = random.Random(seed)
    with _one_rank(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, call in _calls().items():
            for argument, values in call.arguments.items():
                for wrong in values.wrong:
                    required = {key: rng.choice(a.right) for key, a in call.arguments.items() if not a.optional}
                    yield check_wrong(name, call, argument, wrong, required)


def random_calls(seed: int) -> Iterator[Failure | None]:
    """Without an end: right calls, and calls with one wrong argument among right ones."""
    rng = random.Random(seed)
    with _one_rank(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls = _calls()
        while True:
            name = rng.choice(list(calls))
            call = calls[name]
            arguments = right_call(rng, call)
            if rng.random() < 0.2:
                yield check_right(name, call, arguments)
                continue
            argument = rng.choice(list(call.arguments))
            yield check_wrong(name, call, argument, rng.choice(call.arguments[argument].wrong), arguments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    failures, count, end = {}, 0, time.monotonic() + chosen.seconds
    with contextlib.closing(random_calls(chosen.seed)) as calls:
        for failure in calls:
            count += 1
            if failure is not None and failure not in failures:
                failures[failure] = None
                print(failure)
            if time.monotonic() > end:
                break
    print(f"seed {chosen.seed}: {count:,} calls, {len(failures)} kinds of failure")
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
