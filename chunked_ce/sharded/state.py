"""State dicts of modules with sharded parameters hold whole tensors."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from torch import Tensor, nn

from chunked_ce.sharded.gathering import whole_of
from chunked_ce.sharded.rows import RowSharding, rows_in

__all__ = ["attach", "detach", "whole_for"]

_HANDLES = "_row_state_hooks"
_latest = threading.local()  # whole tensors by the id of their parameter, each with its key; and rows of one given


def attach(module: nn.Module) -> None:
    """Let ``state_dict`` give the whole of the module's sharded parameters and ``load_state_dict`` take it."""
    if _HANDLES not in vars(module):
        handles = (
            module.register_state_dict_post_hook(_gather),
            module.register_load_state_dict_pre_hook(_slice),
        )
        vars(module)[_HANDLES] = handles


def detach(module: nn.Module) -> None:
    for handle in vars(module).pop(_HANDLES, ()):
        handle.remove()


def _gather(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    for name, parameter, sharding in rows_in(module):
        sharding.refresh(parameter)
        if prefix + name in state and sharding.is_saved_whole(parameter):
            state[prefix + name] = whole_for(state, parameter, sharding, prefix + name)


def whole_for(state: dict[str, Any], parameter: nn.Parameter, sharding: RowSharding, key: str) -> Tensor | None:
    """The whole of a parameter, gathered once for a state dict that has it under several names."""
    known = vars(_latest).setdefault("whole", {})
    first, whole = known.get(id(parameter), (key, lambda: None))
    found: Tensor | None = whole()
    if first == key or found is None or state.get(first) is not found:
        found = whole_of(parameter, sharding, f"the state dict's {key}")
        for other in [other for other, (_, dead) in known.items() if dead() is None]:
            del known[other]
        if found is not None:  # as on a rank that keeps no whole tensors
            known[id(parameter)] = key, weakref.ref(found)
    return found


def _slice(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *others: Any) -> None:
    _, _, _, errors = others
    assigns = metadata.get("assign_to_params_buffers", False)
    for name, parameter, sharding in rows_in(module):
        key = prefix + name
        given = state.get(key)
        if given is None:
            continue
        expected = sharding.whole_shape(parameter)
        if given.shape == expected:
            state[key] = _assigned(given, sharding) if assigns else sharding.loaded(given)
        else:
            errors.append(
                f"size mismatch for {key}: the state dict has {tuple(given.shape)}, and the whole parameter, of which "
                f"this rank holds rows {sharding.vocab.start} to {sharding.vocab.stop}, has {tuple(expected)}"
            )
            state[key] = parameter.detach()


def _assigned(given: Tensor, sharding: RowSharding) -> Tensor:
    """What a parameter becomes by a whole tensor: the same memory for all that are given the same tensor, so that
    ``load_state_dict(assign=True)`` ties them no less than torch does."""
    rows: Tensor | None
    of, versions, rows = getattr(_latest, "assigned", (lambda: None, None, None))
    if rows is None or of() is not given or versions != (given._version, rows._version):
        rows = sharding.loaded(given)
        _latest.assigned = weakref.ref(given), (given._version, rows._version), rows
    return rows
