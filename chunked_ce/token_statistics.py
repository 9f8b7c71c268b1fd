"""Statistics per token, for `chunked_ce.linear_statistics`: which statistics of a row each needs, and its formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from chunked_ce.arguments import INDICES, described, is_dense, is_integer
from chunked_ce.devices import moved
from chunked_ce.engine import dispatch
from chunked_ce.engine.call import Call
from chunked_ce.narrowing import not_none
from chunked_ce.rows.statistics import EXP_IS_ZERO, RowStatistics, names_of

__all__ = [
    "TokenStatistics",
    "asked_flags",
    "check_outputs",
    "has_ids",
    "names_for",
    "one_of_the_ids",
    "statistics_over",
]


class TokenStatistics(NamedTuple):
    """Statistics of the predicted distribution p of each token, in the shape of the tokens; None if not asked for.

    They are in float32 (float64 for float64 input), 0 where ignored, and differentiable but for ``is_top1`` and
    ``predicted``.
    """

    logprob: Tensor | None = None
    """The log-probability of the target, (...); of each id, (..., K), if the target has K ids per token."""
    entropy: Tensor | None = None
    """-sum_v p_v log p_v, in nats."""
    lse: Tensor | None = None
    """log sum_v exp(z_v)."""
    log_sum_sq_probs: Tensor | None = None
    """log sum_v p_v^2: minus the Renyi entropy of order 2."""
    mean_logit: Tensor | None = None
    """(1 / V) sum_v z_v."""
    is_top1: Tensor | None = None
    """1.0 where the target has the largest logit, the first of equals; it has no gradient."""
    predicted: Tensor | None = None
    """The id of the largest logit, the first of equals: int64, -1 where ignored; it has no gradient."""


class _Output(NamedTuple):
    """An output of `linear_statistics`."""

    needs: tuple[str, ...]  # statistics of a row besides those that every call computes
    of: Callable[[RowStatistics, int], Tensor]  # from the statistics and V
    of_support: bool = False  # whether it can be asked of a support


_OUTPUTS = {
    "logprob": _Output((), lambda rows, size: rows.logprob, True),
    "entropy": _Output(("mean",), lambda rows, size: rows.entropy, True),
    "lse": _Output((), lambda rows, size: rows.lse, True),
    "log_sum_sq_probs": _Output(("squares",), lambda rows, size: not_none(rows.squares) - 2 * rows.log_sum),
    "mean_logit": _Output(("total",), lambda rows, size: not_none(rows.total) / size),
    "is_top1": _Output(("correct",), lambda rows, size: not_none(rows.correct)),
    "predicted": _Output(("predicted",), lambda rows, size: not_none(rows.predicted).long()),
}


def names_for(outputs: Sequence[str], *, with_ids: bool) -> tuple[str, ...]:
    """The statistics of a row that ``outputs`` need."""
    at_ids = ("at_ids",) if with_ids and "logprob" in outputs else ()
    return names_of([*at_ids, *(name for output in outputs for name in _OUTPUTS[output].needs)])


def _token_statistics(
    outputs: Sequence[str],
    rows: RowStatistics,  # (N,) each, 0 where ignored
    vocab_size: int,
    shape: torch.Size,  # of the tokens
    valid: Tensor | None,  # (N, K) which ids are not ignored, if the target has K ids per token
) -> TokenStatistics:
    """The ``outputs`` from the statistics of the rows."""
    found = {}
    for name in outputs:
        if name == "logprob" and valid is not None:
            found[name] = rows.logprobs.where(valid, 0).view(*shape, valid.shape[1])
        else:
            found[name] = _OUTPUTS[name].of(rows, vocab_size).view(shape)
    return TokenStatistics(**found)


def _support_statistics(
    outputs: Sequence[str],
    logits: Tensor,  # (N, K + S) at the targets, then at the support
    ids: Tensor,  # (N, K + S) -1 where an id is none
    num_targets: int,  # K
    counted: Tensor,  # (N,)
) -> TokenStatistics:
    """The ``outputs`` (N, ...) of the distribution over the ids of each token."""
    member = _first_of_equals(ids) & (ids >= 0)
    # All are members of an ignored token, so that neither its statistics nor their gradients are NaN.
    member = member | ~counted.unsqueeze(-1)
    maximum = logits.detach().masked_fill(~member, -torch.inf).amax(-1, keepdim=True)
    shifted = logits - maximum
    members = shifted.masked_fill(~member, -torch.inf)
    log_sum = members.logsumexp(-1, keepdim=True)
    found = {}
    if "logprob" in outputs:
        found["logprob"] = (shifted[:, :num_targets] - log_sum).where(ids[:, :num_targets] >= 0, 0)
    if "entropy" in outputs:
        log_p = members - log_sum
        found["entropy"] = -(log_p.exp() * log_p.clamp(min=EXP_IS_ZERO)).sum(-1).where(counted, 0)
    if "lse" in outputs:
        found["lse"] = (maximum + log_sum).squeeze(-1).where(counted, 0)
    return TokenStatistics(**found)


def _first_of_equals(ids: Tensor) -> Tensor:
    """Whether each id (N, M) is the first of its value in its row."""
    ordered, order = ids.sort(dim=-1, stable=True)
    again = torch.cat([torch.zeros_like(ordered[:, :1]), (ordered[:, 1:] == ordered[:, :-1]).long()], -1)
    return torch.zeros_like(ids).scatter(-1, order, again) == 0


def asked_flags(outputs: object) -> dict[str, bool]:
    """Whether each output is asked for, which ranks compare; {} for ``outputs`` that `check_outputs` refuses."""
    if not _are_names(outputs):
        return {}
    return {f"outputs has {name!r}": name in outputs for name in _OUTPUTS}


def check_outputs(outputs: object, *, with_ids: bool, with_support: bool) -> None:
    """Check the names of the outputs, and that K ids per token and a support have them."""
    allowed = f"outputs must be a tuple of names among {', '.join(map(repr, _OUTPUTS))}"
    if not _are_names(outputs):
        raise TypeError(f"{allowed}, was {described(outputs)}")
    for name in outputs:
        if name not in _OUTPUTS:
            raise ValueError(f"{allowed}, had {described(name)}")
    if with_ids and "is_top1" in outputs:
        raise ValueError("outputs must not have 'is_top1' where target has K ids per token: there is no one target")
    of_support = [name for name, output in _OUTPUTS.items() if output.of_support]
    for name in outputs if with_support else ():
        if name not in of_support:
            raise ValueError(f"outputs must be among {', '.join(map(repr, of_support))} with a support, had {name!r}")


def _are_names(outputs: object) -> TypeGuard[Sequence[str]]:
    return isinstance(outputs, tuple | list) and all(isinstance(name, str) for name in outputs)


def has_ids(input: Any, target: Any) -> bool:
    """Whether a target has K ids per token, (..., K), and not one, (...), for hidden states (..., D)."""
    return is_dense(input) and is_dense(target) and bool(target.dim() == input.dim() > 0)


def one_of_the_ids(ids: Tensor, ignore_index: Any) -> Tensor:
    """One id (...) of each token's ids (..., K) that are not ignored, ``ignore_index`` where all are.

    Whatever it is given: arguments are checked later, on all ranks together.
    """
    if ids.dtype not in INDICES.dtypes or not is_integer(ignore_index) or ids.shape[-1] < 1:
        return ids.sum(-1)
    ids = ids.long()
    counted = ids != ignore_index
    largest = ids.masked_fill(~counted, torch.iinfo(torch.int64).min).amax(-1)
    return largest.where(counted.any(-1), int(ignore_index))


def statistics_over(
    call: Call,
    outputs: Sequence[str],
    ids: Tensor | None,  # (..., K) targets
    support: Tensor | None,  # (..., S)
    shape: torch.Size,  # of the tokens
) -> TokenStatistics:
    """The statistics of a call, over the whole vocabulary or over each token's support."""
    if ids is not None:
        ids = moved(ids.reshape(-1, ids.shape[-1]).long(), call.target.device)  # (N, K)
        counted = (ids != call.ignore_index).any(-1)
        # An id out of range is reported by its place among the ids, not as a target.
        inside = call.target.clamp(0, call.vocab_size - 1).where(counted, call.ignore_index)
        call = call._replace(target=inside)
    if support is None:
        return _over_the_vocabulary(call, outputs, ids, shape)
    return _over_a_support(call, outputs, ids, support, shape)


def _over_the_vocabulary(call: Call, outputs: Sequence[str], ids: Tensor | None, shape: torch.Size) -> TokenStatistics:
    """Statistics of the distributions over all vocabulary entries, in the ``shape`` of the tokens."""
    valid = None
    if ids is not None:
        call = call.with_per_token(call.per_token | {"target": ids}, ids="target")
        valid = ids != call.ignore_index
    found = _token_statistics(outputs, dispatch.statistics(call), call.vocab_size, shape, valid)
    if found.predicted is None:
        return found
    counted = (call.target != call.ignore_index).view(shape)
    return found._replace(predicted=found.predicted.where(counted, -1))


def _over_a_support(
    call: Call, outputs: Sequence[str], ids: Tensor | None, support: Tensor, shape: torch.Size
) -> TokenStatistics:
    """Statistics of the distributions over each token's support and its targets."""
    targets = call.target.unsqueeze(-1) if ids is None else ids  # (N, K)
    support = support.reshape(targets.shape[0], support.shape[-1]).long()  # (N, S)
    gathered = call.with_per_token({"target": targets, "support": support})
    members = torch.cat([targets, support], -1)
    members = members.where(members != call.ignore_index, -1)
    counted = call.target != call.ignore_index
    temperature = None if call.temperature is None else call.temperature.where(counted, 1)
    logits = call.specification.logits(dispatch.gathered_logits(gathered), temperature)
    found = _support_statistics(outputs, logits, members, targets.shape[1], counted)
    shapes = {"logprob": shape if ids is None else (*shape, ids.shape[1])}
    return TokenStatistics(**{n: v.view(shapes.get(n, shape)) for n, v in found._asdict().items() if v is not None})
