"""A sharded head under DeepSpeed: the step of one process, checkpoints, and errors instead of a wrong training."""

import importlib.util

import pytest
import torch

from tests.distributed.covering import covering
from tests.distributed.launch import run
from tests.integrations import sharded_engine
from tests.integrations.sharded_engine import Case, Model
from tests.integrations.test_deepspeed import BF16_EPSILON, DTYPES, attempt, quiet_deepspeed

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")

STAGES = (0, 1, 2, 3)
DIMENSIONS = {
    "stage": STAGES,
    "tied": (True, False),
    "steps": (1, 3),
    "data": ("uneven", "idle rank"),
    "loss": ("cross-entropy", "policy"),
    "clip": (True, False),
    "dtype": ("fp32", "bf16"),
    "backward": ("engine", "loss"),
}


def is_possible(case: dict) -> bool:
    return case["stage"] > 0 or case["backward"] == "engine"  # below ZeRO-1 there is only engine.backward


STEPS = [
    *(Case(**case) for case in covering(DIMENSIONS, is_possible, seed=0)),
    *(Case(stage, settings="sum", clip=True) for stage in (0, 1, 2)),
    *(Case(stage, settings="unmanaged", clip=True) for stage in STAGES),
    *(Case(stage, settings="offload", clip=True, dtype="bf16") for stage in (1, 2, 3)),
    *(Case(stage, settings="sequence", clip=True) for stage in (0, 2, 3)),
    Case(1, settings="fp32 accumulation", clip=True, dtype="bf16"),
    Case(1, settings="no norm"),
    Case(2, backward="overflow", dtype="bf16", steps=1),
    *(Case(stage, frozen=True, tied=False, clip=True) for stage in (0, 3)),
]
NOTHING = [Case(stage, data="nothing", clip=True) for stage in STAGES]
RESUMED = [Case(0, steps=1, clip=True), Case(2, False, 1, clip=True), Case(3, steps=1, clip=True)]
RESUMED_BF16 = [Case(1, steps=1, dtype="bf16")]


def two_ranks(rank, world_size, folder):
    quiet_deepspeed()
    found = {case: attempt(sharded_engine.one_step, case, rank) for case in (*STEPS, *NOTHING)}
    for number, case in enumerate((*RESUMED, *RESUMED_BF16)):
        found["resumed", case] = attempt(sharded_engine.resumed, case, rank, f"{folder}/{number}")
    found["refused"] = attempt(sharded_engine.refusals, rank)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run(two_ranks, sharded_engine.RANKS, str(tmp_path_factory.mktemp("checkpoints")))


def result_of(results, case) -> list:
    for result in results:
        assert not isinstance(result[case], str), result[case]
    return [result[case] for result in results]


def step_error(case: Case, state: dict, exact: dict) -> float:
    """The largest relative error of a parameter's step, against the exact step in float64."""
    initial = Model(case.tied, case.loss).to(DTYPES[case.dtype]).double().state_dict()
    steps = {name: (exact[name] - initial[name]).norm() for name in exact}
    assert state.keys() == exact.keys() == initial.keys()
    for name, step in steps.items():
        assert step > 0 or torch.equal(state[name].double(), exact[name])
    return max(((state[name].double() - exact[name]).norm() / step).item() for name, step in steps.items() if step)


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_step_equals_that_of_one_process(results, case):
    dtype = DTYPES[case.dtype]
    exact, exact_loss, exact_norm = sharded_engine.reference(case, torch.float64, dtype)
    if case.dtype == "fp32":
        bound = loss_bound = 1e-6
    else:
        # As in test_deepspeed.py: as many roundings to bf16 as on one process, in another order.
        single, _, _ = sharded_engine.reference(case, dtype, dtype)
        bound, loss_bound = 2 * step_error(case, single, exact), BF16_EPSILON
    for state, loss, norm in result_of(results, case):
        assert step_error(case, state, exact) <= bound
        assert loss == pytest.approx(exact_loss, rel=loss_bound)
        if norm is not None:
            assert norm == pytest.approx(exact_norm, rel=2 * loss_bound)
    assert exact_norm > 2 * sharded_engine.MOST
    norms = [norm for _, _, norm in result_of(results, case)]
    has_none = case.settings == "no norm" or (case.stage == 0 and case.dtype == "fp32" and not case.clip)
    assert all((norm is None) == has_none for norm in norms)


@pytest.mark.parametrize("case", NOTHING, ids=str)
def test_nothing_counted_anywhere_changes_nothing(results, case):
    initial = Model(case.tied, case.loss).state_dict()
    for state, loss, _ in result_of(results, case):
        assert all(torch.equal(state[name], initial[name]) for name in initial)
        assert loss == 0.0


@pytest.mark.parametrize("case", RESUMED, ids=str)
def test_adam_with_a_schedule_and_groups(results, case):
    """The embedding is updated wherever a token occurs, by a learning rate's size however small its gradient is."""
    for found in result_of(results, ("resumed", case)):
        assert max(found["rates"]) > 1.5 * min(found["rates"])
        exact = sharded_engine.adam_reference(case, found["rates"])
        for name, value in found["uninterrupted"].items():
            assert (value.double() - exact[name]).norm() < 1e-4 * exact[name].norm()


@pytest.mark.parametrize("case", [*RESUMED, *RESUMED_BF16], ids=str)
def test_a_training_goes_on_from_its_checkpoint(results, case):
    for found in result_of(results, ("resumed", case)):
        resumed, uninterrupted = found["resumed"], found["uninterrupted"]
        assert resumed.keys() == uninterrupted.keys()
        assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)
        for whole in found["resharded"].values():
            assert whole.keys() == found["whole"].keys()
            for name, expected in found["whole"].items():
                assert whole[name].keys() == expected.keys() >= {"values", "exp_avg", "exp_avg_sq"}
                assert all(torch.equal(whole[name][one], expected[one]) for one in expected)


@pytest.mark.parametrize("case", [*RESUMED, *RESUMED_BF16], ids=str)
def test_state_dicts_are_whole(results, case):
    for rank, found in enumerate(result_of(results, ("resumed", case))):
        state = found["state dict"]
        assert "engine.destroy()" in found["unwrap"]
        assert found["destroyed"].keys() == dict(Model(case.tied, case.loss).named_parameters()).keys()
        if case.stage == 3 and rank > 0:
            assert state is None
            continue
        model = Model(case.tied, case.loss).to(DTYPES[case.dtype])
        model.load_state_dict(state)
        for name, value in model.state_dict().items():
            assert torch.equal(value, found["uninterrupted"][name].to(value.dtype))


def test_zero_3_writes_no_whole_head_for_each_rank(results, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "checkpoints0"
    written = torch.load(
        folder / "2" / "global_step2" / "zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=False
    )
    assert "body.weight" in written["module"] and "head.weight" not in written["module"]


def test_what_would_train_wrongly_is_refused(results):
    for found in result_of(results, "refused"):
        assert "ValueError: deepspeed.initialize would broadcast, average and partition" in found["plain"]
        assert "import deepspeed before LMHead.shard(model)" in found["plain"]
        assert "ValueError: optimizer must hold the sharded embedding.weight" in found["before"]
        assert "ValueError: the head must be sharded over the ranks that the engine averages over" in found["group"]
        assert "ValueError: config has what does not work with a sharded head: DeepCompile" in found["config"]
