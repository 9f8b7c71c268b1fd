"""TRL's SFT on two processes, under ZeRO-3 and under FSDP2: with this library as without, and without the logits."""

import importlib.util
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from chunked_ce import LMHead
from tests.distributed.launch import run
from tests.integrations.sharded_fsdp_trainings import use_fsdp2
from tests.integrations.test_transformers_trainer import ZERO3
from tests.packages import trainings as t
from tests.packages import trl_trainers as r

trl = pytest.importorskip("trl")
accelerate = pytest.importorskip("accelerate")

from chunked_ce.integrations import trl as integration  # noqa: E402

RANKS = 2
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
ENGINES = {"FSDP2": [], "ZeRO-3": [needs_deepspeed]}
BY = ("trl.install", "LMHead.shard and trl.install")


class WithFSDP2(trl.SFTTrainer):
    """On a CPU, Accelerate's own code for FSDP2 runs once the state says that it is in use."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        use_fsdp2(self.accelerator, state_dict_type="FULL_STATE_DICT", cpu_ram_efficient_loading=False)
        self.is_fsdp_enabled = True


def build(engine: str, by: str | None, folder: Path) -> Any:
    settings: dict[str, Any] = {"max_length": 128}
    if engine == "ZeRO-3":
        # By default a bucket of gradients holds 2 GB.
        more = {"stage3_gather_16bit_weights_on_model_save": True, "reduce_bucket_size": t.VOCAB * t.WIDTH}
        settings |= {"deepspeed": ZERO3 | {"zero_optimization": ZERO3["zero_optimization"] | more}, "use_cpu": False}
        settings["accelerator_config"] = {"use_configured_state": True}
        # Accelerate knows DeepSpeed on GPUs; on CPUs it would take every process for the only one.
        accelerate.PartialState(cpu=True).distributed_type = accelerate.DistributedType.DEEPSPEED
    model = t.new_model(hidden_size=8)  # an engine's flat buffers hold several of its matrices
    if by is not None:
        integration.install(options=t.OPTIONS)
    if by == BY[1]:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (RANKS,)) if engine == "FSDP2" else None
        LMHead.shard(model, mesh, options=t.OPTIONS)
    trainer = WithFSDP2 if engine == "FSDP2" else trl.SFTTrainer
    return r.build(trainer, trl.SFTConfig, folder, r.texts(), model=model, **settings)


def on_rank(rank: int, world_size: int, folder: Path, engine: str) -> dict[str | None, t.Outcome | str]:
    if engine == "ZeRO-3":
        from tests.integrations.test_deepspeed import quiet_deepspeed

        quiet_deepspeed()
    found: dict[str | None, t.Outcome | str] = {}
    for by in (None, *BY):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        trainers = []

        def new_trainer(wrapped, folder, by=by, trainers=trainers):
            trainers.append(build(engine, by, folder))
            return trainers[0]

        try:
            its = t.outcome(new_trainer, by is not None, folder / str(rank) / str(by))
            state = trainers[0].accelerator.get_state_dict(trainers[0].model_wrapped)
            found[by] = its._replace(before={}, parameters=state or {})
        except Exception:
            found[by] = traceback.format_exc()
        finally:
            integration.uninstall()
    return found


@pytest.mark.parametrize("engine", [pytest.param(name, marks=marks) for name, marks in ENGINES.items()])
def test_the_same_training(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    for rank, found in enumerate(run(on_rank, RANKS, tmp_path, engine)):
        plain = found[None]
        assert not isinstance(plain, str), plain
        assert bool(plain.parameters) == (rank == 0)
        for by in BY:
            ours = found[by]
            assert not isinstance(ours, str), ours
            assert ours.losses == pytest.approx(plain.losses, rel=1e-6)
            assert ours.parameters.keys() == plain.parameters.keys()
            for name, value in plain.parameters.items():
                error = (ours.parameters[name] - value).abs().max()
                assert error <= t.FP32_TOLERANCE * value.abs().max(), f"{by}: {name}"
            t.assert_small(ours, r.TOKENS, plain=plain)
            assert not ours.warnings
            if rank == 0:
                t.record(ours, plain, r.TOKENS, t.Row(f"TRL {trl.__version__}", "SFT", f"{engine}, 2 processes", by))
