"""A low-rank adapter on the head: values and gradients, precision, costs, and what it goes together with."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import chunked_ce
from chunked_ce import ChunkOptions, LinearCrossEntropyLoss, linear_cross_entropy, linear_logprobs, linear_loss
from chunked_ce.objectives import CrossEntropy
from tests.adapters import NAMES, adapted
from tests.cases import REDUCTIONS_AND_WAYS, WAYS, array, assert_close, chunks, loss_dtype, random_like
from tests.precision import LOW, assert_no_worse, parts_in
from tests.test_work import work

FLOATS = (torch.float64, torch.float32)
TERMS = {
    "plain": {},
    "scale_and_softcap": {"logit_scale": 0.3, "softcap": 1.5},
    "smoothing_and_z_loss": {"label_smoothing": 0.2, "z_loss": 0.05},
    "weights": {"weight": True, "token_weight": True},
}


def weights_of(case, terms):
    sizes = {"weight": len(case.weight), "token_weight": len(case.hidden)}
    return {name: torch.linspace(0.5, 2, sizes[name]) if value is True else value for name, value in terms.items()}


def check(case, *, reduction="mean", options=None, **terms):
    """Value and every gradient against the reference, for any upstream gradient."""
    value = case.loss(reduction=reduction, options=options, **terms)
    rows, dtype = case.rows(**terms), case.hidden.dtype
    assert value.dtype == loss_dtype(dtype)
    assert_close(value, *rows.reduce(reduction), dtype, "loss")
    upstream = random_like(value)
    expected = case.reference_gradients(rows, "loss", array(upstream) * rows.coefficient(reduction))
    check_gradients(case, value, upstream, expected)


def check_gradients(case, value, upstream, expected, **keywords):
    trained = {name: tensor for name, tensor in case.tensors.items() if tensor.requires_grad}
    found = torch.autograd.grad(value, list(trained.values()), upstream, **keywords)
    for (name, leaf), gradient in zip(trained.items(), found, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
        assert_close(gradient, *expected[name], leaf.dtype, f"gradient of {name}")


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_and_gradients(dtype, terms, reduction, way):
    case = adapted(23, 6, 3, 13, dtype=dtype, bias=True)
    check(case, reduction=reduction, options=chunks(5, way), **weights_of(case, terms))


@pytest.mark.parametrize("seed", range(60))
def test_random_shapes(seed):
    """r = 1, one token, no token, none that counts, a vocabulary of one, and every choice of trained tensors."""
    draw = random.Random(seed)
    case = adapted(
        draw.choice([0, 1, 2, 17, 40]),
        draw.choice([1, 5, 12]),
        draw.choice([1, 2, 7]),
        draw.choice([1, 2, 19]),
        dtype=draw.choice(FLOATS),
        bias=draw.random() < 0.5,
        ignored=draw.choice([0.0, 0.3, 1.0]),
        seed=seed,
    )
    names = [name for name in case.tensors if draw.random() < 0.6] or ["linear_adapter[1]"]
    reduction, way = draw.choice(REDUCTIONS_AND_WAYS)
    check(case.trained(*names), reduction=reduction, options=chunks(draw.choice([1, 3, 100]), way))


@pytest.mark.parametrize("seed", range(10))
def test_log_probabilities(seed):
    case = adapted(17, 5, 1 + seed % 3, 19, dtype=FLOATS[seed % 2], bias=True, seed=seed)
    values = linear_logprobs(
        case.base.hidden, case.base.head, case.base.target, **case.keywords(), softcap=2.0, return_entropy=True
    )
    rows = case.rows(softcap=2.0)
    for name, value in zip(("logprob", "entropy"), values, strict=True):
        assert_close(value, getattr(rows, name), getattr(rows, f"{name}_scale"), case.hidden.dtype, name)
        upstream = random_like(value)
        expected = case.reference_gradients(rows, name, array(upstream))
        check_gradients(case, value, upstream, expected, retain_graph=True)


@pytest.mark.parametrize("chunk", [200, 33])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
@pytest.mark.parametrize("frozen", [(), ("linear_weight",)], ids=["trained", "frozen_weight"])
def test_no_worse_than_plain(frozen, dtype, way, chunk):
    """peers 15: the bound is the error of a head whose adapter is not merged, in the same dtype.

    Errors of six problems together: thin factors have few elements, whose roundings may be lucky.
    """
    results = {}
    for seed in range(6):
        case = adapted(200, 64, 8, 501, dtype=dtype, spread=2.0, seed=seed)
        case = case.trained(*(name for name in NAMES if name not in frozen))
        rows, leaves = case.rows(), case.leaves()
        plain = F.cross_entropy(case.plain_logits().float(), case.base.target, reduction="none")
        losses = case.loss(reduction="none", options=chunks(chunk)), plain, rows.loss
        found = torch.autograd.grad(case.loss(options=chunks(chunk, way)), leaves)
        theirs = torch.autograd.grad(plain.sum() / (case.base.target != -100).sum(), leaves)
        expected = case.reference_gradients(rows, "loss", rows.coefficient("mean"))
        names = [name for name in case.tensors if name not in frozen]
        triples = zip(found, theirs, [expected[name][0] for name in names], strict=True)
        for name, triple in {"loss": losses, **dict(zip(names, triples, strict=True))}.items():
            results.setdefault(name, []).append(triple)
    for name, triples in results.items():
        ours, other, exact = zip(*triples, strict=True)
        of = {"linear_adapter[0]": "input", "linear_adapter[1]": "linear_weight"}.get(name, name)
        # Logits are rounded twice here, and three times in the plain code: the worst elements are others.
        pooled = torch.stack(ours), torch.stack(other), np.stack(exact)
        assert_no_worse(*pooled, name, parts_in(of, way, dtype), max_slack=2.0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("upstream", [65536.0, 1e-6])
def test_fp16_scales(upstream, way):
    """Loss scales and small shares of a mean stay in the range of fp16, for the adapter's gradients too."""
    case = adapted(256, 16, 4, 100, dtype=torch.float16, ignored=0.0)
    loss = case.loss(options=chunks(64, way), num_tokens=10**6 if upstream > 1 else None, reduction="mean")
    found = torch.autograd.grad(loss * upstream, case.leaves())
    factor = upstream / (10**6 if upstream > 1 else 256)
    rows = case.rows()
    expected = case.reference_gradients(rows, "loss", factor * rows.coefficient("sum"))
    for name, gradient in zip(case.tensors, found, strict=True):
        size = abs(expected[name][0]).max()
        smallest = 2.0**-24
        assert abs(array(gradient) - expected[name][0]).max() <= 2**-8 * size + smallest, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_gradient_filter_is_exact(dtype):
    """The dropped columns would be missing from the adapter's gradients: with an adapter nothing is dropped."""
    case = adapted(40, 16, 3, 300, dtype=dtype, spread=3.0)
    for way in WAYS:
        exact = torch.autograd.grad(case.loss(options=chunks(8, way)), case.leaves())
        filtered = torch.autograd.grad(case.loss(options=chunks(8, way, gradient_filter=0.1)), case.leaves())
        assert all(torch.equal(a, b) for a, b in zip(exact, filtered, strict=True))


N, D, R, V, C = 64, 32, 2, 2048, 16


@pytest.mark.parametrize("way", WAYS)
def test_a_frozen_weight_costs_nothing(way):
    """LoRA on a head: no dW is formed, and nothing of its size is allocated."""
    case = adapted(N, D, R, V, ignored=0.0).trained("input", "linear_adapter[0]", "linear_adapter[1]")
    cost = work(lambda: torch.autograd.grad(case.loss(options=chunks(4, way)), case.leaves()))
    products = 2 if way == "forward" else 3
    assert cost.multiplications == products * N * D * V + (products + 1) * N * R * V
    assert cost.largest < V * D * 4


@pytest.mark.parametrize("way", WAYS)
def test_a_trained_adapter_alone(way):
    """Only the second factor is trained: logits, and one thin product."""
    case = adapted(N, D, R, V, ignored=0.0).trained("linear_adapter[1]")
    cost = work(lambda: torch.autograd.grad(case.loss(options=chunks(4, way)), case.leaves()))
    logits = 1 if way == "forward" else 2
    assert cost.multiplications == logits * N * (D + R) * V + N * R * V
    assert cost.largest < V * D * 4


@pytest.mark.parametrize("way", WAYS)
def test_neither_logits_nor_merged_weights_are_formed(way):
    """The largest tensor stays below a tenth of N * V, and W + BA would be larger than anything here."""
    n, d, vocab = 1024, 128, 50257
    case = adapted(n, d, 4, vocab, ignored=0.0).trained("input", "linear_adapter[0]", "linear_adapter[1]")
    cost = work(lambda: torch.autograd.grad(case.loss(options=chunks(64, way)), case.leaves()))
    assert cost.largest < 0.1 * n * vocab * 4
    assert cost.largest < vocab * d * 4


@pytest.mark.parametrize("way", WAYS)
def test_second_derivatives(way):
    case = adapted(5, 3, 2, 7, dtype=torch.float64, bias=True)
    names = list(case.tensors)

    def loss(*leaves):
        tensors = dict(zip(names, leaves, strict=True))
        adapter = tensors["linear_adapter[0]"], tensors["linear_adapter[1]"]
        keywords = {"linear_bias": tensors["linear_bias"], "linear_adapter": adapter, "options": chunks(2, way)}
        return linear_cross_entropy(tensors["input"], tensors["linear_weight"], case.base.target, **keywords)

    assert torch.autograd.gradcheck(loss, case.leaves())
    assert torch.autograd.gradgradcheck(loss, case.leaves())
    found = torch.func.grad(loss, argnums=(0, 4))(*(leaf.detach() for leaf in case.leaves()))
    expected = torch.autograd.grad(loss(*case.leaves()), case.leaves())
    torch.testing.assert_close(found, (expected[0], expected[4]))


@pytest.mark.parametrize("way", ["forward", pytest.param("backward", marks=pytest.mark.thorough)])
def test_compiled(way):
    """In one graph, with the same gradients, and for other numbers of tokens."""

    @torch.compile(fullgraph=True, dynamic=True)
    def loss(hidden, head, target, adapter):
        return linear_cross_entropy(hidden, head, target, linear_adapter=adapter, options=ChunkOptions(gradients=way))

    for tokens in (9, 14):
        case = adapted(tokens, 6, 2, 31, seed=tokens)
        value = loss(case.base.hidden, case.base.head, case.base.target, (case.hidden, case.weight))
        found = torch.autograd.grad(value, case.leaves())
        expected = torch.autograd.grad(case.loss(options=ChunkOptions(gradients=way)), case.leaves())
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_autocast():
    """All factors are multiplied in the autocast dtype; gradients have the dtypes of their tensors."""
    case = adapted(12, 6, 2, 31)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = case.loss()
    low = adapted(12, 6, 2, 31, dtype=torch.bfloat16)
    assert value.item() == low.loss().item()
    for gradient, theirs in zip(
        torch.autograd.grad(value, case.leaves()), torch.autograd.grad(low.loss(), low.leaves()), strict=True
    ):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.bfloat16(), theirs, rtol=1e-2, atol=1e-3)


def test_dtypes_may_differ():
    """A frozen bf16 head, and an adapter that trains in fp32."""
    case = adapted(12, 6, 2, 31)
    hidden, head = case.base.hidden.detach().bfloat16(), case.base.head.detach().bfloat16()
    value = linear_cross_entropy(hidden, head, case.base.target, linear_adapter=(case.hidden, case.weight))
    for gradient in torch.autograd.grad(value, (case.hidden, case.weight)):
        assert gradient.dtype == torch.float32 and gradient.abs().sum() > 0


@pytest.mark.parametrize("into", ["grad", "main_grad"])
def test_accumulate_into(into):
    """Only the weight's gradient is added in place; the adapter's come through autograd."""
    case, other = (adapted(12, 6, 2, 31) for _ in range(2))
    if into == "main_grad":
        case.base.head.main_grad = torch.zeros_like(case.base.head)
    for _ in range(2):
        case.loss(options=ChunkOptions(accumulate_into=into)).backward()
        other.loss(options=ChunkOptions(gradients="backward")).backward()
    found = [getattr(case.base.head, into), case.hidden.grad, case.weight.grad]
    expected = [other.base.head.grad, other.hidden.grad, other.weight.grad]
    torch.testing.assert_close(found, expected)


def test_other_functions():
    """`linear_loss`, the module, and statistics per token over the vocabulary and over a support."""
    case = adapted(12, 6, 2, 31, bias=True)
    tensors, keywords = (case.base.hidden, case.base.head, case.base.target), case.keywords()
    expected = case.loss()
    assert linear_loss(CrossEntropy(), *tensors, **keywords).item() == expected.item()
    module = LinearCrossEntropyLoss()(*tensors, linear_bias=case.base.bias, linear_adapter=(case.hidden, case.weight))
    assert module.item() == expected.item()
    counted = case.base.target != -100
    support = torch.arange(31).expand(12, 31)
    for given in ({}, {"support": support}):
        found = chunked_ce.linear_statistics(*tensors, **keywords, outputs=("logprob", "lse", "entropy"), **given)
        rows = case.rows()
        for name in ("logprob", "entropy"):
            value = getattr(found, name)
            assert_close(value, getattr(rows, name), getattr(rows, f"{name}_scale"), torch.float32, name)
            if name == "logprob":
                upstream = random_like(value)
                check_gradients(case, value, upstream, case.reference_gradients(rows, name, array(upstream)))
        torch.testing.assert_close(found.lse[counted].double(), torch.from_numpy(rows.lse)[counted], rtol=1e-6, atol=0)


WRONG = [
    (3, TypeError, "linear_adapter must be None or a pair .* was 3"),
    ((torch.zeros(6, 2),), TypeError, "linear_adapter must be .*was a tuple of 1"),
    (torch.zeros(2, 2), TypeError, "linear_adapter must be None or a pair .* shape"),
    ((torch.zeros(6, 2), None), TypeError, r"linear_adapter\[1\] must be a tensor, was NoneType"),
    ((torch.zeros(6, 2).long(), torch.zeros(9, 2)), TypeError, r"linear_adapter\[0\] must be .*int64"),
    ((torch.zeros(6, 2), torch.zeros(8, 2)), ValueError, r"linear_adapter\[1\] .* 9 rows .* \(8, 2\)"),
    ((torch.zeros(6, 2), torch.zeros(9)), ValueError, r"linear_adapter\[1\] .* \(9,\)"),
    ((torch.zeros(6, 0), torch.zeros(9, 0)), ValueError, r"linear_adapter\[1\] .* r >= 1, had shape \(9, 0\)"),
    ((torch.zeros(6, 3), torch.zeros(9, 2)), ValueError, r"linear_adapter\[0\] .* \(6, 2\), had \(6, 3\)"),
    ((torch.zeros(5, 2), torch.zeros(9, 2)), ValueError, r"linear_adapter\[0\] .* \(6, 2\), had \(5, 2\)"),
    (([torch.zeros(6, 2)], torch.zeros(9, 2)), TypeError, r"linear_adapter\[0\] must be a tensor, was (a )?list"),
    (
        (torch.zeros(6, 2, device="meta"), torch.zeros(9, 2)),
        ValueError,
        r"linear_adapter\[0\] must be on input's device cpu, was on meta",
    ),
]


@pytest.mark.parametrize(("adapter", "kind", "message"), WRONG)
def test_errors(adapter, kind, message):
    arguments = torch.zeros(6, 4), torch.zeros(9, 4), torch.arange(6)
    functions = [linear_cross_entropy, linear_logprobs, chunked_ce.linear_statistics]
    for function in functions:
        with pytest.raises(kind, match=message):
            function(*arguments, linear_adapter=adapter)
    with pytest.raises(kind, match=message):
        linear_loss(CrossEntropy(), *arguments, linear_adapter=adapter)
