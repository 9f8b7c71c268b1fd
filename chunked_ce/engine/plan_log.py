"""``CHUNKED_CE_LOG=plan``: one line about each sweep, how it is cut and how it sums, for a reader of a log.

The variable is read once, when this module is imported. Lines go to the logger ``chunked_ce``, and to stderr where no
logging is configured.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Mapping

import torch

from chunked_ce.engine.call import Call
from chunked_ce.engine.sources import HeadSource, Source

__all__ = ["LOGS_PLANS", "log_gradients", "log_plain", "log_values"]

VARIABLE = "CHUNKED_CE_LOG"
_logger = logging.getLogger("chunked_ce")


def asked(environment: Mapping[str, str]) -> bool:
    """Whether the variable asks for plans; a warning for a value that it does not have."""
    value = environment.get(VARIABLE, "").strip()
    if value not in ("", "plan"):
        warnings.warn(f"{VARIABLE} is {value!r}, which logs nothing: set it to 'plan', or unset it", stacklevel=2)
    return value == "plan"


LOGS_PLANS = asked(os.environ)


def log_values(call: Call, source: Source) -> None:
    """Say how a sweep for values alone is cut."""
    way = "batch-invariant values" if call.specification.settings.invariant else "values"
    _log(f"{_subject(call)}, {way}: {_cut(call, source)}")


def log_gradients(call: Call, source: Source, way: str) -> None:
    """Say how a sweep for gradients is cut, in the ``"forward"`` or the ``"backward"``, and in which dtypes it sums."""
    sums = ""
    if isinstance(source, HeadSource):
        head, hidden = _name(source.plan.head_sum), _name(source.plan.hidden_sum)
        sums = f"; sums in {head} for the head, {hidden} for hidden states"
    _log(f"{_subject(call)}, gradients in the {way}: {_cut(call, source)}{sums}")


def log_plain(call: Call) -> None:
    """Say that plain torch computes the call, as second derivatives and ``torch.func`` need it."""
    _log(f"{_subject(call)}, in plain torch: all logits of {len(call.target)} tokens and {call.rows} words exist")


def _log(line: str) -> None:
    if torch.compiler.is_compiling():
        return  # operators log when they run
    if _logger.level == logging.NOTSET:
        _logger.setLevel(logging.INFO)
    if not _logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s %(message)s"))
        _logger.addHandler(handler)
    _logger.info("plan: %s", line)


def _subject(call: Call) -> str:
    objective = call.specification.objective
    return "statistics" if objective is None else type(objective).__name__


def _cut(call: Call, source: Source) -> str:
    specification, device = call.specification, call.target.device
    settings = specification.settings
    counted = f"{len(source.tokens)} of {len(call.target)} tokens"
    words = f"{call.rows} words" if specification.shard is None else f"{call.rows} of {call.vocab_size} words"
    kernels = f"{specification.row_kernels(device).__name__.rpartition('.')[2].partition('_')[0]} kernels on {device}"
    if not isinstance(source, HeadSource):
        return f"{counted}, {words}, {_name(settings.logits_dtype)} logits that exist, a few rows at a time; {kernels}"
    plan = source.plan
    size = min(plan.tokens, len(source.tokens))
    chunks = math.ceil(len(source.tokens) / max(1, size))
    entries = call.rows if plan.entries is None else min(plan.entries, call.rows)
    blocks = "" if plan.entries is None else f" in {math.ceil(call.rows / max(1, entries))} x {entries}"
    taken = size * entries * settings.logit_bytes(plan.in_flight)
    filtered = settings.gradient_filter
    return "; ".join(
        [
            f"{counted} in {chunks} x {size}, {words}{blocks}",
            f"{taken / 2**20:.1f} MiB of {_name(settings.logits_dtype)} logits at a time",
            f"budget {plan.budget.size / 2**20:.1f} MiB, {plan.budget.reason}",
            *([] if filtered is None else [f"gradient filter at {filtered:.1e}"]),
            kernels,
        ]
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
