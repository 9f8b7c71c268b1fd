"""`LMHead.shard` over a device mesh: FSDP2 on two ranks and HSDP on four train as one process does."""

import functools

import pytest
import torch
import torch.distributed.checkpoint

from tests.distributed import sharded_head_fsdp as w
from tests.distributed.launch import run
from tests.distributed.sharded_head_fsdp_checks import CHECKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def results(folder):
    """By the number of ranks. Four ranks load what two have saved."""
    return {number: run(w.worker, number, str(folder)) for number in (2, 4)}


@functools.cache
def expected_of(case: w.Case, number: int) -> w.Result:
    return w.train(case, w.LanguageModel(case), list(range(number)), number)


@pytest.mark.parametrize(("number", "case"), [(n, case) for n, cases in w.CASES.items() for case in cases], ids=str)
def test_training_equals_that_of_one_process(results, number, case):
    expected = expected_of(case._replace(mesh="", setting=""), number)
    found = [result[case] for result in results[number]]
    assert not any(isinstance(one, str) for one in found), found[0]
    losses = [sum(of_step) for of_step in zip(*(one.losses for one in found), strict=True)]
    assert losses == pytest.approx(expected.losses, rel=1e-6, abs=2e-7)  # terms of a policy gradient cancel
    for one in found:
        assert one.norms == pytest.approx(expected.norms, rel=1e-6)
        assert min(one.norms) > case.clip  # gradients are clipped
        assert one.parameters.keys() == expected.parameters.keys()
        for name, value in expected.parameters.items():
            assert (one.parameters[name] - value).norm() <= 1e-6 * value.norm(), name


@pytest.mark.parametrize(
    ("number", "case"), [(n, case) for n, cases in w.LOW_PRECISION.items() for case in cases], ids=str
)
def test_bf16(results, number, case):
    """Further from the exact gradients than a head that is gathered: by 5 %, all parameters together."""
    model = w.LanguageModel(case).double()
    parts = [w.tokens(case, rank, 0, 0) for rank in range(number)]
    (sum(model(*part) for part in parts) / sum(int((labels != -100).sum()) for _, labels in parts)).backward()
    exact = {name: parameter.grad for name, parameter in model.named_parameters()}
    for result in results[number]:
        assert not isinstance(result[case], str), result[case]
        ours, plain = (
            sum((found[name].double() - value).square().sum() for name, value in exact.items()).sqrt()
            for found in result[case]
        )
        assert ours <= 1.05 * plain
        assert {gradient.dtype for gradient in result[case][0].values()} == {torch.float32}


@pytest.mark.parametrize(("number", "name"), [(n, name) for n, checks in CHECKS.items() for name in checks], ids=str)
def test_on_ranks(results, number, name):
    failures = [result[name] for result in results[number] if result[name] is not None]
    assert not failures, failures[0]


def test_a_checkpoint_of_ranks_fits_a_plain_model(results, folder):
    states = {"model": w.LanguageModel().state_dict()}
    torch.distributed.checkpoint.load(states, checkpoint_id=str(folder / "tied True"), no_dist=True)
    expected = torch.load(folder / "tied True.pt")["model"]
    assert states["model"].keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(states["model"][name], value), name
