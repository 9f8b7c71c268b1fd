"""Whole losses by the one-pass way with its torch kernels; `exponential_cases.py` runs Triton's."""

from types import SimpleNamespace

import pytest
import torch

from chunked_ce import devices, linear_loss
from chunked_ce.engine import exponential_products
from chunked_ce.objectives import PolicyGradient
from chunked_ce.plan import Settings
from chunked_ce.rows import exponentials as twin
from chunked_ce.rows import torch_rows
from tests.adapters import adapted
from tests.cases import array, assert_equal, chunks, gradients, problem
from tests.engine.one_pass import confident, drawn, install, install_product, zipf
from tests.precision import RMS_SLACK, assert_no_worse, plain_and_expected

BF16 = torch.bfloat16
EPSILON = torch.finfo(BF16).eps


@pytest.fixture(autouse=True)
def seen(monkeypatch):
    return install(monkeypatch, twin)


def in_float64(case):
    """The same numbers, for which the exact way is two passes."""
    values = {name: x.detach().double().requires_grad_() for name, x in vars(case).items() if torch.is_tensor(x)}
    return case.fresh(**values | {"target": case.target})


def assert_close(found, expected, roundings=2.0):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == BF16
        assert (one.double() - other).norm() <= roundings * EPSILON * other.norm()


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("kind", ["random", "drawn", "confident", "zipf"])
@pytest.mark.parametrize("single", [True, False], ids=["one chunk", "chunks"])
def test_precision(kind, spread, single, seen):
    """No worse than the plain loss in bf16: small numbers, frequent targets, flat and peaked softmaxes."""
    if kind == "zipf" and spread not in (1.0, 3.0):
        pytest.skip("the frequencies decide")
    for n, d, vocab in ((129, 64, 500), (512, 32, 1000)):
        case = problem(n, d, vocab, dtype=BF16, spread=spread, ignored=0.0)
        case = {"random": lambda x: x, "drawn": drawn, "confident": confident, "zipf": zipf}[kind](case)
        (plain, plain_gradients), (expected, expected_gradients) = plain_and_expected(case)
        value = case.loss(options=chunks(n if single else 100))
        assert "exponentials" in seen
        assert_no_worse(value, plain, expected)
        found = zip(gradients(value, case), plain_gradients, expected_gradients[:2], strict=True)
        for name, (got, other, right) in zip(("input", "linear_weight"), found, strict=True):
            assert_no_worse(got, other, right, f"gradient of {name}")


@pytest.mark.parametrize("choose", [drawn, confident])
def test_the_precision_of_single_tokens(choose, seen):
    """A chunk of one token has few roundings, which fall well or badly: over many, the rms is no worse."""
    squares = []
    for seed in range(20):
        case = choose(problem(2, 16, 300, dtype=BF16, spread=3.0, ignored=0.0, seed=seed))
        (_, plain), (_, expected) = plain_and_expected(case)
        pairs = zip(gradients(case.loss(options=chunks(1)), case), plain, expected[:2], strict=True)
        errors = [[(array(one) - right) / abs(right).max() for one in (ours, theirs)] for ours, theirs, right in pairs]
        squares.append([[(error**2).mean() for error in both] for both in errors])
    assert len(seen) >= 40
    ours, theirs = torch.tensor(squares).mean(0).sqrt().unbind(-1)
    assert (ours <= RMS_SLACK * theirs).all()


TERMS = {
    "plain": {},
    "z-loss": {"z_loss": 1e-2, "logit_scale": 0.7},
    "class weights": {"weight": torch.linspace(0.0, 2.0, 300)},
    "token weights": {"token_weight": torch.linspace(0.0, 1.0, 200)},
    "temperatures": {"temperature": torch.linspace(0.5, 2.0, 200)},
    "a sum": {"reduction": "sum"},
}


@pytest.mark.parametrize(("size", "ignored"), [(200, "mask"), (70, "drop")])
@pytest.mark.parametrize("name", TERMS)
def test_terms(name, size, ignored, seen):
    options = chunks(size, ignored=ignored)
    case = problem(200, 16, 300, dtype=BF16, bias=True, spread=2.0)
    terms = TERMS[name]
    value, exact = case.loss(options=options, **terms), in_float64(case)
    expected = exact.loss(**terms)
    assert {"exponentials", "add_targets_", "add_columns_"} == set(seen)
    torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=0)
    right = gradients(expected, exact)
    assert_close(gradients(value, case), right)
    assert_close(gradients(3 * case.loss(options=options, **terms), case), [3 * grad for grad in right])


def test_fp32_logits(seen):
    """Their exponentials are written to other memory."""
    case = problem(200, 16, 300, dtype=BF16, spread=2.0)
    exact = in_float64(case)
    value = case.loss(options=chunks(70, logits_dtype=torch.float32))
    expected = exact.loss()
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    assert_close(gradients(value, case), gradients(expected, exact), 1.0)
    assert "exponentials" in seen


def test_autocast(seen):
    """A head in fp32 whose single chunk is summed in fp32: whatever D is."""
    case = problem(20, 16, 300)
    with torch.autocast("cpu", BF16):
        value = case.loss(options=chunks(20))
    exact = in_float64(case)
    for one, other in zip(gradients(value, case), gradients(exact.loss(), exact), strict=True):
        assert one.dtype == torch.float32
        assert (one.double() - other).norm() <= 2 * EPSILON * other.norm()
    assert "add_targets_" in seen


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_what_is_frozen_costs_nothing(frozen, seen):
    case = problem(20, 16, 300, dtype=BF16)
    getattr(case, frozen).requires_grad_(False)
    exact = in_float64(case)
    getattr(exact, frozen).requires_grad_(False)
    assert_close(gradients(case.loss(options=chunks(6)), case), gradients(exact.loss(), exact))
    assert ("add_targets_" in seen) == (frozen == "hidden")


def test_an_adapter(seen):
    case = adapted(200, 16, 300, 4, dtype=BF16)
    value = case.loss(options=chunks(70))
    reference = case.rows()
    expected = case.reference_gradients(reference, "loss", reference.coefficient("mean"))
    for name, grad in zip(case.tensors, torch.autograd.grad(value, case.leaves()), strict=True):
        right = torch.from_numpy(expected[name][0])
        assert (grad.double() - right).norm() <= 2 * EPSILON * right.norm()
    assert "exponentials" in seen


def test_policy_gradient(seen):
    case = problem(200, 16, 300, dtype=BF16)
    generator = torch.Generator().manual_seed(5)
    advantage = torch.randn(200, generator=generator)
    old = -6 + 0.1 * torch.randn(200, generator=generator)

    def loss(case, **options):
        tensors = {"advantage": advantage, "old_logprob": old, "ref_logprob": old}
        return linear_loss(PolicyGradient(kl=0.1), case.hidden, case.head, case.target, **tensors, **options)

    exact = in_float64(case)
    value, expected = loss(case, options=chunks(70)), loss(exact)
    assert "exponentials" in seen
    assert_close(gradients(value, case), gradients(expected, exact), 3.0)


def test_no_token_counts(seen):
    for size in (40, 13):
        case = problem(40, 16, 300, dtype=BF16, ignored=1.1)
        value = case.loss(options=chunks(size))
        assert value == 0
        assert all(grad.count_nonzero() == 0 for grad in gradients(value, case))


def test_rows_that_weigh_nothing(seen):
    """A factor of 0 leaves exactly nothing, and no NaN."""
    case = problem(40, 16, 300, dtype=BF16, ignored=0.0)
    weight = torch.zeros(40)
    weight[3] = 1.0
    hidden, head = gradients(case.loss(options=chunks(13), token_weight=weight, reduction="sum"), case)
    assert hidden[3].count_nonzero() > 0 and hidden[:3].count_nonzero() == hidden[4:].count_nonzero() == 0
    alone = case.fresh(hidden=case.hidden.detach()[3:4].requires_grad_(), target=case.target[3:4])
    right = gradients(alone.loss(options=chunks(1), reduction="sum"), alone)[1]
    assert (head - right).norm() <= EPSILON * right.norm()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_hidden_states_give_no_finite_loss(value, seen):
    case = problem(40, 16, 300, dtype=BF16, ignored=0.0)
    with torch.no_grad():
        case.hidden[5] = value
    found = case.loss(options=chunks(13))
    assert found.isnan() and "exponentials" in seen
    assert gradients(found, case)[0][5].isnan().all()


def test_twice_the_same():
    case = zipf(problem(200, 16, 300, dtype=BF16))
    first, second = ((value, *gradients(value, case)) for value in (case.loss(options=chunks(70)) for _ in range(2)))
    assert_equal(first, second)


SERVED = {
    "plain": ({}, {}),
    "z-loss": ({"z_loss": 0.1}, {}),
    "fp32 logits": ({}, {"logits_dtype": torch.float32}),
}
NOT_SERVED = {
    "smoothing": ({"label_smoothing": 0.1}, {}),
    "softcap": ({"softcap": 3.0}, {}),
    "statistics": ({"return_stats": True}, {}),
    "a negative scale": ({"logit_scale": -1.0}, {}),
    "a filter": ({}, {"gradient_filter": 1e-3}),
    "sums in float64": ({}, {"accumulate_dtype": torch.float64}),
    "the backward": ({}, {"gradients": "backward"}),
}


@pytest.mark.parametrize("name", [*SERVED, *NOT_SERVED])
def test_what_is_served(name, seen):
    terms, options = (SERVED | NOT_SERVED)[name]
    for dtype in (BF16, torch.float16, torch.float32):
        seen.clear()
        problem(40, 16, 300, dtype=dtype).loss(options=chunks(13, **options), **terms)
        assert bool(seen) == (name in SERVED and dtype == BF16)


@pytest.mark.parametrize(("n", "served"), [(32, False), (33, True)])
def test_a_narrow_sum_is_served_where_that_saves_traffic(n, served, seen):
    """A single chunk, whose head gradient is written in bf16: with more than 2 D tokens; a frozen head always."""
    case = problem(n, 16, 300, dtype=BF16, ignored=0.0)
    case.loss(options=chunks(n))
    assert bool(seen) == served
    seen.clear()
    case.head.requires_grad_(False)
    case.loss(options=chunks(n))
    assert seen


def test_the_dispatch(monkeypatch):
    """Triton's kernels, and products in fp32."""
    monkeypatch.undo()
    pytest.importorskip("triton")
    chosen = []

    class Call:
        target = torch.empty(1, device="meta")

        class specification:
            settings = Settings(BF16)
            row_kernels = staticmethod(lambda device: chosen[0])

    chosen.append(torch_rows)
    monkeypatch.setattr(devices, "adds_in_product", lambda *arguments: True)
    assert exponential_products._kernels(Call) is None
    chosen[0] = None
    assert exponential_products._kernels(Call).__name__.endswith("triton_exponentials")
    monkeypatch.setattr(devices, "adds_in_product", lambda *arguments: False)
    assert exponential_products._kernels(Call) is None


@pytest.mark.parametrize("size", [200, 70])
def test_a_product_that_takes_the_exponentials(size, seen, monkeypatch):
    """No row pass, and no logit is rounded: the loss is exact to fp32, the gradients no worse than the plain ones."""
    of_product = install_product(monkeypatch, twin)
    case = drawn(problem(200, 16, 300, dtype=BF16, spread=3.0))
    (_, plain_gradients), (expected, expected_gradients) = plain_and_expected(case)
    value = case.loss(options=chunks(size))
    assert "exponentials" not in seen and "product_exponentials" in of_product
    assert abs(value.item() - expected) <= 2e-6 * expected
    for got, plain, right in zip(gradients(value, case), plain_gradients, expected_gradients[:2], strict=True):
        assert_no_worse(got, plain, right)


def test_that_product_is_chosen_by_measurement_only(monkeypatch):
    monkeypatch.undo()
    pytest.importorskip("triton")

    def source(weight, parts=("hidden", "weight")):
        call = SimpleNamespace(target=torch.empty(1, device="cpu"), specification=SimpleNamespace(parts=parts))
        return SimpleNamespace(call=call, head=SimpleNamespace(weight=weight))

    head = torch.zeros(20, 16, dtype=BF16)
    choose = exponential_products._product_kernels
    assert not exponential_products.FUSED_ON and choose(source(head)) is None
    with exponential_products.fusing(True):
        assert choose(source(head)).__name__.endswith("triton_product")
        assert choose(source(head[:, :12])) is None
        assert choose(source(head, ("hidden", "weight", "adapter_hidden", "adapter_weight"))) is None
        with exponential_products.fusing(False):
            assert choose(source(head)) is None
    assert choose(source(head)) is None
    on_device = source(head)
    on_device.call.target = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    for measured, chosen in ((frozenset(), False), ({"another"}, False), ({"a device"}, True)):
        monkeypatch.setattr(exponential_products, "FUSED_ON", measured)
        assert (choose(on_device) is not None) == chosen
