"""``chunked-ce plan --html``: a plan in one file whose sliders move its bars.

The page computes nothing about memory: for each position of its controls it looks up the terms that `estimate` gave. It
loads nothing from elsewhere.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any

from chunked_ce.cli.files import write_whole
from chunked_ce.cli.planning.estimate import TERMS, Term, estimate
from chunked_ce.cli.planning.loss import LABELS, paths_of
from chunked_ce.cli.planning.run import Checkpointing, Engine, Path, Run
from chunked_ce.cli.units import GIB

__all__ = ["save_calculator", "tables"]

_TOKENS = tuple(2**power for power in range(10, 18))
_DATA = tuple(2**power for power in range(8))
_ENGINES: tuple[Engine, ...] = ("ddp", "zero1", "zero2", "zero3", "fsdp")
_ENGINE_LABELS = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp": "FSDP2"}
_CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "full")
_LORA = 16
_MEMORIES = tuple(GIB * size for size in (16, 24, 32, 40, 48, 64, 80, 96, 141, 192, 288))
_MOVED = ("--tokens", "--gpus", "--dp", "--engine", "--zero", "--checkpointing", "--lora", "--memory", "--loss")
_DIVIDE = ("--batch", "--sequence-length")  # the tokens, evenly: which those of a control need not be
_CHOSEN = ("--tp",)  # the first size that fits of several
_FILES = ("--html", "--json")
_TEMPLATE = FilePath(__file__).with_name("calculator.html")


def save_calculator(run: Run, memory: int, path: Path, words: Sequence[str], file: FilePath) -> None:
    """Write the page of ``run`` beside ``memory`` bytes of a rank, with the loss on ``path`` in front.

    ``words`` is the command line, whose options that no control moves are kept in the commands that the page shows.
    """
    text = json.dumps(tables(run, memory, path, words), separators=(",", ":")).replace("</", "<\\/")
    write_whole(file, _TEMPLATE.read_text(encoding="utf-8").replace('{"plan": null}', text, 1))


def tables(run: Run, memory: int, path: Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """What the page looks up: the stops of its controls, and for each of their combinations the terms of every path.

    ``rows`` holds, in the order of the controls, the last of which runs fastest, for every path None or pairs of a
    term's number and a number in ``values``, whose entries are bytes and whether these are exact.
    """
    axes: dict[str, list[Any]] = {
        "tokens": sorted({*_TOKENS, run.tokens}),
        "data": sorted({*_DATA, run.data}),
        "engine": list(_ENGINES),
        "checkpointing": list(_CHECKPOINTING),
        "lora": sorted({0, _LORA, run.lora}),
    }
    order = list(TERMS)
    values: dict[Term, int] = {}
    rows: list[list[list[int] | None]] = []
    paths: tuple[Path, ...] = tuple(LABELS)
    for tokens, data, engine, checkpointing, lora in itertools.product(*axes.values()):
        changed = _changed(run, tokens, data, engine, checkpointing, lora)
        known = paths_of(changed) if changed else ()
        row: list[list[int] | None] = []
        for one in paths:
            terms = estimate(changed, one).terms if changed and one in known else None
            row.append(
                None
                if terms is None
                else [
                    number
                    for name, term in terms.items()
                    for number in (order.index(name), values.setdefault(term, len(values)))
                ]
            )
        rows.append(row)
    memories = sorted({*_MEMORIES, memory})
    engine = "ddp" if run.engine == "none" else run.engine
    start = {
        "tokens": axes["tokens"].index(run.tokens),
        "data": axes["data"].index(run.data),
        "engine": _ENGINES.index(engine),
        "checkpointing": _CHECKPOINTING.index(run.checkpointing),
        "lora": axes["lora"].index(run.lora),
        "memory": memories.index(memory),
        "path": paths.index(path),
    }
    return {
        "name": run.model.name,
        "source": run.model.source,
        "trainer": run.trainer,
        "dtype": run.dtype,
        "optimizer": run.optimizer,
        "others": {"TP": run.tensor, "PP": run.pipeline, "SP": run.sequence},
        "words": _kept(words),
        "axes": axes,
        "engines": [_ENGINE_LABELS[one] for one in _ENGINES],
        "memories": memories,
        "paths": paths,
        "labels": [LABELS[one] for one in paths],
        "terms": [TERMS[name] for name in order],
        "start": start,
        "values": [[term.bytes, int(term.exact)] for term in values],
        "rows": rows,
    }


def _changed(run: Run, tokens: int, data: int, engine: Engine, checkpointing: Checkpointing, lora: int) -> Run | None:
    """The run at a position of the controls; None where these contradict each other."""
    engine = "none" if data * run.sequence == 1 else engine
    try:
        return dataclasses.replace(run, tokens=tokens, data=data, engine=engine, checkpointing=checkpointing, lora=lora)
    except ValueError:
        return None


def _kept(words: Sequence[str]) -> list[str]:
    """The command line without the options that controls move or contradict, and without files.

    >>> _kept(["plan", "--model", "llama-3-8b", "--tokens", "8192", "--zero=3", "--html", "plan.html", "--tp", "2"])
    ['plan', '--model', 'llama-3-8b']
    """
    kept: list[str] = []
    drops = False
    for word in words:
        if word.startswith("--"):  # an option, or enough of its beginning to tell it from all others
            option = word.split("=")[0]
            drops = any(name.startswith(option) for name in _MOVED + _DIVIDE + _CHOSEN + _FILES)
        if not drops:
            kept.append(word)
    return kept
