"""``chunked-ce plan --verify`` over shapes, trainers, paths of the loss and ways to train.

    python -m benchmarks.verify --json benchmarks/results/verify.json

On a CPU in fp32, each case in a process of its own: some ten minutes. ``--quick`` takes a few of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import MIB, conditions, dump, print_conditions
from chunked_ce.cli import memory, verify
from chunked_ce.cli.console import wide_console
from chunked_ce.cli.implementations import DEVICE
from chunked_ce.cli.model_shapes import MODELS
from chunked_ce.cli.planning import Run, paths_of

MODELS_MEASURED = ("llama-3-8b", "qwen-3-8b", "gemma-2-2b")
WAYS: tuple[dict[str, object], ...] = (
    {"checkpointing": "full"},
    {"checkpointing": "selective"},
    {"lora": 16},
    {"optimizer": "sgd"},
    {"accumulation": 2},
)


def runs() -> Iterator[Run]:
    """All trainers on the first model, the others' shapes, and the first in other ways."""
    base = Run(MODELS[MODELS_MEASURED[0]], tokens=8192, device=DEVICE)
    teacher = MODELS["llama-3-70b"]
    yield base
    for trainer in ("dpo", "grpo"):
        yield dataclasses.replace(base, trainer=trainer)
    yield dataclasses.replace(base, trainer="distill", other_model=teacher)
    for name in MODELS_MEASURED[1:]:
        yield dataclasses.replace(base, model=MODELS[name])
    for way in WAYS:
        yield dataclasses.replace(base, **way)  # type: ignore[arg-type]


def cases(quick: bool) -> list[verify.Case]:
    """The loss of each trainer and shape on each path once, and a step of every run."""
    found: dict[verify.Case, None] = {}
    for run in itertools.islice(runs(), 1 if quick else None):
        found |= dict.fromkeys(verify.cases_of(run, "forward" if "forward" in paths_of(run) else "backward"))
    return list(found)


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """The table of docs/plan.md: a row for each case."""
    rows = ["| | path | N | D | V | predicted MiB | measured MiB | difference |", "|---|---|---|---|---|---|---|---|"]
    for one in results:
        sizes = " | ".join(f"{one[name]:,}" for name in ("tokens", "hidden", "vocab"))
        peaks = " | ".join(f"{one[name] / MIB:,.0f}" for name in ("predicted_bytes", "measured_bytes"))
        cells = f"{one['path']} | {sizes} | {peaks} | {one['difference']:+.1%}"
        rows.append(f"| {_name(one)} | {cells} |")
    return "\n".join(rows) + "\n"


def _name(one: Mapping[str, Any]) -> str:
    """What is measured: a loss, or a step with all in which it differs from the usual one."""
    if one["kind"] == "loss":
        return f"{one['trainer']} loss" + (", frozen head" if not one["train_head"] else "")
    more = [f"{one['checkpointing']} checkpointing"] if one["checkpointing"] != "none" else []
    more += [f"LoRA {one['lora']}"] if one["lora"] else []
    more += [one["optimizer"]] if one["optimizer"] != "adamw" else []
    more += [f"{one['accumulation']} micro-batches"] if one["accumulation"] > 1 else []
    return ", ".join([f"{one['trainer']} step", *more])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="one run")
    arguments = parser.parse_args()
    why = memory.why_not_measured(DEVICE)
    if why is not None:
        parser.error(why)
    where = conditions()
    print_conditions(where)
    outcomes = []
    for outcome in verify.measured(cases(arguments.quick)):
        outcomes.append(outcome)
        kind, run, path = outcome.case
        print(f"{run.trainer} {kind} {path}: {outcome.difference:+.1%}", flush=True)
        if arguments.json:
            dump({"conditions": where, "results": [one.document() for one in outcomes]}, arguments.json)
    console = wide_console()
    console.print(verify.summary(outcomes), markup=False)
    console.print(verify.table(outcomes))


if __name__ == "__main__":
    main()
