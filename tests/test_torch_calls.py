"""Calls of torch's functions with one import changed: the same arguments, or an error that says what to write."""

import functools

import pytest
import torch
import torch.nn.functional as F

from chunked_ce import (
    ChunkOptions,
    LinearCrossEntropyLoss,
    Teacher,
    cross_entropy,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_loss,
    logits_loss,
    torch_options,
)
from chunked_ce.objectives import CrossEntropy, Divergence

GENERATOR = torch.Generator().manual_seed(0)
HIDDEN, HEAD = torch.randn(9, 6, generator=GENERATOR), torch.randn(11, 6, generator=GENERATOR)
TARGET = torch.randint(11, (9,), generator=GENERATOR)

needs_torchs = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="this version of torch has no LinearCrossEntropyOptions"
)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss(*(leaves := [tensor.clone().requires_grad_() for tensor in tensors])), leaves)


@pytest.mark.parametrize("ignore_index", [None, -100, 4])
@pytest.mark.parametrize("module", [False, True])
def test_ignore_index(ignore_index, module):
    ours = LinearCrossEntropyLoss(ignore_index=ignore_index) if module else linear_cross_entropy
    keywords = {} if module else {"ignore_index": ignore_index}
    target = TARGET.clone()
    target[2] = -100 if ignore_index is None else ignore_index
    expected = F.cross_entropy(HIDDEN @ HEAD.T, target, ignore_index=-100 if ignore_index is None else ignore_index)
    torch.testing.assert_close(ours(HIDDEN, HEAD, target, **keywords), expected)


def torchs(**keywords):
    return torch.nn.LinearCrossEntropyOptions(**keywords)


@needs_torchs
@pytest.mark.parametrize(
    ("keywords", "ours"),
    [
        ({}, ChunkOptions()),
        ({"batch_chunk_size": 4}, ChunkOptions(chunk_size=4)),
        ({"batch_chunk_size": 4, "chunking_method": None, "allow_retain_graph": True}, ChunkOptions(chunk_size=4)),
        ({"acc_policy": "accurate"}, ChunkOptions()),
        ({"acc_policy": "balanced", "acc_dtype": torch.float32}, ChunkOptions()),
    ],
    ids=str,
)
def test_options_are_taken(keywords, ours, monkeypatch):
    seen = []
    import chunked_ce.invocation as invocation

    checked = invocation.check_call
    monkeypatch.setattr(invocation, "check_call", lambda *args: seen.append(checked(*args)) or seen[-1])
    options = torchs(**keywords)
    module = LinearCrossEntropyLoss(options=options)
    theirs, ours_found = (
        gradients(functools.partial(call, target=TARGET, options=options), HIDDEN, HEAD)
        for call in (F.linear_cross_entropy, linear_cross_entropy)
    )
    torch.testing.assert_close(ours_found, theirs)
    torch.testing.assert_close(module(HIDDEN, HEAD, TARGET), F.linear_cross_entropy(HIDDEN, HEAD, TARGET))
    assert seen == [ours, ours]


@needs_torchs
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"acc_policy": "compact"},
            r"acc_policy='compact' has no counterpart: write ChunkOptions\(gradients='backward'\)",
        ),
        (
            {"acc_dtype": torch.float16},
            r"acc_dtype=torch.float16 .*: write ChunkOptions\(accumulate_dtype=torch.float32",
        ),
        (
            {"chunking_method": "aspect_ratio:2"},
            r"chunking_method='aspect_ratio:2' .*: write ChunkOptions\(chunk_size=",
        ),
        (
            {"chunking_method": None},
            r"chunking_method=None without a batch_chunk_size.*: write ChunkOptions\(chunk_size=N",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("module", [False, True])
def test_options_without_a_counterpart_are_refused(keywords, message, module):
    with pytest.raises(TypeError, match=rf"options must be .* was torch's LinearCrossEntropyOptions: {message}"):
        if module:
            LinearCrossEntropyLoss(options=torchs(**keywords))
        else:
            linear_cross_entropy(HIDDEN, HEAD, TARGET, options=torchs(**keywords))


@needs_torchs
def test_other_functions_say_what_to_write():
    said = r"was torch's LinearCrossEntropyOptions: write ChunkOptions\(chunk_size=4\)"
    for call in (
        lambda options: linear_logprobs(HIDDEN, HEAD, TARGET, options=options),
        lambda options: linear_loss(CrossEntropy(), HIDDEN, HEAD, TARGET, options=options),
    ):
        with pytest.raises(TypeError, match=said):
            call(torchs(batch_chunk_size=4))


@needs_torchs
def test_wider_sums():
    options = torch_options.chunk_options(torchs(acc_dtype=torch.float64))
    assert options == ChunkOptions(accumulate_dtype=torch.float64)


@needs_torchs
def test_options_compile():
    def step(hidden):
        return linear_cross_entropy(hidden, HEAD, TARGET, options=torchs(batch_chunk_size=4))

    torch.testing.assert_close(torch.compile(step, backend="eager", fullgraph=True)(HIDDEN), step(HIDDEN))


def test_class_probabilities():
    """The error names the call that has the same gradients; its value is less by the entropy of the probabilities."""
    logits, probabilities = HIDDEN @ HEAD.T, torch.rand(9, 11, generator=GENERATOR).softmax(-1)
    entropy = torch.special.entr(probabilities).sum(-1).mean()
    expected = F.cross_entropy(logits, probabilities)
    of_head = gradients(lambda h, w: F.cross_entropy(h @ w.T, probabilities), HIDDEN, HEAD)
    of_logits = gradients(lambda z: F.cross_entropy(z, probabilities), logits)

    advice = r"write linear_divergence\(input, linear_weight, Teacher\(probabilities=target\)\) or Teacher\(logits="
    with pytest.raises(TypeError, match=advice):
        linear_cross_entropy(HIDDEN, HEAD, probabilities)
    for teacher in (Teacher(probabilities=probabilities), Teacher(logits=probabilities.log())):
        torch.testing.assert_close(linear_divergence(HIDDEN, HEAD, teacher) + entropy, expected)
        divergence = functools.partial(linear_divergence, teacher=teacher)
        torch.testing.assert_close(gradients(divergence, HIDDEN, HEAD), of_head)

    advice = r"write logits_loss\(Divergence\(\), logits, classes, teacher=Teacher\(probabilities=target\)\)"
    with pytest.raises(TypeError, match=advice):
        cross_entropy(logits, probabilities)
    teacher = Teacher(probabilities=probabilities)
    ours = gradients(lambda z: logits_loss(Divergence(), z, TARGET, teacher=teacher), logits)
    torch.testing.assert_close(ours, of_logits)
