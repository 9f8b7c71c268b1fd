"""DeepSpeed on two ranks trains as one process does on the whole batch, whatever it divides by."""

import gc
import importlib.util
import logging
import traceback
from typing import NamedTuple

import pytest
import torch

import chunked_ce
from chunked_ce.integrations.deepspeed import token_mean
from tests.distributed.launch import run
from tests.distributed.token_training import (
    LEARNING_RATE,
    State,
    mean_of_micro_batch,
    new_model,
    one_process,
    step_error,
    whole_batch,
    window,
)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BF16_EPSILON = torch.finfo(torch.bfloat16).eps


class Case(NamedTuple):
    stage: int
    steps: int = 3
    dtype: str = "fp32"
    data: str = "uneven"  # a key of COUNTED
    backward: str = "engine"  # how backward is called: see `train`
    settings: str = ""  # a key of SETTINGS
    ranks: str = "data"  # what the two ranks are: data, sequence, mesh (sequence, by mesh_param) or tensor

    def __str__(self):
        return f"zero{self.stage}-" + "-".join(str(value) for value in self[1:] if value)


# What might change the division, on top of the plain configuration. "zero" updates zero_optimization.
SETTINGS = {
    "": {},
    "sum": {"gradient_allreduce_op": "sum"},
    "predivide 2": {"gradient_predivide_factor": 2.0, "zero": {"reduce_scatter": False}},
    "predivide 3": {"gradient_predivide_factor": 3.0, "zero": {"reduce_scatter": False}},
    "prescale": {"prescale_gradients": True, "zero": {"reduce_scatter": False}},
    "all-reduce": {"zero": {"reduce_scatter": False}},
    "not contiguous": {"zero": {"reduce_scatter": False, "contiguous_gradients": False}},
    "small bucket": {"zero": {"reduce_scatter": False, "reduce_bucket_size": 500}},
    "unmanaged": {"managed_gradient_accumulation": False},
    "fp32 accumulation": {"data_types": {"grad_accum_dtype": "fp32"}},
}


def cases(stages=(0, 1, 2, 3), **fields) -> list[Case]:
    return [Case(stage, **fields) for stage in stages]


DATA_PARALLEL = [
    *(case for dtype in DTYPES for steps in (1, 3) for case in cases(dtype=dtype, steps=steps)),
    *cases(data="idle rank"),
    *cases(data="idle rank", dtype="bf16"),
    *cases(backward="unscaled"),
    *cases(backward="one tensor"),
    *cases((1, 2, 3), backward="loss.backward"),
    *cases((0, 1, 2), settings="sum"),
    *cases((0, 1, 2), settings="predivide 2"),
    *cases(settings="predivide 3"),
    *cases(settings="prescale"),
    *cases(settings="all-reduce"),
    *cases((3,), settings="not contiguous"),
    *cases((3,), settings="small bucket"),
    *cases(settings="unmanaged"),
    *cases((1, 2, 3), settings="fp32 accumulation", dtype="bf16"),
]
NOTHING = [case for dtype in DTYPES for case in cases(data="nothing", dtype=dtype)]
MEAN_OF_MEANS = cases(backward="mean of means")

# The model has no attention, so a shard of a sequence is like any other tokens.
OTHER_PARALLEL = [
    *cases(ranks="sequence"),
    *cases(ranks="sequence", backward="unscaled"),
    *cases(ranks="sequence", settings="all-reduce"),
    *cases((0, 1, 2), ranks="sequence", settings="sum"),
    *cases((0,), ranks="sequence", settings="predivide 2"),
    *cases(ranks="sequence", settings="predivide 3"),
    *cases((3,), ranks="sequence", settings="not contiguous"),
    *cases((3,), ranks="mesh"),
    *cases(ranks="tensor"),
]
REFUSED = {
    **dict.fromkeys(cases((3,), settings="predivide 2"), "gradient_predivide_factor=2.0 on 2 ranks"),
    **dict.fromkeys(cases((1, 2), ranks="sequence", settings="predivide 2"), "gradient_predivide_factor=2.0"),
    **dict.fromkeys(cases((3,), ranks="sequence", settings="small bucket"), "reduce_bucket_size=500"),
    **dict.fromkeys(cases((0, 1, 2), ranks="mesh"), "sequence-parallel ranks, but reduces over"),
    **dict.fromkeys(cases(backward="two of three"), "gradient_accumulation_steps=3 micro-batches, held 2"),
}

GRADIENTS = ("forward", "backward")  # both ways of ChunkOptions


def new_engine(case: Case, **loss_keywords):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": case.steps,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": case.dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Or ZeRO-3 leaves parameters as small as these whole, and proves nothing.
        "zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 0},
    }
    settings = dict(SETTINGS[case.settings])
    config["zero_optimization"].update(settings.pop("zero", {}))
    config.update(settings)
    parallel = {}
    if case.ranks == "sequence":
        parallel["mpu"] = sequence_parallel_ranks()
    elif case.ranks == "mesh":
        parallel["mesh_param"] = (1, 2)
    elif case.ranks == "tensor":
        # The layers stay whole, since only the groups matter here.
        whole = {"use_default_specs": False, "layer_specs": [{"patterns": [".*"], "partition_type": "skip"}]}
        config["tensor_parallel"] = {"autotp_size": 2, "partition_config": whole}
    model = new_model(**loss_keywords)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, **parallel)[0]


def sequence_parallel_ranks():
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    deepspeed.init_distributed(dist_backend="gloo")
    if parallel_state_sp._SEQUENCE_PARALLEL_GROUP is None:
        parallel_state_sp.initialize_sequence_parallel(sequence_parallel_size=2)
    return parallel_state_sp


def quiet_deepspeed():
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile this, for a minute
    deepspeed.utils.logger.setLevel(logging.ERROR)
    gc.freeze()  # ZeRO-3 collects garbage for every engine, which would look at all that was imported each time


def end(engine):
    from deepspeed.utils import groups

    engine.destroy()
    groups.mpu = groups.mesh_device = None  # the next engine has ranks of its own


def masters(engine) -> State:
    """The fp32 parameters that the optimizer steps."""
    from deepspeed.utils import safe_get_full_fp32_param

    named = dict(engine.module.named_parameters())
    if engine.zero_optimization_stage() > 0:
        full = [safe_get_full_fp32_param(parameter) for parameter in named.values()]
    else:
        full = engine.optimizer.fp32_groups[0] if engine.bfloat16_enabled() else named.values()
    return {name: parameter.detach().float().clone() for name, parameter in zip(named, full, strict=True)}


def train(engine, batches, backward: str) -> float:
    """One window and its step; the reported loss."""
    targets = [target for _, target in batches]
    if backward == "one tensor":
        targets = torch.stack(targets)
    elif backward == "two of three":
        targets = targets[:2]
    scale_wrt_gas = backward != "unscaled"
    mean = token_mean(engine, targets, scale_wrt_gas=scale_wrt_gas)
    loss_sums = []
    for tokens, target in batches:
        loss_sum = engine(tokens, target)
        loss_sums.append(loss_sum)
        if backward == "loss.backward":
            mean(loss_sum).backward()
        elif backward == "mean of means":
            engine.backward(mean_of_micro_batch(target)(loss_sum))
        else:
            engine.backward(mean(loss_sum), scale_wrt_gas=scale_wrt_gas)
        if engine.managed_gradient_accumulation():
            engine.step()
    if not engine.managed_gradient_accumulation():
        engine.step()
    return mean.report(loss_sums).item()


def one_step(case: Case, rank: int, **loss_keywords) -> tuple[State, float]:
    engine = new_engine(case, **loss_keywords)
    try:
        # Tensor-parallel ranks hold the same tokens.
        batches = window(case.data, 0 if case.ranks == "tensor" else rank, case.steps)
        loss = train(engine, batches, case.backward)
        return masters(engine), loss
    finally:
        end(engine)


def attempt(function, *args, **keywords):
    """The result, or the error as text: a case that fails on all ranks must not take the others along."""
    try:
        return function(*args, **keywords)
    except Exception:
        return traceback.format_exc()


def use_head_inside(rank: int, gradients: str) -> tuple[State, float]:
    options = chunked_ce.ChunkOptions(gradients=gradients, chunk_size=4)
    return one_step(Case(3), rank, options=options)


def use_head_outside(rank: int):
    engine = new_engine(Case(3))
    try:
        tokens, target = window("uneven", rank, 1)[0]
        head = engine.module.head.weight
        assert head.numel() == 0
        chunked_ce.linear_cross_entropy(torch.randn(*tokens.shape, head.ds_shape[1]), head, target)
    finally:
        end(engine)


def backward_outside_of_the_gather(rank: int, gradients: str):
    import deepspeed

    engine = new_engine(Case(3))
    try:
        tokens, target = window("uneven", rank, 1)[0]
        head = engine.module.head.weight
        options = chunked_ce.ChunkOptions(gradients=gradients)
        with deepspeed.zero.GatheredParameters([head]):
            hidden = torch.randn(*tokens.shape, head.ds_shape[1], requires_grad=True)
            loss = chunked_ce.linear_cross_entropy(hidden, head, target, options=options)
        loss.backward()
    finally:
        end(engine)


def two_ranks(rank, world_size):
    quiet_deepspeed()
    results = {case: attempt(one_step, case, rank) for case in (*DATA_PARALLEL, *NOTHING, *MEAN_OF_MEANS)}
    results.update({gradients: attempt(use_head_inside, rank, gradients) for gradients in GRADIENTS})
    results["outside"] = attempt(use_head_outside, rank)
    results.update({("gathered", way): attempt(backward_outside_of_the_gather, rank, way) for way in GRADIENTS})
    # AutoTP changes DeepSpeed for good: its cases come last.
    results.update({case: attempt(one_step, case, rank) for case in (*REFUSED, *OTHER_PARALLEL)})
    return results


@pytest.fixture(scope="module")
def results():
    return run(two_ranks, 2)


def result_of(results, case) -> list:
    """What the case gave on each rank, where it did not fail."""
    for result in results:
        assert not isinstance(result[case], str), result[case]
    return [result[case] for result in results]


def assert_result_of_one_process(results, case: Case):
    dtype = DTYPES[case.dtype]
    batches = whole_batch(case.data, case.steps)
    if case.ranks == "tensor":
        batches = window(case.data, 0, case.steps)
    exact, exact_loss = one_process(batches, torch.float64, start=dtype)
    if case.dtype == "fp32":
        step_bound = loss_bound = 1e-6
    else:
        # Each micro-batch's gradient is rounded to bf16 and added up, as on one process that adds up in bf16:
        # as many roundings in another order, so an error like its own. The loss is uncertain by the rounding
        # of the hidden states.
        single, _ = one_process(batches, dtype)
        step_bound = 2 * step_error(single, exact, dtype)
        loss_bound = BF16_EPSILON
    for state, loss in results:
        assert step_error(state, exact, dtype) <= step_bound
        assert loss == pytest.approx(exact_loss, rel=loss_bound)


@pytest.mark.parametrize("case", DATA_PARALLEL, ids=str)
def test_step_equals_that_of_one_process(results, case):
    assert_result_of_one_process(result_of(results, case), case)


@pytest.mark.parametrize("case", NOTHING, ids=str)
def test_nothing_counted_anywhere_changes_nothing(results, case):
    initial = new_model().to(DTYPES[case.dtype]).state_dict()
    for state, loss in result_of(results, case):
        assert all(torch.equal(state[name], initial[name].float()) for name in initial)
        assert loss == 0.0


@pytest.mark.parametrize("case", MEAN_OF_MEANS, ids=str)
def test_the_mean_of_means_would_be_another_step(results, case):
    exact, _ = one_process(whole_batch(case.data, case.steps), torch.float64, start=torch.float32)
    for state, _ in result_of(results, case):
        assert step_error(state, exact, torch.float32) > 0.1


@pytest.mark.parametrize("case", OTHER_PARALLEL, ids=str)
def test_step_with_sequence_or_tensor_parallel_ranks(results, case):
    assert_result_of_one_process(result_of(results, case), case)


@pytest.mark.parametrize(("case", "message"), REFUSED.items(), ids=str)
def test_what_no_divisor_can_put_right_is_refused(results, case, message):
    for result in results:
        assert isinstance(result[case], str) and "ValueError" in result[case]
        assert message in result[case]


# Under ZeRO-3 the head is partitioned, and whole only inside engine.forward.


@pytest.mark.parametrize("gradients", GRADIENTS)
def test_partitioned_head_inside_the_engine(results, gradients):
    assert_result_of_one_process(result_of(results, gradients), Case(3))


def test_partitioned_head_outside_the_engine_is_a_clear_error(results):
    for result in results:
        assert "ValueError" in result["outside"] and "ZeRO-3" in result["outside"]


@pytest.mark.parametrize("gradients", GRADIENTS)
def test_backward_outside_of_the_gather_says_that_the_head_is_gone(results, gradients):
    for result in results:
        said = result["gathered", gradients]
        assert "RuntimeError: linear_weight had shape" in said and "in the forward and has shape (0,)" in said
        assert "partitioned by DeepSpeed" in said and "loss and backward both into one block" in said
        assert "allowed are" not in said


# Without an engine


@pytest.mark.parametrize("engine", [None, torch.nn.Linear(2, 2)])
def test_only_an_engine_will_do(engine):
    with pytest.raises(TypeError, match=r"engine must be what deepspeed\.initialize returned, was a "):
        token_mean(engine, [torch.tensor([1])])
