"""A sharded head in Transformers' `Trainer` under DeepSpeed: one process on the whole batch, checkpoints included."""

import importlib.util
import traceback

import pytest

from tests.distributed.launch import run

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.integrations import sharded_trainings as s  # noqa: E402

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
]

STAGES = (2, 3)
SETTINGS = (*s.ADAM, ("max_grad_norm", 0.1), ("save_steps", 2), ("gradient_accumulation_steps", 2))


def training(stage: int, *more: tuple[str, object]) -> s.Training:
    return s.Training(tied=stage == 2, settings=(*SETTINGS, *more))


def engine(stage: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }


def on_rank(rank, world_size, folder):
    import accelerate

    from tests.integrations.test_deepspeed import quiet_deepspeed

    quiet_deepspeed()
    found = {}
    for stage in STAGES:
        for start in (None, folder / f"{stage} None" / "checkpoint-2"):
            accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
            name = f"{stage} {start and start.name}"
            try:
                its = training(stage, ("deepspeed", engine(stage)))
                found[name] = s.run_trainer(its, folder / name, world_size, start)
            except Exception:
                found[name] = traceback.format_exc()
    return found


def test_trainer_under_zero(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    ranks = run(on_rank, s.RANKS, tmp_path)
    for stage in STAGES:
        expected = s.run_trainer(training(stage), tmp_path / f"plain {stage}", 1)
        for name in (f"{stage} None", f"{stage} checkpoint-2"):
            for found in (rank[name] for rank in ranks):
                assert not isinstance(found, str), found
                assert found.losses == pytest.approx(expected.losses, rel=1e-6)
                assert found.norms == pytest.approx(expected.norms, rel=1e-5)
                assert found.evaluation == pytest.approx(expected.evaluation, rel=1e-6)
            saved = type(s.new_model(training(stage))).from_pretrained(tmp_path / name / "final").state_dict()
            for key, value in expected.state.items():
                assert (saved[key] - value).norm() <= 1e-6 * value.norm(), key
