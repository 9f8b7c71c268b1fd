"""Sources of logits: each yields them in chunks of tokens and blocks of the vocabulary."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from chunked_ce import devices
from chunked_ce.engine.call import Call
from chunked_ce.engine.counted_tokens import CountedTokens, Places, check_range, columns_of, rows_at
from chunked_ce.engine.depth_rows import DepthRows
from chunked_ce.engine.head_gradients import HIDDEN_PARTS, HiddenGradient
from chunked_ce.engine.own_teacher import OwnTeacher
from chunked_ce.engine.products import project
from chunked_ce.engine.scratch import cast_with_room, logits_scratch
from chunked_ce.engine.specification import TOKEN
from chunked_ce.engine.teacher import TeacherSource
from chunked_ce.engine.windows import Window, order_of, windows_of
from chunked_ce.narrowing import not_none
from chunked_ce.parallel.collectives import Collectives, Pending
from chunked_ce.plan import Plan, tokens_per_chunk
from chunked_ce.rows.statistics import PerRow, RowStatistics
from chunked_ce.rows.torch_rows import rows_in_flight

__all__ = ["HIDDEN", "Block", "Chunk", "DepthsSource", "HeadSource", "LogitsSource", "SequenceSource", "Source"]

HIDDEN = "chunked_ce: the all-gather of hidden states"


class Block(NamedTuple):
    """Logits before scale and softcap, of some tokens of a chunk, for some vocabulary entries."""

    products: Tensor  # (C, B)
    column: Tensor  # (C,) of the target, -1 where it is not among these entries
    class_weight: Tensor | None  # (B,)
    entries: slice  # of this rank's
    start: int  # index of the first entry in the whole vocabulary
    rows: slice  # of the counted tokens
    per_row: PerRow
    weight: Tensor | None = None  # (B, D) of the head, in the products' dtype
    adapter_weight: Tensor | None = None  # (B, r)
    apart: Tensor | None = None  # (C, B) room for the gradients of wider logits, in the products' dtype

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The weight of the head and, if it has an adapter, of this."""
        weight = not_none(self.weight)
        return (weight,) if self.adapter_weight is None else (weight, self.adapter_weight)

    @property
    def gradients(self) -> Tensor:
        """The tensor (C, B) that the gradients of the logits are written to, if they are formed."""
        return self.products if self.apart is None else self.apart


class Chunk(NamedTuple):
    rows: slice  # of the counted tokens
    blocks: Iterable[Block]  # each is valid until the next one
    x: Tensor | None = None  # (C, D) hidden states in the products' dtype
    window: Window | None = None  # of tokens that are sharded over ranks
    adapter_x: Tensor | None = None  # (C, r)

    @property
    def xs(self) -> tuple[Tensor, ...]:
        """The hidden states and, if the head has an adapter, those of this: the partners of `Block.weights`."""
        x = not_none(self.x)
        return (x,) if self.adapter_x is None else (x, self.adapter_x)


class Head(NamedTuple):
    """Some rows of a head in the products' dtype."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,) in the logits' dtype
    adapter_weight: Tensor | None  # (V, r)


class _Rows(Protocol):
    """Rows of one tensor, as of `CountedTokens`, or of several, as of `DepthRows`."""

    def select(self, tensors: Any, rows: slice, /) -> Tensor: ...

    def put(self, tensors: Any, rows: slice, part: Tensor, /) -> None: ...


class _Blocks:
    """Blocks that are made again for each pass over them."""

    def __init__(self, make: Callable[[], Iterator[Block]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Block]:
        return self._make()


class Source:
    """Where logits come from."""

    owns_products = True  # whether the products of its blocks may be overwritten
    forms_gradients = False  # whether its blocks have room for the gradients of their logits

    def __init__(self, call: Call) -> None:
        self.call = call
        target, ignored = self.in_chunk_order(call.target), call.specification.settings.ignored
        self.tokens = CountedTokens(target, call.ignore_index, call.vocab_size, ignored, self._places())
        self.class_weight = call.local_class_weight()  # (V_r,)
        self.column = self.tokens.target  # (n,) -1 where it is in another shard
        if call.specification.shard is not None:
            self.column = columns_of(self.tokens.target, call.start, call.rows)
        self.temperature, self.ids = call.temperature, call.ids
        if self.temperature is not None:
            self.temperature = self.tokens.select(self.in_chunk_order(self.temperature))  # (n,)
            self.temperature = self.temperature.where(self.temperature > 0, 1)  # of ignored tokens that are kept
        if self.ids is not None:
            check_range(not_none(call.specification.ids), self.ids, call.ignore_index, call.vocab_size)
            ids = self.ids.where(self.ids != call.ignore_index, -1)
            self.ids = self.tokens.select(self.in_chunk_order(ids))  # (n, K) -1 for none
        self.teacher = None if call.specification.teacher is None else self._teacher()

    def per_row(self, rows: slice, start: int, size: int) -> PerRow:
        """What is known about the tokens ``rows`` for the ``size`` vocabulary entries from ``start`` on."""
        temperature = None if self.temperature is None else self.temperature[rows]
        ids = None if self.ids is None else columns_of(self.ids[rows], start, size)
        teacher = None
        if self.teacher is not None:
            first = start - self.call.start
            teacher = self.teacher.rows(rows, slice(first, first + size), *self._room(rows))
        return PerRow(temperature, ids, teacher, self.tokens.kept_mask(rows))

    def _places(self) -> Places | None:
        """Where the counted tokens are in the order of the chunks, if the call says so."""
        return self.call.places

    def _teacher(self) -> TeacherSource:
        return TeacherSource(self.call, self.tokens, self._index())

    def _room(self, rows: slice) -> tuple[int, int]:
        """The most tokens of a block, and the blocks that exist at a time."""
        return rows.stop - rows.start, 1

    def _index(self) -> Tensor | None:
        """The token (n,) of each counted one, in the order of the chunks; None where each counts, in that order."""
        if self.tokens.all_kept:
            return None
        return self.tokens.select(torch.arange(self.tokens.num_tokens, device=self.column.device))

    def with_gradients(self) -> Source:
        """Give each block room for the gradients of its logits."""
        self.forms_gradients = True
        return self

    def chunks(self) -> Iterator[Chunk]:
        """The chunks of counted tokens in order; none if no token counts."""
        raise NotImplementedError

    def in_chunk_order(self, values: Tensor) -> Tensor:
        """``values`` (N, ...) of the tokens in the order in which the chunks take them."""
        return values

    def from_chunk_order(self, values: Tensor) -> Tensor:
        """``values`` (N, ...) from the order of the chunks to that of the targets."""
        return values

    def put(self, total: HiddenGradient, rows: slice, part: Tensor) -> None:
        """Write ``part`` (C, D) to the rows of ``total`` (N, D) that belong to the counted tokens ``rows``."""
        raise NotImplementedError

    def own(self, values: Tensor) -> Tensor:
        """Of ``values`` (n, ...) of the counted tokens, those whose losses are this rank's."""
        return values

    def in_order(self, rows: RowStatistics) -> RowStatistics:
        """The statistics (N,), from the order of the chunks to that of the targets."""
        return rows.map(self.from_chunk_order)


class LogitsSource(Source):
    """Existing logits: one chunk, a few rows at a time."""

    owns_products = False

    def chunks(self) -> Iterator[Chunk]:
        if len(self.tokens):
            yield Chunk(slice(0, len(self.tokens)), _Blocks(self._blocks))

    def _blocks(self) -> Iterator[Block]:
        (logits,) = self.call.tensors
        row_kernels = self.call.specification.row_kernels(logits.device)
        entries, size = slice(0, self.call.rows), row_kernels.rows_in_flight(self.call.rows, logits.device.type)
        settings = self.call.specification.settings
        if not self.tokens.all_kept:  # their rows are copied
            size = min(size, rows_in_flight(self.call.rows, logits.device.type))
        elif self.teacher is None:
            size = max(1, len(self.tokens))
        if settings.teacher_dtype is not None:  # a teacher's head is worth larger products
            size = tokens_per_chunk(len(self.tokens), self.call.rows, 1, settings)
        for rows in self.tokens.blocks(size):
            products = self.tokens.unmasked(logits, rows)  # the slopes of tokens that do not count are 0
            per_row = self.per_row(rows, self.call.start, self.call.rows)
            yield Block(products, self.column[rows], self.class_weight, entries, self.call.start, rows, per_row)


class HeadSource(Source):
    """Logits of hidden states and a head, computed chunk by chunk or block by block."""

    plan: Plan  # once the tokens are `cut`
    forms_products = True  # whether its blocks hold logits, or only room for what another product makes of them

    def __init__(self, call: Call) -> None:
        tensors = dict(zip(call.specification.parts, call.tensors, strict=True))
        self.hidden: Tensor = tensors["hidden"]
        self.adapter_hidden: Tensor | None = tensors.get("adapter_hidden")
        self.weight: Tensor = tensors["weight"]
        self.bias: Tensor | None = tensors.get("bias")
        self.adapter_weight: Tensor | None = tensors.get("adapter_weight")
        self.dtype = call.specification.settings.compute_dtype
        self.logits_dtype = call.specification.settings.logits_dtype
        super().__init__(call)

    @functools.cached_property
    def head(self) -> Head:
        """The whole head."""
        return self._head(slice(0, len(self.weight)))

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The weight of the head and, if it has an adapter, of this: the partners of `Chunk.xs`."""
        return (self.weight,) if self.adapter_weight is None else (self.weight, self.adapter_weight)

    def cut(self, plan: Plan) -> HeadSource:
        """Cut the tokens and the vocabulary as ``plan`` says."""
        self.plan = plan
        return self

    def chunks(self) -> Iterator[Chunk]:
        rows, entries = self._largest_chunk(), len(self.weight) if self.plan.entries is None else self.plan.entries
        head = self.head if self.plan.entries is None else None
        buffers: list[Tensor] = []
        apart = None
        for turn, chunk in enumerate(self.parts()):
            if turn < self.plan.in_flight:
                size = rows, min(entries, len(self.weight))
                # Beside a wider sum of the head's gradient, which the backward rounds, they would add to the peak.
                keep = self.plan.entries is not None or self.plan.head_sum == self.weight.dtype
                buffers.append(logits_scratch(*size, dtype=self.logits_dtype, device=self.hidden.device, keep=keep))
                if turn == 0 and self.forms_gradients and self.logits_dtype != self.dtype:
                    apart = logits_scratch(*size, dtype=self.dtype, device=self.hidden.device)
            buffer = buffers[turn % self.plan.in_flight]
            blocks = self._blocks(chunk, buffer, apart, head, max(1, entries))
            yield chunk._replace(blocks=tuple(blocks) if head is not None else blocks)

    @property
    def covers_hidden(self) -> bool:
        """Whether every row of the hidden states belongs to a token of a chunk."""
        return self.tokens.all_kept

    def put(self, total: HiddenGradient, rows: slice, part: Tensor) -> None:
        assert isinstance(total, Tensor)
        self.tokens.put(total, rows, part)

    def _blocks(
        self,
        chunk: Chunk,  # without its blocks
        buffer: Tensor,  # (C, B) at least
        apart: Tensor | None,  # (C, B) at least
        head: Head | None,
        size: int,
    ) -> Iterator[Block]:
        """The products with ``size`` vocabulary entries at a time; one empty block of an empty head."""
        rows, x, vocab_size, start = chunk.rows, not_none(chunk.x), len(self.weight), self.call.start
        target = self.tokens.target[rows]
        for first in range(0, max(1, vocab_size), size):
            entries = slice(first, min(first + size, vocab_size))
            whole = entries.stop - first == vocab_size
            weight, bias, adapter = head or self._head(entries)
            low_rank = None if adapter is None else (not_none(chunk.adapter_x), adapter)
            part = slice(len(x)), slice(len(weight))
            products = buffer[part]
            if self.forms_products:
                project(x, weight, bias, out=products, low_rank=low_rank)
            column = self.column[rows] if whole else columns_of(target, start + first, len(weight))
            class_weight = None if self.class_weight is None else self.class_weight[entries]
            per_row = self.per_row(rows, start + first, len(weight))
            into = None if apart is None else apart[part]
            yield Block(products, column, class_weight, entries, start + first, rows, per_row, weight, adapter, into)

    def _head(self, entries: slice) -> Head:
        """The rows ``entries`` of the head."""
        adapter = None if self.adapter_weight is None else self.adapter_weight[entries].to(self.dtype)
        if self.bias is None:
            return Head(self.weight[entries].to(self.dtype), None, adapter)
        weight, bias = self.weight[entries], self.bias[entries]
        return Head(cast_with_room(weight, self.dtype), cast_with_room(bias, self.logits_dtype), adapter)

    def _room(self, rows: slice) -> tuple[int, int]:
        return self._largest_chunk(), self.plan.in_flight

    def _largest_chunk(self) -> int:
        return min(self.plan.tokens, len(self.tokens))

    def parts(self) -> Iterator[Chunk]:
        """The chunks without their blocks."""
        for rows in self.tokens.blocks(self.plan.tokens):
            x = self.tokens.select(self.hidden, rows).to(self.dtype)
            adapter = self.adapter_hidden
            adapter = None if adapter is None else self.tokens.select(adapter, rows).to(self.dtype)
            yield Chunk(rows, (), x, adapter_x=adapter)


class DepthsSource(HeadSource):
    """Logits of the hidden states of several depths, (N_1, D) to (N_k, D), which no tensor holds together.

    A chunk may hold tokens of several depths: only its own rows are copied.
    """

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.depths = call.named("hidden")
        self._adapter_depths = call.named("adapter_hidden")
        self._rows = DepthRows(self.tokens, [len(hidden) for hidden in self.depths])

    def put(self, total: HiddenGradient, rows: slice, part: Tensor) -> None:
        assert isinstance(total, list)
        self._rows.put(total, rows, part)

    def parts(self) -> Iterator[Chunk]:
        for rows in self.tokens.blocks(self.plan.tokens):
            x = self._rows.select(self.depths, rows).to(self.dtype)
            depths = self._adapter_depths
            yield Chunk(rows, (), x, adapter_x=self._rows.select(depths, rows).to(self.dtype) if depths else None)


class SequenceSource(HeadSource):
    """Hidden states sharded by tokens over the ranks of the vocabulary, gathered chunk by chunk.

    The call is that of `chunked_ce.engine.token_shards`: over the counted tokens of all ranks.
    """

    def __init__(self, call: Call) -> None:
        shard = not_none(call.specification.shard)
        plan = call.plan_by_tokens(len(call.target), sums_head=call.sums_head)
        self.call, self._collectives, self._shard = call, Collectives(shard.group_name), shard
        rank = self._collectives.rank
        self._windows = windows_of(shard.sizes, plan.tokens, rank)
        self._order = devices.moved(order_of(shard.sizes, plan.tokens), call.target.device)
        first = sum(shard.sizes[:rank])
        self._mine = slice(first, first + shard.sizes[rank]) if shard.is_own else slice(None)
        depths = call.named("hidden")
        local = rows_at(call.places, sum(map(len, depths)))
        self._local: _Rows = local if len(depths) == 1 else DepthRows(local, [len(hidden) for hidden in depths])
        super().__init__(call)
        self.plan = plan

    @property
    def covers_hidden(self) -> bool:
        return self.call.places is None

    def in_chunk_order(self, values: Tensor) -> Tensor:
        return values[self._order]

    def from_chunk_order(self, values: Tensor) -> Tensor:
        return torch.empty_like(values).index_copy_(0, self._order, values)

    def own(self, values: Tensor) -> Tensor:
        return self.from_chunk_order(values)[self._mine]

    def put_reduced(self, total: HiddenGradient, chunk: Chunk, part: Tensor) -> None:
        """Write ``part`` (width, D), of this rank's tokens of a chunk, to the rows of ``total`` that belong to them."""
        factor, window = self._shard.hidden_factor, not_none(chunk.window)
        part = part[: window.mine]
        self._local.put(total, window.own, part if factor == 1 else part * factor)

    def parts(self) -> Iterator[Chunk]:
        """The chunks without their blocks, their hidden states gathered during the work on the previous chunk."""
        widths, hidden = self.call.chunk_widths(), [self.call.named(name) for name in HIDDEN_PARTS]
        sources = [depths if len(depths) > 1 else depths[0] for depths in hidden if depths]

        def gather(window: Window) -> Pending:
            parts = [self._local.select(source, window.own).to(self.dtype) for source in sources]
            part = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            return self._collectives.all_gather(window.filled_up(part), HIDDEN)

        windows = self._windows
        pending = gather(windows[0]) if windows else None
        for window, following in itertools.zip_longest(windows, windows[1:]):
            gathered = not_none(pending).wait()  # (R, width, D + r)
            pending = None if following is None else gather(following)
            x, *adapter = torch.split(self.tokens.mask(window.joined(gathered), window.rows), widths, 1)
            if isinstance(self.teacher, OwnTeacher):
                self.teacher.start(window)
            yield Chunk(window.rows, (), x, window, adapter[0] if adapter else None)

    def _places(self) -> None:
        return None  # those of the call are of this rank's hidden states

    def _teacher(self) -> TeacherSource:
        if self._shard.is_own:
            assert isinstance(self._local, CountedTokens)  # a teacher goes with one depth
            return OwnTeacher(self.call, self.tokens, self._local, self._collectives)
        return TeacherSource(self.call, self.tokens, self.in_chunk_order(self.call.per_token[TOKEN]))

    def _largest_chunk(self) -> int:
        return max((sum(window.counts) for window in self._windows), default=0)
