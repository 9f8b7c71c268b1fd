"""Several depths on one head (multi-token prediction): as one call on all their tokens, which no tensor holds."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from chunked_ce import (
    ChunkOptions,
    TokenMean,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_loss,
    linear_statistics,
)
from chunked_ce.objectives import CrossEntropy, PolicyGradient, Teacher, TopKDivergence
from tests.cases import REDUCTIONS_AND_WAYS, WAYS, array, arrays, assert_close, chunks, loss_dtype, problem
from tests.precision import LOW, assert_no_worse, parts_in
from tests.reference import linear_rows
from tests.test_work import work

SHAPES = ((2, 4), (7,), (0,), (), (3, 1, 2))
FLOATS = (torch.float64, torch.float32)


class Depths:
    """Hidden states and targets of several depths, and one head."""

    def __init__(self, shapes, d, vocab, *, dtype=torch.float32, seed=0, ignored=0.25, bias=False, spread=1.0):
        sizes = [int(np.prod(shape)) for shape in shapes]
        whole = problem(sum(sizes), d, vocab, dtype=dtype, bias=bias, ignored=ignored, spread=spread, seed=seed)
        self.shapes, self.sizes, self.whole = shapes, sizes, whole
        parts = zip(whole.hidden.detach().split(sizes), whole.target.split(sizes), shapes, strict=True)
        pairs = [(hidden.reshape(*shape, d).clone(), target.reshape(shape)) for hidden, target, shape in parts]
        self.hidden = [hidden.requires_grad_() for hidden, _ in pairs]
        self.target = [target for _, target in pairs]
        self.head, self.bias = whole.head, whole.bias

    def leaves(self):
        tensors = [*self.hidden, self.head, *([] if self.bias is None else [self.bias])]
        return [tensor for tensor in tensors if tensor.requires_grad]

    def split(self, values):
        """A tensor (N, ...) of all tokens in the shapes of the depths."""
        parts = zip(values.split(self.sizes), self.shapes, strict=True)
        return [part.reshape((*shape, *part.shape[1:])) for part, shape in parts]

    def loss(self, **options):
        return linear_cross_entropy(self.hidden, self.head, self.target, linear_bias=self.bias, **options)

    def rows(self, **terms):
        bias = None if self.bias is None else array(self.bias)
        tensors = array(self.whole.hidden), array(self.head), array(self.whole.target)
        return linear_rows(*tensors, bias=bias, **arrays(terms))

    def check_gradients(self, found, rows, of, upstream):
        """The gradients of all leaves against the reference, for an ``upstream`` gradient (N,) of ``of``."""
        hidden, *head = rows.gradients(of, array(self.whole.hidden), array(self.head), upstream)
        stops = np.cumsum(self.sizes)[:-1]
        depths = zip(*(np.split(part, stops) for part in hidden), self.shapes, strict=True)
        expected = [tuple(x.reshape(*shape, x.shape[1]) for x in pair) for *pair, shape in depths]
        leaves = [*self.hidden, self.head, *([] if self.bias is None else [self.bias])]
        exact = [(leaf, *pair) for leaf, pair in zip(leaves, [*expected, *head], strict=False) if leaf.requires_grad]
        for gradient, (leaf, value, scale) in zip(found, exact, strict=True):
            assert gradient.dtype == leaf.dtype
            assert_close(gradient, value.reshape(leaf.shape), scale.reshape(leaf.shape), leaf.dtype, "gradient")


def tokens(size, dtype=torch.float64, seed=3):
    g = torch.Generator().manual_seed(seed)
    return 0.2 + torch.rand(size, generator=g, dtype=torch.float64).to(dtype)


def check(case, *, reduction="mean", options=None, **terms):
    per_token = {name: case.split(value) for name, value in terms.items() if name == "token_weight"}
    value = case.loss(reduction=reduction, options=options, **(terms | per_token))
    rows, dtype = case.rows(**terms), case.head.dtype
    exact, scale = rows.reduce(reduction)
    coefficient = rows.coefficient(reduction)
    if reduction == "none":
        assert isinstance(value, list) and [part.shape for part in value] == [torch.Size(s) for s in case.shapes]
        upstream = tokens(sum(case.sizes), seed=4)
        coefficient = coefficient * array(upstream)
        parts, value = value, torch.cat([part.flatten() for part in value])
        total = sum((part * factor).sum() for part, factor in zip(parts, case.split(upstream), strict=True))
    else:
        total = value
    assert value.dtype == loss_dtype(dtype)
    assert_close(value, exact, scale, dtype, "loss")
    case.check_gradients(torch.autograd.grad(total, case.leaves()), rows, "loss", coefficient)


@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_and_gradients(dtype, reduction, way, chunk):
    """Chunks that span depths, a depth of one unbatched token and one without tokens, every term of the loss."""
    case = Depths(SHAPES, 6, 13, dtype=dtype, bias=True)
    check(case, reduction=reduction, options=chunks(chunk, way))
    weights = {"weight": tokens(13), "token_weight": tokens(sum(case.sizes))}
    terms = {"label_smoothing": 0.2, "z_loss": 0.05, "softcap": 3.0, "logit_scale": 0.7}
    check(case, reduction=reduction, options=chunks(chunk, way), **weights, **terms)


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(seed):
    draw = random.Random(seed)
    shapes = [(draw.choice([0, 1, 3, 11]),) for _ in range(draw.choice([1, 2, 3]))]
    ignored, dtype = draw.choice([0.0, 0.3, 1.0]), draw.choice(FLOATS)
    case = Depths(shapes, draw.choice([1, 5]), draw.choice([1, 17]), dtype=dtype, seed=seed, ignored=ignored)
    for leaf in case.leaves():
        leaf.requires_grad_(draw.random() < 0.7)
    case.hidden[0].requires_grad_(case.hidden[0].requires_grad or not case.leaves())
    reduction, way = draw.choice(REDUCTIONS_AND_WAYS)
    check(case, reduction=reduction, options=chunks(draw.choice([1, 2, 4, 50]), way))


def test_log_probabilities():
    case = Depths(SHAPES, 6, 13, bias=True)
    found = linear_logprobs(case.hidden, case.head, case.target, linear_bias=case.bias, return_entropy=True)
    rows = case.rows()
    for name, values in zip(("logprob", "entropy"), found, strict=True):
        assert [part.shape for part in values] == [torch.Size(shape) for shape in case.shapes]
        whole = torch.cat([part.flatten() for part in values])
        assert_close(whole, getattr(rows, name), getattr(rows, f"{name}_scale"), torch.float32, name)
        gradients = torch.autograd.grad(whole.sum(), case.leaves(), retain_graph=True)
        case.check_gradients(gradients, rows, name, np.ones(sum(case.sizes)))


@pytest.mark.parametrize("way", WAYS)
def test_numbers_per_depth(way):
    """A number among the token weights or temperatures is that of each token of its depth."""
    case = Depths([(2, 4), (7,)], 6, 13, dtype=torch.float64)
    weights, temperatures = [1.0, torch.full((7,), 0.3)], [torch.full((2, 4), 2.0), 0.5]
    keywords = {"options": chunks(3, way), "return_stats": True}
    found, stats = case.loss(token_weight=weights, temperature=temperatures, **keywords)
    whole = case.whole
    weight = torch.cat([torch.ones(8), torch.full((7,), 0.3)])
    temperature = torch.cat([torch.full((8,), 2.0), torch.full((7,), 0.5)])
    expected, other = linear_cross_entropy(
        whole.hidden, whole.head, whole.target, token_weight=weight, temperature=temperature, **keywords
    )
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(tuple(stats), tuple(other), rtol=1e-6, atol=0)
    assert stats.num_tokens.item() == pytest.approx(weight[whole.target != -100].sum().item())
    gradients = torch.autograd.grad(found, [*case.hidden, case.head])
    ours = [torch.cat([gradients[0].flatten(0, 1), gradients[1]]), gradients[2]]
    torch.testing.assert_close(ours, list(torch.autograd.grad(expected, [whole.hidden, whole.head])))


@pytest.mark.parametrize("way", WAYS)
def test_objectives(way):
    """Tensors per token of objectives are lists too, those with K numbers per token among them."""
    case = Depths([(2, 4), (7,)], 6, 13, dtype=torch.float64)
    whole, n = case.whole, 15
    g = torch.Generator().manual_seed(0)
    policy = {name: torch.randn(n, generator=g, dtype=torch.float64) for name in ("advantage", "old_logprob")}
    ids = torch.stack([torch.randperm(13, generator=g)[:3] for _ in range(n)])
    logprobs = torch.randn(n, 13, generator=g, dtype=torch.float64).log_softmax(-1).gather(-1, ids)
    top_k = {"teacher_ids": ids, "teacher_logprobs": logprobs}
    for objective, tensors in ((PolicyGradient(), policy), (TopKDivergence(), top_k), (CrossEntropy(0.1), {})):
        expected = linear_loss(objective, whole.hidden, whole.head, whole.target, **tensors)
        lists = {name: case.split(tensor) for name, tensor in tensors.items()}
        found = linear_loss(objective, case.hidden, case.head, case.target, options=chunks(4, way), **lists)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
        gradients = torch.autograd.grad(found, [*case.hidden, case.head])
        theirs = torch.autograd.grad(expected, [whole.hidden, whole.head])
        ours = [torch.cat([gradients[0].flatten(0, 1), gradients[1]]), gradients[2]]
        torch.testing.assert_close(ours, list(theirs), rtol=1e-11, atol=1e-13)


def test_the_mean_of_a_window():
    """`TokenMean` counts the targets of all depths: the mean over them is the mean that the loss takes itself."""
    case = Depths([(2, 4), (7,)], 6, 13, dtype=torch.float64)
    mean = TokenMean.over(case.target)
    torch.testing.assert_close(mean(case.loss(reduction="sum")), case.loss(), rtol=1e-14, atol=0)
    depths = list(zip(case.hidden, case.target, strict=True))
    sums = [linear_cross_entropy(hidden, case.head, target, reduction="sum") for hidden, target in depths]
    torch.testing.assert_close(mean.report(sums), case.loss().detach(), rtol=1e-14, atol=0)
    means = [linear_cross_entropy(hidden, case.head, target) for hidden, target in depths]
    assert abs(sum(means) / 2 - case.loss()) > 1e-4, "the mean of means is another one"


@pytest.mark.parametrize("chunk", [200, 33])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
def test_no_worse_than_plain(dtype, way, chunk):
    """peers 15: the bound is the error of the plain loss on the tokens of all depths."""
    case = Depths([(10, 10), (70,), (30,)], 64, 501, dtype=dtype, spread=2.0)
    rows, whole = case.rows(), case.whole
    plain = F.cross_entropy(F.linear(whole.hidden, whole.head).float(), whole.target, reduction="none")
    losses = torch.cat([part.flatten() for part in case.loss(reduction="none", options=chunks(chunk))])
    assert_no_worse(losses, plain, rows.loss)
    *hidden, head = torch.autograd.grad(case.loss(options=chunks(chunk, way)), case.leaves())
    found = torch.cat([part.reshape(-1, 64) for part in hidden]), head
    theirs = torch.autograd.grad(plain.sum() / (whole.target != -100).sum(), [whole.hidden, whole.head])
    expected = rows.gradients("loss", array(whole.hidden), array(whole.head), rows.coefficient("mean"))
    for name, ours, other, (exact, _) in zip(("input", "linear_weight"), found, theirs, expected, strict=False):
        # Both ways sum the weight's gradient over chunks of tokens.
        parts = parts_in(name, "forward", dtype)
        assert_no_worse(ours, other, exact, f"gradient of {name}", parts)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ignored", [0.0, 0.25])
def test_no_concatenated_copy(ignored, way):
    """Only the rows of a chunk are copied: no tensor has the hidden states of all depths, nor of a whole one."""
    n, d, vocab, chunk = 512, 256, 64, 16
    case = Depths([(n,), (n,), (n,)], d, vocab, ignored=ignored)
    cost = work(lambda: torch.autograd.grad(case.loss(options=chunks(chunk, way)), case.leaves()))
    assert cost.largest <= n * d * 4, "more than one depth's gradient"
    for hidden in case.hidden:
        hidden.requires_grad_(False)
    cost = work(lambda: torch.autograd.grad(case.loss(options=chunks(chunk, way)), case.leaves()))
    assert cost.largest <= max(vocab * d, 3 * n * 8) * 4
    assert cost.peak <= 3 * vocab * d * 4 + 4 * chunk * d * 4 + 40 * 3 * n * 8  # less than a single depth's states
    assert cost.peak < n * d * 4


@pytest.mark.parametrize("way", WAYS)
def test_products_and_one_gradient_of_the_weight(way):
    """As many products as one tensor of all tokens takes, and one gradient of the weight."""
    n, d, vocab = 32, 64, 4096
    case = Depths([(n,), (n,)], d, vocab, ignored=0.0)
    cost = work(lambda: torch.autograd.grad(case.loss(options=chunks(16, way)), case.leaves()))
    assert cost.multiplications == (3 if way == "forward" else 4) * 2 * n * d * vocab
    assert cost.peak < 1.9 * vocab * d * 4
    case.head.requires_grad_(False)
    cost = work(lambda: torch.autograd.grad(case.loss(options=chunks(4, way)), case.leaves()))
    assert cost.multiplications == (2 if way == "forward" else 3) * 2 * n * d * vocab
    assert cost.peak < vocab * d * 4


@pytest.mark.parametrize("way", WAYS)
def test_logits_never_exist(way):
    n, d, vocab = 512, 16, 50257
    case = Depths([(n,), (n,)], d, vocab, ignored=0.0)
    cost = work(lambda: torch.autograd.grad(case.loss(options=chunks(64, way)), case.leaves()))
    assert cost.largest < 0.1 * 2 * n * vocab * 4


@pytest.mark.parametrize("way", ["forward", pytest.param("backward", marks=pytest.mark.thorough)])
def test_compiled(way):
    """In one graph, lists and all, with the same values and gradients for other numbers of tokens."""

    @torch.compile(fullgraph=True, dynamic=True)
    def loss(hidden, head, target):
        options = ChunkOptions(gradients=way)
        mean = linear_cross_entropy(hidden, head, target, token_weight=[1.0, 0.3], options=options)
        return mean, linear_logprobs(hidden, head, target)

    for shapes in ([(3, 4), (9,)], [(2, 5), (6,)]):
        case = Depths(shapes, 6, 31)
        value, logprobs = loss(case.hidden, case.head, case.target)
        total = value + sum(part.sum() for part in logprobs)
        mean = case.loss(token_weight=[1.0, 0.3], options=ChunkOptions(gradients=way))
        other = linear_logprobs(case.hidden, case.head, case.target)
        assert [part.shape for part in logprobs] == [part.shape for part in other]
        expected = torch.autograd.grad(mean + sum(part.sum() for part in other), case.leaves())
        torch.testing.assert_close(torch.autograd.grad(total, case.leaves()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_second_derivatives(way):
    case = Depths([(2, 2), (3,)], 3, 7, dtype=torch.float64, bias=True)

    def loss(first, second, head, bias):
        keywords = {"linear_bias": bias, "options": chunks(2, way)}
        return linear_cross_entropy([first, second], head, case.target, **keywords)

    assert torch.autograd.gradgradcheck(loss, case.leaves())
    found = torch.func.grad(loss, argnums=(1,))(*(leaf.detach() for leaf in case.leaves()))
    torch.testing.assert_close(found, torch.autograd.grad(loss(*case.leaves()), case.leaves()[1:2]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradient_filter_and_accumulation(dtype):
    """The filter drops columns of chunks that span depths; the weight's gradient is added to the existing one."""
    case = Depths([(20,), (25,)], 16, 300, dtype=dtype, spread=3.0)
    whole = case.whole
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 2e-3}
    for options in (chunks(8, gradient_filter=0.02), chunks(8, "backward", gradient_filter=0.02)):
        found = torch.autograd.grad(case.loss(options=options), case.leaves())
        expected = torch.autograd.grad(whole.loss(options=options), whole.leaves())
        torch.testing.assert_close([torch.cat(found[:2]), found[2]], list(expected), **tolerance)
    for into in ("grad", "main_grad"):
        case.head.grad, case.head.main_grad = None, torch.zeros_like(case.head)
        for _ in range(2):
            case.loss(options=chunks(8, accumulate_into=into)).backward(inputs=[case.head])
        (expected,) = torch.autograd.grad(whole.loss(options=chunks(8, "backward")), whole.head)
        total = getattr(case.head, into)
        torch.testing.assert_close(total, 2 * expected, **tolerance)


def test_autocast():
    case = Depths([(20,), (25,)], 16, 30)
    low = Depths([(20,), (25,)], 16, 30, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = case.loss()
    assert value.item() == low.loss().item()
    assert {gradient.dtype for gradient in torch.autograd.grad(value, case.leaves())} == {torch.float32}


H, T = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
WRONG = [
    ({"input": [], "target": []}, ValueError, r"input must be a tensor, or a list .* at least one, was \[\]"),
    ({"input": [H, None]}, TypeError, "input must be .*list of 2 whose entry 1 is a NoneType"),
    ({"input": [[0.0]]}, TypeError, "input must be .*list of 1 whose entry 0 is a list"),
    ({"input": [H, torch.zeros(4, 5)]}, ValueError, r"depth 1: linear_weight must be \(V, D\) with D = 5"),
    ({"input": [H, H.double()]}, ValueError, "input must have one dtype.*float32 on cpu, had torch.float64 .*depth 1"),
    ({"input": H}, TypeError, "target must be a tensor, was list"),
    ({"target": T}, TypeError, "target must be a list of 2, one for each depth of input, was a torch.int64 tensor"),
    ({"target": [T]}, ValueError, "target must .* 2 depths of input, had 1"),
    ({"target": [T, T[:3]]}, ValueError, r"depth 1: target must have .*\(4,\), had \(3,\)"),
    ({"target": [T, T.float()]}, TypeError, "depth 1: target must be int32 or int64"),
    ({"target": None}, TypeError, "depth 0: target must be a tensor, was NoneType"),
    ({"token_weight": [1.0]}, ValueError, "token_weight must .* 2 depths of input, had 1"),
    ({"token_weight": T}, TypeError, "token_weight must be a list of 2, one for each depth of input, was a torch"),
    ({"token_weight": [1.0, "2"]}, TypeError, "token_weight of depth 1 must be a tensor or a number, was '2'"),
    ({"token_weight": [1.0, None]}, TypeError, "token_weight of depth 1 must be a tensor or a number, was None"),
    ({"temperature": [1.0, 0.0]}, ValueError, "depth 1: temperature must be finite and > 0"),
    ({"temperature": [1.0]}, ValueError, "temperature must .* 2 depths of input, had 1"),
    ({"linear_adapter": (H, torch.zeros(5, 3))}, TypeError, r"linear_adapter\[0\] must be a list of 2"),
    ({"linear_adapter": ([H, H[:3]], torch.zeros(5, 3))}, ValueError, r"depth 1: linear_adapter\[0\] must have"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), WRONG)
def test_errors(changes, kind, message):
    arguments = {"input": [H, H], "linear_weight": torch.zeros(5, 3), "target": [T, T]} | changes
    for function in (linear_cross_entropy, linear_logprobs):
        if function is linear_logprobs and "token_weight" in arguments:
            continue
        with pytest.raises(kind, match=message):
            function(**arguments)


def test_what_takes_one_depth():
    hidden, head, target = [H, H], torch.zeros(5, 3), [T, T]
    with pytest.raises(TypeError, match="input must be a tensor, was a list of 2: linear_statistics takes one depth"):
        linear_statistics(hidden, head, target)
    with pytest.raises(ValueError, match="input must be one tensor, was a list of 2: a teacher goes with one depth"):
        linear_divergence(hidden, head, Teacher(H, head), target=target)
    with pytest.raises(
        ValueError, match=r"teacher_ids must have one last dimension K for all depths, had \[\(2,\), \(1,\)\]"
    ):
        ids, logprobs = [[torch.zeros(4, k, dtype=dtype) for k in (2, 1)] for dtype in (torch.int64, torch.float32)]
        linear_loss(TopKDivergence(), hidden, head, target, teacher_ids=ids, teacher_logprobs=logprobs)


def test_one_depth_in_a_list():
    """It is that depth alone; what comes per token is a list."""
    case = problem(9, 4, 11)
    assert linear_cross_entropy([case.hidden], case.head, (case.target,)).item() == case.loss().item()
    (losses,) = linear_cross_entropy([case.hidden], case.head, [case.target], reduction="none")
    assert torch.equal(losses, case.loss(reduction="none"))
