"""On the meta device shapes and dtypes come out as those of a call with values, forward and backward."""

import pytest
import torch

from chunked_ce import (
    ChunkOptions,
    LinearCrossEntropyLoss,
    TokenMean,
    count_tokens,
    cross_entropy,
    linear_cross_entropy,
    linear_logprobs,
)
from tests.cases import REDUCTIONS, REDUCTIONS_AND_WAYS, chunks

D, V = 6, 11
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def tensors(device, shape, dtype):
    def new(*size):
        return torch.ones(size, dtype=dtype, device=device, requires_grad=True)

    return new(*shape, D), new(V, D), torch.zeros(shape, dtype=torch.int64, device=device), new(V)


def facts(outputs, leaves):
    """Shape and dtype of everything that a call returns, and of the gradients."""
    outputs[0].sum().backward()
    gradients = [leaf.grad for leaf in leaves if leaf.requires_grad]
    return [(x.shape, x.dtype) for x in (*outputs, *gradients)], {x.device.type for x in (*outputs, *gradients)}


def assert_as_with_values(call, shape=(24,), dtype=torch.float32, frozen=()):
    found = {}
    for device in ("cpu", "meta"):
        leaves = tensors(device, shape, dtype)
        for index in frozen:
            leaves[index].requires_grad_(False)
        found[device], devices = facts(call(*leaves), leaves)
        assert devices == {device}
    assert found["meta"] == found["cpu"]


def weights_of(x, target):
    return {
        "weight": torch.ones(V, device=x.device),
        "token_weight": torch.ones(target.shape, device=x.device),
        "num_tokens": torch.tensor(7, device=x.device),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_linear_cross_entropy(reduction, way, dtype):
    keywords = {"reduction": reduction, "options": chunks(5, way)}
    terms = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 2.0, "return_stats": True}

    def with_everything(x, w, y, b):
        loss, stats = linear_cross_entropy(x, w, y, linear_bias=b, **keywords, **terms, **weights_of(x, y))
        return loss, *stats

    assert_as_with_values(with_everything, dtype=dtype)
    for frozen in ((), (0,), (1, 3)):
        assert_as_with_values(
            lambda x, w, y, b: [linear_cross_entropy(x, w, y, linear_bias=b, **keywords)], dtype=dtype, frozen=frozen
        )


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_shapes(reduction, shape):
    def linear(x, w, y, b):
        loss, stats = linear_cross_entropy(x, w, y, linear_bias=b, reduction=reduction, return_stats=True)
        return loss, *stats

    def logits(x, w, y, b):
        loss, stats = cross_entropy(x @ w.t() + b, y, reduction=reduction, return_stats=True)
        return loss, *stats

    for call in (linear, logits, lambda x, w, y, b: linear_logprobs(x, w, y, linear_bias=b, return_entropy=True)):
        assert_as_with_values(call, shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_logprobs(dtype):
    assert_as_with_values(lambda x, w, y, b: [linear_logprobs(x, w, y, linear_bias=b)], dtype=dtype)
    assert_as_with_values(lambda x, w, y, b: linear_logprobs(x, w, y, linear_bias=b, return_entropy=True), dtype=dtype)


@pytest.mark.parametrize("number", [3, 2.5, torch.tensor(3.0)])
def test_num_tokens_on_the_host(number):
    assert_as_with_values(lambda x, w, y, b: [linear_cross_entropy(x, w, y, linear_bias=b, num_tokens=number)])


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_with_the_gradient_filter(way):
    options = chunks(5, way, gradient_filter="auto")
    assert_as_with_values(lambda x, w, y, b: [linear_cross_entropy(x, w, y, linear_bias=b, options=options)])


def test_module_and_mean():
    def call(x, w, y, b):
        module = LinearCrossEntropyLoss(weight=torch.ones(V), reduction="sum", return_stats=True).to(x.device)
        loss, stats = module(x, w, y, b)
        assert count_tokens(y).device == x.device
        return TokenMean.over(y)(loss), *stats

    assert_as_with_values(call)


@pytest.mark.parametrize("into", ["grad", "main_grad"])
def test_accumulation(into):
    """The second backward adds to what there is."""
    hidden, head, target, _ = tensors("meta", (24,), torch.float32)
    head.main_grad = torch.zeros_like(head)
    for _ in range(2):
        linear_cross_entropy(hidden, head, target, options=ChunkOptions(accumulate_into=into)).backward()
    assert (head.grad is not None) == (into == "grad")


def test_derivatives_of_derivatives_and_transforms():
    hidden, head, target, _ = tensors("meta", (24,), torch.float32)
    (first,) = torch.autograd.grad(linear_cross_entropy(hidden, head, target), hidden, create_graph=True)
    assert torch.autograd.grad(first.sum(), head)[0].shape == head.shape
    grad = torch.func.grad(lambda x: linear_cross_entropy(x, head, target))(hidden)
    assert (grad.shape, grad.device.type) == (hidden.shape, "meta")
