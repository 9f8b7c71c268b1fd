"""Peak memory of the chunked loss: within its bound, hardly growing with the tokens, and as the memory law says."""

import functools

import pytest

from benchmarks.memory import Case, allowed, measure, why_not
from benchmarks.report import MIB
from chunked_ce.cli.implementations import BACKWARD, DTYPES, FILTERED, FORWARD

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

TOKENS = (1024, 4096, 16384)
once = functools.cache(measure)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("way", [FORWARD, BACKWARD])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_memory_law_holds(dtype, way, tokens):
    case = Case(way, dtype, tokens)
    assert once(case) == pytest.approx(case.prediction.peak, rel=0.1)


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_the_memory_law_holds_for_filtered_chunks(tokens):
    """In bf16: at the threshold of fp32 hardly an entry is dropped."""
    case = Case(FILTERED, "bf16", tokens)
    assert once(case) == pytest.approx(case.prediction.peak, rel=0.1)


@pytest.mark.parametrize("way", [FORWARD, BACKWARD])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_gradients_and_a_chunk(dtype, way):
    case = Case(way, dtype, 4096)
    assert once(case) <= allowed(case)


@pytest.mark.parametrize("way", [FORWARD, BACKWARD])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_hardly_growing_with_tokens(dtype, way):
    """Sixteen times the tokens: their gradients, fp32 while they are summed, and 32 MiB. Full logits grow by GiB."""
    few, many = (Case(way, dtype, tokens) for tokens in (TOKENS[0], TOKENS[-1]))
    gradients = (many.tokens - few.tokens) * many.hidden * (4 + DTYPES[dtype].itemsize)
    assert once(many) - once(few) <= gradients + 32 * MIB
