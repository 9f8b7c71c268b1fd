"""A verdict as JSON and as text for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from rich.table import Table

from chunked_ce.cli.console import simple_table
from chunked_ce.cli.planning.changes import Change
from chunked_ce.cli.planning.estimate import TERMS, Estimate
from chunked_ce.cli.planning.loss import LABELS
from chunked_ce.cli.planning.run import Path, Run
from chunked_ce.cli.planning.verdict import Verdict
from chunked_ce.cli.units import GIB, bytes_text

__all__ = ["NOTE", "document_of", "facts", "paths_table", "verdict_lines"]

_MOMENTS = {"loss": "loss", "backward": "backward", "end": "end of it"}
_ENGINES = {"none": "", "ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp": "FSDP"}
_TRAINERS = {"plain": "Pretraining", "sft": "SFT", "dpo": "DPO", "grpo": "GRPO", "distill": "Distillation"}
NOTE = (
    "~ is estimated, the rest follows from shapes and dtypes; full logits and their gradient are estimates, too. "
    "--details has the loss term by term, with operations and traffic."
)


def document_of(found: Verdict) -> dict[str, object]:
    """Everything, in bytes per rank."""
    return {
        "verdict": found.text,
        "fits": found.fits,
        "path": found.path,
        "advice": found.advice,
        "code": found.code,
        "run": dataclasses.asdict(found.run) | {"ranks": found.run.ranks, "parameters": found.run.model.parameters},
        "paths": {path: _path(found, path, one) for path, one in found.estimates.items()},
        "changes": [_change(change) for change in found.changes],
    }


def _path(found: Verdict, path: Path, one: Estimate) -> dict[str, object]:
    return {
        "label": LABELS[path],
        "total": found.taken(path),
        "fits": found.taken(path) <= found.memory,
        "moment": one.moment,
        "terms": {name: term._asdict() for name, term in one.terms.items()},
        "moments": {name: {key: term.bytes for key, term in terms.items()} for name, terms in one.moments.items()},
        "loss": dict(one.loss_terms),
        "state": one.state._asdict(),
        "largest_tokens": found.largest_tokens[path],
        "longest_sequence": found.sequence_length(path),
        "largest_batch": found.batch(path),
    }


def _change(change: Change) -> dict[str, object]:
    return {"words": change.words, "arguments": change.arguments, "path": change.path, "total": change.total}


def listed(words: Sequence[str]) -> str:
    """
    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def facts(run: Run, memory: str) -> str:
    """The request in one line."""
    model = run.model
    size = f"{model.parameters / 1e9:,.2f} billion parameters" if model.layers else "the head and its loss alone"
    trained = f", LoRA of rank {run.lora}" if run.lora else ""
    pairs = " (twice, for pairs)" if run.trainer == "dpo" else ""
    each = f" in {run.batch:,} sequences" if run.batch > 1 else ""
    by_precision = {"mixed": ", fp32 master weights", "autocast": ", autocast", "pure": ", pure"}
    has_others = run.itemsize < 4 and (run.precision != "mixed" or run.optimizer != "none")
    master = by_precision[run.precision] if has_others else ""
    optimizer = "no optimizer" if run.optimizer == "none" else run.optimizer
    kept = f", {run.checkpointing} checkpointing" if run.checkpointing != "none" else ""
    tokens = f"{run.tokens:,} tokens{each}{pairs} per micro-batch"
    numbers = f"{run.dtype}{master}, {optimizer}{kept}"
    of_model = f"{model.name} ({size}{trained})"
    return f"{of_model}; {_TRAINERS[run.trainer]}, {tokens}, {numbers}; {_ranks(run)}; memory {memory}"


def _ranks(run: Run) -> str:
    sizes = {"data": run.data, "tensor": run.tensor, "pipeline": run.pipeline, "sequence": run.sequence}
    split = " * ".join(f"{name} {size:,}" for name, size in sizes.items() if size > 1)
    engine = f", {_ENGINES[run.engine]}" if _ENGINES[run.engine] else ""
    return f"{run.ranks:,} rank{'s' if run.ranks > 1 else ''}{f' ({split})' if split else ''}{engine}"


def verdict_lines(found: Verdict) -> Iterator[str]:
    """The verdict first, and what to do."""
    yield found.text
    if found.fits:
        yield found.advice
        yield f"    {found.code}"
        return
    if found.loss_only:
        yield found.advice
    elif not found.changes:
        yield "No change makes it fit: not checkpointing, ZeRO, LoRA, nor 1,024 GPUs."
    for index, change in enumerate(found.changes):
        lead = "Or" if index else "The smallest change that makes it fit"
        yield f"{lead}: {listed(change.words)}, {bytes_text(change.total)} ({change.arguments})"
    most = max(found.largest_tokens.values())
    if most:
        yield f"As it is, up to {most:,} tokens per micro-batch fit."


def paths_table(found: Verdict) -> Table:
    """The terms of each path of the loss at its worst moment, in GiB."""
    paths = list(found.estimates)
    names = [f"*{path}" if path == found.path else path for path in paths]
    table = simple_table("GiB per rank, by the path of the loss (* of the verdict)", ("", *names), left=("",))
    estimates = list(found.estimates.values())

    def row(label: str, value: Callable[[Estimate], str], *, last: bool = False, style: str = "") -> None:
        table.add_row(label, *map(value, estimates), end_section=last, style=style)

    if not found.loss_only:
        for name, label in TERMS.items():
            terms = [one.terms.get(name) for one in estimates]
            if any(terms):
                mark = "" if all(term.exact for term in terms if term) or name == "loss" else "~ "
                table.add_row(mark + label, *(f"{term.bytes / GIB:,.2f}" if term else "-" for term in terms))
        row("in all", lambda one: f"{one.total / GIB:,.2f}", style="bold")
        row("peak in the", lambda one: _MOMENTS[one.moment], last=True)
    row("the loss at its peak", lambda one: f"{one.loss / GIB:,.2f}")
    row("fits", lambda one: "yes" if found.taken(one.path) <= found.memory else "no")
    row("longest sequence", lambda one: f"{found.sequence_length(one.path):,}")
    row("largest batch", lambda one: f"{found.batch(one.path):,}")
    return table
