"""Handlers of shape, memory and dtype: an operation that leaves the vocabulary whole applies to the hidden states."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from chunked_ce.lazy.follow import follows
from chunked_ce.lazy.logits import Lazy, Piece
from chunked_ce.lazy.source import Operation
from chunked_ce.lazy.words import of_index, of_words

__all__: list[str] = []

_FLOATS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}


def _follow(lazy: Lazy, operation: Callable[[Tensor], Tensor], vocab_dim: int) -> Lazy:
    """The result of an ``operation`` that is the same for hidden states, and moves the vocabulary to ``vocab_dim``."""
    return lazy.derive(Operation(operation, of_tokens=operation), vocab_dim=vocab_dim)


def _dim(dim: Any, dims: int) -> int:
    """The dimension, counted from the front."""
    if not isinstance(dim, int) or not -dims <= dim < dims:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-dims}, {dims - 1}], but got {dim})")
    return dim % dims


# ---- reshapes of the tokens that keep rows whole ----


def _reshape(lazy: Lazy, operation: Callable[[Tensor], Tensor]) -> Lazy | None:
    stand_in = operation(lazy._stand_in)
    if lazy._vocab_dim != lazy.dim() - 1 or stand_in.dim() == 0 or stand_in.shape[-1] != lazy.shape[-1]:
        return None
    if stand_in is lazy._stand_in:
        return lazy
    tokens = stand_in.shape[:-1]
    of_tokens = Operation(operation, of_tokens=lambda x: x.reshape(*tokens, x.shape[-1]))
    return lazy.derive(of_tokens, vocab_dim=len(tokens))


@follows("view")
def _view(lazy: Lazy, *shape: Any, size: Any = None, dtype: Any = None) -> Lazy | None:
    shape = shape or (size,)
    if dtype is not None or shape[0] is None or isinstance(shape[0], torch.dtype):
        return None
    return _reshape(lazy, lambda x: x.view(*shape))


@follows("reshape")
def _reshaped(lazy: Lazy, *shape: Any) -> Lazy | None:
    return _reshape(lazy, lambda x: x.reshape(*shape))


@follows("view_as")
def _view_as(lazy: Lazy, other: Tensor) -> Lazy | None:
    return _view(lazy, tuple(other.shape))


@follows("reshape_as")
def _reshape_as(lazy: Lazy, other: Tensor) -> Lazy | None:
    return _reshaped(lazy, tuple(other.shape))


@follows("flatten")
def _flatten(lazy: Lazy, start_dim: int = 0, end_dim: int = -1) -> Lazy | None:
    return _reshape(lazy, lambda x: x.flatten(start_dim, end_dim))


@follows("unflatten")
def _unflatten(lazy: Lazy, dim: int, sizes: Any) -> Lazy | None:
    return _reshape(lazy, lambda x: x.unflatten(dim, sizes))


# ---- dimensions moved about ----


@follows("transpose swapaxes swapdims")
def _transpose(lazy: Lazy, dim0: int, dim1: int) -> Lazy:
    a, b = _dim(dim0, lazy.dim()), _dim(dim1, lazy.dim())
    vocab_dim = {a: b, b: a}.get(lazy._vocab_dim, lazy._vocab_dim)
    return _follow(lazy, lambda x: x.transpose(a, b), vocab_dim)


@follows("permute")
def _permute(lazy: Lazy, *dims: Any) -> Lazy | None:
    dims = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    order = [_dim(dim, lazy.dim()) for dim in dims]
    if sorted(order) != list(range(lazy.dim())):
        return None
    return _follow(lazy, lambda x: x.permute(order), order.index(lazy._vocab_dim))


@follows("movedim moveaxis")
def _movedim(lazy: Lazy, source: Any, destination: Any) -> Lazy | None:
    if not isinstance(source, int) or not isinstance(destination, int):
        return None
    source, destination = _dim(source, lazy.dim()), _dim(destination, lazy.dim())
    order = [dim for dim in range(lazy.dim()) if dim != source]
    order.insert(destination, source)
    return _follow(lazy, lambda x: x.movedim(source, destination), order.index(lazy._vocab_dim))


@follows("unsqueeze")
def _unsqueeze(lazy: Lazy, dim: int) -> Lazy:
    dim = _dim(dim, lazy.dim() + 1)
    return _follow(lazy, lambda x: x.unsqueeze(dim), lazy._vocab_dim + (dim <= lazy._vocab_dim))


@follows("squeeze")
def _squeeze(lazy: Lazy, dim: Any = None) -> Lazy | None:
    if dim is not None and not isinstance(dim, int):
        return None
    asked = range(lazy.dim()) if dim is None else [_dim(dim, lazy.dim())]
    gone = [d for d in asked if lazy.shape[d] == 1]
    if lazy._vocab_dim in gone:
        return None
    before = sum(d < lazy._vocab_dim for d in gone)
    return _follow(lazy, lambda x: x.squeeze(tuple(gone)), lazy._vocab_dim - before)


# ---- parts of the tokens ----


@follows("__getitem__")
def _getitem(lazy: Lazy, index: Any) -> Any:
    items = _without_ellipsis([*map(_plain, index if isinstance(index, tuple) else [index])], lazy.dim())
    if items is None:
        return None
    constants: list[Any] = []
    reached, vocab_at, words = 0, 0, slice(None)
    for item in items:
        shape = lazy.shape[reached : reached + (_consumed(item) or 0)]
        constant: list[Any] | None
        if reached <= lazy._vocab_dim < reached + len(shape):
            if not isinstance(item, slice):
                return _words_by_index(lazy, items)
            constant, vocab_at, words = [slice(None)], len(constants), item
        else:
            constant = _constant(item, shape)
        if constant is None:
            return None  # the logits will raise
        reached += len(shape)
        constants += constant
    tensors = [item for item in constants if isinstance(item, Tensor)]
    if tensors and vocab_at != len(constants) - 1:
        return None

    def at(x: Tensor) -> Tensor:
        return x[tuple(_on(x, constants))]

    kept = sum(not isinstance(item, int | Tensor) for item in constants[:vocab_at])
    vocab_dim = kept + max((item.dim() for item in tensors), default=0)
    numbers = range(lazy.shape[lazy._vocab_dim])[words]
    if len(numbers) == lazy.shape[lazy._vocab_dim]:
        return lazy.derive(Operation(at, of_tokens=at), vocab_dim=vocab_dim)
    some = [*constants[:vocab_at], words, *constants[vocab_at + 1 :]]
    chosen = numbers if numbers.step == 1 else torch.tensor(numbers)
    return of_words(lazy, chosen, lambda x: x[tuple(_on(x, some))], at, vocab_dim)


def _on(x: Tensor, index: list[Any]) -> list[Any]:
    return [item.to(x.device) if isinstance(item, Tensor) else item for item in index]


def _words_by_index(lazy: Lazy, items: list[Any]) -> Any:
    """The values that an index finds which has numbers for the words."""
    *tokens, words = items
    if lazy._vocab_dim != lazy.dim() - 1 or any(_consumed(item) != 1 for item in items):
        return None
    constants: list[Any] = []
    for dim, item in enumerate(tokens):
        constant = _constant(item, lazy.shape[dim : dim + 1])
        if constant is None:
            return None  # the logits will raise
        constants += constant
    return of_index(lazy, (*constants, words))


def _plain(item: Any) -> Any:
    """The item, with numbers for tensors that bound a slice."""
    bounds = (item.start, item.stop, item.step) if isinstance(item, slice) else None
    return slice(*(one if one is None else operator.index(one) for one in bounds)) if bounds else item


def _without_ellipsis(items: list[Any], dims: int) -> list[Any] | None:
    """The items of an index of all dimensions, None where that is not known."""
    known = [None if isinstance(item, Lazy) else _consumed(item) for item in items]
    consumed = [number for number in known if number is not None]
    places = [place for place, item in enumerate(items) if item is Ellipsis]
    if len(consumed) < len(items) or sum(consumed) > dims or len(places) > 1:
        return None
    place = places[0] if places else len(items)
    return [*items[:place], *[slice(None)] * (dims - sum(consumed)), *items[place + 1 :]]


def _consumed(item: Any) -> int | None:
    """The number of dimensions that an item of an index takes up, None if it is not known."""
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, slice):
        return 1
    if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8):
        return item.dim() or None
    if isinstance(item, Tensor) and not item.is_floating_point():
        return 1
    entries = item if isinstance(item, list | range) else [item]
    return 1 if all(isinstance(entry, int) and not isinstance(entry, bool) for entry in entries) else None


def _constant(item: Any, shape: torch.Size) -> list[Any] | None:
    """The item as slices, numbers and tensors of numbers that nobody can change later, for dimensions of this shape."""
    if isinstance(item, list | range):
        return [torch.tensor([*item], dtype=torch.long)]
    if not isinstance(item, Tensor):
        return [item]
    if item.dtype in (torch.bool, torch.uint8):
        return [*item.nonzero(as_tuple=True)] if item.shape == shape else None
    return [int(item)] if item.dim() == 0 else [item.clone()]


@follows("narrow")
def _narrow(lazy: Lazy, dim: int, start: int, length: int) -> Any:
    dim = _dim(dim, lazy.dim())
    if dim == lazy._vocab_dim:
        words = slice(start, start + length)
        is_within = 0 <= start <= start + length <= lazy.shape[dim]
        return _getitem(lazy, (*[slice(None)] * dim, words)) if is_within else None
    return _follow(lazy, lambda x: x.narrow(dim, start, length), lazy._vocab_dim)


@follows("select")
def _select(lazy: Lazy, dim: int, index: int) -> Lazy | None:
    dim = _dim(dim, lazy.dim())
    if dim == lazy._vocab_dim or not isinstance(index, int):
        return None
    return _follow(lazy, lambda x: x.select(dim, index), lazy._vocab_dim - (dim < lazy._vocab_dim))


@follows("index_select")
def _index_select(lazy: Lazy, dim: int, index: Tensor) -> Any:
    dim = _dim(dim, lazy.dim())
    if isinstance(index, Lazy) or index.dim() > 1:
        return None
    if dim == lazy._vocab_dim:
        return _words_by_index(lazy, [*[slice(None)] * dim, index.reshape(-1)])
    kept = index.clone()  # the caller may change it before the logits are computed
    return _follow(lazy, lambda x: x.index_select(dim, kept.to(x.device)), lazy._vocab_dim)


@follows("__get__", inspect.getattr_static(Tensor, "mT"))
def _mt(lazy: Lazy, owner: Any = None) -> Lazy | None:
    return None if lazy.dim() < 2 else _transpose(lazy, -2, -1)


@follows("__get__", inspect.getattr_static(Tensor, "T"))
def _t(lazy: Lazy, owner: Any = None) -> Lazy | None:
    return None if lazy.dim() != 2 else _transpose(lazy, 0, 1)


@follows("t")
def _t_of_matrix(lazy: Lazy) -> Lazy | None:
    return None if lazy.dim() != 2 else _transpose(lazy, 0, 1)


@follows("unbind")
def _unbind(lazy: Lazy, dim: int = 0) -> tuple[Lazy, ...] | None:
    dim = _dim(dim, lazy.dim())
    if dim == lazy._vocab_dim:
        return None
    return _pieces_of(lazy, [_select(lazy, dim, at) for at in range(lazy.shape[dim])])


@follows("__iter__", Tensor)
def _iter(lazy: Lazy) -> Any:
    parts = None if lazy.dim() == 0 else _unbind(lazy, 0)
    return None if parts is None else iter(parts)


@follows("split")
def _split(lazy: Lazy, split_size: Any, dim: int = 0) -> tuple[Lazy, ...] | None:
    dim = _dim(dim, lazy.dim())
    return _parts(lazy, lazy._stand_in.split(split_size, dim), dim)


@follows("tensor_split")
def _tensor_split(lazy: Lazy, sections: Any, dim: int = 0) -> tuple[Lazy, ...] | None:
    dim = _dim(dim, lazy.dim())
    sections = sections.tolist() if isinstance(sections, Tensor) else sections
    return _parts(lazy, lazy._stand_in.tensor_split(sections, dim), dim)


@follows("chunk")
def _chunk(lazy: Lazy, chunks: int, dim: int = 0) -> tuple[Lazy, ...] | None:
    dim = _dim(dim, lazy.dim())
    return _parts(lazy, lazy._stand_in.chunk(chunks, dim), dim)


def _parts(lazy: Lazy, stand_ins: tuple[Tensor, ...], dim: int) -> tuple[Lazy, ...] | None:
    if dim == lazy._vocab_dim:
        return None
    sizes = [part.shape[dim] for part in stand_ins]
    return _pieces_of(lazy, [_narrow(lazy, dim, sum(sizes[:at]), size) for at, size in enumerate(sizes)])


def _pieces_of(whole: Lazy, parts: list[Lazy | None]) -> tuple[Lazy, ...] | None:
    """Parts that know their whole: what is asked of one is often asked of all, and answered in one pass."""
    pieces = tuple(part for part in parts if part is not None)
    if len(pieces) < len(parts):
        return None
    for part in pieces:
        part._piece = Piece(whole, part._operations)
    return pieces


# ---- memory, graph and dtype ----


@follows("contiguous")
def _contiguous(lazy: Lazy, memory_format: torch.memory_format = torch.contiguous_format) -> Lazy:
    if lazy._stand_in.is_contiguous(memory_format=memory_format):
        return lazy
    return lazy.derive(Operation(lambda x: x.contiguous(memory_format=memory_format)))


@follows("clone")
def _clone(lazy: Lazy, memory_format: torch.memory_format = torch.preserve_format) -> Lazy:
    return lazy.derive(Operation(lambda x: x.clone(memory_format=memory_format)))


@follows("detach")
def _detach(lazy: Lazy) -> Lazy:
    return lazy.without_graph()


@follows("__get__", inspect.getattr_static(Tensor, "data"))
def _data(lazy: Lazy, owner: Any = None) -> Lazy:
    return lazy.without_graph()


@follows("type_as")
def _type_as(lazy: Lazy, other: Tensor) -> Lazy | None:
    return _cast(lazy, other.dtype) if _same_device(other.device, lazy.device) else None


@follows("to")
def _to(
    lazy: Lazy,
    *args: Any,
    dtype: torch.dtype | None = None,
    device: Any = None,
    other: Tensor | None = None,
    non_blocking: bool = False,
    copy: bool = False,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Lazy | None:
    flags = []
    for value in args:
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, Tensor):
            other = value
        elif isinstance(value, bool):
            flags.append(value)
        elif value is not None:
            device = value
    if other is not None:
        dtype, device = other.dtype, other.device
    copy = copy or (len(flags) > 1 and flags[1])
    if memory_format is not torch.preserve_format:
        return None
    if device is not None and not _same_device(torch.device(device), lazy.device):
        return None
    if dtype in (None, lazy.dtype):
        return _clone(lazy) if copy else lazy
    return _cast(lazy, dtype)


def _cast(lazy: Lazy, dtype: torch.dtype) -> Lazy | None:
    if dtype == lazy.dtype:
        return lazy
    # Losses are float32. The products hold no more precision than that, unless the hidden states are float64.
    if dtype not in _FLOATS.values() or torch.float64 in (dtype, lazy.dtype):
        return None

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype)

    return lazy.derive(Operation(cast, of_rows=cast))


def _same_device(asked: torch.device, device: torch.device) -> bool:
    """Whether ``asked``, which may name no index, is ``device``."""
    if asked.type != device.type or asked.type == "cpu":
        return asked.type == device.type
    current = torch.get_device_module(asked.type).current_device() if asked.index is None else asked.index
    return current == device.index


def _caster(dtype: torch.dtype) -> Callable[[Lazy], Lazy | None]:
    def cast(lazy: Lazy) -> Lazy | None:
        return _cast(lazy, dtype)

    return cast


for _name, _dtype in _FLOATS.items():
    follows(_name)(_caster(_dtype))
