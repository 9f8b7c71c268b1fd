"""Calls with `VocabShard(tokens="own")`: graphs that are kept, accumulation, modes, and errors on every rank."""

import contextlib
import re

import pytest
import torch
import torch.distributed as dist

from chunked_ce import (
    Teacher,
    VocabShard,
    cross_entropy,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_loss,
    linear_statistics,
)
from chunked_ce.engine import device_filter, own_teacher, sweep
from chunked_ce.objectives import PolicyGradient
from chunked_ce.rows import torch_filter
from tests.cases import WAYS, chunks
from tests.distributed.own_tokens import BOUNDS, RANKS, UPSTREAM, VOCAB, WIDTH, Case, shard_of, tensors_of
from tests.distributed.threads import run_threads

CASE = Case("", None)


def on_each_rank(function, *, check="auto") -> list:
    """What ``function(rank, tensors, vocab)`` returns on every rank."""
    return run_threads(
        lambda rank, _: function(rank, tensors_of(CASE, rank, whole=False), shard_of(rank, check=check)), RANKS
    )


def loss_of(x, vocab, way="forward", **keywords):
    options = chunks(5, way, gradient_filter=keywords.pop("gradient_filter", None))
    return linear_cross_entropy(x.hidden, x.weight, x.target, options=options, vocab=vocab, **keywords)


def expected(differ: bool, way="forward", **keywords):
    """The gradients of hidden states and weight on each rank, and all of the latter."""
    of_ranks = []
    for rank in range(RANKS):
        x = tensors_of(CASE, rank, whole=True)
        value = loss_of(x, None, way, **keywords) * (UPSTREAM[rank] if differ else 1.0)
        of_ranks.append(torch.autograd.grad(value, [x.hidden, x.weight]))
    weight = sum(of_weight for _, of_weight in of_ranks) / RANKS
    return [(of_hidden, weight[slice(*BOUNDS[rank])]) for rank, (of_hidden, _) in enumerate(of_ranks)]


def assert_near(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("differ", [False, True], ids=["equal", "differ"])
@pytest.mark.parametrize("way", WAYS)
def test_a_graph_that_is_kept(way, differ):
    """Twice, with other upstream gradients in between, for all gradients and for those of one tensor."""

    def work(rank, x, vocab):
        value, factor = loss_of(x, vocab, way), UPSTREAM[rank] if differ else 1.0
        leaves = [x.hidden, x.weight]
        first = torch.autograd.grad(value * factor, leaves, retain_graph=True)
        others = torch.autograd.grad(value * 7, leaves, retain_graph=True)
        parts = [torch.autograd.grad(value * factor, leaf, retain_graph=True)[0] for leaf in leaves]
        return first, torch.autograd.grad(value * factor, leaves), parts, others

    sevens = [[7 * part for part in parts] for parts in expected(False, way)]
    for found, wanted, seven in zip(on_each_rank(work), expected(differ, way), sevens, strict=True):
        *same, others = found
        assert_near(others, seven)
        for gradients in same:
            assert_near(gradients, wanted)


@pytest.mark.parametrize("into", [None, "grad", "main_grad"])
def test_accumulation(into):
    """The gradients of two backwards, added where the options say; in the second a rank has no tokens."""

    def work(rank, x, vocab):
        if into == "main_grad":
            x.weight.main_grad = torch.ones_like(x.weight)
        for step in range(2):
            few = slice(0, None if step == 0 or rank != 0 else 0)
            value = linear_cross_entropy(
                x.hidden[few], x.weight, x.target[few], vocab=vocab, options=chunks(5, accumulate_into=into)
            )
            (value * UPSTREAM[rank]).backward()
        return x.weight.main_grad - 1 if into == "main_grad" else x.weight.grad

    total = 0
    for rank in range(RANKS):
        x = tensors_of(CASE, rank, whole=True)
        (of_weight,) = torch.autograd.grad(loss_of(x, None) * UPSTREAM[rank], x.weight)
        total = total + of_weight * (1 if rank == 0 else 2) / RANKS
    for rank, found in enumerate(on_each_rank(work)):
        torch.testing.assert_close(found, total[slice(*BOUNDS[rank])], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    def work(rank, x, vocab):
        with mode():
            weight = x.weight + 0  # of the mode
            value = linear_cross_entropy(x.hidden, weight, x.target, vocab=vocab)
            logprobs = linear_logprobs(x.hidden, weight, x.target, vocab=vocab)
        assert not value.requires_grad
        return value, logprobs.sum()

    for rank, found in enumerate(on_each_rank(work)):
        x = tensors_of(CASE, rank, whole=True)
        logprobs = linear_logprobs(x.hidden, x.weight, x.target)
        assert_near(found, [loss_of(x, None).detach(), logprobs.sum().detach()])


# Arguments that may differ between ranks.


def test_what_may_differ():
    """The shape of the tokens, the denominator of the mean, and what each token has."""

    def work(rank, x, vocab):
        hidden, target = x.hidden, x.target
        if rank == 2:
            hidden, target = hidden.view(3, 4, -1), target.view(3, 4).int()
        denominator = (None, 3, torch.tensor(5.0))[rank]
        keywords = {"num_tokens": denominator, "token_weight": torch.full(target.shape, 1.0 + rank)}
        value = linear_cross_entropy(hidden, x.weight, target, vocab=vocab, **keywords)
        losses = linear_cross_entropy(hidden, x.weight, target, vocab=vocab, reduction="none")
        assert losses.shape == target.shape
        return value.detach(), losses.sum().detach()

    for rank, (value, total) in enumerate(on_each_rank(work)):
        x = tensors_of(CASE, rank, whole=True)
        torch.testing.assert_close(total, loss_of(x, None, "auto", reduction="sum").detach())
        denominator = (None, 3, 5)[rank]
        torch.testing.assert_close(
            value, total * (1 + rank) / denominator if denominator else total / (x.target >= 0).sum()
        )


# What the second rank does otherwise in a call, what its error says, and that of the others.
OUT_OF_RANGE = r"target at position 1 \(of the flattened tokens\) is 19, allowed are \[0, 19\)"
FAILED = "rank 2 of the group failed in this call, and all ranks with it: IndexError: "
WRONG = {
    "target": (OUT_OF_RANGE, FAILED + OUT_OF_RANGE),
    "ids": (r"target at position \(1, 3\) is 19", FAILED + r"target at position \(1, 3\) is 19"),
    "shape": ("target must have the shape", "rank 2 of the group could not take part: target must have the shape"),
    "reduction": ("disagree on reduction: rank 0 has 'mean', rank 1 has 'mean', rank 2 has 'sum'",) * 2,
    "frozen": (r"disagree on input\.requires_grad",) * 2,
    "tokens": (r"disagree on tokens: rank 0 has 'own', rank 1 has 'own', rank 2 has 'same'",) * 2,
    "dtype": (r"disagree on their dtypes and widths: rank 0 has .*float32.* rank 2 has .*float64",) * 2,
    "class weights": (r"disagree on weight's values \(a checksum\)",) * 2,
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_on_every_rank(wrong):
    def work(rank, x, vocab):
        odd, target = rank == RANKS - 1, x.target.clone()
        keywords = {"vocab": vocab}
        if wrong == "target" and odd:
            target[1] = VOCAB
        if wrong == "shape" and odd:
            target = target[1:]
        if wrong == "reduction":
            keywords["reduction"] = "sum" if odd else "mean"
        if wrong == "tokens" and odd:
            keywords["vocab"] = VocabShard(None, vocab.start, vocab.stop, VOCAB)
        if wrong == "class weights":
            keywords["weight"] = torch.full((VOCAB,), 1.0 + odd)
        hidden = x.hidden.detach() if wrong == "frozen" and odd else x.hidden
        try:
            if wrong == "ids":
                ids = x.more["full_ids"].clone()
                ids[1:2, 3] = VOCAB if odd else 0
                linear_statistics(hidden, x.weight, ids, **keywords)
            elif wrong == "dtype":
                advantage = x.more["advantage"].double() if odd else x.more["advantage"]
                linear_loss(PolicyGradient(), hidden, x.weight, target, advantage=advantage, **keywords)
            else:
                linear_cross_entropy(hidden, x.weight, target, **keywords)
        except (ValueError, RuntimeError, IndexError) as error:
            message = f"{type(error).__name__}: {error}"
        loss_of(x, vocab).backward()  # the ranks are in step
        return message

    for rank, message in enumerate(on_each_rank(work)):
        assert re.search(WRONG[wrong][rank != RANKS - 1], message), message


@pytest.mark.parametrize("way", WAYS)
def test_another_call_is_not_taken_for_this_one(way):
    """Calls that are not compared: one rank's forward meets the others' backward, or a call with other gradients."""

    def work(rank, x, vocab):
        value, messages = loss_of(x, vocab, way), []
        for turn in range(2):
            mine = tensors_of(CASE._replace(frozen=("hidden",) if turn and rank else ()), rank, whole=False)
            try:
                if turn == 0 and rank:
                    value.backward(retain_graph=True)
                else:
                    loss_of(mine, vocab, way)
            except (RuntimeError, ValueError) as error:
                messages.append(str(error))
        return messages

    for first, second in on_each_rank(work, check="first"):
        assert "ranks of the vocabulary group are in different calls: rank 0 is at the start of the forward" in first
        assert "rank 1 is at the" in first and "of the backward of" in first
        assert "ranks of the vocabulary group disagree on " in second and "rank 0 has" in second


def test_refusals():
    def work(rank, x, vocab):
        mine = slice(vocab.start, vocab.stop)
        with pytest.raises(ValueError, match=r"vocab\.tokens must be 'same' for logits that exist, was 'own'"):
            cross_entropy(x.hidden @ x.weight.t(), x.target, vocab=vocab)
        with pytest.raises(
            ValueError, match=r"teacher\.logits must have the student's vocabulary, 19, in its last dim"
        ):
            linear_divergence(x.hidden, x.weight, Teacher(logits=x.more["teacher_logits"][:, mine]), vocab=vocab)
        with pytest.raises(ValueError, match=r"teacher\.hidden must have shape"):
            teacher = Teacher(torch.zeros(3, WIDTH), torch.zeros(VOCAB, WIDTH))
            linear_divergence(x.hidden, x.weight, teacher, vocab=vocab)
        with pytest.raises(NotImplementedError, match="create_graph"):
            torch.autograd.grad(loss_of(x, vocab), x.weight, create_graph=True)
        for way in ("partial", "sequence"):
            with pytest.raises(ValueError, match=f"input_grad must be 'complete' with tokens='own', .*, was '{way}'"):
                shard_of(rank, input_grad=way)

    on_each_rank(work)


@pytest.mark.parametrize("kind", ["head", "logits"])
@pytest.mark.parametrize("way", WAYS)
def test_a_rank_without_memory_amid_a_teachers_chunks(monkeypatch, way, kind):
    """It goes through the others' exchanges, and all ranks fail and are in step again."""
    starts, original = [], own_teacher.OwnTeacher.start
    told = [False]

    def start(self, window):
        if dist.get_rank() == 1 and told[0]:
            starts.append(window)
            if len(starts) == 2:
                raise torch.OutOfMemoryError("a simulated one")
        return original(self, window)

    monkeypatch.setattr(own_teacher.OwnTeacher, "start", start)

    def work(rank, x, vocab):
        existing = {"logits": x.more["teacher_logits"]}
        teacher = Teacher(x.more["teacher_hidden"], x.more["teacher_weight"]) if kind == "head" else Teacher(**existing)

        def value():
            return linear_divergence(
                x.hidden, x.weight, teacher, target=x.target, vocab=vocab, options=chunks(5, way), beta=0.4
            )

        before = torch.autograd.grad(value(), x.weight)
        dist.barrier()
        told[0], messages = True, []
        dist.barrier()
        with contextlib.suppress(torch.OutOfMemoryError):
            try:
                value().backward()
            except RuntimeError as error:
                messages.append(str(error))
                raise torch.OutOfMemoryError from None
        dist.barrier()
        told[0] = False
        dist.barrier()
        torch.testing.assert_close(torch.autograd.grad(value(), x.weight), before, rtol=0, atol=0)
        return messages

    for (message,) in on_each_rank(work):
        assert "a simulated one" in message


def test_small_gradients_in_fp16():
    """The head's gradient is divided in the dtype of its sum: no more small gradients of logits are lost than without
    a division."""
    case = CASE._replace(dtype=torch.float16, sizes="even")

    def gradient(x, vocab):
        return torch.autograd.grad(loss_of(x, vocab, "backward") * 1e-4, x.weight)[0]

    def exact(rank):
        x = tensors_of(case, rank, whole=True)
        wide = x._replace(hidden=x.hidden.detach().double(), weight=x.weight.detach().double().requires_grad_())
        return gradient(wide, None), gradient(x, None)

    wanted, plain = (sum(parts) / RANKS for parts in zip(*map(exact, range(RANKS)), strict=True))
    found = run_threads(lambda rank, _: gradient(tensors_of(case, rank, whole=False), shard_of(rank)), RANKS)
    errors = [(part.double() - wanted).square().mean().sqrt() for part in (torch.cat(found), plain)]
    assert errors[0] <= 1.05 * errors[1]


@pytest.mark.parametrize("differ", [False, True], ids=["equal", "differ"])
def test_the_filter_of_a_device(monkeypatch, differ):
    """Its gradient of the head is finished in the backward, from terms; its torch kernels run here."""
    finished, original = [], device_filter.HeadTerms.finished
    monkeypatch.setattr(sweep, "filter_kernels", lambda specification, device: torch_filter)
    monkeypatch.setattr(device_filter.HeadTerms, "finished", lambda *args: finished.append(1) or original(*args))
    keywords = {"gradient_filter": 1e-4, "logit_scale": 40.0}

    def work(rank, x, vocab):
        value = loss_of(x, vocab, **keywords)
        return torch.autograd.grad(value * (UPSTREAM[rank] if differ else 1.0), [x.hidden, x.weight])

    expected_of_ranks = expected(differ, logit_scale=40.0)
    assert not finished
    for found, wanted in zip(on_each_rank(work), expected_of_ranks, strict=True):
        for one, other in zip(found, wanted, strict=True):
            size = other.abs().max().item() if other.numel() else 0.0
            torch.testing.assert_close(one, other, rtol=0, atol=1e-3 * size)
    assert finished
