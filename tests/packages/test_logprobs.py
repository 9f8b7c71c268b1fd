"""TRL's and verl's fused log-probabilities and entropies, from the same hidden states and head."""

import pytest
import torch
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction
from verl.utils.experimental.torch_functional import FusedLinearForPPO

import chunked_ce
from chunked_ce import linear_logprobs
from tests.cases import array, chunks
from tests.packages.comparison import VOCAB, assert_same, model, needs
from tests.precision import assert_no_worse

TOKENS = 70
MODEL = model(TOKENS)
TARGET = torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(5))
TARGET[:9] = (MODEL.hidden @ MODEL.weight.t() + MODEL.bias).argmax(-1)[:9]
TRANSFORMS = [{}, {"softcap": 2.5}, {"logit_scale": 0.6}, {"softcap": 3.0, "logit_scale": 1.7}]
NAMES = {"mean_logits": "mean_logit"}  # what TRL calls otherwise


def trl(hidden, weight, bias, outputs, temperature=1.0, softcap=None, logit_scale=1.0):
    """The log-probabilities and the outputs asked for, by TRL's names: 64 words at a time."""
    found = ChunkedLogProbFunction.apply(
        hidden, weight, bias, TARGET, temperature, 64, softcap, logit_scale, tuple(outputs)
    )
    named = dict(zip(OPTIONAL_OUTPUTS, found[1:], strict=True))
    return {"logprob": found[0]} | {name: named[name] for name in outputs}


def both(logprob, entropy):
    """One tensor of the two, so that each gets gradients of its own."""
    return torch.stack([logprob, entropy])


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_trl(transform):
    def ours(hidden, weight, bias):
        return linear_logprobs(hidden, weight, TARGET, linear_bias=bias, options=chunks(16), **transform)

    assert_same(ours, lambda *leaves: trl(*leaves, (), **transform)["logprob"], MODEL)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_trl_with_entropy(transform):
    def ours(hidden, weight, bias):
        keywords = {"linear_bias": bias, "options": chunks(16), "return_entropy": True}
        return both(*linear_logprobs(hidden, weight, TARGET, **keywords, **transform))

    assert_same(ours, lambda *leaves: both(*trl(*leaves, ("entropy",), **transform).values()), MODEL)


@needs("linear_logprobs(temperature)")
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("temperature", [0.7, 1.4])
def test_trl_with_a_temperature(temperature, transform):
    """It divides what scale and softcap leave, in both."""
    keywords = transform | {"temperature": temperature}

    def ours(hidden, weight, bias):
        logprobs = linear_logprobs(hidden, weight, TARGET, linear_bias=bias, return_entropy=True, **keywords)
        return both(*logprobs)

    assert_same(ours, lambda *leaves: both(*trl(*leaves, ("entropy",), **keywords).values()), MODEL)


@needs("linear_statistics")
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 1.4])
def test_trl_statistics(temperature, transform):
    """TRL differentiates the log-probability and the entropy only: values of the others, gradients of these."""
    keywords = transform | {"temperature": temperature}
    names = {name: NAMES.get(name, name) for name in ("logprob", *OPTIONAL_OUTPUTS)}

    def statistics(hidden, weight, bias):
        return chunked_ce.linear_statistics(
            hidden, weight, TARGET, outputs=tuple(names.values()), linear_bias=bias, options=chunks(16), **keywords
        )

    theirs, found = trl(*MODEL, OPTIONAL_OUTPUTS, **keywords), statistics(*MODEL)
    exact = statistics(*(x.double() for x in MODEL))
    for name, own in names.items():
        mine, other, right = getattr(found, own), theirs[name], getattr(exact, own)
        assert mine.dtype == torch.float32 and mine.any()
        if name == "is_top1":  # a boolean there, 0.0 or 1.0 here
            assert torch.equal(mine, other.float())
        else:
            torch.testing.assert_close(other.double(), right, rtol=1e-5, atol=1e-5)
            assert_no_worse(mine, other, array(right), own)

    def ours(*leaves):
        rows = statistics(*leaves)
        return both(rows.logprob, rows.entropy)

    def differentiable(*leaves):
        rows = trl(*leaves, OPTIONAL_OUTPUTS, **keywords)
        return both(rows["logprob"], rows["entropy"])

    assert_same(ours, differentiable, MODEL)


@needs("linear_statistics")
def test_trl_first_of_equal_logits():
    """Words 3 and 7 have the largest logit in both."""
    hidden, weight, bias = torch.zeros(2, 4), torch.zeros(9, 4), torch.zeros(9)
    bias[[3, 7]] = 1.0
    target = torch.tensor([3, 7])
    *_, is_top1 = ChunkedLogProbFunction.apply(hidden, weight, bias, target, 1.0, 4)
    found = chunked_ce.linear_statistics(hidden, weight, target, outputs=("is_top1",), linear_bias=bias).is_top1
    assert found.tolist() == is_top1.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("shape", [(TOKENS,), (2, TOKENS // 2)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_verl(temperature, shape):
    """verl has neither a bias nor ignored tokens. Without a softcap a temperature is a scale of the logits."""
    fused, target = FusedLinearForPPO(chunk_size=32), TARGET.view(shape)

    def ours(hidden, weight):
        keywords = {"logit_scale": 1 / temperature, "options": chunks(16), "return_entropy": True}
        return both(*linear_logprobs(hidden.view(*shape, -1), weight, target, **keywords))

    def theirs(hidden, weight):
        return both(*fused(hidden.view(*shape, -1), weight, target, temperature=temperature))

    assert_same(ours, theirs, MODEL[:2])
