"""What the calls of a head came to in a training step, in counters: `LMHead.report` shows them."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import dataclasses
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["Activity", "Computed", "Record", "during", "name_of", "user_frame", "user_stacklevel"]


class Computed(NamedTuple):
    """Logits that were computed for an operation."""

    operation: str
    where: str  # file:line of the code that asked for it, outside of this package and torch


@dataclasses.dataclass(eq=False)
class Activity:
    """Counts of what happened in the calls of a head since the optimizer's last step.

    Attributes:
        calls: of the head.
        taken: passes over the head that took losses and statistics without logits, by operation.
        computed: how often lazy logits were computed after all, and their last shape, by operation and place.
        plain: calls that computed ordinary logits at once, by reason.
        bypasses: readers of the head's weight that take a loss without the head, by function.
    """

    calls: int = 0
    taken: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    computed: dict[Computed, tuple[int, torch.Size]] = dataclasses.field(default_factory=dict)
    plain: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    bypasses: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    readers: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  # who may be a bypass
    losses_with_terms: int = 0  # the head's z_loss and label_smoothing are added to
    is_trained: bool = False  # something with a gradient was taken or computed
    is_over: bool = False  # an optimizer has made its step

    def take(self, tracked: bool) -> None:
        """Count a pass over the head by the operation that runs now."""
        function = _operation.get()
        self.taken["a function of the package" if function is None else name_of(function)] += 1
        self.is_trained |= tracked

    def compute(self, operation: str, shape: torch.Size, tracked: bool) -> None:
        frame = user_frame()
        where = Computed(operation, f"{frame.f_code.co_filename}:{frame.f_lineno}")
        count, _ = self.computed.get(where, (0, shape))
        self.computed[where] = (count + 1, shape)
        self.is_trained |= tracked


class Record:
    """The activity of a head in training and in evaluation, and which warnings it has given. Copies start anew."""

    def __init__(self) -> None:
        self.training, self.evaluation = Activity(), Activity()
        self.told: set[str] = set()
        self.served: set[str] = set()  # packages that read the head's weight but take the loss from the head
        self.reads_logits: dict[str, str] = {}  # purposes of evaluation calls whose logits were read, and by what

    def __reduce__(self) -> tuple[type[Record], tuple[()]]:
        return type(self), ()

    def new_call(self, training: bool, terms: str = "") -> Activity:
        """The activity that a call belongs to; ``terms`` names what the head adds to cross-entropies."""
        found = self.activity(training)
        found.calls += 1
        if terms:
            _heads_of_this_step[self] = terms
        return found

    def activity(self, training: bool) -> Activity:
        """That of the step that has not ended yet."""
        _heads_of_this_step.setdefault(self, "")
        if training:
            self.training = Activity() if self.training.is_over else self.training
            return self.training
        self.evaluation = Activity() if self.evaluation.is_over else self.evaluation
        return self.evaluation

    def tell(self, key: str, message: str) -> None:
        """Warn, once for each ``key``."""
        if key not in self.told:
            self.told.add(key)
            warnings.warn(message, UserWarning, stacklevel=user_stacklevel())

    def end_step(self, terms: str) -> None:
        step = self.training
        self.evaluation.is_over = True
        if step.is_over:
            return
        step.is_over = True
        if step.readers and not step.calls:
            step.bypasses.update(step.readers)
            self.tell(
                "bypass",
                f"LMHead had no effect in this step: {', '.join(step.readers)} reads the weight of the head, and the "
                "head was not called, so that its settings do not apply. For the LMHead to take the loss, the model "
                "has to call it: head(hidden)",
            )
        if terms and step.is_trained and not step.losses_with_terms:
            by = ", ".join([*step.taken, *(one.operation for one in step.computed)])
            self.tell(
                "terms",
                f"{terms} of the head had no effect in this step: they are added to F.cross_entropy and F.nll_loss of "
                f"lazy logits with indices as targets, and its loss came of {by}. Take the loss by one of the two, or "
                "add the terms to it yourself and leave them out of the head",
            )


_heads_of_this_step: weakref.WeakKeyDictionary[Record, str] = weakref.WeakKeyDictionary()


def _end_step(*_: object) -> None:
    for record, terms in list(_heads_of_this_step.items()):
        record.end_step(terms)
    _heads_of_this_step.clear()


register_optimizer_step_post_hook(_end_step)

# ---- the operation that runs now, and where it was called ----

_operation: contextvars.ContextVar[Callable[..., object] | None] = contextvars.ContextVar("operation", default=None)


@contextlib.contextmanager
def during(function: Callable[..., object]) -> Iterator[None]:
    """Count what happens meanwhile as of ``function``, unless it is part of another one."""
    if _operation.get() is not None:
        yield
        return
    token = _operation.set(function)
    try:
        yield
    finally:
        _operation.reset(token)


def name_of(function: Callable[..., object]) -> str:
    name: str = getattr(function, "__name__", str(function))
    owner = getattr(function, "__self__", None)
    return f"Tensor.{owner.__name__}" if name in ("__get__", "__set__", "__delete__") and owner is not None else name


def user_stacklevel() -> int:
    """The stack level, for the caller's warning, of the frame that `user_frame` gives."""
    level, frame, users = 1, sys._getframe(1), user_frame()
    while frame is not users and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    return level


def user_frame() -> FrameType:
    """The first frame that is neither in this package nor in torch."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("chunked_ce", "torch"):
        frame = frame.f_back
    return frame
