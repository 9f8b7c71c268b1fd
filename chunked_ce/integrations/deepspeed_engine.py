"""What a DeepSpeed engine does differently when the rows of a sharded head are beside it.

The methods overridden here are DeepSpeed's public ones, and `_zero3_consolidated_16bit_state_dict`, which Accelerate
and Transformers call. Before its optimizer steps, the norm of the engine's own gradients is only in its optimizer's
`_global_grad_norm` (0.19.8).
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from chunked_ce.integrations import deepspeed_checkpoint as checkpoint
from chunked_ce.integrations.deepspeed_rows import EPSILON, STAND_IN, Rows, step_rows, sum_of_squares
from chunked_ce.narrowing import not_none
from chunked_ce.sharded.gathering import gathered

if TYPE_CHECKING:
    _Engine = Any
else:
    _Engine = object  # `joined` puts the engine's class behind

__all__ = ["SeparateRows", "WithSeparateRows"]


class SeparateRows:
    """The rows beside an engine, and what a step of theirs has in common with the engine's."""

    def __init__(self, rows: list[Rows], scale: float, clips_itself: bool) -> None:
        self.all, self.trained = rows, [one for one in rows if one.is_trained]
        self.norm: Tensor | float | None = None  # of the latest step, of the engine's parameters and the rows together
        self._scale = scale  # of the rows' gradients: what the engine divides its own by instead of the group's size
        self._clips_itself = clips_itself  # the engine clips before its optimizer runs
        self._clip: Tensor | float = 1.0  # of this step, the factor of all gradients
        self._correction: Tensor | float | None = None  # of this step, what the engine's own are short of that factor
        self._options: list[dict[str, Any]] = []
        self._stepping = self._own_step = False

    @property
    def is_stepping(self) -> bool:
        return self._stepping

    @contextlib.contextmanager
    def engine_steps(self, optimizer: Optimizer) -> Iterator[None]:
        """While the engine steps, perhaps."""
        # A schedule changes the groups right after the step.
        self._options = [
            {name: it for name, it in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        self._clip, self._correction, self._stepping = 1.0, None, True
        try:
            yield
        finally:
            self._stepping = False

    def step(self, optimizer: Optimizer) -> None:
        self._own_step = True
        try:
            step_rows(optimizer, self.trained, self._options, self._clip * self._scale)
        finally:
            self._own_step = False

    def clear(self) -> None:
        for one in self.all:
            one.clear()

    # ---- the norm ----

    def clip(self, engine_norm: Tensor | float | None, most: float) -> Tensor | float:
        """Include the rows in the norm, and return by how much all gradients are to be multiplied."""
        self._correction, self.norm = 1.0, engine_norm
        if engine_norm is None:
            return self._clip
        norm = engine_norm
        if self.trained:
            squares = sum_of_squares(self.trained, self._scale)
            norm = (torch.as_tensor(engine_norm, device=squares.device).float() ** 2 + squares).sqrt()
        self.norm = norm
        if most > 0:  # without a norm DeepSpeed refuses to clip
            self._clip = _factor(norm, most)
        return self._clip

    def before_optimizer(self, engine: Any, optimizer: Optimizer) -> None:
        """Correct the gradients of a step of the optimizer, of which ZeRO makes several out of one step."""
        if self._own_step or not self._stepping:
            return
        if self._correction is None:
            self._correction = 1.0
            if not self._clips_itself:
                norm, most = engine.optimizer._global_grad_norm, engine.gradient_clipping()
                wanted = self.clip(norm, most)
                if norm is not None and most > 0:
                    self._correction = wanted / _factor(norm, most)
        if isinstance(self._correction, Tensor):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(self._correction.to(parameter.grad.device))


def _factor(norm: Tensor | float, most: float) -> Tensor:
    """What clipping to a norm of ``most`` multiplies gradients by."""
    return 1 / ((torch.as_tensor(norm, dtype=torch.float32) + EPSILON) / most).clamp(min=1.0)


class WithSeparateRows(_Engine):
    """Goes before the class of a `deepspeed.DeepSpeedEngine`."""

    separate_rows: SeparateRows

    def step(self, *args: Any, **keywords: Any) -> None:
        if self.basic_optimizer is None:
            super().step(*args, **keywords)  # which says so
            return
        rows, steps = self.separate_rows, self.global_steps
        with rows.engine_steps(self.basic_optimizer):
            super().step(*args, **keywords)
        if self.global_steps == steps:
            return
        if self.was_step_applied():
            rows.step(self.basic_optimizer)
        rows.clear()

    def clip_fp32_gradients(self) -> None:
        """Runs in a step under ZeRO 0 in fp32."""
        from deepspeed.runtime.utils import clip_grad_norm_

        parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        # Nothing is clipped to infinity.
        norm = clip_grad_norm_(parameters, math.inf, mpu=self.mpu) if parameters else 0.0
        factor = self.separate_rows.clip(norm, self.gradient_clipping())
        for parameter in parameters:
            not_none(parameter.grad).mul_(factor)

    def get_global_grad_norm(self) -> Tensor | float | None:
        return self.separate_rows.norm

    def zero_grad(self) -> None:
        super().zero_grad()
        if not self.separate_rows.is_stepping:
            self.separate_rows.clear()

    def destroy(self) -> None:
        super().destroy()
        for one in self.separate_rows.all:
            one.show()

    # ---- checkpoints ----

    def save_checkpoint(self, save_dir: str, tag: str | None = None, *args: Any, **keywords: Any) -> bool:
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        # First, since DeepSpeed then writes which checkpoint is the latest complete one.
        checkpoint.save(self.separate_rows.all, Path(save_dir, tag))
        with self._gathered(keep=self.save_non_zero_checkpoint):
            return bool(super().save_checkpoint(save_dir, tag, *args, **keywords))

    def save_16bit_model(self, *args: Any, **keywords: Any) -> bool:
        with self._gathered(keep=dist.get_rank() == 0):
            return bool(super().save_16bit_model(*args, **keywords))

    def _gathered(self, *, keep: bool) -> contextlib.AbstractContextManager[None]:
        """While state dicts take the whole rows from the CPU of the ranks that ``keep`` them."""
        rows = [(one.name, one.parameter, one.sharding) for one in self.separate_rows.all if one.in_state_dicts]
        return gathered(self.module, rows, keep=keep)

    def load_checkpoint(self, load_dir: str, *args: Any, **keywords: Any) -> tuple[str | None, Any]:
        given = inspect.signature(super().load_checkpoint).bind(load_dir, *args, **keywords)
        given.apply_defaults()
        for one in self.separate_rows.all:
            one.was_loaded = False
        path, client_state = super().load_checkpoint(load_dir, *args, **keywords)
        if path is not None:
            wanted = given.arguments["load_optimizer_states"] and not given.arguments["load_module_only"]
            checkpoint.load(self.separate_rows.all, Path(path).parent, with_optimizer=wanted)
        return path, client_state

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Tensor] | None:
        state: dict[str, Tensor] | None = super()._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters)
        if state is not None:
            for name in [name for name in state if name.endswith(STAND_IN)]:
                del state[name]
        for one in self.separate_rows.all:
            if one.is_trained or not exclude_frozen_parameters:
                whole = one.whole(keep=state is not None)
                if state is not None:
                    state.update({place.name: not_none(whole) for place in one.places})
        return state
