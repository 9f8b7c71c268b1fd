"""Slopes that an objective writes out by hand, and those that autograd finds."""

import pytest
import torch

from chunked_ce.objectives import CrossEntropy, Divergence, Objective, Tokens
from chunked_ce.rows.statistics import STATISTICS, RowStatistics
from tests.objectives.policies import POLICIES

WRITTEN_OUT = [
    CrossEntropy(),
    CrossEntropy(label_smoothing=0.1),
    CrossEntropy(label_smoothing=1.0, z_loss=0.3),
    CrossEntropy(z_loss=0.2),
    *POLICIES.values(),
    *map(Divergence, (0.0, 0.3, 1.0)),
]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("given", [False, True])  # the optional tensors for each token
@pytest.mark.parametrize("objective", WRITTEN_OUT, ids=str)
def test_slopes(objective, given, weighted):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 50, generator=generator, dtype=torch.float64)
    log_sum, target = values[1].abs(), -values[2].abs()
    rows = RowStatistics(values[0], log_sum, target, weighted=40 * values[3], mean=-values[3].abs())
    if isinstance(objective, Divergence):
        rows = rows._replace(forward_kl=values[0], reverse_kl=values[1], mixture_kl=values[2], student_kl=values[3])
    weight = torch.rand(50, generator=generator, dtype=torch.float64) if weighted else None
    per_token = {"advantage": values[3], "old_logprob": target - log_sum + 0.4 * values[0], "ref_logprob": -values[0]}
    if not given:
        per_token = dict.fromkeys(objective.optional_per_token)
        per_token |= dict.fromkeys(objective.per_token, values[4])
    tokens = Tokens(40, 37.5, weight, per_token)
    written, found = objective.slopes(rows, tokens), Objective.slopes(objective, rows, tokens)
    assert written.maximum is None and found.maximum is None
    for name in (name for name, statistic in STATISTICS.items() if statistic.differentiable):
        one, other = getattr(written, name), getattr(found, name)
        if other is None or one is None:
            assert (one is None or not one.any()) and (other is None or not other.any()), name
        else:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
