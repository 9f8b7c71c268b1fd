"""The arguments of an operator besides its tensors, as one value passed down to the kernels.

Operators take only tensors, numbers and strings: `encoded` turns a specification into a string, `decoded` back.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from types import ModuleType
from typing import Any, NamedTuple

import torch

from chunked_ce.objectives.base import OBJECTIVES, Objective
from chunked_ce.parallel.shard import Shard
from chunked_ce.plan import Settings
from chunked_ce.rows.backend import row_kernels
from chunked_ce.rows.statistics import Logits

__all__ = ["TEMPERATURE", "TOKEN", "Specification", "TeacherSpecification", "decoded", "encoded"]

# Names among the tensors per token.
TEMPERATURE = "_temperature"
TOKEN = "_token"  # the row of the token in the tensors of a teacher


class TeacherSpecification(NamedTuple):
    """A teacher beside its student."""

    parts: tuple[str, ...]  # names of its tensors
    logits: Logits
    dtype: torch.dtype  # of its products
    share: float = 0.0  # of its distribution in the mixture with the student's


class Specification(NamedTuple):
    """One call of the engine."""

    source: str  # "head" or "logits"
    names: tuple[str, ...]  # the statistics
    logits: Logits
    settings: Settings
    shard: Shard | None = None
    parts: tuple[str, ...] = ("hidden", "weight")  # names of the source's tensors; each depth has a "hidden"
    needed: tuple[bool, ...] = ()  # which of them need a gradient
    objective: Objective | None = None
    per_token: tuple[str, ...] = ()  # names of the per-token tensors
    ids: str | None = None  # which of them holds the ids that the statistic ``at_ids`` reads
    slopes: tuple[str, ...] = ()  # the statistics for which slopes are given
    teacher: TeacherSpecification | None = None
    has_places: bool = False  # whether those of the tokens that count are given

    def row_kernels(self, device: torch.device) -> ModuleType:
        return row_kernels(self.settings.backend, device, self.settings.logits_dtype, self.names)

    def needs(self, part: str) -> bool:
        """Whether any tensor of the source that is called ``part`` needs a gradient."""
        return (part, True) in zip(self.parts, self.needed, strict=False)

    @property
    def scales_chunks(self) -> bool:
        """Whether the gradients of a chunk's logits are scaled into the range of fp16."""
        return self.settings.compute_dtype == torch.float16


def encoded(specification: Specification) -> str:
    """The specification as a string; while a compiler records, each number in it is a constant."""
    rest = specification._replace(objective=None)
    text = _text(rest) if torch.compiler.is_compiling() else _encoded(rest)
    # Not from the cache: objectives that are equal, with 1 and with True, may differ in their loss.
    return f"[{text}, {_text(specification.objective)}]"


@functools.lru_cache(maxsize=1024)
def _encoded(specification: Specification) -> str:
    return _text(specification)


@functools.lru_cache(maxsize=1024)
def decoded(text: str) -> Specification:
    """The specification that `encoded` turned into ``text``, in this process or another."""
    values, objective = _value(json.loads(text, strict=False))
    specification = Specification(*values)._replace(objective=objective)
    shard = None if specification.shard is None else Shard(*specification.shard)
    logits, settings, teacher = Logits(*specification.logits), Settings(*specification.settings), specification.teacher
    if teacher is not None:
        teacher = TeacherSpecification(*teacher)
        teacher = teacher._replace(logits=Logits(*teacher.logits))
    return specification._replace(logits=logits, settings=settings, shard=shard, teacher=teacher)


def _text(value: Any) -> str:
    """JSON of plain values, tuples of them, dtypes and objectives, by operations that a compiler can trace."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, torch.dtype):
        return f'{{"dtype": "{value}"}}'
    if isinstance(value, Objective):
        fields = [field.name for field in dataclasses.fields(value)]
        values = ", ".join([f'"{name}": {_text(getattr(value, name))}' for name in fields])
        return f'{{"objective": "{value.key}", "fields": {{{values}}}}}'
    if isinstance(value, tuple):
        return "[" + ", ".join([_text(part) for part in value]) + "]"
    if isinstance(value, str):
        quoted = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{quoted}"'
    if isinstance(value, int):
        return f"{int(value)}"
    return f"{float(value)!r}".replace("inf", "1e999")


def _value(decoded: Any) -> Any:
    """The value that `_text` wrote, as JSON reads it."""
    if isinstance(decoded, list):
        return tuple(map(_value, decoded))
    if not isinstance(decoded, dict):
        return decoded
    if "dtype" in decoded:
        return getattr(torch, decoded["dtype"].removeprefix("torch."))
    return _class(decoded["objective"])(**{name: _value(value) for name, value in decoded["fields"].items()})


def _class(key: str) -> type[Objective]:
    if key not in OBJECTIVES:  # encoded in another process
        importlib.import_module(key.partition(":")[0])
    return OBJECTIVES[key if key in OBJECTIVES else key.partition("#")[0]]
