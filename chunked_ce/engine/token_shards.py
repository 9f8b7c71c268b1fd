"""Calls in which each rank holds the hidden states of its own tokens, as one call over the counted tokens of all ranks.

The tokens are sharded in one of two ways. With ``input_grad="sequence"`` every rank is given the targets of all tokens,
and gets their statistics. With ``tokens="own"`` each rank is given its own tokens alone: `OwnTokens` exchanges targets
and the other small tensors per token, and each rank gets the statistics of its own. Ignored tokens stay where they are
in both: only hidden states that count travel.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from chunked_ce import devices
from chunked_ce.engine.call import Call
from chunked_ce.engine.counted_tokens import CountedTokens, Places, check_range, rows_at
from chunked_ce.engine.specification import TOKEN
from chunked_ce.narrowing import not_none
from chunked_ce.parallel.collectives import Collectives
from chunked_ce.parallel.meeting import Doing, meet
from chunked_ce.rows.statistics import RowStatistics

__all__ = ["TOKENS", "JoinedCall", "OwnTokens", "joined_sequence", "sequence_call"]

TOKENS = "chunked_ce: the all-gather of tokens"


class JoinedCall(NamedTuple):
    """The call over the counted tokens of all ranks, and where its results go on this rank."""

    call: Call
    others: list[Tensor]  # (n, ...) each: more values per token
    mine: slice  # of the joined tokens: those whose results this rank gets
    tokens: CountedTokens  # where these are among the tokens that this rank was given

    def put(self, values: Tensor) -> Tensor:
        """The results (n, ...) of the joined tokens, for the tokens that this rank was given: 0 where ignored."""
        values = values[self.mine]
        if self.tokens.all_kept:
            return values
        whole = values.new_zeros(self.tokens.num_tokens, *values.shape[1:])
        self.tokens.put(whole, slice(None), values)
        return whole

    def put_rows(self, rows: RowStatistics) -> RowStatistics:
        return rows.map(self.put)


def sequence_call(call: Call) -> Call:
    """A call whose ranks know all targets, with the number of each rank's counted tokens."""
    return _sized(call, _sizes(call, _kept(call)))


def joined_sequence(call: Call, *others: Tensor) -> JoinedCall:
    """The call over the counted tokens, and ``others`` (N, ...) of these, where every rank knows those of all."""
    kept, ignored = _kept(call), call.specification.settings.ignored
    tokens = CountedTokens(call.target, call.ignore_index, call.vocab_size, ignored, kept)
    sized, local = _sized(call, _sizes(call, kept)), None
    if kept is not None:
        shard = not_none(sized.specification.shard)
        ranks, sizes = Collectives(shard.group_name), shard.sizes
        share, first = len(call.target) // ranks.size, sum(sizes[: ranks.rank])
        mine = slice(first, first + sizes[ranks.rank])
        if sizes[ranks.rank] < share:
            local = Places(*(places[mine] - share * ranks.rank for places in kept))
    per_token = call.per_token
    if call.teacher:  # whose tensors hold all tokens
        per_token[TOKEN] = torch.arange(len(call.target), device=call.target.device)
    target, *values = [tokens.unmasked(each, slice(None)) for each in (call.target, *per_token.values(), *others)]
    named = dict(zip(per_token, values, strict=False))
    return JoinedCall(_joined(sized, target, named, local), values[len(named) :], slice(None), tokens)


class OwnTokens:
    """The tokens of this rank, once all ranks know how many the others have.

    ``intent`` is what the ranks meet for, and ``ids`` names the tensors per token that hold ids. Raises on every rank
    if one of them has a target or an id out of range, fails before the meeting, or does something else.
    """

    def __init__(self, call: Call, intent: Doing, *others: Tensor, ids: Iterable[str] = ()) -> None:
        self._call, self._ranks = call, Collectives(not_none(call.specification.shard).group_name)
        self._tensors = [call.target, *call.per_token.values(), *others]  # (N, ...) each
        self._places: Places | None = None
        columns: list[Tensor] = []
        failure: Exception | None = None
        try:
            check_range("target", call.target, call.ignore_index, call.vocab_size)
            for name in ids:
                check_range(name, call.per_token[name], call.ignore_index, call.vocab_size)
            self._places = _kept(call)
            columns = [_as_bytes(values if self._places is None else self._counted(values)) for values in self._tensors]
        except Exception as error:
            failure = error
        self._columns = columns
        self._widths = [column.shape[1] for column in columns]
        number = len(columns[0]) if columns else 0
        numbers = number, call.start, call.start + call.rows
        found = meet(self._ranks, intent, *numbers, device=call.target.device, failure=failure)
        self.sizes = tuple(number for number, *_ in found)
        self.call = _sized(call, self.sizes, tuple((start, stop) for _, start, stop, *_ in found))

    @property
    def shape(self) -> tuple[int, int]:
        """Of what each rank gathers: bytes of its tokens."""
        return max(self.sizes), sum(self._widths)

    def joined(self) -> JoinedCall:
        """The call over the counted tokens of all ranks, which takes one collective."""
        mine = torch.cat(self._columns, 1)
        self._columns = []
        filled_up = torch.cat([mine, mine.new_zeros(self.shape[0] - len(mine), mine.shape[1])])
        gathered = self._ranks.all_gather(filled_up, TOKENS).wait()  # (R, n, B)
        whole = torch.cat([part[:size] for part, size in zip(gathered, self.sizes, strict=True)])
        target, *values = [
            _dense(part).view(like.dtype).view(len(whole), *like.shape[1:])
            for part, like in zip(torch.split(whole, self._widths, 1), self._tensors, strict=True)
        ]
        per_token = dict(zip(self._call.per_token, values, strict=False))
        first = sum(self.sizes[: self._ranks.rank])
        tokens = rows_at(self._places, len(self._call.target))
        joined = _joined(self.call, target, per_token, self._places)
        return JoinedCall(joined, values[len(per_token) :], slice(first, first + self.sizes[self._ranks.rank]), tokens)

    def _counted(self, values: Tensor) -> Tensor:
        return values.index_select(0, not_none(self._places).on_device)


def _kept(call: Call) -> Places | None:
    """Where the tokens are that travel, if not all do."""
    if call.specification.settings.ignored != "drop":
        return None
    return call.places or Places.of(devices.read(call.target != call.ignore_index), call.target.device)


def _sizes(call: Call, kept: Places | None) -> tuple[int, ...]:
    """The tokens of each rank that travel, where every rank knows all targets."""
    ranks = Collectives(not_none(call.specification.shard).group_name).size
    share = len(call.target) // ranks
    if kept is None:
        return (share,) * ranks
    bounds = torch.searchsorted(kept.on_host, share * torch.arange(ranks + 1)).tolist()
    return tuple(stop - start for start, stop in itertools.pairwise(bounds))


def _sized(call: Call, sizes: tuple[int, ...], bounds: tuple[tuple[int, int], ...] = ()) -> Call:
    """The call with the number of tokens of each rank, and the dtype of the head's sum, whatever their number."""
    specification = call.specification
    settings = specification.settings
    if call.specification.objective is not None or call.cuts_tokens:
        dtype = call.plan_by_tokens(len(call.target), sums_head=call.sums_head).head_sum
        settings = settings._replace(head_sum_dtype=settings.head_sum_dtype or dtype)
    if settings.ignored == "drop":
        settings = settings._replace(ignored="none")
    shard = not_none(specification.shard)._replace(sizes=sizes, bounds=bounds)
    return call._replace(specification=specification._replace(settings=settings, shard=shard))


def _joined(
    sized: Call,
    target: Tensor,  # (n,) of all ranks' tokens
    per_token: dict[str, Tensor],  # (n, ...) each
    places: Places | None,  # of this rank's, among its hidden states
) -> Call:
    joined = sized.without_places().with_per_token(per_token)._replace(target=target)
    return joined if places is None else joined.with_places(places)


def _as_bytes(values: Tensor) -> Tensor:
    """``values`` (n, ...) as bytes (n, B)."""
    return _dense(values.reshape(len(values), values.shape[1:].numel())).view(torch.uint8)


def _dense(values: Tensor) -> Tensor:
    """A copy whose strides and place allow views of other dtypes: one or no row may be contiguous with any."""
    return values.clone(memory_format=torch.contiguous_format)
