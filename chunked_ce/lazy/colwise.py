"""Heads that are sharded as DTensors, by torch's ``parallelize_module`` or by a ``tp_plan`` of Transformers.

Torch hangs two hooks on the layer: one makes a DTensor of the input, the other one changes the placements of the
output. Transformers replaces ``forward`` of the layer for the same purpose. A head reads off them how its input and
output lie on the ranks, and does without them in its losses.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from chunked_ce.lazy.layout import Layout
from chunked_ce.parallel.dtensors import is_dtensor

__all__ = [
    "Colwise",
    "colwise_of",
    "has_forward_of_a_style",
    "is_a_styles",
    "other_style_of",
    "set_class",
    "sharding_of",
]

_Head = TypeVar("_Head", bound=nn.Module)

_TORCH = "torch.distributed.tensor._api"  # the module of the hooks
_TRANSFORMERS = "transformers.distributed.tensor_parallel"


@dataclasses.dataclass(frozen=True)
class Colwise(Layout):
    """A head by ``ColwiseParallel``: each rank has some words of all tokens."""

    mesh: Any
    input: Any  # the placement of a plain tensor that the layer is called with
    output: Any  # the placement of the logits
    local: bool  # the layer returns the local part of them

    @property
    def has_all_words(self) -> bool:
        return bool(self.output.is_replicate() or not self.local)

    def takes(self, hidden: Any) -> bool:
        last_dim = hidden.dim() - 1
        return bool(self.output.is_replicate() or self.output.is_shard(-1) or self.output.is_shard(last_dim))

    def whole(self, hidden: Tensor) -> Tensor:
        distributed: Any = hidden
        if not is_dtensor(hidden):
            if self.input.is_replicate():
                return hidden
            distributed = _types().DTensor.from_local(hidden, self.mesh, (self.input,), run_check=False)
        everywhere = [_types().Replicate()] * distributed.device_mesh.ndim
        whole: Tensor = distributed.redistribute(placements=everywhere).to_local(grad_placements=everywhere)
        return whole

    def without_its_steps(self, head: _Head) -> _Head:
        # A copy, as of `nn.DataParallel`, with the same parameters: other threads may call the head meanwhile.
        bare: _Head = object.__new__(type(head))
        bare.__dict__ = {name: value for name, value in vars(head).items() if name != "forward"}
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = vars(head)[name]
            vars(bare)[name] = type(hooks)((key, hook) for key, hook in hooks.items() if not is_a_styles(hook))
        return bare

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        everywhere = (_types().Replicate(),)
        distributed = _types().DTensor.from_local(hidden, self.mesh, everywhere, run_check=False)
        product: Any = F.linear(distributed, weight, bias)
        logits: Tensor = product.redistribute(placements=everywhere).to_local()
        return logits


class _Style(NamedTuple):
    """What a parallel style of torch or Transformers has put on a layer."""

    name: str
    colwise: Colwise | None  # None for another style


def colwise_of(head: nn.Module) -> Colwise | None:
    """How ``ColwiseParallel`` has sharded a head, if it has."""
    weight = dict.get(head._parameters, "weight")
    if not is_dtensor(weight):
        return None
    style = _style_of(head)
    return None if style is None else style.colwise


def other_style_of(module: nn.Module) -> str | None:
    """The name of a parallel style other than ``ColwiseParallel`` that has sharded a layer."""
    style = _style_of(module)
    return None if style is None or style.colwise is not None else style.name


def sharding_of(head: nn.Module) -> str:
    """By what a head is sharded whose weight is a DTensor, for a message."""
    style = _style_of(head)
    if style is None:
        weight: Any = head._parameters["weight"]
        return f"has a weight with placements {tuple(weight.placements)}"
    outputs = "" if style.colwise is None else f", with output_layouts={style.colwise.output}"
    return f"is sharded by {style.name}{outputs}"


def is_a_styles(hook: Callable[..., object]) -> bool:
    """Whether a hook of a module is one of the two of torch's ``ColwiseParallel``."""
    step = _step_of(hook)
    return step is not None and step.function in _colwise_steps()


def has_forward_of_a_style(module: nn.Module) -> bool:
    """Whether Transformers has put a ``forward`` in the place of the layer's own."""
    forward: Any = vars(module).get("forward")
    return getattr(forward, "__module__", None) == _TRANSFORMERS and bool(forward.__name__ == "tp_forward")


def set_class(module: nn.Module, cls: type) -> None:
    """Change the class of a module, whose ``forward`` by Transformers then calls that of the new class."""
    if not has_forward_of_a_style(module):
        module.__class__ = cls
        return
    parts = _captured(module.forward)
    del module.forward
    module.__class__ = cls
    parts["self"].install_forward(module, parts["mesh"])


def _style_of(module: nn.Module) -> _Style | None:
    if has_forward_of_a_style(module):
        return _style_of_transformers(_captured(module.forward))
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    steps = [step for step in map(_step_of, hooks) if step is not None]
    return _style_of_torch(steps) if steps else None


def _style_of_transformers(parts: dict[str, Any]) -> _Style:
    style, name = parts["self"], type(parts["self"]).__name__
    if type(style) is not sys.modules[_TRANSFORMERS].ColwiseParallel:
        return _Style(name, None)
    return _Style(name, Colwise(parts["mesh"], style.input_layouts, style.output_layouts, style.use_local_output))


class _Step(NamedTuple):
    """A hook of ``distribute_module``: a function, mostly of a parallel style, with some of its arguments."""

    function: Any
    args: tuple[Any, ...]
    mesh: Any


def _step_of(hook: Callable[..., object]) -> _Step | None:
    if getattr(hook, "__module__", None) != _TORCH:
        return None
    parts = _captured(hook)
    found = parts.get("input_fn", parts.get("output_fn"))
    return _Step(getattr(found, "func", found), getattr(found, "args", ()), parts["device_mesh"])


def _colwise_steps() -> list[Any]:
    parallel = sys.modules.get("torch.distributed.tensor.parallel")
    style = getattr(parallel, "ColwiseParallel", None)
    return [] if style is None else [style._prepare_input_fn, style._prepare_output_fn]


def _style_of_torch(steps: list[_Step]) -> _Style:
    functions = [step.function for step in steps]
    if functions != _colwise_steps():
        other = next((one for one in functions if one not in _colwise_steps()), functions[0])
        return _Style(getattr(other, "__qualname__", repr(other)).split(".")[0], None)
    (inputs, _), (outputs, local) = (step.args for step in steps)
    return _Style("ColwiseParallel", Colwise(steps[0].mesh, inputs[0], outputs[0], local))


def _captured(function: Any) -> dict[str, Any]:
    """The variables of the scopes around a function, by name."""
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def _types() -> Any:
    return sys.modules["torch.distributed.tensor"]
