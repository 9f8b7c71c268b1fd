"""One graph for every size: compilations are counted, values and gradients checked at each size."""

import contextlib

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from chunked_ce import ChunkOptions, LinearCrossEntropyLoss, cross_entropy, linear_cross_entropy, linear_logprobs
from tests.cases import REDUCTIONS_AND_WAYS, chunks

thorough = pytest.mark.thorough
BACKEND = "aot_eager"
COUNTS = (24, 17, 3, 40, 9, 64)
SIZES = ((24, 6, 11), (17, 9, 13), (5, 2, 7), (40, 33, 301))  # N, D, V


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def everything(h, w, y, **keywords):
    """Every term and weight of the loss."""
    weights = {"weight": w[:, 0].detach().abs(), "token_weight": h[:, 0].detach().abs(), "linear_bias": w[:, 1]}
    return linear_cross_entropy(h, w, y, label_smoothing=0.1, z_loss=0.1, softcap=2.0, **weights, **keywords)


def with_stats(h, w, y, **keywords):
    loss, stats = linear_cross_entropy(h, w, y, return_stats=True, **keywords)
    return loss + torch.stack(list(stats)).sum()


module = LinearCrossEntropyLoss(label_smoothing=0.1)
CALLS = {
    **{
        f"{reduction}-{way}": lambda h, w, y, reduction=reduction, way=way: linear_cross_entropy(
            h, w, y, reduction=reduction, options=chunks(5, way)
        )
        for reduction, way in REDUCTIONS_AND_WAYS
    },
    "auto": linear_cross_entropy,
    "everything-forward": everything,
    "everything-backward": lambda h, w, y: everything(h, w, y, options=chunks(5, "backward")),
    "stats-forward": with_stats,
    "stats-backward": lambda h, w, y: with_stats(h, w, y, options=chunks(5, "backward")),
    "cross_entropy": lambda h, w, y: cross_entropy(h @ w.t(), y, label_smoothing=0.1),
    "cross_entropy-none": lambda h, w, y: cross_entropy(h @ w.t(), y, reduction="none"),
    "linear_logprobs": linear_logprobs,
    "entropy": lambda h, w, y: torch.stack(linear_logprobs(h, w, y, return_entropy=True)),
    "module": lambda h, w, y: module(h, w, y),
}


def names(*few):
    """All calls by name; `make test` takes a few of them, `make thorough` the others."""
    return [pytest.param(name, marks=[thorough] * (name not in few)) for name in CALLS]


FEW = ("auto", "everything-backward", "cross_entropy", "entropy")


def data(n, d=6, vocab=11, dtype=torch.float32):
    torch.manual_seed(n)
    target = torch.randint(vocab, (n,))
    target[::5] = -100
    return (
        torch.randn(n, d, dtype=dtype, requires_grad=True),
        torch.randn(vocab, d, dtype=dtype).requires_grad_(),
        target,
    )


def assert_same(function, reference, tensors, leaves=2, **tolerance):
    value, expected = function(*tensors), reference(*tensors)
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(value, expected, **tolerance)
    got, want = (torch.autograd.grad(0.37 * x.sum(), tensors[:leaves]) for x in (value, expected))
    torch.testing.assert_close(got, want, **tolerance)


def counted(function, **keywords):
    counter = CompileCounterWithBackend(BACKEND)
    return torch.compile(function, fullgraph=True, backend=counter, **keywords), counter


# --- compilations ---


# Sizes that are marked, below, ask for more.
@pytest.mark.parametrize("name", names("auto"))
def test_two_compilations_for_all_token_counts(name):
    """The first takes the count for a constant, the second is for all."""
    fast, counter = counted(CALLS[name])
    for n in COUNTS:
        assert_same(fast, CALLS[name], data(n))
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    "name",
    names("none-backward", "mean-forward", "auto", "everything-backward", "stats-forward", "cross_entropy", "entropy"),
)
def test_one_compilation_for_marked_sizes(name):
    """Tokens, width and vocabulary; marking is an error where the code makes a constant of one."""
    fast, counter = counted(CALLS[name])
    for n, d, vocab in SIZES:
        tensors = data(n, d, vocab)
        for tensor in tensors:
            for dim in range(tensor.dim()):
                torch._dynamo.mark_dynamic(tensor, dim)
        assert_same(fast, CALLS[name], tensors)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", names("everything-backward"))
def test_vocabulary_and_width_change_too(name):
    fast, counter = counted(CALLS[name])
    for sizes in SIZES:
        assert_same(fast, CALLS[name], data(*sizes))
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", names("auto"))
@pytest.mark.parametrize("dynamic", [True, pytest.param(False, marks=thorough)])
def test_dynamic_as_asked(dynamic, name):
    fast, counter = counted(CALLS[name], dynamic=dynamic)
    assert_same(fast, CALLS[name], data(24))
    first = counter.frame_count
    with torch._dynamo.config.patch(error_on_recompile=dynamic):
        for n in (17, 40):
            assert_same(fast, CALLS[name], data(n))
    assert counter.frame_count == (first if dynamic else 3)


@pytest.mark.parametrize("name", names("auto"))
def test_one_token_and_none(name):
    """Sizes 0 and 1 have graphs of their own, as everywhere in torch; all others share one."""
    fast, counter = counted(CALLS[name])
    for n in (1, 0, 5, 9, 0, 1, 24):
        assert_same(fast, CALLS[name], data(n))
    assert counter.frame_count == 3


@pytest.mark.parametrize(
    ("dtype", "way"),
    [
        (torch.bfloat16, "backward"),
        (torch.float16, "forward"),
        pytest.param(torch.bfloat16, "forward", marks=thorough),
        pytest.param(torch.float16, "backward", marks=thorough),
    ],
)
def test_one_chunk_or_several_in_half_precision(dtype, way):
    """The dtype of the sum over chunks may not depend on their number: it is part of the graph."""

    def loss(h, w, y):
        return linear_cross_entropy(h, w, y, options=chunks(16, way))

    fast, counter = counted(loss)
    for n in (8, 12, 16, 17, 64):
        assert_same(fast, loss, data(n, dtype=dtype), rtol=0.02, atol=1e-3)
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("function", "number"),
    [
        (linear_cross_entropy, float),
        (linear_cross_entropy, int),
        (linear_cross_entropy, torch.tensor),
        (cross_entropy, float),
        pytest.param(cross_entropy, int, marks=thorough),
        pytest.param(cross_entropy, torch.tensor, marks=thorough),
    ],
)
def test_num_tokens_is_no_constant(function, number):
    def loss(h, w, y, num_tokens):
        if function is cross_entropy:
            return cross_entropy(h @ w.t(), y, num_tokens=num_tokens)
        return linear_cross_entropy(h, w, y, num_tokens=num_tokens)

    fast, counter = counted(loss)
    for value in (30, 45, 7, 100, 10, 81, 64, 3, 11, 12, 0):
        assert_same(fast, loss, (*data(24), number(value if number is int else value / 4)))
    assert counter.frame_count <= 2


# --- graphs that others record ---


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", names(*FEW, "mean-forward", "none-backward", "stats-backward"))
def test_make_fx(name, mode):
    """Loss and backward in one recorded graph, for any count if sizes are symbols."""

    def step(h, w, y):
        value = CALLS[name](h, w, y)
        return value, *torch.autograd.grad(0.37 * value.sum(), (h, w))

    recorded = make_fx(step, tracing_mode=mode)(*data(24))
    for n in COUNTS if mode == "symbolic" else (24,):
        torch.testing.assert_close(recorded(*data(n)), step(*data(n)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", names("auto", "cross_entropy"))
def test_compiled_autograd(name):
    """The backward of an eager loss, compiled whole: it reads no value of the device or of the host."""
    compiler = torch.compile(fullgraph=True, backend=BACKEND)
    for n in (24, 9):
        tensors = data(n)
        expected = torch.autograd.grad(0.37 * CALLS[name](*tensors).sum(), tensors[:2])
        value = 0.37 * CALLS[name](*tensors).sum()
        with torch._dynamo.compiled_autograd._enable(compiler):
            value.backward()
        torch.testing.assert_close([x.grad for x in tensors[:2]], list(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("into", ["grad", "main_grad"])
def test_compiled_autograd_adds_nothing_itself(into):
    """A recorded backward cannot add to a tensor that is no argument of it: the usual way, or an error."""
    hidden, head, target = data(24)
    expected = torch.autograd.grad(linear_cross_entropy(hidden, head, target), head)[0]
    head.grad, head.main_grad = torch.ones_like(head), torch.ones_like(head)
    value = linear_cross_entropy(hidden, head, target, options=ChunkOptions(accumulate_into=into))
    refused = pytest.raises(RuntimeError, match="accumulate_into='main_grad'")
    with (
        torch._dynamo.compiled_autograd._enable(torch.compile(backend=BACKEND)),
        refused if into == "main_grad" else contextlib.nullcontext(),
    ):
        value.backward()
    assert torch.equal(head.main_grad, torch.ones_like(head))
    if into == "grad":
        torch.testing.assert_close(head.grad, 1 + expected)


@pytest.mark.parametrize("present", [True, False])
def test_main_grad_in_compiled_code_is_refused_by_name(present):
    hidden, head, target = data(24)
    if present:
        head.main_grad = torch.zeros_like(head)
    fast, _ = counted(lambda h, w, y: linear_cross_entropy(h, w, y, options=ChunkOptions(accumulate_into="main_grad")))
    with pytest.raises(
        Exception, match=r"accumulate_into='main_grad' needs .*outside of torch.compile.*compiling=True"
    ):
        fast(hidden, head, target)


class Model(nn.Module):
    """A layer and a head, or the head alone; the one or the other frozen."""

    def __init__(self, call, layer, frozen_head):
        super().__init__()
        self.call, self.head = call, nn.Linear(6, 11, bias=False)
        self.layer = nn.Linear(6, 6) if layer else nn.Identity()
        self.head.weight.requires_grad_(not frozen_head)

    def forward(self, x, target):
        return self.call(self.layer(x), self.head.weight, target)


# Which part is frozen makes another graph of one call, whose strict tracing takes longest.
@pytest.mark.parametrize(
    ("name", "strict", "parts"),
    [
        pytest.param(name, strict, parts, marks=[thorough] * (name not in few))
        for strict, parts, few in (
            (True, "both", ("auto", "everything-backward", "entropy")),
            (True, "frozen head", ("everything-backward",)),
            (True, "frozen input", ("everything-backward",)),
            (False, "both", ("auto", "everything-backward", "entropy")),
            (False, "frozen head", ("auto", "everything-backward", "entropy")),
            (False, "frozen input", ("auto", "everything-backward", "entropy")),
        )
        for name in CALLS
    ],
)
def test_export(name, strict, parts):
    model = Model(CALLS[name], layer=parts != "frozen input", frozen_head=parts == "frozen head")
    tokens = torch.export.Dim("tokens", min=2)
    x, _, target = data(24)
    example, shapes = (x.detach(), target), ({0: tokens}, {0: tokens})
    exported = torch.export.export(model, example, dynamic_shapes=shapes, strict=strict).module()
    mine, theirs = dict(model.named_parameters()), dict(exported.named_parameters())
    names = [name for name, parameter in mine.items() if parameter.requires_grad]
    for n in COUNTS:
        x, _, target = data(n)
        value, expected = exported(x.detach(), target), model(x.detach(), target)
        torch.testing.assert_close(value, expected)
        got, want = (
            torch.autograd.grad(0.37 * found.sum(), [of[name] for name in names])
            for found, of in ((value, theirs), (expected, mine))
        )
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["auto", "everything-forward", "sum-forward", "everything-backward"])
def test_an_exported_graph_trains_what_was_frozen(name):
    """The forward way prepared no gradient for it: it is formed again."""
    model = Model(CALLS[name], layer=False, frozen_head=False)
    x, _, target = data(24)
    exported = torch.export.export(model, (x.detach(), target)).module()
    leaves = [x, exported.head.weight]
    got = torch.autograd.grad(0.37 * exported(x, target).sum(), leaves)
    want = torch.autograd.grad(0.37 * model(x, target).sum(), [x, model.head.weight])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
