"""State dicts of optimizers hold whole tensors for sharded parameters, and any number of ranks takes them.

Torch lets every optimizer's steps be followed: a step slices whole states that were loaded, and makes the state dict of
this optimizer gather them.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from chunked_ce.sharded.gathering import whole_of
from chunked_ce.sharded.gradients import sharding_of
from chunked_ce.sharded.rows import RowSharding

__all__ = ["follow_steps", "retire", "sharded_states"]

_RETIRED = "_was_sharded"

_followed: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def sharded_states(optimizer: Optimizer | None) -> Iterator[tuple[str, Tensor, RowSharding]]:
    """The tensors in an optimizer's state that hold a row for each row of a sharded parameter, with their names."""
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            sharding = sharding_of(parameter)
            if sharding is not None:
                for name, value in optimizer.state.get(parameter, {}).items():
                    if _is_of_rows(value, parameter):
                        yield name, value, sharding


@functools.cache
def follow_steps() -> None:
    """Look at every optimizer before each of its steps from now on."""
    register_optimizer_step_pre_hook(_before_step)


def retire(parameter: nn.Parameter) -> None:
    """Let optimizers refuse a parameter in whose place its rows are now."""
    setattr(parameter, _RETIRED, True)


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if hasattr(parameter, _RETIRED):
                raise RuntimeError(
                    f"{type(optimizer).__name__} has a parameter of the head {tuple(parameter.shape)} in whose place "
                    "LMHead.shard or LMHead.unwrap has put another one since: make the optimizer afterwards"
                )
            sharding = sharding_of(parameter)
            if sharding is None:
                continue
            _follow(optimizer)
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == sharding.whole_shape(parameter) != parameter.shape:
                    state[name] = sharding.mine(value)


def _follow(optimizer: Optimizer) -> None:
    if optimizer in _followed:
        return
    if any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in type(optimizer).__mro__):
        raise RuntimeError(
            "ZeroRedundancyOptimizer gives every rank the parameters of one, and the rows of a sharded head differ "
            "between ranks: give them an optimizer of their own"
        )
    _followed.add(optimizer)
    optimizer.register_state_dict_post_hook(_gather)


def _gather(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    states = state_dict["state"]
    for group, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for parameter, index in zip(group["params"], packed["params"], strict=True):
            sharding = sharding_of(parameter)
            if sharding is not None and index in states:
                states[index] = {
                    name: whole_of(value, sharding, f"the optimizer's {name}")
                    if _is_of_rows(value, parameter)
                    else value
                    for name, value in states[index].items()
                }


def _is_of_rows(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
