"""Slopes that an objective writes out by hand, and those that autograd finds."""

import pytest
import torch

from chunked_ce.objectives import CrossEntropy, Objective, Tokens
from chunked_ce.rows.statistics import RowStatistics

WRITTEN_OUT = [
    CrossEntropy(),
    CrossEntropy(label_smoothing=0.1),
    CrossEntropy(label_smoothing=1.0, z_loss=0.3),
    CrossEntropy(z_loss=0.2),
]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("objective", WRITTEN_OUT, ids=str)
def test_slopes(objective, weighted):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 50, generator=generator, dtype=torch.float64)
    rows = RowStatistics(values[0], values[1].abs(), -values[2].abs(), 40 * values[3])
    weight = torch.rand(50, generator=generator, dtype=torch.float64) if weighted else None
    tokens = Tokens(40, 37.5, weight, {})
    written, found = objective.slopes(rows, tokens), Objective.slopes(objective, rows, tokens)
    assert written.maximum is None and found.maximum is None
    for name in ("log_sum", "target", "weighted"):
        one, other = getattr(written, name), getattr(found, name)
        if other is None or one is None:
            assert (one is None or not one.any()) and (other is None or not other.any()), name
        else:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
