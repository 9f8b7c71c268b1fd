"""What a whole process takes: the two gradients and a chunk, as the memory law says."""

import pytest

from benchmarks.memory import Case, allowed, measure, why_not
from chunked_ce.cli.implementations import BACKWARD, FORWARD
from tests.cases import needs_bf16

NOT_HERE = why_not("cpu")


@pytest.mark.skipif(NOT_HERE is not None, reason=NOT_HERE or "")
@pytest.mark.parametrize(
    ("dtype", "way"),
    [
        ("fp32", FORWARD),
        pytest.param("bf16", BACKWARD, marks=needs_bf16),
        pytest.param("fp32", BACKWARD, marks=pytest.mark.thorough),
        pytest.param("bf16", FORWARD, marks=[needs_bf16, pytest.mark.thorough]),
    ],
)
def test_peak_memory_of_a_large_vocabulary(dtype, way):
    """N=2048 D=256 V=131072, in a process of its own; full logits would take 1 GiB and more.

    `benchmarks/test_memory.py` measures 1,024 to 16,384 tokens.
    """
    case = Case(way, dtype, 2048, device="cpu")
    peak = measure(case)
    assert peak <= allowed(case)
    assert peak == pytest.approx(case.prediction.peak, rel=0.1)
