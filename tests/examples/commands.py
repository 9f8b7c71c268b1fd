"""Runs the examples as commands, each with a hard limit after which none of its processes is left."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
TINY = ["--width=16", "--depth=1", "--heads=2", "--context=16"]
LIMIT = 900.0  # seconds, the last resort on a busy machine; a command takes 5 to 10


class Command:
    """A started example. Leaving the `with` block kills whatever of it still runs, as `kill -9` does."""

    def __init__(self, *arguments: object, log: Path):
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment |= {"OMP_WAIT_POLICY": "passive"}  # threads that wait leave the processors to other tests
        environment |= {"TORCHDYNAMO_DISABLE": "1"}  # or an optimizer of DeepSpeed's imports inductor, which takes long
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, arguments)], stdout=output, stderr=output, env=environment
            )
        self.deadline = time.monotonic() + LIMIT

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            tree = psutil.Process(self.process.pid)
            processes = [tree, *tree.children(recursive=True)]
        except psutil.NoSuchProcess:
            processes = []
        for process in processes:
            process.kill()
        self.process.wait()

    def wait_until(self, happened: Callable[[], bool]) -> None:
        while not happened():
            assert time.monotonic() < self.deadline, f"took more than {LIMIT} s\n{self.log.read_text()}"
            time.sleep(0.01)

    def status(self) -> int:
        self.wait_until(lambda: self.process.poll() is not None)
        return self.process.returncode


def run(*arguments: object, log: Path) -> str:
    """Runs to the end, which must be a good one; returns what was printed.

    Once more where torch's own threads abort a rank that has finished its work, as they sometimes do at its exit.
    """
    for last in (False, True):
        with Command(*arguments, log=log) as command:
            ended_well, printed = command.status() == 0, log.read_text()
        if ended_well:
            return printed
        assert not last and "terminate called without an active exception" in printed, printed


def metrics(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(out: Path) -> list[float]:
    records = metrics(out)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]
