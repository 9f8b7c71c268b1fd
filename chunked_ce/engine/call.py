"""One call of the engine: its tensors, its specification, and the plans that follow from both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chunked_ce.engine.counted_tokens import Places
from chunked_ce.engine.specification import TEMPERATURE, Specification, TeacherSpecification
from chunked_ce.narrowing import not_none
from chunked_ce.parallel.collectives import Collectives
from chunked_ce.plan import Plan

__all__ = ["Call"]


class Call(NamedTuple):
    tensors: Sequence[Tensor]  # of the source, named by the specification's parts: see `Call.named`
    class_weight: Tensor | None  # (V,) of the whole vocabulary, in the work dtype
    target: Tensor  # (N,), of all ranks if the input is a sequence shard and not this rank's own
    ignore_index: int
    specification: Specification
    extra: Sequence[Tensor] = ()  # constant: the tensors per token, (N, ...) each, those of the teacher, and places

    def named(self, part: str) -> list[Tensor]:
        """The tensors of the source that are called ``part``.

        A head has "hidden" (N, D), once for each depth, "weight" (V, D), perhaps "bias" (V,), and perhaps a low-rank
        adapter: "adapter_hidden" (N, r), once for each depth, and "adapter_weight" (V, r). Logits that exist are
        "logits" (N, V).
        """
        return [tensor for name, tensor in zip(self.specification.parts, self.tensors, strict=True) if name == part]

    @property
    def weight(self) -> Tensor:
        """The head's weight (V, D)."""
        return self.tensors[self.specification.parts.index("weight")]

    @property
    def num_depths(self) -> int:
        return self.specification.parts.count("hidden")

    @property
    def per_token(self) -> dict[str, Tensor]:
        """The tensors per token, by name."""
        return dict(zip(self.specification.per_token, self.extra, strict=False))

    @property
    def teacher(self) -> dict[str, Tensor]:
        """The tensors of the teacher, by name."""
        specification = self.specification
        if specification.teacher is None:
            return {}
        return dict(zip(specification.teacher.parts, self._after_per_token, strict=False))

    @property
    def places(self) -> Places | None:
        """Where the tokens that count are, in the order of the targets, if that is known before the tokens are cut."""
        return Places(*self.extra[-2:]) if self.specification.has_places else None

    @property
    def _after_per_token(self) -> Sequence[Tensor]:
        return self.extra[len(self.specification.per_token) :]

    def with_per_token(self, tensors: dict[str, Tensor], **changes: Any) -> Call:
        """The call with these ``tensors`` per token instead, and a specification with ``changes``."""
        specification = self.specification._replace(per_token=tuple(tensors), **changes)
        return self._replace(specification=specification, extra=[*tensors.values(), *self._after_per_token])

    def with_teacher(self, specification: TeacherSpecification, tensors: Sequence[Tensor]) -> Call:
        """The call with a teacher: its ``tensors`` in the order of the parts in ``specification``."""
        extra = [*self.extra, *tensors]
        return self._replace(specification=self.specification._replace(teacher=specification), extra=extra)

    def with_places(self, places: Places) -> Call:
        """The call with the ``places`` of its counted tokens, after all other constant tensors."""
        specification = self.specification._replace(has_places=True)
        return self._replace(specification=specification, extra=[*self.extra, *places])

    def without_places(self) -> Call:
        if not self.specification.has_places:
            return self
        return self._replace(specification=self.specification._replace(has_places=False), extra=self.extra[:-2])

    def for_statistics(self) -> Call:
        """The call of the statistics that its objective reads."""
        needed = (TEMPERATURE, self.specification.ids)
        tensors = {name: tensor for name, tensor in self.per_token.items() if name in needed}
        return self.with_per_token(tensors, objective=None)

    @property
    def temperature(self) -> Tensor | None:
        """The temperature of each token, (N,)."""
        return self.per_token.get(TEMPERATURE)

    @property
    def ids(self) -> Tensor | None:
        """The ids of each token, (N, K), ``ignore_index`` where an id stands for none."""
        name = self.specification.ids
        return None if name is None else self.per_token.get(name)

    @property
    def num_ids(self) -> int:
        return 0 if self.ids is None else self.ids.shape[1]

    @property
    def is_head(self) -> bool:
        return self.specification.source == "head"

    @property
    def rows(self) -> int:
        """Vocabulary entries that this rank holds."""
        return self.weight.shape[0] if self.is_head else self.tensors[0].shape[-1]

    @property
    def vocab_size(self) -> int:
        shard = self.specification.shard
        return self.rows if shard is None else shard.total

    @property
    def start(self) -> int:
        """Index of this rank's first vocabulary entry."""
        shard = self.specification.shard
        return 0 if shard is None else shard.start

    @property
    def num_tokens(self) -> int:
        """N, or the counted tokens of all ranks once these are known."""
        shard = self.specification.shard
        return self.target.shape[0] if shard is None or not shard.sizes else sum(shard.sizes)

    @property
    def is_sequence(self) -> bool:
        """Whether the hidden states are only this rank's share of the tokens."""
        shard = self.specification.shard
        return self.is_head and shard is not None and shard.is_sequence

    @property
    def cuts_tokens(self) -> bool:
        """Whether recomputation takes chunks of tokens: what it needs whole in blocks of the vocabulary, the hidden
        states of all tokens, is in several tensors or on several ranks."""
        return self.is_sequence or self.num_depths > 1

    @property
    def sums_head(self) -> bool:
        """Whether the head's gradient is a sum over chunks of tokens."""
        specification = self.specification
        return self.cuts_tokens if specification.objective is None else specification.needs("weight")

    def chunk_widths(self, *, needed: bool = False) -> list[int]:
        """The columns D and, with an adapter, r of a chunk's hidden states; or of those that need a gradient."""
        names = [name for name in ("hidden", "adapter_hidden") if name in self.specification.parts]
        return [self.named(name)[0].shape[1] for name in names if not needed or self.specification.needs(name)]

    def local_class_weight(self) -> Tensor | None:
        """The class weights (V_r,) of this rank's vocabulary entries."""
        shard = self.specification.shard
        return self.class_weight if shard is None else shard.class_weight(self.class_weight, self.rows)

    def plan_by_tokens(self, num_counted: int, *, sums_head: bool) -> Plan:
        """The plan in chunks of tokens, the same on every rank."""
        settings, shard = self.specification.settings, self.specification.shard
        (vocab_size, hidden_size), num_tokens = self.weight.shape, self.num_tokens
        head_dtype = (settings.head_sum_dtype or self.weight.dtype) if sums_head else None
        if shard is None:
            return Plan.by_tokens(num_tokens, num_counted, vocab_size, hidden_size, settings, head_dtype=head_dtype)
        even = -(-shard.total // Collectives(shard.group_name).size)  # the largest of even shards
        sizes = num_tokens, num_tokens, even, hidden_size
        return Plan.by_tokens(*sizes, settings, head_dtype=head_dtype, in_flight=2)

    def plan_by_vocabulary(self, num_counted: int) -> Plan:
        weight = self.weight
        return Plan.by_vocabulary(num_counted, len(weight), self.specification.settings, weight.dtype)

    def plan_of_recomputation(self, num_counted: int, *, filtered: bool) -> Plan:
        """The plan of recomputed gradients, and of statistics where they are not ``filtered``."""
        if self.cuts_tokens:
            return self.plan_by_tokens(num_counted, sums_head=True)
        if filtered:
            return self.plan_by_tokens(num_counted, sums_head=self.specification.needs("weight"))
        return self.plan_by_vocabulary(num_counted)

    def reduce_dtype(self) -> torch.dtype:
        """The dtype in which the gradient of the hidden states is summed over the ranks."""
        shard, settings = not_none(self.specification.shard), self.specification.settings
        return shard.reduce_dtype or settings.wide_dtype
