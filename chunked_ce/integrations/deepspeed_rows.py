"""The rows of a sharded head beside a DeepSpeed engine: their gradients, their fp32 copy and their optimizer step."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from chunked_ce.narrowing import not_none
from chunked_ce.parallel.collectives import Pending
from chunked_ce.parallel.vocab import VocabShard
from chunked_ce.sharded.rows import RowSharding, rows_in
from chunked_ce.sharded.state import whole_for

__all__ = ["EPSILON", "STAND_IN", "Place", "Rows", "rows_of", "step_rows", "sum_of_squares"]

EPSILON = 1e-6  # what DeepSpeed adds to the norm that it clips by
STAND_IN = "stand_in_of_sharded_rows"  # the name of a parameter


class Place(NamedTuple):
    """Where a parameter is in a model."""

    name: str  # of the parameter, as `named_parameters` gives it
    module: nn.Module
    attribute: str


class Rows:
    """A parameter of this rank's rows (V_r, ...), of which an engine knows nothing.

    Its gradients are summed in fp32 over an accumulation window, and the optimizer steps an fp32 copy (`master`, the
    parameter itself where it is fp32 already), as ZeRO does with its own partitions.
    """

    def __init__(self, parameter: nn.Parameter, sharding: RowSharding, places: list[Place]) -> None:
        self.parameter, self.sharding, self.places = parameter, sharding, places
        self.group = 0  # of the optimizer
        self.state: dict[str, Any] = {}  # the optimizer's, of `master`
        self.master: Tensor = parameter
        self.in_state_dicts = True
        self.was_loaded = False  # from a state dict
        self._gradient: Tensor | None = None
        self._handles: list[Any] = []

    @property
    def vocab(self) -> VocabShard:
        return self.sharding.vocab

    @property
    def name(self) -> str:
        return self.places[0].name

    @property
    def is_trained(self) -> bool:
        return self.parameter.requires_grad

    # ---- out of sight ----

    def hide(self) -> None:
        """Make a plain attribute of the parameter, so that nobody who asks the model for its parameters gets it.

        State dicts hold all ranks' rows as before.
        """
        for place in self.places:
            del place.module._parameters[place.attribute]
            vars(place.module)[place.attribute] = self.parameter
            save = functools.partial(self._add_to_state, place.attribute)
            load = functools.partial(self._take_from_state, place.attribute)
            self._handles.append(place.module.register_state_dict_post_hook(save))
            self._handles.append(place.module.register_load_state_dict_pre_hook(load))

    def show(self) -> None:
        """Undo `hide`."""
        while self._handles:
            self._handles.pop().remove()
        self._gradient = None
        self.places[0].module._parameters.pop(STAND_IN, None)
        for place in self.places:
            del vars(place.module)[place.attribute]
            place.module.register_parameter(place.attribute, self.parameter)

    def stand_in(self) -> nn.Parameter:
        """Another parameter in the place of this one, for an engine that keeps no group of the optimizer without one.

        It is one zero, whose gradient is zero. State dicts do not hold it.
        """
        module, parameter = self.places[0].module, nn.Parameter(self.parameter.new_zeros(1))
        module.register_parameter(STAND_IN, parameter)
        self._handles.append(module.register_state_dict_post_hook(_without_stand_in))
        self._handles.append(module.register_load_state_dict_pre_hook(_with_stand_in))
        return parameter

    def settle(self, device: torch.device, dtype: torch.dtype | None, master_device: torch.device) -> None:
        """Move and cast the parameter as the engine has done with its own; make the copy that the optimizer steps."""
        self.parameter.data = self.parameter.data.to(device, dtype)
        wide = torch.promote_types(self.parameter.dtype, torch.float32)
        if not self.is_trained or (wide, master_device) == (self.parameter.dtype, self.parameter.device):
            return
        self.master = self.parameter.detach().to(master_device, wide, copy=True)
        self._handles.append(self.parameter.register_post_accumulate_grad_hook(self._add_gradient))

    # ---- gradients ----

    def _add_gradient(self, parameter: nn.Parameter) -> None:
        gradient, parameter.grad = not_none(parameter.grad).detach(), None
        if self._gradient is None:
            self._gradient = torch.zeros_like(self.master)
        self._gradient += gradient.as_subclass(Tensor).to(self.master.device)

    @property
    def gradient(self) -> Tensor | None:
        """The sum (V_r, ...) over the window so far, as `master` is."""
        gradient = self.parameter.grad if self.master is self.parameter else self._gradient
        return None if gradient is None else gradient.detach().as_subclass(Tensor)

    def clear(self) -> None:
        self.parameter.grad = self._gradient = None

    # ---- values ----

    def _add_to_state(
        self, attribute: str, module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object
    ) -> None:
        if self.in_state_dicts:
            state[prefix + attribute] = whole_for(state, self.parameter, self.sharding, prefix + attribute)

    @torch.no_grad()
    def _take_from_state(
        self, attribute: str, module: nn.Module, state: dict[str, Any], prefix: str, *others: Any
    ) -> None:
        given, errors = state.pop(prefix + attribute, None), others[-1]
        if given is None:
            return
        shape = self.sharding.whole_shape(self.parameter)
        if given.shape != shape:
            errors.append(f"size mismatch for {prefix + attribute}: {tuple(given.shape)} instead of {tuple(shape)}")
            return
        self.parameter.copy_(self.sharding.mine(given))
        self.copy_from_parameter()
        self.was_loaded = True

    def whole(self, *, keep: bool) -> Tensor | None:
        """All ranks' rows (V, ...) on the CPU, which all of them ask for together; None if not to ``keep``."""
        return self.sharding.whole(self.parameter, f"the whole of {self.name}", device="cpu", keep=keep)

    def copy_to_parameter(self) -> None:
        if self.master is not self.parameter:
            self.parameter.data.copy_(self.master)

    def copy_from_parameter(self) -> None:
        """Take over values that were loaded into the parameter."""
        if self.master is not self.parameter:
            self.master.copy_(self.parameter.detach())


def _without_stand_in(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    state.pop(prefix + STAND_IN, None)


def _with_stand_in(module: nn.Module, state: dict[str, Any], prefix: str, *_others: Any) -> None:
    state.setdefault(prefix + STAND_IN, not_none(module._parameters[STAND_IN]).detach())


def rows_of(model: nn.Module) -> list[Rows]:
    """The parameters of a model that `LMHead.shard` has made of one rank's rows, each once however often it is tied."""
    found: dict[int, Rows] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter, sharding in rows_in(module):
            place = Place(f"{prefix}.{attribute}" if prefix else attribute, module, attribute)
            found.setdefault(id(parameter), Rows(parameter, sharding, [])).places.append(place)
    return list(found.values())


def sum_of_squares(rows: list[Rows], scale: float) -> Tensor:
    """Of the gradients of all ranks' rows times ``scale``: a 0-d tensor in fp32, the same on every rank."""
    device = rows[0].parameter.device
    total = torch.zeros((), device=device)
    for gradient in _gradients(rows):
        total += torch.linalg.vector_norm(gradient, dtype=torch.float32).to(device) ** 2
    work = dist.all_reduce(total, group=rows[0].vocab.group, async_op=True)
    return Pending(total, work, "chunked_ce: the norm of gradients").wait() * scale**2


def _gradients(rows: list[Rows]) -> Iterator[Tensor]:
    return (one.gradient for one in rows if one.gradient is not None and one.gradient.numel())


@torch.no_grad()
def step_rows(optimizer: Optimizer, rows: list[Rows], options: list[dict[str, Any]], scale: Tensor | float) -> None:
    """One step of ``optimizer`` on ``rows`` alone, with their gradients times ``scale``.

    ``options``: the optimizer's groups, as they were when the engine stepped. The optimizer lends its code: its groups
    and its state are put back.
    """
    stepped = [one for one in rows if one.master.numel()]
    groups, state = optimizer.param_groups, optimizer.state
    optimizer.state = defaultdict(dict, {one.master: one.state for one in stepped})
    optimizer.param_groups = [{**options[one.group], "params": [one.master]} for one in stepped]
    try:
        for one in stepped:
            # As the engine does with its own parameters, one without a gradient is stepped with zeros.
            gradient = torch.zeros_like(one.master) if one.gradient is None else one.gradient
            one.master.grad = gradient.mul_(torch.as_tensor(scale, device=gradient.device))
        optimizer.step()
        for one in stepped:
            one.state, one.master.grad = optimizer.state[one.master], None
            one.copy_to_parameter()
    finally:
        optimizer.param_groups, optimizer.state = groups, state
