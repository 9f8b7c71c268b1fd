"""The files of a training run, which can be killed at any moment and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class RunDirectory:
    """Settings, one line of metrics per step, and DeepSpeed's checkpoints. Only rank 0 writes the first two."""

    def __init__(self, path: Path):
        self.path = path
        self.settings, self.metrics, self.latest = (
            path / "settings.json",
            path / "metrics.jsonl",
            path / "latest",
        )

    def check(self, settings: dict, resume: bool) -> None:
        """Raises `ValueError` if the directory holds a run that this one would overwrite or cannot continue."""
        if not self.settings.exists():
            return
        if not resume:
            raise ValueError(f"{self.path} already holds a run: --resume goes on with it, or choose another --out")
        before = json.loads(self.settings.read_text())
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(f"cannot resume {self.path}: its {name} is {before.get(name)}, not {value}")

    def start(self, settings: dict, step: int) -> None:
        """Records the settings and drops the metrics of steps that the checkpoint does not contain."""
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        replace(self.metrics, "".join(f"{line}\n" for line in lines[:step]))
        replace(self.settings, json.dumps(settings, indent=1))

    def log(self, record: dict) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def load(self, engine: DeepSpeedEngine) -> None:
        """Loads the last complete checkpoint, if any, into the engine."""
        if self.latest.exists():
            engine.load_checkpoint(str(self.path))

    def records(self) -> list[dict]:
        """The metrics so far, one record per step."""
        return [json.loads(line) for line in self.metrics.read_text().splitlines()]

    def save(self, engine: DeepSpeedEngine) -> None:
        """Writes a checkpoint, then its name into `latest`.

        DeepSpeed's own `latest` can name a checkpoint that other ranks are still writing, since rank 0 does
        not wait for them. After a kill at that moment, there would be nothing to resume from.
        """
        tag = f"step{engine.global_steps}"
        engine.save_checkpoint(str(self.path), tag=tag, save_latest=False)  # ends with a barrier
        if dist.get_rank() == 0:
            replace(self.latest, tag)


def replace(path: Path, text: str) -> None:
    """Writes a file such that a kill at any moment leaves either the old text or the new."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)
