"""Divergences with a vocabulary that ranks share, evenly or not, also with empty shards; ranks are threads."""

import pytest
import torch
import torch.nn.functional as F

from chunked_ce import Teacher, VocabShard, linear_divergence, logits_loss
from chunked_ce.objectives import Divergence
from tests.cases import WAYS, chunks, problem
from tests.distributed.threads import run_threads
from tests.objectives.teachers import divergence, reduced, teacher_of, teacher_tensors

CLOSE = {"rtol": 2e-5, "atol": 2e-6}
N, D, V = 12, 6, 23
SHARDS = {"one": [0, V], "two": [0, 9, V], "empty": [0, 9, 9, V], "first_empty": [0, 0, 20, V]}


def expected(case, logits, beta, bias=None):
    leaves = [x.detach().double().requires_grad_() for x in case.leaves()]
    losses = divergence(F.linear(*leaves, bias), logits, beta)
    value = reduced(losses, case.target != -100)
    return value.detach(), torch.autograd.grad(value, leaves)


def local(teacher, vocab):
    """The same teacher with the entries of this rank alone."""
    tensors = {
        name: x[..., vocab.start : vocab.stop] if name in ("logits", "probabilities") else x
        for name, x in teacher.tensors.items()
    }
    for name in ("weight", "bias"):
        if name in tensors:
            tensors[name] = tensors[name][vocab.start : vocab.stop]
    return Teacher(**tensors)


@pytest.mark.parametrize("bounds", list(SHARDS.values()), ids=list(SHARDS))
@pytest.mark.parametrize("kind", ["head", "logits", "probabilities"])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_shards(beta, kind, bounds):
    case = problem(N, D, V)
    teacher, logits = teacher_of(kind, *teacher_tensors(N, V))
    want, gradients = expected(case, logits, beta)

    def call(rank: int, world_size: int) -> None:
        vocab = VocabShard(None, bounds[rank], bounds[rank + 1], V)
        hidden = case.hidden.detach().clone().requires_grad_()
        head = case.head.detach()[vocab.start : vocab.stop].clone().requires_grad_()
        for way in WAYS:
            for given in (teacher, local(teacher, vocab)):
                keywords = {"target": case.target, "beta": beta, "vocab": vocab, "options": chunks(4, way)}
                value = linear_divergence(hidden, head, given, **keywords)
                torch.testing.assert_close(value.double(), want, **CLOSE)
                of_hidden, of_head = torch.autograd.grad(value, [hidden, head])
                torch.testing.assert_close(of_hidden.double(), gradients[0], **CLOSE)
                torch.testing.assert_close(of_head.double(), gradients[1][vocab.start : vocab.stop], **CLOSE)
        columns = hidden.detach() @ head.t()
        value = logits_loss(Divergence(beta), columns, case.target, teacher=teacher, vocab=vocab)
        torch.testing.assert_close(value.double(), want, **CLOSE)
        (of_head,) = torch.autograd.grad(value, head)
        torch.testing.assert_close(of_head.double(), gradients[1][vocab.start : vocab.stop], **CLOSE)

    run_threads(call, len(bounds) - 1)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_sequence_shards(beta, ranks):
    """The teacher's tensors hold the tokens of all ranks, as the targets do."""
    case = problem(N, D, V)
    for kind in ("head", "logits"):
        teacher, logits = teacher_of(kind, *teacher_tensors(N, V))
        want, gradients = expected(case, logits, beta)

        def call(rank: int, world_size: int, teacher=teacher, want=want, gradients=gradients) -> None:
            vocab = VocabShard.split(V, input_grad="sequence")
            share = N // world_size
            tokens = slice(rank * share, rank * share + share)
            hidden = case.hidden.detach()[tokens].clone().requires_grad_()
            head = case.head.detach()[vocab.start : vocab.stop].clone().requires_grad_()
            for way in WAYS:
                keywords = {"target": case.target, "beta": beta, "vocab": vocab, "options": chunks(4, way)}
                value = linear_divergence(hidden, head, teacher, **keywords)
                torch.testing.assert_close(value.double(), want, **CLOSE)
                of_hidden, of_head = torch.autograd.grad(value, [hidden, head])
                torch.testing.assert_close(of_hidden.double(), gradients[0][tokens], **CLOSE)
                torch.testing.assert_close(of_head.double(), gradients[1][vocab.start : vocab.stop], **CLOSE)

        run_threads(call, ranks)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_words(beta):
    """A draft vocabulary, sharded: ``words`` and the teacher are whole."""
    case, size = problem(N, D, V), 57
    words = torch.randperm(size)[:V]
    for kind in ("head", "logits", "probabilities"):
        teacher, logits = teacher_of(kind, *teacher_tensors(N, size))
        teacher = Teacher(**teacher.tensors, words=words)
        want, gradients = expected(case, logits[:, words], beta)

        def call(rank: int, world_size: int, teacher=teacher, want=want, gradients=gradients) -> None:
            vocab = VocabShard.split(V)
            hidden = case.hidden.detach().clone().requires_grad_()
            head = case.head.detach()[vocab.start : vocab.stop].clone().requires_grad_()
            for way in WAYS:
                keywords = {"target": case.target, "beta": beta, "vocab": vocab, "options": chunks(4, way)}
                value = linear_divergence(hidden, head, teacher, **keywords)
                torch.testing.assert_close(value.double(), want, **CLOSE)
                of_hidden, of_head = torch.autograd.grad(value, [hidden, head])
                torch.testing.assert_close(of_hidden.double(), gradients[0], **CLOSE)
                torch.testing.assert_close(of_head.double(), gradients[1][vocab.start : vocab.stop], **CLOSE)

        run_threads(call, 2)


@pytest.mark.timeout(60)
def test_a_beta_that_one_rank_alone_refuses_fails_on_all():
    case = problem(N, D, V)
    teacher, _ = teacher_of("head", *teacher_tensors(N, V))

    def call(rank: int, world_size: int) -> str:
        vocab = VocabShard(None, *((0, 9), (9, V))[rank], V)
        head = case.head.detach()[vocab.start : vocab.stop]
        with pytest.raises(ValueError, match="beta must be in") as caught:
            linear_divergence(case.hidden.detach(), head, teacher, beta=(0.5, 2.0)[rank], vocab=vocab)
        return str(caught.value)

    assert "rank 1" in run_threads(call, 2)[0]
