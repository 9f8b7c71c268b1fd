"""Forward and backward of every implementation under pytest-benchmark, grouped by dtype and share of ignored tokens.

They run one after the other here; `benchmarks.ratios` compares them round by round. Nothing timed is asserted.
"""

import pytest

from chunked_ce.cli.implementations import DEVICE, DTYPES, IMPLEMENTATIONS, train_step, why_not
from chunked_ce.cli.synthetic_inputs import LossInputs

TOKENS, HIDDEN, VOCAB = 2048, 768, 50257
ROUNDS = 5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("ignored", [0.0, 0.5], ids=["all_counted", "half_ignored"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_forward_and_backward(benchmark, dtype, ignored, implementation):
    reason = why_not(implementation)
    if reason:
        pytest.skip(reason)
    inputs = LossInputs.random(TOKENS, HIDDEN, VOCAB, DTYPES[dtype], ignored=ignored, device=DEVICE)
    benchmark.group = f"{dtype}, {ignored:.0%} of {TOKENS} tokens ignored, D={HIDDEN}, V={VOCAB}"
    benchmark.extra_info |= {"tokens": TOKENS, "hidden": HIDDEN, "vocab": VOCAB}
    benchmark.pedantic(train_step, args=(implementation, inputs), rounds=ROUNDS, warmup_rounds=1)
