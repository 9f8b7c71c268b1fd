"""TRL's and Liger's divergences of a teacher and a student, from the hidden states and heads of both."""

import pytest
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

import chunked_ce
from chunked_ce import linear_cross_entropy, linear_loss, objectives
from tests.cases import chunks
from tests.packages.comparison import assert_same, model, needs, responses

TOKENS = 40
STUDENT, TEACHER = model(TOKENS), model(TOKENS, width=48, seed=1)
TARGET = responses(4, TOKENS // 4).view(-1)
BETAS = [0.0, 1.0, 0.5, 0.2]
TEMPERATURES = [1.0, 2.0]

pytestmark = needs("linear_divergence", "objectives.Divergence", "objectives.Teacher")


def teacher(dtype, **transform):
    hidden, weight, bias = (x.to(dtype) for x in TEACHER)
    return objectives.Teacher(hidden, weight, bias=bias, **transform)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(
    ("of_student", "of_teacher"),
    [({}, {}), ({"softcap": 3.0, "logit_scale": 0.8}, {"softcap": 2.0}), ({}, {"softcap": 2.5, "logit_scale": 1.3})],
    ids=str,
)
def test_trl(beta, temperature, of_student, of_teacher):
    """Per token, each with its own upstream gradient. Neither has a factor of the squared temperature."""

    def ours(hidden, weight, bias):
        return chunked_ce.linear_divergence(
            hidden,
            weight,
            teacher(hidden.dtype, **of_teacher),
            linear_bias=bias,
            beta=beta,
            temperature=temperature,
            reduction="none",
            options=chunks(16),
            **of_student,
        )

    def theirs(hidden, weight, bias):
        transforms = (of_student.get("logit_scale", 1.0), of_student.get("softcap"))
        transforms += (of_teacher.get("logit_scale", 1.0), of_teacher.get("softcap"))
        return ChunkedDivergenceFunction.apply(hidden, weight, bias, *TEACHER, beta, temperature, *transforms)[0]

    assert_same(ours, theirs, STUDENT)


def liger(hard, soft, beta, temperature, chunk_size):
    loss = LigerFusedLinearJSDLoss(hard, soft, beta, -100, temperature, compiled=False, chunk_size=chunk_size)

    def value(hidden, weight, bias):
        return loss(hidden, weight, TEACHER.hidden, TEACHER.weight, TARGET, bias, TEACHER.bias)

    return value


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_liger(beta, temperature, way):
    """The mean over the tokens that count."""

    def ours(hidden, weight, bias):
        return linear_loss(
            objectives.Divergence(beta),
            hidden,
            weight,
            TARGET,
            teacher=teacher(hidden.dtype),
            linear_bias=bias,
            temperature=temperature,
            options=chunks(16, way),
        )

    assert_same(ours, liger(0.0, 1.0, beta, temperature, TOKENS), STUDENT)


@pytest.mark.parametrize("chunk_size", [16, TOKENS])
def test_liger_with_a_hard_loss(chunk_size):
    """Liger adds the cross-entropy, at temperature 1, with weights for both."""

    def ours(hidden, weight, bias):
        soft = chunked_ce.linear_divergence(
            hidden, weight, teacher(hidden.dtype), target=TARGET, linear_bias=bias, beta=0.5, temperature=2.0
        )
        return 0.3 * linear_cross_entropy(hidden, weight, TARGET, linear_bias=bias) + 0.6 * soft

    assert_same(ours, liger(0.3, 0.6, 0.5, 2.0, chunk_size), STUDENT)
