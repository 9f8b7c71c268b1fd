"""`LazyLogits`: a tensor that stands for a head's logits without holding them."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, SupportsIndex, TypeVar, cast

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._pytree import tree_map

from chunked_ce.lazy.form import Form
from chunked_ce.lazy.graph import attach, detour, is_attached
from chunked_ce.lazy.head import LazyHead
from chunked_ce.lazy.product import Rows, with_layout
from chunked_ce.lazy.source import Call, Operation, Root, through, version
from chunked_ce.lazy.terms import LOGITS, Terms
from chunked_ce.rows.statistics import Logits

__all__ = ["Lazy", "LazyLogits", "LazyMixture", "LazyTerms", "Piece"]

_Kind = TypeVar("_Kind", bound="Lazy")


class Piece(NamedTuple):
    """What a part of the tokens was cut from."""

    whole: Lazy
    operations: tuple[Operation, ...]  # of the piece as it was cut, the last one being the cut


class Lazy(Tensor):
    """The base of `LazyLogits` and `LazyTerms`: a tensor with a shape and a graph but without values.

    Its hidden states have the shape of the logits with D in place of V, so that an operation on the other dimensions
    applies to them as well. Its stand-in on the meta device has the shape, strides and dtype of the logits: it goes
    through every operation, and raises the errors that the logits would raise. Its ``operations`` lead from the head's
    output to the logits, in case they have to be computed.
    """

    _dispatch: Callable[..., Any]  # `chunked_ce.lazy.follow.dispatch`
    _root: Root
    _operations: tuple[Operation, ...]
    _hidden: Tensor
    _vocab_dim: int
    _form: Form  # of the logits whose probabilities the terms have
    _terms: Terms
    _stand_in: Tensor
    _value: Tensor | None  # once it is computed
    _value_version: int | None
    _hooked: bool  # the gradient must pass through this tensor, so that its hooks are called
    _joined: bool
    _piece: Piece | None
    _pending: tuple[tuple[Operation, ...], ...]  # changes in place of its memory, by the operations that lead to them
    _answers: dict[Any, tuple[Tensor, ...]]  # that its pieces share

    @classmethod
    def _make(
        cls: type[_Kind],
        root: Root,
        operations: tuple[Operation, ...],
        hidden: Tensor,
        vocab_dim: int,
        form: Form,
        stand_in: Tensor,
        terms: Terms = LOGITS,
        tracked: bool = True,
    ) -> _Kind:
        """Make a lazy tensor, with a graph behind it if ``tracked``."""
        call = root.call

        def make() -> _Kind:
            self = Tensor._make_wrapper_subclass(
                cls,
                stand_in.shape,
                strides=stand_in.stride(),
                storage_offset=stand_in.storage_offset(),
                dtype=stand_in.dtype,
                device=call.device,
            )
            self._root, self._operations, self._hidden = root, operations, hidden
            self._vocab_dim, self._form, self._terms, self._stand_in = vocab_dim, form, terms, stand_in
            self._value, self._hooked, self._joined, self._piece, self._answers = None, False, False, None, {}
            self._pending = ()
            call.members[id(self)] = self
            return self

        if not tracked:
            return make()
        differentiate = functools.partial(call.differentiate, hidden.detach(), vocab_dim, form, terms)
        return attach(make, differentiate, hidden, *call.anchors)

    @classmethod
    def of_call(cls: type[_Kind], call: Call, hidden: Tensor, vocab_size: int, logits: Logits) -> _Kind:
        """The lazy logits that ``call`` returns for ``hidden`` (..., D)."""
        tracked = torch.is_grad_enabled()
        hidden = hidden if tracked else hidden.detach()
        stand_in = torch.empty(*hidden.shape[:-1], vocab_size, dtype=call.dtype, device="meta")
        root = Root.of_call(call, hidden, logits, stand_in, has_graph=tracked)
        return cls._make(root, (), hidden, hidden.dim() - 1, Form(*logits), stand_in, tracked=tracked)

    def derive(
        self,
        operation: Operation,
        *,
        cls: type[Lazy] | None = None,
        vocab_dim: int | None = None,
        form: Form | None = None,
        terms: Terms | None = None,
    ) -> Lazy:
        """The result of ``operation``, which differs from this tensor in the attributes that are given."""
        of_tokens = operation.of_tokens
        # The hidden states come first: an index that is out of range raises on them.
        hidden = self._hidden if of_tokens is None else of_tokens(self._hidden)
        stand_in = operation.of_logits(self._stand_in, *operation.stand_ins)
        tracked = self.requires_grad and torch.is_grad_enabled()
        if of_tokens is not None:
            form = self._form.map(of_tokens) if form is None else form
            terms = self._terms.map(of_tokens) if terms is None else terms
        found = (cls or type(self))._make(
            self._root if tracked else self._root.detached(),
            (*self._operations, operation),
            hidden if tracked else hidden.detach(),
            self._vocab_dim if vocab_dim is None else vocab_dim,
            self._form if form is None else form,
            stand_in,
            self._terms if terms is None else terms,
            tracked,
        )
        if of_tokens is None and not self._joined:
            found._piece = self._piece
        return found

    def without_graph(self) -> Lazy:
        """The same tensor, detached."""
        root, hidden = self._root.detached(), self._hidden.detach()
        form, terms = self._form.detached(), self._terms.map(Tensor.detach)
        return self._make(root, self._operations, hidden, self._vocab_dim, form, self._stand_in, terms, tracked=False)

    def become(self, other: Lazy) -> bool:
        """Take on the state of ``other``, the result of an operation on this tensor; False where that is not sound.

        Other tensors of the same memory are computed, with this change, when they are used.
        """
        if not isinstance(other, type(self) | LazyTerms) or (self.requires_grad and not other.requires_grad):
            return False
        others = [one for one in self._members() if one is not self and one is not other]
        sharing = [one for one in others if one._memory == self._memory]
        if others and not all(one._can_wait_for_a_change_of(self) for one in (self, *sharing)):
            return False
        *before, last = operations = other._operations
        if others:
            operations = (*before, last._replace(of_logits=lambda x: x.copy_(last.of_logits(x)), in_place=True))
        elif other.dtype != self.dtype:
            operations = (*before, last._replace(of_logits=lambda x: last.of_logits(x).to(x.dtype)))
        for one in sharing:
            one._pending = (*one._pending, operations)
        self._root, self._operations, self._hidden = other._root, operations, other._hidden
        self._form, self._terms, self.__class__ = other._form, other._terms, type(other)  # pyright: ignore[reportAttributeAccessIssue]
        self._root.call.changed = True
        return True

    def _members(self) -> list[Lazy]:
        """All lazy tensors of the call."""
        return cast("list[Lazy]", list(self._root.call.members.values()))

    @property
    def _memory(self) -> int:
        """Equal for tensors whose values share memory."""
        address: int = self._stand_in.untyped_storage()._cdata
        return address

    def _can_wait_for_a_change_of(self, other: Lazy) -> bool:
        """Whether the values can be computed by the operations alone, after a change in place of those of ``other``."""
        plain = isinstance(self, LazyLogits) and self._value is None and not self._hooked
        return plain and self._root is other._root and is_attached(self.grad_fn)

    @property
    def is_behind(self) -> bool:
        """Whether the memory was changed through another tensor, so that only the values are right."""
        return bool(self._pending) and not self.is_computed

    def join_graph(self) -> None:
        """Let the gradient of the hidden states pass through whatever others have put into this tensor's graph."""
        if not self.requires_grad or self._joined:
            return
        if is_attached(self.grad_fn) and not self._hooked:
            return
        self._joined = True
        if any(operation.is_per_token for operation in self._operations):  # its rows are no function of the product's
            with torch.enable_grad():
                self._hidden = detour(self, self._hidden)
            return
        numbers, of_rows = self._numbers(), self._of_rows()
        with torch.enable_grad():
            self._hidden = detour(self, self._hidden)
        parts = (self._root.call, self._root.product, numbers, self._hidden, self._vocab_dim, of_rows, self._stand_in)
        self._root = Root(*parts, has_graph=True)
        self._operations = ()

    def _numbers(self) -> Tensor:
        """The numbers of the product's rows behind this tensor's rows, in its shape with 1 in place of V."""
        return self.tokens_of(self._root.numbers)

    def tokens_of(self, numbers: Tensor) -> Tensor:
        """This tensor's tokens among those of its root, for which ``numbers`` has 1 in place of V."""
        for operation in self._operations:
            if operation.of_tokens is not None:
                numbers = operation.of_tokens(numbers)
        return numbers

    def _of_rows(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        """The steps from the product's rows to those of this tensor."""
        return (*self._root.of_rows, functools.partial(through, self._operations))

    def rows(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[Rows, Tensor]]:
        """This tensor's rows in pieces: their places, and their values (m, V) with the bits of `materialize`.

        Takes the arguments of a `request`.
        """
        numbers, of_rows = self._numbers().movedim(self._vocab_dim, -1).flatten(), self._of_rows()
        for places, rows in self._root.product.rows(numbers, weight, bias, hidden.dtype):
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                for step in of_rows:
                    rows = step(rows)
            yield places, rows

    def request(self, function: Callable[..., Any]) -> Any:
        """``function(hidden, weight, bias)`` with hidden states (..., D), inside a call of the head."""
        call = self._root.call
        call.check_hidden_unchanged()
        tracked = self.requires_grad and torch.is_grad_enabled()
        call.take(tracked)
        hidden = self._hidden.movedim(self._vocab_dim, -1)
        return call.run(hidden if tracked else hidden.detach(), function, tracked)

    @property
    def head(self) -> LazyHead:
        return self._root.call.head

    @property
    def is_computed(self) -> bool:
        return self._value is not None

    def compute_for(self, operation: str) -> None:
        """Compute the values, with the one warning that ``operation`` needs them."""
        call = self._root.call
        call.head.check_can_compute(operation)
        if not call.computed and not call.is_cheap and call.purpose is None:
            call.warn(operation, self.shape)
        call.changed |= version(self._computed(operation)) != self._value_version

    def materialize(self) -> Tensor:
        """The tensor that this one stands for, computed at the first call, with its graph.

        From then on every operation on this tensor, and on all others from the same logits, works on these values.
        """
        return self._computed("materialize")

    def _computed(self, operation: str) -> Tensor:
        if self._value is None:
            call = self._root.call
            call.head.check_can_compute(operation)
            if not call.computed:
                call.compute(operation, self.shape, self.requires_grad and torch.is_grad_enabled())
            # All at once, so that views of one another are views of the same memory.
            members = self._members()
            with _unseen():
                for one in sorted(members, key=lambda one: (not one.requires_grad, len(one._operations))):
                    one.join_graph()
                    if one._value is None:
                        value = one._root.value(one._operations, one.requires_grad)
                        one._value = with_layout(value, one._stand_in)
                for one in members:
                    for operations in one._pending:
                        one._root.value(operations, one.requires_grad)
                for one in members:
                    one._value_version = version(one._value)
        assert self._value is not None
        return self._value

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return cls._dispatch(function, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Calls from below Python: they give the same tensor again, or operate on the values."""
        aten, lazy = torch.ops.aten, args[0]
        if isinstance(lazy, Lazy) and lazy.is_behind:
            lazy.compute_for(str(function))
        same = function in (aten.detach.default, aten.alias.default)
        if isinstance(lazy, Lazy) and (same or (function is aten.view.default and tuple(args[1]) == tuple(lazy.shape))):
            return lazy._again(with_graph=not same)

        def value(x: Any) -> Any:
            if not isinstance(x, Lazy):
                return x
            x.compute_for(str(function))
            return x.materialize().detach()

        return function(*tree_map(value, args), **tree_map(value, kwargs or {}))

    def _again(self, with_graph: bool) -> Lazy:
        form, terms = self._form.detached(), self._terms.map(Tensor.detach)
        parts = (self._operations, self._hidden.detach(), self._vocab_dim, form, self._stand_in, terms)
        again = self._make(self._root.detached(), *parts, tracked=False)
        if self._value is not None:
            again._value = self._value if with_graph else self._value.detach()
            again._value_version = self._value_version
        return again

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __copy__(self) -> Tensor:
        self.compute_for("copy")
        return copy.copy(self.materialize().detach())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        self.compute_for("deepcopy")
        return copy.deepcopy(self.materialize().detach(), memo)

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        self.compute_for("pickle")
        reduced: str | tuple[Any, ...] = self.materialize().detach().__reduce_ex__(protocol)
        return reduced


class LazyLogits(Lazy):
    """The logits of an `LMHead` call, not computed.

    A tensor in shape, dtype, device and graph. Its slices, reshapes, casts and multiples are lazy too, and so are its
    probabilities. Its losses, log-probabilities, entropies, ``mean``, ``argmax``, ``topk``, ``gather`` and
    ``logsumexp`` are computed from the hidden states, a chunk of tokens or vocabulary entries at a time. Anything else
    computes the logits once, with a warning.

    >>> import torch
    >>> from chunked_ce import LMHead
    >>> logits = LMHead(4, 10)(torch.ones(2, 3, 4))
    >>> logits[:, :-1].float().reshape(-1, 10)
    LazyLogits(shape=(4, 10), dtype=torch.float32, device=cpu)
    >>> torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.arange(6)).shape
    torch.Size([])
    """


class LazyTerms(Lazy):
    """What is made of `LazyLogits` and their probabilities word by word, as log-probabilities are: a few `Terms`.

    Its sums over the vocabulary and its values at some words come from statistics of the tokens.
    """


class LazyMixture(Lazy):
    """What is made of the probabilities of two heads word by word, of which only a weighted divergence is answered.

    Handlers of other lazy tensors never see it.
    """

    _state: Any  # `chunked_ce.lazy.mixtures`


def _unseen() -> contextlib.AbstractContextManager[object]:
    """Hides a computation that happens once from transforms of ``torch.func``, and from checkpoints, which expect the
    recomputation to save as many tensors as the forward."""
    if torch._C._are_functorch_transforms_active():
        return temporarily_clear_interpreter_stack()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
