"""The smallest change of a run that makes it fit: the cheapest of all combinations of a few single changes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from chunked_ce.cli.planning.estimate import estimate
from chunked_ce.cli.planning.loss import EXACT, LABELS, paths_of
from chunked_ce.cli.planning.run import Engine, Path, Run

__all__ = ["Change", "smallest_changes"]

_LORA = 16  # the rank that is proposed
_MOST_RANKS = 1024


class Change(NamedTuple):
    """What to change, the run that follows, and what it takes."""

    words: tuple[str, ...]  # one for each single change
    kinds: tuple[str, ...]  # of these, the least costly first
    arguments: str  # for the command line, in place of or besides the old ones
    run: Run
    path: Path
    total: int  # bytes


class _Step(NamedTuple):
    """A single change: its cost grows with the time it takes, the work and what else it changes."""

    kind: str
    cost: int
    words: str
    arguments: str
    apply: Callable[[Run], Run]


_NONE = _Step("", 0, "", "", lambda run: run)


def smallest_changes(run: Run, path: Path, memory: int, *, asked: bool = False) -> list[Change]:
    """The smallest change with which ``run`` fits into ``memory`` bytes, then the smallest without each of its kinds of
    change, at most three in all. Empty if nothing helps.

    ``path`` is that of the loss, which only changes to another exact one; with ``asked`` the user chose it.
    """
    found: list[Change] = []
    forbidden: list[str] = []
    for _ in range(3):
        change = _smallest(run, path, memory, forbidden, asked=asked)
        if change is None:
            break
        found.append(change)
        if change.kinds[-1] == "loss":
            break
        forbidden.append(change.kinds[-1])
    return found


def _smallest(run: Run, path: Path, memory: int, forbidden: Sequence[str], *, asked: bool) -> Change | None:
    best: tuple[int, Change] | None = None
    for steps in _combinations(run, forbidden):
        changed = _applied(run, steps)
        if changed is None:
            continue
        cost = sum(step.cost for step in steps)
        for path_cost, other in _paths(changed, path):
            if best is not None and cost + path_cost >= best[0]:
                continue
            total = estimate(changed, other).total
            if total <= memory and (steps or other != path):
                best = cost + path_cost, _change(changed, steps, path, other, total, asked=asked)
    return best[1] if best else None


def _change(run: Run, steps: Sequence[_Step], old: Path, path: Path, total: int, *, asked: bool) -> Change:
    words, arguments = [step.words for step in steps], [step.arguments for step in steps]
    kinds = [step.kind for step in sorted(steps, key=lambda step: step.cost)]
    if path != old:
        words.insert(0, LABELS[path])
        kinds.insert(0, "loss")
    if asked or path == "sharded":
        arguments.append(f"--loss {path}" if path != old else "")
    return Change(tuple(words), tuple(kinds), " ".join(filter(None, arguments)), run, path, total)


def _paths(run: Run, path: Path) -> list[tuple[int, Path]]:
    """Paths of the loss with their costs: the one it is on, then the exact ones."""
    known = paths_of(run)
    costs: dict[Path, int] = {"forward": 1, "backward": 2, "sharded": 4}
    stays: list[tuple[int, Path]] = [(0, path)] if path in known else []
    return stays + [(costs[one], one) for one in EXACT if one in known and one != path]


def _combinations(run: Run, forbidden: Sequence[str]) -> Iterator[list[_Step]]:
    kinds = [_checkpointing(run), _engines(run), _optimizers(run), _adapters(run), _more_ranks(run)]
    for steps in itertools.product(*([_NONE, *kind] for kind in kinds)):
        kept = [step for step in steps if step.words]
        if not any(step.kind in forbidden for step in kept):
            yield kept


def _applied(run: Run, steps: Sequence[_Step]) -> Run | None:
    """The run after all steps, ranks first, since engines need several; None if they do not go together."""
    try:
        for step in reversed(steps):
            run = step.apply(run)
    except ValueError:
        return None
    return run


def _checkpointing(run: Run) -> list[_Step]:
    if not run.model.layers or not run.train_input:
        return []
    selective = _Step(
        "checkpointing",
        5,
        "selective checkpointing",
        "--checkpointing selective",
        lambda run: dataclasses.replace(run, checkpointing="selective"),
    )
    full = _Step(
        "checkpointing",
        6,
        "full checkpointing",
        "--checkpointing full",
        lambda run: dataclasses.replace(run, checkpointing="full"),
    )
    return {"none": [selective, full], "selective": [full], "full": []}[run.checkpointing]


def _engines(run: Run) -> list[_Step]:
    """Higher stages of ZeRO, on the ranks that there are."""

    def step(engine: Engine) -> _Step:
        stage = int(engine[-1])
        return _Step("engine", 7 + stage, f"ZeRO-{stage}", f"--zero {stage}", lambda run: _with_engine(run, engine))

    stages: tuple[Engine, ...] = ("zero1", "zero2", "zero3")
    return [step(engine) for engine in stages if int(engine[-1]) > run.zero]


def _with_engine(run: Run, engine: Engine) -> Run:
    if run.replicas == 1:
        raise ValueError(f"{engine} needs several data-parallel ranks")
    return dataclasses.replace(run, engine=engine)


def _optimizers(run: Run) -> list[_Step]:
    if run.optimizer != "adamw":
        return []
    return [
        _Step(
            "optimizer",
            20,
            "8-bit AdamW",
            "--optimizer adamw-8bit",
            lambda run: dataclasses.replace(run, optimizer="adamw-8bit"),
        )
    ]


def _adapters(run: Run) -> list[_Step]:
    if run.lora or run.trainer == "plain" or not run.model.layers or not run.train_input:
        return []
    return [
        _Step("lora", 30, f"LoRA of rank {_LORA}", f"--lora {_LORA}", lambda run: dataclasses.replace(run, lora=_LORA))
    ]


def _more_ranks(run: Run) -> list[_Step]:
    """Twice as many data-parallel ranks, four times, and so on."""

    def step(power: int) -> _Step:
        factor = 2**power

        def more(run: Run) -> Run:
            data = run.data * factor
            return dataclasses.replace(run, data=data, engine="ddp" if run.engine == "none" else run.engine)

        return _Step("ranks", 40 + 10 * power, f"{run.ranks * factor} GPUs", _ranks_text(run, factor), more)

    if not run.model.layers:
        return []
    return [step(power) for power in range(1, 11) if run.ranks * 2**power <= _MOST_RANKS]


def _ranks_text(run: Run, factor: int) -> str:
    return f"--gpus {run.ranks * factor}"
