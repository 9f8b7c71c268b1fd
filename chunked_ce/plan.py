"""How many tokens a chunk holds, and the memory that a loss takes.

A chunk of C tokens has C * V logits. Small chunks make inefficient products, and each chunk reads and writes the
gradient of the head once; large chunks cost memory. So a chunk is as large as its budget allows, and chunks have equal
sizes.

The budget, unless a user sets one, is 64 MiB on a CPU, or two thirds of an fp32 gradient of the head if that is more:
by then the head's gradient decides the peak. If the head's gradient is narrower than a sum over several chunks has to
be, a single chunk needs no such sum, and its logits may take the sum's memory as well. The logits of a block of the
vocabulary take at most 32 MiB: more blocks cost little.

An accelerator multiplies faster than it reads: products of few rows are bound by reading the head. The budget there is
1 GiB, or an fp32 gradient of the head if that is more: with bf16 logits 2 D tokens, at least 4,096 from D = 2,048 on,
and a single chunk up to 4 D tokens. Chunks are multiples of 256 tokens, blocks multiples of 256 vocabulary entries.

A plan follows from shapes, dtypes and options, and not from the memory in use, except where a loss would not fit into
what a CUDA device has left: then its logits are halved until it does, unless ranks share the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from chunked_ce.devices import (
    PROJECTED_ROWS,
    adds_in_product,
    is_accelerator,
    keeps_scratch,
    product_rows,
    rounds_products,
    rounds_within,
    unrounded,
    widened_rows,
)
from chunked_ce.light import LIGHT, torch
from chunked_ce.options import ChunkOptions
from chunked_ce.rows.sizes import rows_in_flight, work_dtype

if TYPE_CHECKING or not LIGHT:
    from chunked_ce.rows.backend import triton_runs
else:

    def triton_runs(device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a machine that is not this one has the row kernels of Triton: it has."""
        return dtype != torch.float64


__all__ = [
    "FILLED",
    "GROUPS",
    "INVARIANT_ENTRIES",
    "INVARIANT_TOKENS",
    "KEPT_SHARE",
    "ROOM_SHARE",
    "Budget",
    "MemoryPrediction",
    "Plan",
    "Settings",
    "budget",
    "budget_within",
    "filled",
    "predict_memory",
    "tokens_per_chunk",
]

KEPT_SHARE = 0.08  # share of the vocabulary that the gradient filter keeps in a chunk of a trained model
ROOM_SHARE = 0.125  # share that an accelerator makes room for before it knows how many columns a chunk keeps
GROUPS = 4  # rank of the tail that replaces a filtered chunk's dropped columns
# Of a group and a block of batch-invariant statistics. With D=768 and V=50257 those of 512 tokens took 1.5 times as
# long as ordinary ones in groups of 64 tokens, 1.17 times in groups of 128 and 1.03 times in groups of 256; those of a
# single token took 6, 10 and 18 times as long. A block's rows are all in flight at once.
INVARIANT_TOKENS = 128
INVARIANT_ENTRIES = 4096
FILLED = 16  # numbers: their rows and columns are filled up to multiples of it
_LEAST_BUDGET = 64 * 2**20
_LEAST_ON_ACCELERATOR = 2**30
_ALIGNED = 16  # vocabulary entries: rows of a block begin where an accelerator reads fastest
_TILE = 256  # tokens of a chunk or entries of a block: an accelerator multiplies in tiles of 128 and 256
# Of a block of the vocabulary on a CPU. With N=4096 and D=256 in bf16 on two threads, recomputation in blocks of 64, 32
# and 16 MiB took 1.66, 1.55 and 1.64 times as long as the three products at V=32768, and 1.58, 1.68 and 1.77 times at
# V=65536; on one thread 1.55, 1.48 and 1.47 times, and in blocks of 8 MiB 1.48 times, at V=32768.
_BLOCK_BUDGET = 32 * 2**20
# While it multiplies, the matrix library of a CPU keeps a copy of a block of the head's rows: at most so many columns,
# and only from so many tokens on. Measured with torch 2.13 on one and two threads; fp32 is MKL's, bf16 oneDNN's.
_PACKED_COLUMNS = {torch.float32: 384, torch.bfloat16: 256}
_PACKED_FROM_TOKENS = {torch.float32: 192, torch.bfloat16: 1}


class Settings(NamedTuple):
    """How to compute, as `ChunkOptions` and the autocast state say; None lets the plan choose."""

    compute_dtype: torch.dtype
    accumulate_dtype: torch.dtype = torch.float32
    chunk_size: int | None = None
    memory_budget: int | None = None
    backend: str = "auto"
    gradient_filter: float | None = None
    accumulate_into: str | None = None
    head_sum_dtype: torch.dtype | None = None  # of head gradients computed in the forward; None: the plan's
    teacher_dtype: torch.dtype | None = None  # of the products of a teacher's head beside the student's
    asked_logits_dtype: torch.dtype | None = None  # of logits, where that is wider than the products' dtype
    invariant: bool = False
    device_type: str = "cpu"  # where the products run
    ignored: str = "drop"  # or "mask" ignored tokens; "none": the host knows that there is none

    @classmethod
    def of(cls, options: ChunkOptions, compute_dtype: torch.dtype, device_type: str) -> Settings:
        return cls(
            compute_dtype,
            options.accumulate_dtype,
            None if options.chunk_size == "auto" else options.chunk_size,
            options.memory_budget,
            options.backend,
            options.filter_threshold(compute_dtype),
            options.accumulate_into,
            asked_logits_dtype=options.logits_dtype,
            invariant=options.invariant,
            device_type=device_type,
        )

    @property
    def logits_dtype(self) -> torch.dtype:
        """The dtype of the logits before scale and softcap."""
        return self.logits_of(self.compute_dtype)

    def logits_of(self, factors: torch.dtype) -> torch.dtype:
        """The dtype of logits from products of ``factors``."""
        return factors if self.asked_logits_dtype is None else torch.promote_types(self.asked_logits_dtype, factors)

    @property
    def wide_dtype(self) -> torch.dtype:
        """The dtype in which gradients are summed over chunks and ranks."""
        return torch.promote_types(self.accumulate_dtype, self.compute_dtype)

    def logit_bytes(self, in_flight: int = 1) -> int:
        """Bytes that a call holds for each logit of a chunk, of which ``in_flight`` exist at a time: with a teacher's
        logit, and with a gradient that is narrower than its logit and so cannot take its place."""
        apart = self.logits_dtype != self.compute_dtype
        teacher = 0 if self.teacher_dtype is None else self.logits_of(self.teacher_dtype).itemsize
        return in_flight * (self.logits_dtype.itemsize + teacher) + apart * self.compute_dtype.itemsize


class Budget(NamedTuple):
    """Bytes that the logits of a chunk may take, and the reason."""

    size: int
    reason: str


def budget(
    vocab_size: int, hidden_size: int, memory_budget: int | None = None, *, sums_head: bool, device_type: str = "cpu"
) -> Budget:
    """The memory budget; ``sums_head``: whether a gradient of the head (V, D) is a sum over chunks.

    >>> budget(262144, 512, sums_head=False)
    Budget(size=67108864, reason='the least budget')
    >>> budget(262144, 2048, sums_head=True, device_type="cuda")
    Budget(size=2147483648, reason='an fp32 gradient of the head')
    """
    if memory_budget is not None:
        return Budget(memory_budget, "as asked")
    fast, gradient = is_accelerator(device_type), 4 * vocab_size * hidden_size
    least = _LEAST_ON_ACCELERATOR if fast else _LEAST_BUDGET
    by_head = gradient if fast else 2 * gradient // 3
    if sums_head and by_head > least:
        return Budget(by_head, f"{'' if fast else 'two thirds of '}an fp32 gradient of the head")
    return Budget(least, "the least budget")


class Plan(NamedTuple):
    """How a call is cut into chunks of tokens and blocks of the vocabulary, and the dtypes of its gradients' sums."""

    tokens: int  # in a chunk
    entries: int | None  # vocabulary entries in a block, None for all
    in_flight: int  # chunks whose logits exist at a time
    budget: Budget
    head_sum: torch.dtype  # of the head's gradients over chunks
    hidden_sum: torch.dtype  # of the hidden states' gradient over blocks

    @classmethod
    def by_tokens(
        cls,
        num_tokens: int,
        num_counted: int,
        vocab_size: int,
        hidden_size: int,
        settings: Settings,
        *,
        head_dtype: torch.dtype | None,
        in_flight: int = 1,
    ) -> Plan:
        """Chunks of tokens with the logits of the whole vocabulary.

        ``head_dtype`` is the dtype of the head's gradient, None if it is not a sum over chunks. The dtype of that sum
        does not depend on how many tokens count.
        """
        tokens, wide = (
            tokens_per_chunk(n, vocab_size, hidden_size, settings, head_dtype=head_dtype, in_flight=in_flight)
            for n in (num_counted, num_tokens)
        )
        one_chunk = num_tokens <= wide and head_dtype == settings.compute_dtype != torch.float16
        head_sum = settings.compute_dtype if one_chunk else settings.wide_dtype
        most = _budget(vocab_size, hidden_size, settings, sums_head=head_dtype is not None)
        return cls(tokens, None, in_flight, most, head_sum, settings.compute_dtype)

    @classmethod
    def by_vocabulary(cls, num_counted: int, vocab_size: int, settings: Settings, head_dtype: torch.dtype) -> Plan:
        """All counted tokens at once, with the logits of one block of the vocabulary after another.

        A block has as many logits as a chunk of ``chunk_size`` tokens and the whole vocabulary would have.
        """
        most = _budget(vocab_size, 0, settings, sums_head=False)
        if settings.memory_budget is None and not is_accelerator(settings.device_type):
            most = Budget(min(most.size, _BLOCK_BUDGET), "the budget of a block")
        size = most.size // max(1, num_counted * settings.logit_bytes())
        if settings.chunk_size is not None:
            size = settings.chunk_size * vocab_size // max(1, num_counted)
        unit = _TILE if is_accelerator(settings.device_type) and size >= _TILE else _ALIGNED
        entries = _even(vocab_size, max(1, size), unit)
        hidden_sum = settings.wide_dtype if entries < vocab_size else settings.compute_dtype
        return cls(max(1, num_counted), entries, 1, most, head_dtype, hidden_sum)

    @classmethod
    def fixed(cls, vocab_size: int, settings: Settings) -> Plan:
        """The plan of batch-invariant statistics: groups of tokens and blocks of the vocabulary of one size always."""
        reason = Budget(INVARIANT_TOKENS * INVARIANT_ENTRIES * settings.logits_dtype.itemsize, "the same for any batch")
        entries = max(1, min(vocab_size, INVARIANT_ENTRIES))
        return cls(INVARIANT_TOKENS, entries, 1, reason, settings.wide_dtype, settings.wide_dtype)


def tokens_per_chunk(
    num_tokens: int,
    vocab_size: int,
    hidden_size: int,
    settings: Settings,
    *,
    head_dtype: torch.dtype | None = None,
    in_flight: int = 1,
) -> int:
    """Tokens in a chunk, at least 1.

    ``head_dtype`` is that of the head's gradient if it is a sum over chunks, ``in_flight`` the number of chunks whose
    logits exist at a time.

    >>> tokens_per_chunk(8192, 262144, 512, Settings(torch.bfloat16))
    128
    >>> tokens_per_chunk(8192, 262144, 512, Settings(torch.bfloat16, device_type="cuda"))
    2048
    >>> tokens_per_chunk(8192, 262144, 512, Settings(torch.bfloat16, chunk_size=1000))
    1000
    """
    if settings.chunk_size is not None:
        return settings.chunk_size
    compute_dtype, accumulate_dtype = settings.compute_dtype, settings.accumulate_dtype
    most = _budget(vocab_size, hidden_size, settings, sums_head=head_dtype is not None).size
    token_bytes = max(1, vocab_size * settings.logit_bytes())
    # A single chunk needs no wide sum of a narrow head's gradient: its logits may take that memory.
    # An fp16 gradient is always summed wide: before it is divided by the token count it can overflow.
    if settings.memory_budget is None and head_dtype == compute_dtype != torch.float16:
        spared = vocab_size * hidden_size * accumulate_dtype.itemsize
        spared = spared if compute_dtype.itemsize < accumulate_dtype.itemsize else 0
        if num_tokens * token_bytes <= most + spared:
            return max(1, num_tokens)
    unit = _TILE if is_accelerator(settings.device_type) else 1
    return _even(num_tokens, max(1, most // max(1, vocab_size * settings.logit_bytes(in_flight))), unit)


def _budget(vocab_size: int, hidden_size: int, settings: Settings, *, sums_head: bool) -> Budget:
    asked, device_type = settings.memory_budget, settings.device_type
    return budget(vocab_size, hidden_size, asked, sums_head=sums_head, device_type=device_type)


class MemoryPrediction(NamedTuple):
    """Bytes by name that one loss and its backward take besides their inputs, in each of the two phases."""

    forward: dict[str, int]
    backward: dict[str, int]

    @property
    def peak_terms(self) -> dict[str, int]:
        """The terms of the worse of the two phases."""
        return max(self, key=lambda terms: sum(terms.values()))

    @property
    def peak(self) -> int:
        """Bytes at the worse of the two phases."""
        return sum(self.peak_terms.values())


def predict_memory(
    num_tokens: int,
    vocab_size: int,
    hidden_size: int,
    *,
    dtype: torch.dtype,
    head_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    num_counted: int | None = None,
    train_input: bool = True,
    train_head: bool = True,
    options: ChunkOptions | None = None,
    device_type: str = "cpu",
    ranks: int = 1,
    kept_share: float = KEPT_SHARE,
    teacher_hidden_size: int | None = None,
    teacher_dtype: torch.dtype | None = None,
    num_ids: int = 0,
    adapter_rank: int = 0,
) -> MemoryPrediction:
    """The memory law: what `chunked_ce.linear_cross_entropy`, or another loss, allocates for its value and a backward.

    Args:
        num_tokens, vocab_size, hidden_size: N, V and D.
        dtype: of the input; ``head_dtype`` of the head and ``compute_dtype`` of the products (autocast) if they differ.
        num_counted: tokens that are not ignored; all by default, and none fewer with ``ignored="mask"``.
        train_input, train_head: whether they need a gradient.
        options: ``gradients="auto"`` means gradients in the forward, as for sums and means. ``accumulate_into`` means a
            step that adds to an existing sum, the head's ``grad`` or an fp32 ``main_grad``, which is an input.
        device_type: where it runs.
        kept_share: of the vocabulary, kept by the gradient filter in a chunk; a small model of 131,072 kept 6 %.
        ranks: how many share the vocabulary evenly (`chunked_ce.VocabShard`); the prediction is for the largest shard.
        teacher_hidden_size, teacher_dtype: of a teacher's head beside the student's (`chunked_ce.Teacher`); the dtype
            is that of the input by default.
        num_ids: ids per token, of `chunked_ce.objectives.TopKDivergence` or `chunked_ce.linear_statistics`.
        adapter_rank: r of a ``linear_adapter``, both of whose factors are trained.

    Terms in bytes: ``logits`` of one chunk (and their gradients, where these are narrower), ``rows`` in flight in fp32,
    ``hidden_grad`` (kept in fp32 at least until the backward), ``head_sum`` (the head's gradient as it is summed over
    chunks), ``head_grad`` (as it is returned, if that is another tensor), ``products`` before they are added to a wider
    sum, in both dtypes (or the factors of wider logits, cast to their dtype), ``hidden_sum`` (which the backward rounds
    to ``hidden_grad``, if that is another tensor), ``head_copy`` and ``hidden_copy`` in the products' dtype, and
    ``statistics`` of the tokens. With several ranks, two chunks' ``logits``, and ``collectives``: the tensors gathered
    and reduced, without the backend's own buffers. With a gradient filter, ``kept`` columns, their rows of the head and
    of its gradient, and ``tails`` for all chunks; on an accelerator ``head_sum`` is then the kept rows of all chunks.
    ``packed`` is a block of the head as the matrix library of a CPU rearranges it. Other memory of that library and of
    the C allocator is left out: 1 to 8 MiB on two cores. On a CPU a process keeps up to 256 MiB of ``logits`` for its
    next call (`chunked_ce.engine.scratch`), except beside a head's gradient that the backward rounds.

    >>> law = predict_memory(4096, 131072, 256, dtype=torch.float32)
    >>> law.forward["logits"] // 2**20, law.forward["head_sum"] // 2**20
    (82, 128)
    """
    options = options or ChunkOptions()
    weight_dtype = head_dtype or dtype
    product_dtype = compute_dtype or dtype
    settings = Settings.of(options, product_dtype, device_type)
    if teacher_hidden_size is not None:
        settings = settings._replace(teacher_dtype=teacher_dtype or dtype)
    logits_dtype = settings.logits_dtype
    widens = logits_dtype != product_dtype  # the logits: their gradients take memory of their own
    masked = options.ignored == "mask"
    counted = num_tokens if num_counted is None or masked else num_counted
    copies_hidden = masked or counted < num_tokens or dtype != product_dtype
    sharded = ranks > 1
    vocab_size = math.ceil(vocab_size / ranks)
    wide, work = settings.wide_dtype, work_dtype(product_dtype)
    head_elements = vocab_size * (train_head * hidden_size + adapter_rank)  # that have gradients
    in_forward = not options.in_backward
    filtered = settings.gradient_filter is not None
    added = options.accumulate_into is not None and train_head  # to an existing sum: the backward holds no other

    plan = Plan.by_tokens(
        num_tokens,
        num_tokens if sharded else counted,
        vocab_size,
        hidden_size,
        settings,
        head_dtype=weight_dtype if (in_forward or filtered) and train_head else None,
        in_flight=2 if sharded else 1,
    )
    chunk = min(plan.tokens, counted)
    at_a_time = min(plan.in_flight, math.ceil(counted / max(1, chunk)))
    blocks = Plan.by_vocabulary(counted, vocab_size, settings, weight_dtype)

    on_cuda = device_type == "cuda" and options.backend != "torch"
    in_registers = on_cuda and triton_runs(torch.device(device_type), logits_dtype)

    def rows_and_logits(
        tokens: int, entries: int, buffers: int = 1, keeps: bool = False, gradients: bool = True
    ) -> dict[str, int]:
        copies = not in_registers and (keeps or logits_dtype != work)
        apart = gradients * widens * product_dtype.itemsize
        rows = min(tokens, rows_in_flight(entries, device_type)) * entries * work.itemsize
        sizes = {"logits": tokens * entries * (buffers * logits_dtype.itemsize + apart), "rows": copies * rows}
        if settings.teacher_dtype is not None:
            of_teacher = settings.logits_of(settings.teacher_dtype)
            sizes["teacher_logits"] = buffers * tokens * entries * of_teacher.itemsize
            sizes["rows"] += (3 + (of_teacher != work)) * rows  # differences and mixtures, and a wider copy
        return sizes

    def product(total_rows: int, inner: int, wider: torch.dtype, adds: bool, apart: bool = False) -> int:
        step = product_rows(total_rows, device_type)
        part, widened = step * hidden_size * product_dtype.itemsize, step * hidden_size * wider.itemsize
        if wider == product_dtype:
            return part if apart and rounds_within(device_type, wider) else 0
        if adds_in_product(device_type, wider, product_dtype):
            return 0
        if product_dtype == torch.float16:  # formed from wider factors
            return widened + (step + hidden_size) * inner * wider.itemsize
        return part + adds * widened

    def widened(tokens: int, entries: int) -> int:
        """The factors of wider logits, where these are not formed straight from narrow ones."""
        if not widens or adds_in_product(device_type, logits_dtype, product_dtype):
            return 0
        return (tokens + widened_rows(entries)) * hidden_size * logits_dtype.itemsize

    def packed(tokens: int, entries: int) -> int:
        sizes = {product_dtype: min(entries, PROJECTED_ROWS)} | (
            {logits_dtype: widened_rows(entries)} if widens else {}
        )
        return max(
            rows * min(hidden_size, _PACKED_COLUMNS[dtype]) * dtype.itemsize
            if tokens >= _PACKED_FROM_TOKENS.get(dtype, math.inf)
            else 0
            for dtype, rows in sizes.items()
        )

    def products_of(input_product: int, head_product: int, tokens: int) -> int:
        """The larger of the products for input and head, with the targets' terms where these are separate."""
        terms = tokens * hidden_size * (product_dtype.itemsize + 4) * rounds_products(device_type, product_dtype)
        return max(train_input * (input_product + terms), train_head * (head_product or terms))

    common = {"statistics": num_tokens * (3 * work.itemsize + 16 + num_ids * (work.itemsize + 8))}
    if in_forward:
        tokens, entries = chunk, vocab_size
    else:
        tokens, entries = counted, min(vocab_size, blocks.entries or vocab_size)
    keeps = in_forward and (sharded or (widens and product_dtype == torch.float16))  # logits that statistics have read
    forward = rows_and_logits(tokens, entries, at_a_time if in_forward else 1, keeps, in_forward) | common
    forward["products"] = widened(tokens, entries)
    if device_type == "cpu":
        common = common | {"packed": packed(tokens, entries)}
        forward |= common
    if sharded:
        gathered = at_a_time * (ranks + 1) * chunk * 3 * work.itemsize
        parts = product_dtype.itemsize * (wide != product_dtype) + wide.itemsize
        forward["collectives"] = gathered + in_forward * train_input * chunk * hidden_size * parts
    copies = {}
    if weight_dtype != product_dtype:
        copies["head_copy"] = entries * hidden_size * product_dtype.itemsize
    if copies_hidden:
        copies["hidden_copy"] = tokens * hidden_size * product_dtype.itemsize
    forward |= copies
    if settings.invariant:
        forward = common | _fixed_terms(vocab_size, hidden_size, settings, weight_dtype)

    chunks = math.ceil(counted / max(1, chunk))
    kept = math.ceil(kept_share * vocab_size)

    def filter_terms(total: torch.dtype) -> dict[str, int]:
        columns = vocab_size * (4 + 4 * GROUPS) * work.itemsize  # of the current chunk, including indices of 8 bytes
        tails = train_head * 2 * chunks * vocab_size * GROUPS * work.itemsize
        if in_registers:  # room for more columns than are kept, and the place of each column in 4 bytes
            room = max(kept, math.ceil(ROOM_SHARE * vocab_size))
            rows = kept * hidden_size * product_dtype.itemsize
            tails += train_head * 2 * chunks * vocab_size * 4
        else:
            room, rows = kept, kept * hidden_size * max(product_dtype.itemsize, train_head * total.itemsize)
        return {"kept": chunk * room * product_dtype.itemsize + rows, "tails": columns + tails}

    def kept_rows(total: torch.dtype) -> int:
        """The kept rows of the head's gradient, which an accelerator keeps instead of a sum over chunks while they are
        few, in bytes."""
        rows, most = chunks * kept, vocab_size // 2
        return hidden_size * (min(rows, most) * work.itemsize + (rows > most) * vocab_size * total.itemsize)

    hidden_elements = (train_input * hidden_size + adapter_rank) * num_tokens
    gradients = {"hidden_grad": hidden_elements * dtype.itemsize}
    if in_forward:
        total_dtype, hidden_total = plan.head_sum, unrounded(dtype)
        sums = {
            "hidden_grad": hidden_elements * hidden_total.itemsize,
            "head_sum": head_elements * total_dtype.itemsize,
        }
        converted = total_dtype != weight_dtype
        if filtered and in_registers and train_head:
            sums["head_sum"], converted = kept_rows(total_dtype), True
        forward |= sums
        if filtered:
            forward |= filter_terms(total_dtype)
        else:
            products = products_of(0, product(vocab_size, chunk, total_dtype, counted > chunk), chunk)
            forward["products"] = max(products, widened(chunk, vocab_size))
        backward = sums | common | {"head_grad": converted * head_elements * weight_dtype.itemsize}
        if hidden_total != dtype:
            backward |= gradients | {"hidden_sum": sums["hidden_grad"]}
        if not converted and keeps_scratch(forward["logits"], device_type):
            backward["logits"] = forward["logits"]
        return MemoryPrediction(forward, backward)

    main_dtype = torch.promote_types(weight_dtype, torch.float32)
    into = main_dtype if options.accumulate_into == "main_grad" else weight_dtype
    if filtered:
        total_dtype = plan.head_sum
        sums_apart = train_head and not (added and torch.promote_types(into, total_dtype) == into)
        total_dtype = total_dtype if sums_apart else into
        backward = rows_and_logits(chunk, vocab_size, keeps=True) | common | gradients | filter_terms(total_dtype)
        backward["head_sum"] = sums_apart * head_elements * total_dtype.itemsize
        converted = total_dtype != weight_dtype
        if in_registers and train_head:
            backward["head_sum"], sums_apart, converted = kept_rows(plan.head_sum), True, True
        backward["head_grad"] = (sums_apart and not added and converted) * head_elements * weight_dtype.itemsize
        widens_sum = (
            sums_apart and added and device_type == "cpu"
        )  # a copy of the existing sum, to add in a wider dtype
        backward["products"] = max(widens_sum * head_elements * total_dtype.itemsize, widened(chunk, vocab_size))
        backward |= copies
        return MemoryPrediction(forward, backward)

    returned = vocab_size * adapter_rank if added else head_elements
    gradients["head_grad"] = returned * weight_dtype.itemsize
    backward = rows_and_logits(counted, entries, keeps=widens) | gradients | common
    backward["hidden_sum"] = train_input * counted * hidden_size * blocks.hidden_sum.itemsize
    products = products_of(
        product(counted, entries, blocks.hidden_sum, entries < vocab_size),
        product(entries, counted, into if added else weight_dtype, added, apart=added),
        math.ceil(counted * entries / vocab_size) * (entries < vocab_size),
    )
    backward["products"] = max(products, widened(counted, entries))
    if sharded:
        backward["collectives"] = train_input * num_tokens * hidden_size * wide.itemsize
    if copies_hidden:
        backward["hidden_copy"] = counted * hidden_size * product_dtype.itemsize
    if weight_dtype != product_dtype:
        backward["head_copy"] = entries * hidden_size * product_dtype.itemsize
    return MemoryPrediction(forward, backward)


def budget_within(free: int, predicted: Callable[[int | None], MemoryPrediction]) -> int | None:
    """The memory budget with which a loss takes at most ``free`` bytes: None, the usual one, if it does, else half of
    the logits, or a quarter, and so on, but not below the least budget of a CPU.

    ``predicted`` is the memory law as a function of the memory budget.
    """

    def logits_too_large(law: MemoryPrediction) -> int:
        return max((phase.get("logits", 0) for phase in law if sum(phase.values()) > free), default=0)

    size = None
    while (taken := logits_too_large(predicted(size))) // 2 >= _LEAST_BUDGET:
        size = taken // 2 if size is None else size // 2
    return size


def _fixed_terms(vocab_size: int, hidden_size: int, settings: Settings, head_dtype: torch.dtype) -> dict[str, int]:
    """Bytes that batch-invariant statistics take, whatever the number of tokens, by name."""
    dtype, tokens = settings.logits_dtype, INVARIANT_TOKENS
    entries, columns = (filled(size) for size in (min(vocab_size, INVARIANT_ENTRIES), hidden_size))
    copied = entries  # rows of the head at a time: all, or those of the last block
    if head_dtype == dtype and hidden_size == columns:
        copied = filled(vocab_size % INVARIANT_ENTRIES) if vocab_size % FILLED else 0
    return {
        "logits": tokens * entries * dtype.itemsize,
        "rows": (dtype != work_dtype(dtype)) * tokens * entries * work_dtype(dtype).itemsize,
        "head_copy": copied * columns * dtype.itemsize,
        "hidden_copy": 2 * tokens * columns * dtype.itemsize,
    }


def filled(size: int) -> int:
    """Rows or columns of a factor of batch-invariant products, those of zeros included."""
    return size + -size % FILLED


def _even(total: int, most: int, unit: int) -> int:
    """The size of equal parts of ``total``, none larger than ``most``; of several, a multiple of ``unit``, which makes
    the last one smaller, unless ``most`` is less."""
    if total <= most:
        return max(1, total)
    unit = unit if most >= unit else 1
    size = math.ceil(total / math.ceil(total / (most - most % unit)))
    return size + -size % unit
