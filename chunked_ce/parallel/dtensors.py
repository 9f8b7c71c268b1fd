"""DTensors as arguments: the local tensors that each rank takes, by their placements.

The head, or existing logits, may be sharded over the vocabulary along one dimension of their mesh. All other tensors
are made whole: partial ones are summed, and tokens that are sharded over the ranks of the vocabulary are gathered.
Tokens sharded over other ranks are refused, since the loss of some tokens would pass for the loss of all.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from chunked_ce.arguments import ADAPTER
from chunked_ce.narrowing import not_none
from chunked_ce.parallel.fsdp import fsdp_refusal, gradient_factor, is_fsdp_shard
from chunked_ce.parallel.vocab import VocabShard
from chunked_ce.tracing import assume_constant, not_compiled

__all__ = ["has_dtensor", "is_dtensor", "local_arguments", "own_rows"]


def local_arguments(
    name: str,  # of the tensor sharded over the vocabulary: "linear_weight" or "logits"
    sharded: Tensor,  # (V, D) or (..., V)
    vocab: VocabShard | None,
    **given: Any,
) -> tuple[Tensor, VocabShard | None, dict[str, Any]]:
    """This rank's part of ``sharded``, its shard of the vocabulary, and the other arguments as local tensors."""
    if not has_dtensor((sharded, *given.values())) or not isinstance(vocab, VocabShard | None):
        return sharded, vocab, given  # a vocab of another type is refused where arguments are checked
    if is_dtensor(sharded):
        sharded, vocab = _vocabulary(name, sharded, vocab)

    def local(name: str, value: Any) -> Any:
        if isinstance(value, list | tuple):  # of several depths
            return [local(name, part) for part in value]
        if not is_dtensor(value):
            return value
        return _rows(name, value, vocab) if name in ("linear_bias", ADAPTER[1]) else _tokens(name, value, vocab)

    return sharded, vocab, {name: local(name, value) for name, value in given.items()}


def own_rows(tensor: Any, vocab: VocabShard) -> Tensor:
    """This rank's rows of a DTensor whose ranks all have tokens of their own (``vocab.tokens == "own"``).

    Their gradient is averaged over the ranks that hold the same rows: those of the mesh's replicated dimensions.
    """
    average = _types().Partial("avg")
    gradient = [average if placement.is_replicate() else placement for placement in tensor.placements]
    # A redistribution to the placements that it has already: it turns the gradient's placements into these.
    rows: Tensor = tensor.redistribute(placements=tensor.placements).to_local(grad_placements=gradient)
    factor = vocab.row_gradient_factor * _gradient_factor(tensor)
    if factor != 1 and rows.requires_grad:
        rows.register_hook(lambda gradient: gradient * factor)
    return rows


def has_dtensor(values: Iterable[Any]) -> bool:
    """Whether there is a DTensor among ``values``, which may be lists of several depths."""
    if "torch.distributed.tensor" not in sys.modules:
        return False
    return any(has_dtensor(value) if isinstance(value, list | tuple) else is_dtensor(value) for value in values)


def is_dtensor(value: object) -> bool:
    # No DTensor exists before its module, which is slow to import, is imported.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def _vocabulary(name: str, tensor: Any, vocab: VocabShard | None) -> tuple[Tensor, VocabShard | None]:
    """This rank's rows of a head, or columns of logits, and their shard of the vocabulary: None for all."""
    dim = 0 if name == "linear_weight" else tensor.dim() - 1
    placements = _placements(tensor)
    if name == "logits":
        placements = _summed(placements)
        if any(_shards(placement) and placement.dim != dim for placement in placements):
            raise ValueError(_sharded_tokens(name, tensor, ""))
        tensor = tensor.redistribute(placements=placements)
    if all(placement.is_replicate() for placement in placements):
        return tensor.to_local(), vocab
    if name == "linear_weight" and not _has_own_tokens(vocab):
        _refuse_fsdp(name, tensor)
    shard = _shard_of(name, tensor.device_mesh, placements, tensor.shape[dim], dim)
    if _has_own_tokens(vocab):
        _check_rows_of(name, shard, vocab, placements)
        return own_rows(tensor, vocab), vocab
    return tensor.to_local(), shard if vocab is None else vocab


def _tokens(name: str, tensor: Any, vocab: VocabShard | None) -> Tensor:
    """An argument that each rank needs whole: hidden states, targets or weights."""
    placements = _placements(tensor)
    mine = _dim_of(tensor.device_mesh, vocab)
    is_hidden = name in ("input", ADAPTER[0])
    if is_hidden and vocab is not None and vocab.input_grad == "sequence":
        return _sequence_shard(name, tensor, placements, mine)
    is_of_tokens = name in ("target", "token_weight", "temperature")
    token_dims = tensor.dim() - 1 if is_hidden else tensor.dim() if is_of_tokens else 0
    is_own = _has_own_tokens(vocab)
    for at, placement in enumerate(placements):
        if (at != mine or is_own) and _shards(placement) and placement.dim < token_dims:
            where = "" if is_own else " along other ranks than those of the vocabulary"
            raise ValueError(_sharded_tokens(name, tensor, where))
    replicated = _replicated(placements)
    gradient = list(replicated)
    if is_hidden and vocab is not None and vocab.input_grad == "partial":
        if mine is None:
            raise ValueError(
                f"{name} must be a DTensor on a mesh with the ranks of vocab for input_grad='partial', had placements "
                f"{tuple(placements)} on {tensor.device_mesh}"
            )
        gradient[mine] = _types().Partial()
    whole: Tensor = tensor.redistribute(placements=replicated).to_local(grad_placements=gradient)
    return whole


def _sequence_shard(name: str, tensor: Any, placements: list[Any], mine: int | None) -> Tensor:
    """This rank's share of hidden states whose tokens are sharded in the order of the ranks."""
    for at, placement in enumerate(placements):
        if at == mine:
            fits = _shards(placement) and type(placement) is _types().Shard
            fits = (
                fits and placement.dim < tensor.dim() - 1 and all(size == 1 for size in tensor.shape[: placement.dim])
            )
        else:
            fits = placement.is_replicate()
        if mine is None or not fits:
            raise ValueError(
                f"{name} must be sharded on its first dimension of tokens over the ranks of vocab, and replicated over "
                f"others, for input_grad='sequence', had placements {tuple(placements)} on {tensor.device_mesh}"
            )
    share: Tensor = tensor.to_local()
    return share


def _rows(name: str, tensor: Any, vocab: VocabShard | None) -> Tensor:
    """This rank's entries of a bias, or rows of an adapter's weight: those of its rows of the head."""
    placements = _placements(tensor)
    if any(map(_shards, placements)) and not _has_own_tokens(vocab):
        _refuse_fsdp(name, tensor)
    required = _replicated(placements)
    if vocab is not None:
        mine = _dim_of(tensor.device_mesh, vocab)
        if mine is None:
            raise ValueError(
                f"{name} must be on a mesh with the ranks of vocab, had placements {tuple(placements)} on "
                f"{tensor.device_mesh}"
            )
        required[mine] = _types().Shard(0)
        bounds = _shard_of(name, tensor.device_mesh, required, tensor.shape[0], 0)
        _check_rows_of(name, bounds, vocab, required)
    if _has_own_tokens(vocab) and placements == required:
        return own_rows(tensor, vocab)
    rows: Tensor = tensor.redistribute(placements=required).to_local()
    return rows


def _has_own_tokens(vocab: VocabShard | None) -> TypeGuard[VocabShard]:
    return vocab is not None and vocab.tokens == "own"


def _check_rows_of(name: str, shard: VocabShard, vocab: VocabShard, placements: list[Any]) -> None:
    if (shard.start, shard.stop) != (vocab.start, vocab.stop):
        raise ValueError(
            f"{name} must hold the words [{vocab.start}, {vocab.stop}) of vocab on this rank, would hold "
            f"[{shard.start}, {shard.stop}) with placements {tuple(placements)}"
        )


def _refuse_fsdp(name: str, tensor: Any) -> None:
    if _is_fsdp_shard(tensor):
        raise ValueError(fsdp_refusal(name, tensor))


def _types() -> Any:
    return sys.modules["torch.distributed.tensor"]


def _placements(tensor: Any) -> list[Any]:
    """The placements, dimensions counted from the first one."""
    shard = _types().Shard
    return [
        shard(placement.dim % tensor.dim()) if type(placement) is shard and placement.dim < 0 else placement
        for placement in tensor.placements
    ]


def _shards(placement: Any) -> bool:
    return not placement.is_replicate() and not placement.is_partial()


def _replicated(placements: list[Any]) -> list[Any]:
    return [_types().Replicate() for _ in placements]


def _summed(placements: list[Any]) -> list[Any]:
    return [_types().Replicate() if placement.is_partial() else placement for placement in placements]


def _sharded_tokens(name: str, tensor: Any, where: str) -> str:
    return (
        f"{name} must not have its tokens sharded{where}, had placements {tuple(tensor.placements)} on "
        f"{tensor.device_mesh}: give the loss {name}.to_local(), and the other tensors per token alike, for the loss "
        "of this rank's tokens, or redistribute to Replicate() for the loss of all tokens on every rank"
    )


def _dim_of(mesh: Any, vocab: VocabShard | None) -> int | None:
    """The dimension of a mesh along which the vocabulary is sharded."""
    return None if vocab is None else _dim_of_ranks(mesh, vocab.ranks)


def _shard_of(name: str, mesh: Any, placements: list[Any], total: int, dim: int) -> VocabShard:
    """The shard of a tensor with ``total`` vocabulary entries in its dimension ``dim``."""
    if not torch.compiler.is_compiling():
        # The world's group in the key: meshes of a destroyed group and of its successor are equal.
        return _cached_shard(dist.group.WORLD, name, mesh, tuple(placements), total, dim)
    at, start, stop = _bounds(name, mesh, placements, total, dim)
    return VocabShard(mesh.get_group(at), start, stop, total)


@functools.lru_cache(maxsize=64)
@not_compiled
def _cached_shard(_world: Any, name: str, mesh: Any, placements: tuple[Any, ...], total: int, dim: int) -> VocabShard:
    """Made once, so that ranks compare their bounds once."""
    return VocabShard.from_placements(mesh, placements, (total,), name=name, dim=dim)


# The functions below read meshes, groups and identities. The compiler takes their results for constants, and guards
# meshes, placements and sizes by itself.


@assume_constant
def _bounds(name: str, mesh: Any, placements: list[Any], total: int, dim: int) -> tuple[int, int, int]:
    shard = _cached_shard(dist.group.WORLD, name, mesh, tuple(placements), total, dim)
    return not_none(_dim_of_ranks(mesh, shard.ranks)), shard.start, shard.stop


@assume_constant
def _dim_of_ranks(mesh: Any, ranks: tuple[int, ...]) -> int | None:
    dims = [dim for dim in range(mesh.ndim) if tuple(dist.get_process_group_ranks(mesh.get_group(dim))) == ranks]
    return dims[0] if dims else None


@assume_constant
def _is_fsdp_shard(tensor: Any) -> bool:
    return _not_compiled_is_fsdp_shard(tensor)


@assume_constant
def _gradient_factor(tensor: Any) -> float:
    return _not_compiled_gradient_factor(tensor)


# After a graph break the compiler would compile these functions by themselves, with the identities of its fake tensors.
_not_compiled_is_fsdp_shard = not_compiled(is_fsdp_shard)
_not_compiled_gradient_factor = not_compiled(gradient_factor)
