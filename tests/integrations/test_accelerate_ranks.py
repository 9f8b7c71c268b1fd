"""A loop with Accelerate on two processes, under FSDP2 and ZeRO-3: wrapped or sharded heads train as the plain one."""

import itertools
import traceback
import warnings
from typing import NamedTuple

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from chunked_ce import ChunkOptions, LMHead
from tests.distributed.launch import run

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytest.importorskip("deepspeed")

from tests.integrations import sharded_trainings as s  # noqa: E402
from tests.integrations.sharded_fsdp_trainings import use_fsdp2  # noqa: E402
from tests.integrations.test_deepspeed import quiet_deepspeed  # noqa: E402

pytestmark = pytest.mark.thorough

RANKS, STEPS, ACCUMULATED = 2, 3, 2
CASES = list(itertools.product(("FSDP2", "ZeRO-3"), (True, False)))
BY = ("plain", "wrap", "shard")
ZERO3 = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": ACCUMULATED,
    "gradient_clipping": 0.1,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


class Run(NamedTuple):
    losses: list[float]
    state: dict[str, torch.Tensor]  # whole, on rank 0


def new_accelerator(engine: str) -> accelerate.Accelerator:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    if engine == "FSDP2":
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
        use_fsdp2(accelerator, state_dict_type="FULL_STATE_DICT", cpu_ram_efficient_loading=False)
        return accelerator
    # Accelerate knows DeepSpeed on GPUs; on CPUs it would take every process for the only one.
    accelerate.PartialState(cpu=True).distributed_type = accelerate.DistributedType.DEEPSPEED
    plugin = accelerate.DeepSpeedPlugin(hf_ds_config=ZERO3)
    return accelerate.Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=ACCUMULATED)


def train(engine: str, tied: bool, by: str) -> Run:
    accelerator = new_accelerator(engine)
    model = s.new_model(s.Training(tied=tied))
    if by == "wrap":
        LMHead.wrap(model, options=ChunkOptions(chunk_size=2))
    if by == "shard":
        ranks = init_device_mesh("cpu", (RANKS,)) if engine == "FSDP2" else None
        LMHead.shard(model, ranks, options=ChunkOptions(chunk_size=2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loader = torch.utils.data.DataLoader(s.Rows(2 * RANKS * ACCUMULATED * STEPS), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "LazyLogits")
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                losses.append(accelerator.gather(loss.detach()[None]).mean().item())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
    return Run(losses, accelerator.get_state_dict(model) or {})


def on_rank(rank, world_size):
    quiet_deepspeed()
    found = {}
    for case in itertools.product(CASES, BY):
        (engine, tied), by = case
        try:
            found[case] = train(engine, tied, by)
        except Exception:
            found[case] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def on_ranks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", "0")
        return run(on_rank, RANKS)


@pytest.mark.parametrize("by", BY[1:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_training(on_ranks, case, by):
    for rank, found in enumerate(on_ranks):
        ours, plain = found[case, by], found[case, "plain"]
        assert not isinstance(plain, str), plain
        assert not isinstance(ours, str), ours
        assert len(plain.losses) == ACCUMULATED * STEPS and len(set(plain.losses)) == len(plain.losses)
        assert ours.losses == pytest.approx(plain.losses, rel=1e-6)
        assert ours.state.keys() == plain.state.keys() and (plain.state or rank)
        for name, value in plain.state.items():
            assert (ours.state[name] - value).norm() <= 1e-6 * value.norm(), name
