"""Forward and backward of every contestant under pytest-benchmark; a group is a dtype and a share of ignored tokens.

Contestants run one after the other here; `benchmarks.ratios` compares them round by round. Nothing timed is asserted.
"""

import pytest

from benchmarks.contestants import CONTESTANTS, DEVICE, DTYPES, Problem, train_step, why_not

TOKENS, HIDDEN, VOCAB = 2048, 768, 50257
ROUNDS = 5


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("ignored", [0.0, 0.5], ids=["all_counted", "half_ignored"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward(benchmark, dtype, ignored, contestant):
    reason = why_not(contestant)
    if reason:
        pytest.skip(reason)
    problem = Problem.random(TOKENS, HIDDEN, VOCAB, DTYPES[dtype], ignored=ignored, device=DEVICE)
    benchmark.group = f"{dtype}, {ignored:.0%} of {TOKENS} tokens ignored, D={HIDDEN}, V={VOCAB}"
    benchmark.extra_info |= {"tokens": TOKENS, "hidden": HIDDEN, "vocab": VOCAB}
    benchmark.pedantic(train_step, args=(contestant, problem), rounds=ROUNDS, warmup_rounds=1)
