"""The implementations of the loss that are compared: one training step of each, on the same inputs.

A loss is a function of hidden states (N, D), head (V, D) and targets (N,); `train_step` runs it forward and backward.
`PRODUCTS` is the yardstick of cross-entropy: the three matrix products that no exact loss can do without, 6 N V D
operations. Losses that form logits twice, or a teacher's too, have `FOUR_PRODUCTS`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_ce import ChunkOptions, linear_cross_entropy
from chunked_ce.cli import peers
from chunked_ce.cli.other_losses import OTHER_LOSSES, OtherLoss
from chunked_ce.cli.sharded_losses import SHARDED_LOSSES, RankInputs
from chunked_ce.cli.synthetic_inputs import LossInputs

__all__ = [
    "CROSS_ENTROPY",
    "DEVICE",
    "DTYPES",
    "IMPLEMENTATIONS",
    "KINDS",
    "LOSSES",
    "PRODUCTS",
    "SHARDED",
    "loss_of",
    "select",
    "train_step",
    "why_not",
    "yardstick_of",
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

PRODUCTS = "three products"
FOUR_PRODUCTS = "four products"
FORWARD = "chunked_ce"
BACKWARD = "chunked_ce, backward way"
LEAST = "chunked_ce, least memory"
FILTERED = "chunked_ce, filtered"
FULL = "full logits"
COMPILED = "full logits, compiled"
TORCH = "torch, 512 rows"
TORCH_AUTO = "torch, automatic"
DEEPSPEED = "deepspeed"
TRL = "trl"
LIGER = "liger"
LIGER_SCALED = "liger, loss per token"
LIGER_CUTE = "liger, CuTe for SM90"
CCE = "cut-cross-entropy"
CCE_EXACT = "cut-cross-entropy, no filter"
CCE_PRETRAINING = "cut-cross-entropy, pretraining"
QUACK = "quack"
CROSS_ENTROPY = "cross-entropy"
SHARDED = "sharded"  # the cross-entropy, on several ranks

CHUNKED: dict[str, dict[str, Any]] = {  # those of this library, and their `ChunkOptions`
    FORWARD: {},
    BACKWARD: {"gradients": "backward"},
    LEAST: {"gradients": "backward", "memory_budget": 4 * 2**20},
    FILTERED: {"gradient_filter": "auto"},
}
_YARDSTICK_BYTES = 2**31  # of logits at a time, so that the products run where full logits do not fit

Loss = Callable[..., Tensor]  # of the fields of `LossInputs` or `RankInputs`


class Implementation(NamedTuple):
    """A loss, and where it can run."""

    key: str  # what ``--only`` takes
    loss: Callable[[int | None], Loss]  # takes the tokens in a chunk, None for its own choice
    why_not: Callable[[str], str | None] = lambda device: None
    exact: bool = True  # no part of the gradient is left out or approximated on purpose
    takes_chunk: bool = False
    compiles: bool = False  # at each shape, so it has to be warmed up at that shape
    kind: str = CROSS_ENTROPY  # which loss it is: what ``--loss`` takes
    yardstick: str = PRODUCTS


def products(hidden: Tensor, weight: Tensor, logits_times: int = 1) -> None:
    """The logits, as often as ``logits_times`` says, and the two products with a gradient of their shape, as anyone
    would write them.

    Tokens go in slices of 2 GiB of logits each, and the gradient of the head is summed in its own dtype.
    """
    step = max(1, _YARDSTICK_BYTES // (len(weight) * weight.element_size()))
    with torch.no_grad():
        hidden_grad, weight_grad = torch.empty_like(hidden), None
        for x, x_grad in zip(hidden.split(step), hidden_grad.split(step), strict=True):
            logits = x @ weight.t()
            for _ in range(1, logits_times):
                logits = x @ weight.t()
            torch.mm(logits, weight, out=x_grad)
            weight_grad = logits.t() @ x if weight_grad is None else weight_grad.addmm_(logits.t(), x)


def _ours(chunk: int | None, **options: Any) -> Loss:
    return functools.partial(linear_cross_entropy, options=ChunkOptions(chunk_size=chunk or "auto", **options))


def _full(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def _torch(chunk: int | None) -> Loss:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk or 512, chunking_method=None)
    return functools.partial(F.linear_cross_entropy, options=options)


def _torch_auto(chunk: int | None) -> Loss:
    return functools.partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())


# ---- why an implementation cannot run ----


def _no_compiler(device: str) -> str | None:
    if device == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        return "torch.compile needs a C++ compiler on a CPU"
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton on a GPU"
    return None


def _no_torch_chunks(device: str) -> str | None:
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no chunked linear_cross_entropy"


def _no_gloo(device: str) -> str | None:
    if device == "cpu" and not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        return "this torch has no gloo"
    return None


_why_not_cce = functools.partial(peers.on_cuda, "cut_cross_entropy")

LOSSES: dict[str, Implementation] = {
    FORWARD: Implementation("forward", _ours, takes_chunk=True),
    BACKWARD: Implementation("backward", functools.partial(_ours, **CHUNKED[BACKWARD]), takes_chunk=True),
    LEAST: Implementation("least", functools.partial(_ours, **CHUNKED[LEAST]), takes_chunk=True),
    FILTERED: Implementation("filtered", functools.partial(_ours, **CHUNKED[FILTERED]), exact=False, takes_chunk=True),
    FULL: Implementation("full", lambda chunk: _full),
    COMPILED: Implementation("compiled", lambda chunk: torch.compile(_full), _no_compiler, compiles=True),
    TORCH: Implementation("torch", _torch, _no_torch_chunks, takes_chunk=True),
    TORCH_AUTO: Implementation("torch-auto", _torch_auto, _no_torch_chunks),
    DEEPSPEED: Implementation("deepspeed", peers.deepspeed, peers.no_deepspeed),
    TRL: Implementation("trl", peers.trl, peers.no_trl),
    LIGER_SCALED: Implementation("liger-scaled", peers.liger_scaled, peers.no_liger_scaled),
    LIGER: Implementation("liger", peers.liger, functools.partial(peers.on_cuda, "liger_kernel.transformers")),
    LIGER_CUTE: Implementation("liger-cute", peers.liger_cute, peers.no_liger_cute),
    CCE: Implementation("cce", peers.cce, _why_not_cce, exact=False),
    CCE_EXACT: Implementation("cce-exact", functools.partial(peers.cce, filter_eps=None), _why_not_cce),
    CCE_PRETRAINING: Implementation(
        "cce-pretraining", functools.partial(peers.cce, impl="cce_kahan_full_c"), peers.no_cce_preset, exact=False
    ),
    QUACK: Implementation(
        "quack", peers.quack, functools.partial(peers.on_cuda, "quack.linear_cross_entropy"), takes_chunk=True
    ),
}
IMPLEMENTATIONS = (PRODUCTS, *LOSSES)  # of cross-entropy


def _others() -> Iterator[tuple[str, Implementation]]:
    """Two of each loss besides cross-entropy: this library's, and full logits."""
    for kind, loss in OTHER_LOSSES.items():
        yardstick = {3: PRODUCTS, 4: FOUR_PRODUCTS}[loss.products]

        def ours(chunk: int | None, loss: OtherLoss = loss) -> Loss:
            options = ChunkOptions(chunk_size=chunk or "auto")
            return lambda hidden, weight, target: loss.ours(hidden, weight, target, options)

        def full(chunk: int | None, loss: OtherLoss = loss) -> Loss:
            return loss.full

        yield f"{kind}, {FORWARD}", Implementation(kind, ours, takes_chunk=True, kind=kind, yardstick=yardstick)
        yield f"{kind}, {FULL}", Implementation(f"{kind}-full", full, kind=kind, yardstick=yardstick)


def _sharded() -> Iterator[tuple[str, Implementation]]:
    for name, sharded in SHARDED_LOSSES.items():

        def loss(chunk: int | None, of: Callable[[ChunkOptions], Loss] = sharded.loss) -> Loss:
            return of(ChunkOptions(chunk_size=chunk or "auto"))

        yield name, Implementation(sharded.key, loss, _no_gloo, takes_chunk=sharded.takes_chunk, kind=SHARDED)


LOSSES |= dict(_others()) | dict(_sharded())
KINDS = (CROSS_ENTROPY, *OTHER_LOSSES, SHARDED)


def why_not(name: str, device: str = DEVICE) -> str | None:
    """Why an implementation cannot run here; None if it can."""
    return LOSSES[name].why_not(device) if name in LOSSES else None


def yardstick_of(name: str) -> str:
    """The products that an implementation is measured beside."""
    return LOSSES[name].yardstick if name in LOSSES else name


def select(
    only: Sequence[str] | None = None, *, kind: str = CROSS_ENTROPY, chunk_only: bool = False
) -> tuple[list[str], dict[str, str]]:
    """The names of those that run, the products first, and why each of the others does not.

    ``only`` holds keys or names of losses of this ``kind``; ``chunk_only`` leaves out those that choose their chunk
    size themselves.
    """
    keys = {loss.key: name for name, loss in LOSSES.items() if loss.kind == kind}
    unknown = [key for key in only or () if key not in keys and key not in keys.values()]
    if unknown:
        raise ValueError(f"--only must name some of {', '.join(keys)}, was {unknown[0]!r}")
    chosen = list(dict.fromkeys(keys.get(key, key) for key in only or keys))
    missing = {}
    for name in chosen:
        reason = why_not(name)
        if reason is None and chunk_only and not LOSSES[name].takes_chunk:
            reason = "it cannot be told its chunk size"
        if reason:
            missing[name] = reason
    return [yardstick_of(next(iter(keys.values()))), *(name for name in chosen if name not in missing)], missing


@functools.cache
def loss_of(name: str, chunk: int | None = None) -> Loss:
    """The loss of an implementation, made once: what it compiles, it compiles once per shape."""
    return LOSSES[name].loss(chunk)


def train_step(name: str, inputs: LossInputs | RankInputs, chunk: int | None = None) -> None:
    """Forward and backward, gradients into fresh memory; the device has finished all of it on return."""
    hidden, weight = inputs[:2]
    if name in (PRODUCTS, FOUR_PRODUCTS):
        products(hidden, weight, 1 if name == PRODUCTS else 2)
    else:
        loss_of(name, chunk)(*inputs).mean().backward()
        hidden.grad = weight.grad = None
    if hidden.is_cuda:
        torch.cuda.synchronize()
