"""The one-pass way on a CUDA device: its kernels' own tests, whole losses against float64, the same bits twice."""

import pytest
import torch

from chunked_ce.engine.exponential_products import fusing
from chunked_ce.rows import backend as kernels
from tests.cases import assert_equal, chunks, gradients, problem
from tests.engine.one_pass import confident, drawn, zipf
from tests.engine.test_cuda import no_waiting, on_gpu
from tests.precision import assert_no_worse, plain_and_expected

AVAILABLE = torch.cuda.is_available() and not kernels.INTERPRETED
pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs a CUDA device, and Triton not interpreted")
if AVAILABLE and kernels.triton_runs(torch.device("cuda"), torch.bfloat16):
    from chunked_ce.rows import triton_exponentials
    from tests.engine import product_cases
    from tests.engine.exponential_cases import *  # noqa: F403  every kernel against its torch twin

has_tensor_descriptors = AVAILABLE and torch.cuda.get_device_capability() >= (9, 0)
needs_tensor_descriptors = pytest.mark.skipif(not has_tensor_descriptors, reason="needs TMA: sm_90 or later")


@pytest.fixture
def launched(monkeypatch):
    """The chunks that took this way."""
    seen, kernel = [], triton_exponentials.exponentials

    def spy(*args, **keywords):
        seen.append(args)
        return kernel(*args, **keywords)

    monkeypatch.setattr(triton_exponentials, "exponentials", spy)
    return seen


@pytest.mark.parametrize("spread", [1.0, 3.0, 8.0])
@pytest.mark.parametrize(
    "choose", [lambda case: case, drawn, confident, zipf], ids=["random", "drawn", "confident", "zipf"]
)
@pytest.mark.parametrize("size", [512, 100])
def test_precision(size, choose, spread, launched):
    case = on_gpu(choose(problem(512, 64, 1000, dtype=torch.bfloat16, spread=spread, ignored=0.0)))
    (plain, plain_gradients), (expected, expected_gradients) = plain_and_expected(case)
    value = case.loss(options=chunks(size))
    assert len(launched) == -(-512 // size)
    assert_no_worse(value, plain, expected)
    found = zip(gradients(value, case), plain_gradients, expected_gradients[:2], strict=True)
    for name, (got, other, right) in zip(("input", "linear_weight"), found, strict=True):
        assert_no_worse(got, other, right, f"gradient of {name}")


def test_no_waiting_and_twice_the_same(launched):
    case = on_gpu(zipf(problem(512, 64, 5000, dtype=torch.bfloat16, bias=True)))

    def step(size):
        value = case.loss(options=chunks(size))
        return value, *gradients(value, case)

    for size in (512, 100):
        first = step(size)
        with no_waiting():
            second = step(size)
        assert_equal(first, second)
    assert launched


@needs_tensor_descriptors
def test_the_product_that_takes_exponentials():
    """Against its twin, as in the interpreter."""
    for n, hidden, vocab in ((1, 8, 1), (3, 64, 255), (129, 128, 530), (300, 200, 5000)):
        x, weight = product_cases.factors(n, hidden, vocab)
        product_cases.checked(x, weight, product_cases.targets_of(n, vocab))
    product_cases.test_terms()
    for rise in (20.0, 40.0, 300.0):
        product_cases.test_rows_that_outrun_their_targets(rise)
    product_cases.test_masked_words()
    product_cases.test_twice_the_same()


@needs_tensor_descriptors
@pytest.mark.parametrize("size", [512, 100])
def test_whole_losses_of_that_product(size, launched):
    case = on_gpu(drawn(problem(512, 64, 1000, dtype=torch.bfloat16, spread=3.0)))
    (_, plain_gradients), (expected, expected_gradients) = plain_and_expected(case)
    with fusing(True):
        value = case.loss(options=chunks(size))
    assert not launched  # no row pass
    assert abs(value.item() - expected) <= 4e-6 * expected
    for got, plain, right in zip(gradients(value, case), plain_gradients, expected_gradients[:2], strict=True):
        assert_no_worse(got, plain, right)
