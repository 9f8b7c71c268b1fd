"""`LMHead.shard` on three ranks: the training of one process, whole state dicts, errors on every rank."""

import pytest
import torch

from tests.distributed import sharded_head_worker as w
from tests.distributed.launch import run
from tests.distributed.sharded_head_checks import CHECKS
from tests.distributed.sharded_head_refusals import REFUSALS


@pytest.fixture(scope="module")
def ranks():
    return run(w.worker, w.RANKS)


@pytest.mark.parametrize("case", w.CASES, ids=str)
def test_training_equals_that_of_one_process(ranks, case):
    expected = w.train(case, w.LanguageModel(case), list(range(w.RANKS)))
    found = [result[case] for result in ranks]
    assert not any(isinstance(one, str) for one in found), found[0]
    assert [sum(losses) for losses in zip(*(one.losses for one in found), strict=True)] == pytest.approx(
        expected.losses, rel=1e-6
    )
    for one in found:
        assert one.norms == pytest.approx(expected.norms, rel=1e-6)
        assert min(one.norms) > case.clip  # gradients are clipped
        assert one.state.keys() == expected.state.keys()
        for name, value in expected.state.items():
            assert (one.state[name] - value).norm() <= 1e-6 * value.norm(), name
        for index, values in expected.optimizer["state"].items():
            for name, value in values.items():
                if value is not None:
                    torch.testing.assert_close(one.optimizer["state"][index][name], value, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", CHECKS | REFUSALS)
def test_on_ranks(ranks, name):
    failures = [result[name] for result in ranks if result[name] is not None]
    assert not failures, failures[0]


@pytest.mark.thorough
def test_compiled():
    for rank, (loss, gradient) in enumerate(run(w.train_compiled, w.RANKS)):
        model = w.LanguageModel()
        ids, labels = w.tokens(w.Case(), rank, 0, 0)
        expected = torch.nn.functional.cross_entropy(model(ids)[0], labels[0], reduction="sum")
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        torch.testing.assert_close(gradient, model.body[0].weight.grad)
