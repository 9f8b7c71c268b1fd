"""A training under DeepSpeed with a sharded head goes on with another number of ranks."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.distributed.launch import run
from tests.distributed.token_training import BATCH
from tests.integrations import sharded_engine as e
from tests.integrations.test_deepspeed import end, quiet_deepspeed

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
]

TAG = f"global_step{e.SAVED}"
# Under ZeRO-3, DeepSpeed 0.19.8 loads universal checkpoints with the first group's options for all groups.
STAGES = (0, 1, 2)


def two_ranks(rank, world_size, folder):
    quiet_deepspeed()
    found = {}
    for stage in STAGES:
        engine = e.new_adam_engine(e.Case(stage, steps=1, clip=True))
        for step in range(e.ALL_STEPS):
            e.train(engine, e.batch_of_step(step, rank))
            if step + 1 == e.SAVED:
                engine.save_checkpoint(folder / str(stage))
        found[stage] = e.whole_masters(engine)
        end(engine)
    return found


def one_rank(rank, world_size, folder):
    quiet_deepspeed()
    found = {}
    for stage in STAGES:
        settings = {"train_micro_batch_size_per_gpu": BATCH * e.RANKS, "checkpoint": {"load_universal": stage > 0}}
        engine = e.new_adam_engine(e.Case(stage, steps=1, clip=True), **settings)
        engine.load_checkpoint(folder / str(stage), tag=TAG + "_universal" * (stage > 0))
        for step in range(e.SAVED, e.ALL_STEPS):
            of_ranks = [batch for one in range(e.RANKS) for batch in e.batch_of_step(step, one)]
            e.train(engine, [tuple(map(torch.cat, zip(*of_ranks, strict=True)))])
        found[stage] = e.whole_masters(engine)
        end(engine)
    return found


def make_universal(folder):
    universal = folder.with_name(f"{TAG}_universal")
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    folders = ["--input_folder", str(folder), "--output_folder", str(universal)]
    subprocess.run([*command, *folders], check=True, env=os.environ | {"DS_ACCELERATOR": "cpu"})
    for path in folder.glob("sharded_head_*"):
        shutil.copy(path, universal)


def test_another_number_of_ranks(tmp_path):
    expected = run(two_ranks, e.RANKS, tmp_path)[0]
    for stage in STAGES[1:]:
        make_universal(tmp_path / str(stage) / TAG)
    (found,) = run(one_rank, 1, tmp_path)
    for stage, state in expected.items():
        for name, value in state.items():
            assert (found[stage][name] - value).norm() <= 1e-6 * value.norm(), (stage, name)
