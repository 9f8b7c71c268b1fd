"""The call of a head that lazy tensors stand for, and the values that are computed from it."""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from chunked_ce.lazy.activity import user_stacklevel
from chunked_ce.lazy.evaluation import LABELS
from chunked_ce.lazy.form import Form
from chunked_ce.lazy.head import LazyHead, check_whole, is_whole
from chunked_ce.lazy.product import Product, rows_per_block, unsafe_view, with_gradient, with_layout
from chunked_ce.lazy.terms import Terms
from chunked_ce.options import ChunkOptions
from chunked_ce.rows.statistics import Logits

__all__ = ["Call", "Operation", "Root", "through", "version"]


class Call:
    """One call of a head: its parameters and precision at that time, and the lazy tensors that came of it."""

    def __init__(
        self, head: LazyHead, hidden: Tensor, low_rank_weight: Tensor | None = None, purpose: str | None = None
    ) -> None:
        """``low_rank_weight`` (V_r, r) is multiplied by the last r entries of the hidden states.

        ``purpose`` is that of a call whose logits evaluation code does not expect to be lazy: values that it reads are
        computed without a warning, with the bits of a layer that is not lazy where they are for it to read.
        """
        self.purpose, self.passes = purpose, 0
        self.activity = head.record.activity(head.training)
        self.head, self.layout, self.low_rank_weight = head, head.layout, low_rank_weight
        self.hidden, self.hidden_version = hidden.detach(), version(hidden)
        # Not by attribute: ZeRO-3 gathers a parameter that is looked up.
        weight, bias = head.own_parameters()
        assert weight is not None  # a head without one computes its logits at once
        self.parameters = weight, bias
        self.versions = tuple(map(version, (*self.parameters, low_rank_weight)))
        self.anchors = self._anchors()
        self.device = hidden.device
        self.autocast = hidden.dtype != torch.float64 and torch.is_autocast_enabled(hidden.device.type)
        self.dtype = torch.get_autocast_dtype(hidden.device.type) if self.autocast else hidden.dtype
        # The lazy tensors, by id: comparing two tensors is an operation on them.
        self.members: weakref.WeakValueDictionary[int, Member] = weakref.WeakValueDictionary()
        self.log_sum_exps: list[tuple[weakref.ref[Tensor], Any]] = []  # that somebody holds, and whose they are
        self.computed = False
        self.changed = False  # in place
        tensors = (hidden, *self.parameters)
        is_trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        sizes = (hidden.shape[:-1].numel(), head.vocab_size, hidden.shape[-1])
        options = head.options or ChunkOptions()
        budget = ChunkOptions(memory_budget=options.memory_budget)
        # A few rows without a gradient, such as a step of generation, fit into a chunk (a CPU's, on all devices): their
        # logits may as well be computed, with the bits of a layer that is not lazy.
        may_be_few = not is_trained and purpose is None
        self.has_few_rows = may_be_few and rows_per_block(*sizes, self.dtype, budget, "cpu") >= sizes[0]
        at_a_time = rows_per_block(*sizes, self.dtype, options, hidden.device.type)
        self.rows_per_block = sizes[0] if self.has_few_rows or purpose is LABELS else at_a_time

    @property
    def is_cheap(self) -> bool:
        """Whether values may as well be computed when they are needed, a loss apart.

        Besides few rows, those that evaluation code reads after the loss: more would be read of them.
        """
        return self.has_few_rows or (self.purpose is LABELS and self.passes > 0)

    def take(self, tracked: bool) -> None:
        """Count a pass over the head."""
        self.activity.take(tracked)
        self.passes += 1

    def compute(self, operation: str, shape: torch.Size, tracked: bool) -> None:
        """Count that the logits are computed."""
        self.computed = True
        self.activity.compute(operation, shape, tracked)
        self._expect_readers(operation)

    def _expect_readers(self, operation: str) -> None:
        if self.purpose is not None:
            self.head.record.reads_logits.setdefault(self.purpose, operation)

    @property
    def terms(self) -> str:
        """The names and values of what the head adds to cross-entropies of this call; a plain evaluation has none."""
        return self.head.terms if self.purpose is None else ""

    def keywords_of_loss(self, label_smoothing: float) -> dict[str, Any]:
        """The keywords of a cross-entropy that the caller asked for with ``label_smoothing``."""
        if self.purpose is not None:
            return {"label_smoothing": label_smoothing, "options": self.head.options}
        self.activity.losses_with_terms += 1
        return self.head.keywords_of_loss(label_smoothing)

    def _anchors(self) -> tuple[Tensor, ...]:
        """The leaves behind lazy tensors in the graph, where engines look for the parameters of a forward.

        A parameter that an engine gathers has a substitute: its own gradient would wait for the end of the graph, and
        its shape would be that of its released state.
        """
        parameters = [parameter for parameter in self.parameters if parameter is not None]
        whole = is_whole(parameters[0])
        low_rank = () if self.low_rank_weight is None else (self.low_rank_weight,)
        return low_rank + tuple(
            one if whole and not hasattr(one, "ds_id") else self.hidden.new_empty(0).requires_grad_(one.requires_grad)
            for one in parameters
        )

    def linear(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product (..., V) with all rows of the head."""
        if self.layout is not None:
            return self.layout.logits(hidden, weight, bias)
        if self.low_rank_weight is None:
            return F.linear(hidden, weight, bias)
        width = weight.shape[1]
        low_rank = F.linear(hidden[..., width:], self.low_rank_weight.to(hidden.dtype))
        return F.linear(hidden[..., :width], weight, bias) + low_rank

    @contextlib.contextmanager
    def as_it_was(self, tracked: bool) -> Iterator[None]:
        """The precision of the call; with a graph if ``tracked``."""
        with (
            torch.inference_mode(False) if tracked else contextlib.nullcontext(),
            torch.set_grad_enabled(tracked),
            torch.autocast(self.device.type, dtype=self.dtype if self.autocast else None, enabled=self.autocast),
        ):
            yield

    def run(self, hidden: Tensor, request: Callable[..., Any], tracked: bool) -> Any:
        """``request(hidden, weight, bias)`` inside a call of the head, for which engines gather its parameters."""
        now = self.head.own_parameters()
        if self.low_rank_weight is not None:
            check_whole(self.low_rank_weight)  # that of another head, which an engine may have taken back
        with self.as_it_was(tracked):
            self._check_parameters_unchanged()
            if all(a is b for a, b in zip(now, self.parameters, strict=True)):
                return self.head.run(hidden, request)
            # `torch.func.functional_call` put them in the head's place, and took them away again.
            check_whole(self.parameters[0])
            return request(hidden, *self.parameters)

    def differentiate(
        self,
        hidden: Tensor,
        vocab_dim: int,
        form: Form,
        terms: Terms,
        grad: Tensor,  # of the values
    ) -> list[Tensor | None]:
        """The gradients of the hidden states and the anchors, given that of the values a lazy tensor stands for."""
        if any(factor.requires_grad for factor in terms.tensors) or (form.bias is not None and form.bias.requires_grad):
            raise RuntimeError(
                "a gradient of the logits reached lazy logits that were changed by tensors with a gradient: call "
                "materialize() on the logits before what forms it"
            )
        if self.changed:
            raise RuntimeError(
                "a gradient of the logits reached lazy logits that were changed in place: call materialize() on the "
                "logits before they are changed, and go on with what it returns"
            )
        low_rank = () if self.low_rank_weight is None else (self.low_rank_weight,)
        parameters = [*low_rank, *(parameter for parameter in self.parameters if parameter is not None)]
        if any(a is not p and p.requires_grad for a, p in zip(self.anchors, parameters, strict=True)):
            raise RuntimeError(
                "a gradient of the logits reached lazy logits whose head an engine shards: call materialize() on the "
                "logits before what forms it"
            )

        def values(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            found = at_last.of(form.map(to_last)(self.linear(hidden, weight, bias)))
            return found.movedim(-1, vocab_dim).to(grad.dtype)

        def to_last(factor: Tensor) -> Tensor:
            return factor.movedim(vocab_dim, -1)

        at_last = terms.map(to_last)
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad():
            found = self.run(hidden.movedim(vocab_dim, -1), values, tracked=True)
        trained = [hidden, *(parameter for parameter in parameters if parameter.requires_grad)]
        gradients = dict(zip(map(id, trained), torch.autograd.grad(found, trained, grad), strict=True))
        return [gradients.pop(id(one), None) for one in (hidden, *parameters)]  # a sum may be of one head twice

    def compute_before(self, change: Operation) -> None:
        """Compute the values of the tensors that are not made by a change in place, which is about to happen."""
        for one in list(self.members.values()):
            if one._value is None and not any(step is change for step in one._operations):
                one._root.value(one._operations, one.requires_grad)

    def check_unchanged(self) -> None:
        self.check_hidden_unchanged()
        self._check_parameters_unchanged()

    def check_hidden_unchanged(self) -> None:
        if version(self.hidden) != self.hidden_version:
            raise RuntimeError("the hidden states were changed in place after the head was called with them")

    def _check_parameters_unchanged(self) -> None:
        now = map(version, (*self.parameters, self.low_rank_weight))
        if any(one != then for one, then in zip(now, self.versions, strict=True)):
            self._expect_readers("a reader after a step of the optimizer")
            raise RuntimeError(
                "the head's parameters were changed in place, by an optimizer's step perhaps, after these logits were "
                "asked for and before they were used: use the logits before the step, keep what materialize() returns, "
                "or ask for them in evaluation mode, without labels"
            )

    def warn(self, operation: str, shape: torch.Size) -> None:
        terms = self.head.terms
        only = (
            f" {terms} of the head apply to F.cross_entropy of these logits only: add them to another loss yourself."
            if terms
            else ""
        )
        if vars(self.head).get("_is_replica"):
            self.head.record.tell(
                "replica",
                f"LazyLogits does not follow {operation}: the logits {tuple(shape)} were computed. nn.DataParallel "
                f"gathers what its replicas return: let their forward return the loss alone.{only}",
            )
            return
        warnings.warn(
            f"LazyLogits does not follow {operation}: the logits {tuple(shape)} were computed. Call materialize() on "
            "them first if they are meant. To save them, take losses by F.cross_entropy, and what else is needed by "
            f"operations that are followed, such as log_softmax, gather, logsumexp, sum and topk.{only}",
            UserWarning,
            stacklevel=user_stacklevel(),
        )


class Member(Protocol):
    """A lazy tensor, as its call knows it."""

    requires_grad: bool
    _value: Tensor | None
    _operations: tuple[Operation, ...]
    _root: Root


class Operation(NamedTuple):
    """One operation on logits, in the forms that it takes for the tensors behind them."""

    of_logits: Callable[..., Tensor]  # of more than one tensor where it has ``others``
    # For a tensor that has one number, or one hidden state, in place of each row; None if rows stay where they are.
    of_tokens: Callable[[Tensor], Tensor] | None = None
    # For rows (n, V); None if their values stay the same.
    of_rows: Callable[..., Tensor] | None = None
    is_per_token: bool = False  # rows are changed by something of their tokens, which has no ``of_rows``
    # For an operation on several tensors of the same root: the operations that lead to the others, and their stand-ins.
    others: tuple[tuple[Operation, ...], ...] = ()
    stand_ins: tuple[Tensor, ...] = ()
    in_place: bool = False  # changes the memory of what it operates on, and of all tensors that share it


def through(operations: tuple[Operation, ...], rows: Tensor) -> Tensor:
    """Rows (n, V) after ``operations``."""
    found = rows
    for operation in operations:
        if operation.of_rows is not None:
            found = operation.of_rows(found, *(through(other, rows) for other in operation.others))
    return found


class Root:
    """The hidden states of lazy tensors, and the tensors computed for them."""

    def __init__(
        self,
        call: Call,
        product: Product,
        numbers: Tensor,  # of the product's rows, on the CPU; in the shape of the logits with 1 in place of V
        hidden: Tensor,  # with a graph; in the shape of the logits with D in place of V
        vocab_dim: int,
        of_rows: tuple[Callable[[Tensor], Tensor], ...],  # the steps from the product's rows to those of the logits
        stand_in: Tensor,  # has the shape, strides and dtype of the logits
        has_graph: bool,
    ) -> None:
        self.call, self.product, self.numbers, self.hidden = call, product, numbers, hidden
        self.vocab_dim, self.of_rows, self.stand_in, self.has_graph = vocab_dim, of_rows, stand_in, has_graph
        self.values: dict[tuple[Operation, ...], Tensor] = {}
        self.tracked_twin: Callable[[], Root | None] = lambda: None
        self._detached: Root | None = None

    @classmethod
    def of_call(cls, call: Call, hidden: Tensor, logits: Logits, stand_in: Tensor, has_graph: bool) -> Root:
        """The root of the logits that ``call`` returns for ``hidden`` (..., D)."""
        product = Product(call.hidden, call.rows_per_block, call.dtype if call.autocast else None, call.linear)
        numbers = torch.arange(product.num_rows).view(*hidden.shape[:-1], 1)
        of_rows = (logits.__call__, lambda rows: rows.to(stand_in.dtype))
        return cls(call, product, numbers, hidden, hidden.dim() - 1, of_rows, stand_in, has_graph)

    def detached(self) -> Root:
        """The same root without a graph, so that detached tensors do not keep the graph alive."""
        if not self.has_graph:
            return self
        if self._detached is None:
            parts = (self.vocab_dim, self.of_rows, self.stand_in)
            twin = Root(self.call, self.product, self.numbers, self.hidden.detach(), *parts, has_graph=False)
            twin.tracked_twin = weakref.ref(self)
            self._detached = twin
        return self._detached

    def value(self, operations: tuple[Operation, ...], tracked: bool) -> Tensor:
        """The logits themselves after ``operations``."""
        if operations not in self.values:
            self.values[operations] = self._compute(operations, tracked)
        return self.values[operations]

    def _compute(self, operations: tuple[Operation, ...], tracked: bool) -> Tensor:
        twin = self.tracked_twin()
        if twin is not None and (operations in twin.values or self.call.changed):
            return twin.value(operations, True).detach()  # the same memory, which a change in place is to reach
        if operations and operations[-1].in_place:
            self.call.compute_before(operations[-1])
        if operations:
            *first, last = operations
            before = [self.value(steps, tracked) for steps in (tuple(first), *last.others)]
            with self._for_values(tracked):
                return last.of_logits(*before)
        self.call.check_hidden_unchanged()
        with self._for_values(tracked):
            hidden = self.hidden.movedim(self.vocab_dim, -1)
        found = self.call.run(hidden, functools.partial(self._logits, tracked), tracked)
        with self._for_values(tracked):
            found = found if self.vocab_dim == found.dim() - 1 else found.movedim(-1, self.vocab_dim)
            return with_layout(found, self.stand_in)

    def _logits(self, tracked: bool, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        tokens = hidden.shape[:-1]
        numbers = self.numbers.movedim(self.vocab_dim, -1).flatten()
        values = functools.partial(self.product.whole, numbers, weight, bias, hidden.dtype)
        with self._for_values(tracked):
            rows = self.product.factor(hidden.reshape(tokens.numel(), hidden.shape[-1]))
            weight, bias = self.product.factor(weight), self.product.factor(bias)
            if tracked and (self.call.layout is not None or self.call.low_rank_weight is not None):
                found = self.call.linear(rows, weight, bias)  # (n, V)
            else:
                found = with_gradient(values, rows, weight, bias) if tracked else values()
            for operation in self.of_rows:
                found = operation(found)
            logits: Tensor = unsafe_view(found, (*tokens, found.shape[-1]))
            return logits

    @contextlib.contextmanager
    def _for_values(self, tracked: bool) -> Iterator[None]:
        """Without the autocast of the code that needs the values: operations give what they gave the stand-in."""
        with (
            torch.inference_mode(False) if tracked else contextlib.nullcontext(),
            torch.set_grad_enabled(tracked),
            torch.autocast(self.call.device.type, enabled=False),
        ):
            yield


def version(tensor: Tensor | None) -> int | None:
    """A number that changes when the tensor's values do."""
    if hasattr(tensor, "ds_id"):  # ZeRO-3 gathers and releases its values, and an optimizer changes them elsewhere
        return _optimizer_steps
    return None if tensor is None or tensor.is_inference() else tensor._version


_optimizer_steps = 0  # of all optimizers


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)
