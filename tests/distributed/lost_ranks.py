"""Ranks that are lost in a call, or leave it: what the others see, after how many seconds, and how their processes end.

    seen = lose([Scene("killed", "own", "hidden states")], patience=4.0)

Three processes form a group whose timeout is `patience`. They run a step; in the next one something happens to the odd
rank, just before the collective that the scene names. `benchmarks/faults.py` prints the table of docs/distributed.md.
"""

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from chunked_ce import ChunkOptions, VocabShard, linear_cross_entropy
from chunked_ce.parallel.collectives import Collectives
from tests.distributed.launch import SERVER

RANKS, ODD_ONE = 3, 1
VOCAB, WIDTH, TOKENS, CHUNK = 12, 5, 12, 6
STARTS = 120.0  # seconds in which three processes start, however busy the machine is
ABORTED = -signal.SIGABRT


class Scene(NamedTuple):
    how: str  # "killed", "stopped", or what the odd rank does instead of the call
    tokens: str
    collective: str = ""  # a part of its name
    way: str = "forward"

    def __str__(self):
        return "-".join(part for part in self if part)


class Seen(NamedTuple):
    """By a rank that is left."""

    seconds: float  # from the loss to the error
    type: str
    message: str
    exit_code: int


def lose(scenes: Sequence[Scene], patience: float) -> dict[Scene, dict[int, Seen]]:
    """What the ranks that are left see in each scene, by rank; all scenes at the same time."""
    with tempfile.TemporaryDirectory(prefix="lost-ranks-") as folder:
        processes = {}
        for scene in scenes:
            Path(folder, str(scene)).mkdir()
            arguments = [(rank, scene, Path(folder, str(scene)), patience) for rank in range(RANKS)]
            processes[scene] = [SERVER.Process(target=_rank_main, args=each) for each in arguments]
        everyone = [process for of_scene in processes.values() for process in of_scene]
        for process in everyone:
            process.start()
        try:
            deadline = time.monotonic() + STARTS + 3 * patience
            for scene, of_scene in processes.items():
                for rank, process in enumerate(of_scene):
                    if rank != ODD_ONE or scene.how not in ("killed", "stopped"):
                        process.join(max(0.0, deadline - time.monotonic()))
            return {scene: dict(_seen(Path(folder, str(scene)), of_scene)) for scene, of_scene in processes.items()}
        finally:
            for process in everyone:
                process.kill()
                process.join()


def _seen(folder: Path, processes: Sequence[Any]) -> Iterator[tuple[int, Seen]]:
    lost = float((folder / "lost").read_text())
    for rank, process in enumerate(processes):
        if (folder / str(rank)).exists():
            at, kind, message = (folder / str(rank)).read_text().split("\n", 2)
            yield rank, Seen(float(at) - lost, kind, message, process.exitcode)


def _rank_main(rank: int, scene: Scene, folder: Path, patience: float) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    started = {"init_method": f"file://{folder}/rendezvous", "rank": rank, "world_size": RANKS}
    dist.init_process_group("gloo", **started, timeout=timedelta(seconds=STARTS))
    group = dist.new_group(list(range(RANKS)), timeout=timedelta(seconds=patience))
    step = _step_of(scene, rank, group)
    step()
    dist.barrier()
    happens = _happens_at(scene, folder) if rank == ODD_ONE else contextlib.nullcontext()
    try:
        with happens:
            if rank == ODD_ONE and scene.how == "a call less":
                (folder / "lost").write_text(str(time.time()))
            else:
                step()
            if rank == ODD_ONE and scene.how == "a call more":
                (folder / "lost").write_text(str(time.time()))
                step()
        dist.all_reduce(torch.ones(1000), group=group)  # as of other gradients
    except Exception as error:
        partial = folder / f"{rank}.partial"
        partial.write_text(f"{time.time()}\n{type(error).__name__}\n{error}")
        partial.rename(folder / str(rank))
    others = [other for other in range(RANKS) if other != ODD_ONE]
    while not all((folder / str(other)).exists() for other in others):  # none sees only that another one has ended
        time.sleep(0.01)


def _step_of(scene: Scene, rank: int, group: dist.ProcessGroup) -> Callable[[], None]:
    vocab = VocabShard.split(VOCAB, group, tokens=scene.tokens)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).requires_grad_()
    head = torch.randn(vocab.rows, WIDTH, generator=generator).requires_grad_()
    options = ChunkOptions(chunk_size=CHUNK, gradients=scene.way)
    return lambda: linear_cross_entropy(hidden, head, torch.arange(TOKENS), vocab=vocab, options=options).backward()


@contextlib.contextmanager
def _happens_at(scene: Scene, folder: Path) -> Iterator[None]:
    """The rank is lost before the collective of the scene."""
    methods = "_start", "gather_numbers", "sum_number"
    originals = {name: getattr(Collectives, name) for name in methods}

    def losing(original: Callable, name: str) -> Callable:
        def method(self, *arguments, **keywords):
            what = arguments[0] if name == "_start" else arguments[-1]
            if scene.how in ("killed", "stopped") and scene.collective in what:
                (folder / "lost").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL if scene.how == "killed" else signal.SIGSTOP)
            return original(self, *arguments, **keywords)

        return method

    for name, original in originals.items():
        setattr(Collectives, name, losing(original, name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(Collectives, name, original)
