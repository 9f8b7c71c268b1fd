"""LoRA and DoRA on the head under FSDP2 and ZeRO-3, on two ranks: the step of one plain process."""

import logging
import traceback
import warnings

import pytest
import torch

from chunked_ce import LazyLogits, LMHead
from tests.distributed.launch import run
from tests.integrations.test_lm_head_engines import OPTIONS, RANKS, batch, loss_of, new_model, whole_batch
from tests.integrations.training import Step, assert_same_step, exact_step, training_step

peft = pytest.importorskip("peft")
pytest.importorskip("deepspeed")

ADAPTERS = {
    "LoRA": {},
    "bias": {"lora_bias": True},
    "DoRA": {"use_dora": True},
}
ENGINES = {"fsdp": [], "fsdp, units of their own": ["lora_A", "lora_B"], "zero3": []}
CASES = [(engine, adapter) for engine in ENGINES for adapter in ADAPTERS]
COMPUTED = {("zero3", "DoRA"), ("fsdp, units of their own", "DoRA")}  # its norm needs a weight that is elsewhere


def adapted(name: str):
    model = new_model(False)
    config = {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": False, "r": 4, "lora_alpha": 8}
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(**config, **ADAPTERS[name])).train()


def sharded_by_fsdp(engine: str, model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, inner = init_device_mesh("cpu", (RANKS,)), model.base_model.model
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh)
    for name in ENGINES[engine]:
        fully_shard(getattr(inner.lm_head, name)["default"], mesh=mesh)
    fully_shard(model, mesh=mesh)

    def gradients():
        return {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.requires_grad}

    return model, gradients, torch.Tensor.backward, int


def sharded_by_zero(_engine: str, model):
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.0)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    def gradients():
        found = {name: safe_get_full_grad(p).float().clone() for name, p in trained.items()}
        engine.step()
        return found

    return engine, gradients, engine.backward, engine.destroy


def step_of(engine: str, adapter: str, rank: int):
    """The second step without an optimizer, and what was said of lazy logits."""
    model = LMHead.wrap(adapted(adapter), options=OPTIONS)
    shard = sharded_by_zero if engine == "zero3" else sharded_by_fsdp
    model, gradients, backward, end = shard(engine, model)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):  # ZeRO-3 records the first step, and goes by the record in the second
                model.zero_grad()
                loss = loss_of(model, rank, False)
                backward(loss)
                found = gradients()
        return Step(loss.detach().float(), found), [
            str(w.message) for w in caught if "Logits" in str(w.message) or "logits" in str(w.message)
        ]
    finally:
        end()


def attempt(case, rank: int):
    try:
        return step_of(*case, rank)
    except Exception:
        return traceback.format_exc()


def two_ranks(rank, world_size):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile this, for a minute
    deepspeed.utils.logger.setLevel(logging.ERROR)
    return {case: attempt(case, rank) for case in CASES}


@pytest.fixture(scope="module")
def results():
    return run(two_ranks, RANKS)


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_step_of_one_process(results, case):
    for result in results:
        assert not isinstance(result[case], str), result[case]
    model = adapted(case[1])
    plain, exact = (step(model, whole_batch(False)) for step in (training_step, exact_step))
    mean = sum(result[case][0].loss for result in results) / RANKS
    for step, said in (result[case] for result in results):
        assert_same_step(Step(mean, step.gradients), plain, exact)
        assert len(said) == (case in COMPUTED) and all("no plain LoRA (DoraLinear" in one for one in said), said


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_logits_stay_lazy(adapter):
    assert type(LMHead.wrap(adapted(adapter))(*batch(0)[:1]).logits) is LazyLogits
