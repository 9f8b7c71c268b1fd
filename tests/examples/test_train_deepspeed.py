"""The DeepSpeed example, as real processes over gloo: a launch takes seconds, so that tests share launches."""

import json
import socket
from pathlib import Path

import pytest
import torch
from common.run_directory import RunDirectory

from tests.examples.commands import EXAMPLES, TINY, TORCHRUN, Command, losses, metrics, run

SCRIPT = EXAMPLES / "train_deepspeed.py"
STEPS, SAVE_EVERY = 16, 4

# Losses are about 12, where float32 has a resolution of 1e-6. AdamW's updates are normalised, so that a relative error
# of 1e-6 in the gradients moves a logit by 1e-6 * lr * |h|_1 = 5e-8 a step, less than that. Ten units leave room for
# the order of the sums and all steps (measured: 3). A mean of means is off by 7e-3.
TOLERANCE = 1e-5


def write_config(path: Path, *, stage: int, batch: int, micro_batches: int) -> Path:
    config = json.loads((EXAMPLES / "ds_config.json").read_text())
    config |= {"train_micro_batch_size_per_gpu": batch, "gradient_accumulation_steps": micro_batches}
    config["bf16"]["enabled"] = False
    config["zero_optimization"] |= {"stage": stage, "stage3_param_persistence_threshold": 0}
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, text) -> list:
    """Of two ranks with two micro-batches, whose tokens are masked to uneven numbers."""
    config = write_config(tmp_path_factory.mktemp("config") / "zero2.json", stage=2, batch=2, micro_batches=2)
    settings = ["--text", text, "--mask-prompt", "--steps", STEPS, "--save-every", SAVE_EVERY]
    return [SCRIPT, *TINY, *settings, "--deepspeed-config", config]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, arguments) -> Path:
    """What two ranks with the chunked loss left behind, uninterrupted."""
    out = tmp_path_factory.mktemp("trained") / "out"
    printed = run(*TORCHRUN, *arguments, "--out", out, log=out.with_name("log"))
    assert f"step   {STEPS}/{STEPS}  loss" in printed
    return out


def test_the_model_learns(trained):
    assert len(losses(trained)) == STEPS
    assert sum(losses(trained)[-4:]) < sum(losses(trained)[:4]) - 4 * 0.05


def test_metrics(trained):
    for record in metrics(trained):
        assert record["tokens"] == 2 * 2 * 2 * 16
        assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["seconds"])
        assert 0 < record["peak_memory_bytes"] < 2**30
    assert metrics(trained)[-1]["lr"] == pytest.approx(6e-4)


@pytest.mark.thorough
def test_full_logits_in_one_batch_give_the_same_losses(tmp_path, arguments, trained):
    config = write_config(tmp_path / "one.json", stage=2, batch=8, micro_batches=1)
    out = tmp_path / "out"
    run(*arguments, "--deepspeed-config", config, "--loss=full", "--out", out, log=tmp_path / "log")
    assert losses(out) == pytest.approx(losses(trained), abs=TOLERANCE, rel=0)


@pytest.mark.thorough  # DeepSpeed's launcher; ZeRO 3 is tested by tests/integrations/test_deepspeed.py as well
@pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed's launcher would take a GPU for each rank")
def test_zero_3_by_the_deepspeed_launcher_gives_the_same_losses(tmp_path, arguments, trained):
    config = write_config(tmp_path / "zero3.json", stage=3, batch=2, micro_batches=2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus=2", f"--master_port={port}"]
    out = tmp_path / "out"
    run(*launcher, *arguments, "--deepspeed-config", config, "--out", out, log=tmp_path / "log")
    assert losses(out) == pytest.approx(losses(trained), abs=TOLERANCE, rel=0)


@pytest.mark.thorough  # tests/integrations/test_sharded_head_deepspeed.py trains such heads as well
def test_a_sharded_head_gives_the_same_losses(tmp_path, arguments, trained):
    config = write_config(tmp_path / "zero3.json", stage=3, batch=2, micro_batches=2)
    command = [*TORCHRUN, *arguments, "--deepspeed-config", config, "--shard-head", "--out", tmp_path / "out"]
    assert "and 65,536 rows of the head on rank 0" in run(*command, "--steps", 4, log=tmp_path / "log")
    assert losses(tmp_path / "out") == pytest.approx(losses(trained)[:4], abs=TOLERANCE, rel=0)


@pytest.mark.thorough  # tests/examples/test_run_directory.py has what a killed run leaves
def test_a_killed_run_resumes_to_the_very_same_losses(tmp_path, arguments, trained):
    for attempt in range(5):  # a busy machine may kill too late to prove anything
        out = tmp_path / f"out{attempt}"
        with Command(*TORCHRUN, *arguments, "--out", out, log=tmp_path / "log") as command:
            command.wait_until(lambda out=out: len(metrics(out)) > SAVE_EVERY + 1)
        saved = (out / "latest").read_text()
        if saved != f"step{STEPS}":
            break
    assert saved != f"step{STEPS}"

    # As if the kill had come while the next checkpoint and the next line of metrics were being written.
    interrupted = out / f"step{int(saved.removeprefix('step')) + SAVE_EVERY}"
    interrupted.mkdir(exist_ok=True)
    (interrupted / "mp_rank_00_model_states.pt").write_bytes(b"half a file")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": ')

    run(*TORCHRUN, *arguments, "--out", out, "--resume", log=tmp_path / "log")
    assert losses(out) == losses(trained)


def test_latest_appears_after_the_checkpoint_and_by_one_rename(tmp_path, monkeypatch):
    class Engine:
        global_steps = 7

        def save_checkpoint(self, path, tag, save_latest):
            assert (tag, save_latest) == ("step7", False)
            assert not (tmp_path / "latest").exists()

    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    RunDirectory(tmp_path).save(Engine())
    assert (tmp_path / "latest").read_text() == "step7"
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
