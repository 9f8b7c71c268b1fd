"""`temperature`: a number, or one for each token, in every function, against dense logits."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from chunked_ce import (
    LinearCrossEntropyLoss,
    VocabShard,
    cross_entropy,
    linear_cross_entropy,
    linear_logprobs,
    linear_loss,
)
from tests.cases import REDUCTIONS_AND_WAYS, WAYS, array, chunks, problem
from tests.distributed.threads import run_threads
from tests.objectives.users_own import Focal
from tests.precision import assert_gradients_no_worse, assert_no_worse

CLOSE = {"rtol": 2e-5, "atol": 2e-6}
CAPS = (None, 4.0)


def temperatures(n, dtype=torch.float32, seed=5):
    return (0.4 + 2 * torch.rand(n, generator=torch.Generator().manual_seed(seed))).to(dtype)


def dense_losses(hidden, head, target, temperature, *, bias=None, softcap=None, smoothing=0.0, z_loss=0.0, scale=1.0):
    """The loss of each token (N,), 0 where ignored, of logits in the dtype of the products or in float64."""
    z = F.linear(hidden, head, bias)
    z = scale * (z if z.dtype == torch.float64 else z.float())
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / (temperature.unsqueeze(-1).to(z.dtype) if isinstance(temperature, torch.Tensor) else temperature)
    losses = F.cross_entropy(z, target, reduction="none", label_smoothing=smoothing)
    return losses + (z_loss * torch.logsumexp(z, -1) ** 2) * (target != -100)


def expected(case, temperature, reduction, upstream=None, **terms):
    """Value and gradients in float64."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in case.leaves()]
    bias = leaves[2] if case.bias is not None else None
    losses = dense_losses(*leaves[:2], case.target, temperature, bias=bias, **terms)
    value = reduced(losses, case.target, reduction)
    return value, torch.autograd.grad(value, leaves, torch.ones_like(value) if upstream is None else upstream)


def reduced(losses, target, reduction):
    if reduction == "none":
        return losses
    return losses.sum() / ((target != -100).sum() if reduction == "mean" else 1)


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("of_tokens", [False, True])
@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_a_head(reduction, way, of_tokens, softcap):
    case = problem(17, 6, 23, bias=True)
    temperature = temperatures(17) if of_tokens else 1.7
    terms = {"softcap": softcap, "z_loss": 0.1}
    value = case.loss(
        reduction=reduction,
        temperature=temperature,
        label_smoothing=0.2,
        logit_scale=0.8,
        options=chunks(5, way),
        **terms,
    )
    want, gradients = expected(case, temperature, reduction, smoothing=0.2, scale=0.8, **terms)
    torch.testing.assert_close(value.double(), want, **CLOSE)
    for one, other in zip(torch.autograd.grad(value.sum(), case.leaves()), gradients, strict=True):
        torch.testing.assert_close(one.double(), other, **CLOSE)


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_plain(dtype, way, softcap):
    case, temperature = problem(200, 64, 501, dtype=dtype, spread=2.0), temperatures(200)
    want, gradients = expected(case, temperature, "mean", softcap=softcap)
    plain = reduced(dense_losses(*case.leaves(), case.target, temperature, softcap=softcap), case.target, "mean")
    of_plain = torch.autograd.grad(plain, case.leaves())
    value = case.loss(temperature=temperature, softcap=softcap, options=chunks(33, way))
    got = torch.autograd.grad(value, case.leaves())
    assert_gradients_no_worse(got, of_plain, [array(grad) for grad in gradients], way, dtype)
    losses = case.loss(temperature=temperature, softcap=softcap, options=chunks(33), reduction="none")
    of_tokens = dense_losses(*case.leaves(), case.target, temperature, softcap=softcap)
    want, _ = expected(case, temperature, "none", softcap=softcap)
    assert_no_worse(losses, of_tokens, array(want))


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("of_tokens", [False, True])
def test_logits_and_log_probabilities(of_tokens, softcap):
    case = problem(17, 6, 23)
    temperature = temperatures(17) if of_tokens else 0.6
    want, gradients = expected(case, temperature, "none", softcap=softcap)
    logprobs, entropy = linear_logprobs(
        case.hidden, case.head, case.target, temperature=temperature, softcap=softcap, return_entropy=True
    )
    torch.testing.assert_close(-logprobs.double(), want, **CLOSE)
    for one, other in zip(torch.autograd.grad(-logprobs.sum(), case.leaves()), gradients, strict=True):
        torch.testing.assert_close(one.double(), other, **CLOSE)
    leaves = [leaf.detach().double() for leaf in case.leaves()]
    z = F.linear(*leaves)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    p = (z / (temperature.unsqueeze(-1) if of_tokens else temperature)).softmax(-1)
    counted = case.target != -100
    torch.testing.assert_close(entropy.double(), -(p * p.log()).sum(-1) * counted, **CLOSE)

    logits = F.linear(*(leaf.detach() for leaf in case.leaves())).requires_grad_()
    keywords = {"temperature": temperature, "softcap": softcap, "reduction": "none"}
    value = cross_entropy(logits, case.target, **keywords)
    torch.testing.assert_close(value.double(), want, **CLOSE)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    plain = logits.detach().double().requires_grad_()
    losses = dense_losses(plain, torch.eye(23, dtype=torch.float64), case.target, temperature, softcap=softcap)
    torch.testing.assert_close(gradient.double(), *torch.autograd.grad(losses.sum(), plain), **CLOSE)


@pytest.mark.parametrize("of_tokens", [False, True])
def test_an_objective_and_the_module(of_tokens):
    case = problem(17, 6, 23)
    temperature = temperatures(17) if of_tokens else 1.7
    losses, _ = expected(case, temperature, "none")
    want = ((1 - torch.exp(-losses)) ** 2 * losses).sum() / (case.target != -100).sum()
    for way in WAYS:
        keywords = {"temperature": temperature, "options": chunks(5, way)}
        value = linear_loss(Focal(), case.hidden, case.head, case.target, **keywords)
        torch.testing.assert_close(value.double(), want, **CLOSE)
    arguments = case.hidden, case.head, case.target
    module = LinearCrossEntropyLoss(temperature=1.7)
    value = module(*arguments, temperature=temperature) if of_tokens else module(*arguments)
    assert torch.equal(value, linear_cross_entropy(*arguments, temperature=temperature))


@pytest.mark.parametrize("input_grad", ["complete", "sequence"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks(ranks, input_grad):
    case, temperature = problem(12, 6, 23), temperatures(12)
    want, gradients = expected(case, temperature, "mean", softcap=4.0)

    def call(rank: int, world_size: int) -> None:
        vocab = VocabShard.split(23, input_grad=input_grad)
        share = 12 // world_size
        tokens = slice(rank * share, rank * share + share) if input_grad == "sequence" else slice(None)
        hidden = case.hidden.detach()[tokens].clone().requires_grad_()
        head = case.head.detach()[vocab.start : vocab.stop].clone().requires_grad_()
        for way in WAYS:
            keywords = {"vocab": vocab, "options": chunks(4, way), "softcap": 4.0}
            value = linear_cross_entropy(hidden, head, case.target, temperature=temperature, **keywords)
            torch.testing.assert_close(value.double(), want, **CLOSE)
            of_hidden, of_head = torch.autograd.grad(value, [hidden, head])
            torch.testing.assert_close(of_hidden.double(), gradients[0][tokens], **CLOSE)
            torch.testing.assert_close(of_head.double(), gradients[1][vocab.start : vocab.stop], **CLOSE)
        with pytest.raises(ValueError, match="temperature"):  # ranks that were given other temperatures
            other = temperature + rank
            linear_cross_entropy(hidden, head, case.target, temperature=other, vocab=vocab)

    run_threads(call, ranks)


@pytest.mark.parametrize("way", ["forward", pytest.param("backward", marks=pytest.mark.thorough)])
def test_compiled(way):
    """One graph for all token counts but the first."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def loss(hidden, head, target, temperature):
        options = chunks(5, way)
        return linear_cross_entropy(hidden, head, target, temperature=temperature, softcap=4.0, options=options)

    for n in (17, 9, 24):
        case, temperature = problem(n, 6, 23), temperatures(n)
        value = loss(case.hidden, case.head, case.target, temperature)
        want, gradients = expected(case, temperature, "mean", softcap=4.0)
        torch.testing.assert_close(value.double(), want, **CLOSE)
        for one, other in zip(torch.autograd.grad(value, case.leaves()), gradients, strict=True):
            torch.testing.assert_close(one.double(), other, **CLOSE)
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_second_derivatives():
    case, temperature = problem(5, 3, 7, dtype=torch.float64), temperatures(5, torch.float64)

    def loss(hidden, head):
        return linear_cross_entropy(hidden, head, case.target, temperature=temperature, softcap=2.0)

    assert torch.autograd.gradgradcheck(loss, case.leaves())


@pytest.mark.parametrize("n", [0, 1])
def test_few_tokens(n):
    case = problem(n, 6, 23, ignored=0.0)
    value = case.loss(temperature=temperatures(n), reduction="sum")
    want, _ = expected(case, temperatures(n), "sum")
    torch.testing.assert_close(value.double(), want, **CLOSE)


def test_ignored_tokens_need_none():
    """Padding may have a temperature of 0."""
    case = problem(17, 6, 23)
    temperature = temperatures(17)
    padded = temperature.where(case.target != -100, 0)
    values = [case.loss(temperature=one) for one in (temperature, padded)]
    assert torch.equal(*values)
    for one, other in zip(*(torch.autograd.grad(value, case.leaves()) for value in values), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("wrong", [0, -1.0, float("inf"), float("nan")])
def test_values_that_are_not_allowed(wrong):
    case = problem(5, 6, 23, ignored=0.0)
    with pytest.raises(ValueError, match=r"temperature must be finite and > 0"):
        case.loss(temperature=wrong)
    with pytest.raises(ValueError, match=r"temperature must be finite and > 0"):
        case.loss(temperature=torch.full((5,), float(wrong)))


def test_other_mistakes():
    case = problem(5, 6, 23)
    with pytest.raises(TypeError, match="temperature must be a number or a tensor"):
        case.loss(temperature="hot")
    with pytest.raises(TypeError, match="temperature must be a number or a tensor"):
        case.loss(temperature=None)
    with pytest.raises(ValueError, match=r"temperature must have shape \(5,\), had \(4,\)"):
        case.loss(temperature=torch.ones(4))
    with pytest.raises(ValueError, match="temperature requires grad"):
        case.loss(temperature=torch.ones(5, requires_grad=True))
