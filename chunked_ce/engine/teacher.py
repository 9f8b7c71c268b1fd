"""The side of a teacher: its products, or its logits that exist, for the tokens and entries of its student's blocks."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from chunked_ce.engine.call import Call
from chunked_ce.engine.counted_tokens import CountedTokens
from chunked_ce.engine.products import project
from chunked_ce.engine.scratch import logits_scratch
from chunked_ce.narrowing import not_none
from chunked_ce.rows.teacher import TeacherRows

__all__ = ["TeacherSource", "teacher_logits"]


class TeacherSource:
    """A teacher; its tensors hold all tokens, and the vocabulary entries of this rank unless ``words`` names them."""

    def __init__(
        self,
        call: Call,
        tokens: CountedTokens,
        index: Tensor | None = None,  # (n,) of each counted token, None where all count in order
    ) -> None:
        specification, tensors = not_none(call.specification.teacher), call.teacher
        self._logits, self._dtype, self._share = specification.logits, specification.dtype, specification.share
        self._logits_dtype = call.specification.settings.logits_of(self._dtype)
        self._hidden, self._weight, self._bias = (tensors.get(name) for name in ("hidden", "weight", "bias"))
        self._existing = tensors.get("logits", tensors.get("probabilities"))  # (N, V_t)
        self._are_probabilities = "probabilities" in tensors
        self._words = tensors.get("words")  # (V_r,)
        self._tokens, self._index = tokens, index
        place = tensors.get("place")  # (N,) the row of each token in logits that exist
        if place is not None:
            self._index = place if index is None else place[index]
        self._buffers: list[Tensor] = []
        self._turn = 0

    def rows(self, rows: slice, entries: slice, most: int, in_flight: int = 1) -> TeacherRows:
        """The teacher's side of the counted tokens ``rows``, at ``most`` so many, and this rank's ``entries``.

        It is valid until that of the ``in_flight``-th block after it.
        """
        if self._existing is None:
            products = self._products(rows, entries, most, in_flight)
            return TeacherRows(products, self._logits, overwrite=True, share=self._share)
        existing, columns = self._existing[:, entries], None
        if self._words is not None:
            existing, columns = self._existing, self._words[entries]
        index = None if self._index is None else self._index[rows]
        existing = existing[rows] if index is None else existing
        counted = self._tokens.kept_mask(rows)
        are_probabilities, share = self._are_probabilities, self._share
        return TeacherRows(existing, self._logits, index, columns, counted, are_probabilities, share=share)

    def _hidden_of(self, rows: slice) -> Tensor:
        """The hidden states (C, D_t) of the counted tokens ``rows``."""
        hidden = not_none(self._hidden)
        return hidden[rows] if self._index is None else hidden.index_select(0, self._index[rows])

    def _products(self, rows: slice, entries: slice, most: int, in_flight: int) -> Tensor:
        """The products (C, B) of the teacher's head."""
        hidden, mask = self._hidden_of(rows), self._tokens.kept_mask(rows)
        hidden = (hidden if mask is None else hidden.where(mask.unsqueeze(-1), 0)).to(self._dtype)
        whole = entries == slice(0, self._num_entries)
        weight, bias = self._whole_head if whole else self._head(entries)
        if len(self._buffers) < in_flight:  # the first blocks have the most entries
            self._buffers.append(logits_scratch(most, len(weight), dtype=self._logits_dtype, device=hidden.device))
        buffer = self._buffers[self._turn % in_flight]
        self._turn += 1
        return project(hidden, weight, bias, out=buffer[: len(hidden), : len(weight)])

    @property
    def _num_entries(self) -> int:
        return len(not_none(self._weight) if self._words is None else self._words)

    @functools.cached_property
    def _whole_head(self) -> tuple[Tensor, Tensor | None]:
        return self._head(slice(0, self._num_entries))

    def _head(self, entries: slice) -> tuple[Tensor, Tensor | None]:
        """Weight (B, D_t) of this rank's ``entries`` in the products' dtype, bias (B,) in that of the logits."""
        weight, bias = not_none(self._weight), self._bias
        if self._words is None:
            weight, bias = weight[entries], None if bias is None else bias[entries]
        else:
            words = self._words[entries]
            weight, bias = weight.index_select(0, words), None if bias is None else bias.index_select(0, words)
        return weight.to(self._dtype), None if bias is None else bias.to(self._logits_dtype)


def teacher_logits(
    call: Call,
    counted: Tensor,  # (N,)
    temperature: Tensor | None,  # (N,)
    dtype: torch.dtype,
) -> Tensor:
    """The teacher's logits (N, V) in plain torch, uniform where ignored."""
    tokens = CountedTokens(torch.zeros_like(call.target), -1, 1, "none")
    rows = TeacherSource(call, tokens, None).rows(slice(0, len(call.target)), slice(0, call.rows), len(call.target))
    return rows._replace(counted=counted).plain_logits(temperature, dtype)
