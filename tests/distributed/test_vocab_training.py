"""Tensor parallel times data parallel on real text: the training of one process, step by step."""

import pytest
import torch

from tests.distributed.launch import run
from tests.distributed.vocab_training import DATA, STEPS, TENSOR, both_ways, train_on_one_process, windows


@pytest.fixture(scope="module")
def one_process():
    return train_on_one_process()


@pytest.fixture(scope="module")
def mesh():
    return run(both_ways, DATA * TENSOR)


@pytest.mark.parametrize("gradients", ["forward", "backward"])
def test_training_equals_that_of_one_process(mesh, one_process, gradients):
    losses, parameters = one_process
    for result in mesh:
        assert result[gradients][0] == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < 0.8 * losses[0]  # something was learnt
    for data_rank in range(DATA):
        ranks = [mesh[data_rank * TENSOR + tensor_rank][gradients][1] for tensor_rank in range(TENSOR)]
        for name, expected in parameters.items():
            found = torch.cat([of_rank[name] for of_rank in ranks]) if name == "head" else ranks[0][name]
            assert (found - expected).norm() <= 1e-5 * expected.norm(), name
            assert name == "head" or all(torch.equal(of_rank[name], found) for of_rank in ranks), name


def test_the_ranks_count_different_tokens():
    """Else a mean of means would pass too."""
    counts = [[sum(int((target != -100).sum()) for _, target in window) for window in windows(r)] for r in range(DATA)]
    assert sum(a != b for a, b in zip(*counts, strict=True)) > STEPS / 2
