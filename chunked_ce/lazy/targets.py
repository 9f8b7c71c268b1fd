"""Statistics of logits and of the targets of their tokens, whether the logits are lazy or exist."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from chunked_ce.functional import linear_statistics
from chunked_ce.lazy.answers import maths
from chunked_ce.lazy.arithmetic import of_softmax
from chunked_ce.lazy.form import Form
from chunked_ce.lazy.logits import Lazy, LazyLogits, LazyMixture
from chunked_ce.token_statistics import TokenStatistics

__all__ = ["target_statistics"]


def target_statistics(
    logits: Tensor,  # (..., V)
    target: Tensor,  # (...)
    outputs: tuple[str, ...],
    ignore_index: int = -100,
) -> TokenStatistics:
    """The ``outputs`` of `chunked_ce.linear_statistics`, 0 where the target is ignored."""
    if isinstance(logits, Lazy) and not logits.is_computed:
        form = _form_of(logits, outputs)
        if form is not None:
            return _of_lazy(logits, form, target, outputs, ignore_index)
        logits.compute_for("target_statistics")
    values = logits.materialize() if isinstance(logits, Lazy) else logits
    return _of_values(values, target, outputs, target != ignore_index)


def _form_of(logits: Lazy, outputs: tuple[str, ...]) -> Form | None:
    """How the logits are formed from the head's product; None where that does not tell the outputs."""
    if isinstance(logits, LazyMixture):
        return None
    form = of_softmax(logits)
    is_shifted = not isinstance(logits, LazyLogits) and form is not None and bool(logits._terms.shift())
    return None if is_shifted and {"lse", "mean_logit"} & set(outputs) else form


def _of_lazy(logits: Lazy, form: Form, target: Tensor, outputs: tuple[str, ...], ignore_index: int) -> TokenStatistics:
    def ask(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> TokenStatistics:
        factors, keywords = maths(logits, hidden, weight, bias, form)
        keywords |= {"ignore_index": ignore_index, "options": logits.head.options}
        return linear_statistics(*factors, target, outputs=outputs, **keywords)

    found: TokenStatistics = logits.request(ask)
    return found


def _of_values(logits: Tensor, target: Tensor, outputs: tuple[str, ...], counted: Tensor) -> TokenStatistics:
    rows, ids = logits[counted], target[counted].unsqueeze(-1)  # (n, V), (n, 1)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    lse = rows.logsumexp(-1, keepdim=True)
    logprobs = rows - lse
    compute: dict[str, Callable[[], Tensor]] = {
        "logprob": lambda: logprobs.gather(-1, ids).squeeze(-1),
        "entropy": lambda: torch.special.entr(logprobs.exp()).sum(-1),
        "lse": lambda: lse.squeeze(-1),
        "log_sum_sq_probs": lambda: (2 * logprobs).logsumexp(-1),
        "mean_logit": lambda: rows.mean(-1),
        "is_top1": lambda: (rows.argmax(-1, keepdim=True) == ids).squeeze(-1).to(rows.dtype),
    }
    found = {name: compute[name]() for name in outputs}
    # The scatter keeps the graph where no token counts.
    return TokenStatistics(**{n: x.new_zeros(target.shape).masked_scatter(counted, x) for n, x in found.items()})
