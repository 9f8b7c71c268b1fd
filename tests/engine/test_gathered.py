"""Logits at a few ids per token: the gathered products, their gradients, their memory, and ranks that fail."""

import collections
import itertools

import pytest
import torch

from chunked_ce import VocabShard, linear_statistics
from chunked_ce.engine import gathered, gathered_operator, in_step
from chunked_ce.engine.call import Call
from chunked_ce.engine.specification import Specification
from chunked_ce.parallel.collectives import Collectives
from chunked_ce.plan import Settings
from chunked_ce.rows.statistics import Logits
from tests.cases import array
from tests.distributed.threads import run_threads
from tests.precision import LOW, assert_no_worse
from tests.statistics_reference import IGNORED, OF_SUPPORT, Inputs, gradients, inputs
from tests.test_work import work


def call_of(call: Inputs, compute_dtype=None) -> Call:
    """What the engine is given for the ids of target and support."""
    targets = call.target.unsqueeze(-1) if call.target.dim() == 1 else call.target
    per_token = {"target": targets, "support": call.support}
    settings = Settings(compute_dtype or call.hidden.dtype)
    source = [leaf for leaf in (call.hidden, call.head, call.bias) if leaf is not None]
    target = targets.amax(-1)
    parts = ("hidden", "weight", "bias")[: len(source)]
    specification = Specification("head", (), Logits(), settings, parts=parts, per_token=tuple(per_token))
    return Call(source, None, target, IGNORED, specification, list(per_token.values()))


@pytest.mark.parametrize("cached", [1, 100, 2**18])
@pytest.mark.parametrize("bias", [False, True])
def test_its_slow_twin(bias, cached, monkeypatch):
    monkeypatch.setattr(gathered, "_CACHED_ELEMENTS", cached)
    for seed, (n, d, vocab, k, size) in enumerate(
        [(13, 5, 23, 3, 4), (1, 2, 1, 1, 1), (0, 2, 3, 1, 2), (9, 700, 11, 1, 0)]
    ):
        case = inputs(n, d, vocab, num_ids=k, size=size, bias=bias, dtype=torch.float64, seed=seed)
        call = call_of(case)
        ours, twin = gathered_operator.logits(call), gathered.plain_logits(call)
        assert ours.shape == (n, k + size)
        torch.testing.assert_close(ours, twin)
        upstream = torch.randn(ours.shape, dtype=torch.float64)
        grads = [torch.autograd.grad(one, case.leaves(), upstream) for one in (ours, twin)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_no_worse_than_products(dtype):
    """Than products of the whole head, in the dtype of the factors."""
    case = inputs(100, 300, 401, num_ids=1, size=20, dtype=dtype, ignored=0.0)
    for padded in (case.target, case.support):
        padded.remainder_(401)
    wide, ids = case.double(), torch.cat([case.target, case.support], -1)
    found = {}
    for name, one in (("plain", case), ("right", wide)):
        value = torch.nn.functional.linear(one.hidden, one.head).to(wide.hidden.dtype).gather(1, ids)
        found[name] = value, torch.autograd.grad(value, one.leaves(), torch.sin(ids.double()))
    value = gathered_operator.logits(call_of(case))
    assert value.dtype == torch.float32
    found["ours"] = value, torch.autograd.grad(value, case.leaves(), torch.sin(ids.double()).float())
    assert_no_worse(found["ours"][0], found["plain"][0], array(found["right"][0]))
    for one, other, exact in zip(*(found[name][1] for name in ("ours", "plain", "right")), strict=True):
        assert_no_worse(one, other, array(exact))


def test_memory():
    """No tensor of N V / 10 at V = 50,257, nor of N S D, and no products."""
    n, vocab, d, size = 2048, 50257, 16, 300
    case = inputs(n, d, vocab, size=size, ignored=0.0)
    cost = work(lambda: gradients(values_of(case), case.leaves()))
    assert cost.largest < 0.1 * n * vocab * 4
    assert cost.largest < n * size * d * 4 / 2
    assert cost.multiplications <= n * (size + 1) * d


def test_ignored_tokens_cost_nothing():
    case = inputs(64, 16, 100, size=8, ignored=0.0)
    whole = work(lambda: gradients(values_of(case), case.leaves())).multiplications
    case.target[::2] = IGNORED
    assert work(lambda: gradients(values_of(case), case.leaves())).multiplications == whole / 2


def values_of(case, **keywords):
    found = linear_statistics(*case.arguments(), outputs=OF_SUPPORT, **case.keywords(), **keywords)
    return {name: value for name, value in found._asdict().items() if value is not None}


# ---- ranks that share the vocabulary ----

RANKS, ODD_ONE = 3, 1


def of_rank(case: Inputs, rank: int, input_grad: str) -> tuple[Inputs, VocabShard]:
    """A rank's leaves, with shards of 9, 0 and 2 rows."""
    start, stop = [(0, 9), (9, 9), (9, 11)][rank]
    vocab = VocabShard(None, start, stop, 11, input_grad=input_grad, check="first")
    share = slice(None)
    if input_grad == "sequence":
        share = slice(rank * len(case.target) // RANKS, (rank + 1) * len(case.target) // RANKS)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (case.hidden[share], case.head[start:stop])]
    return Inputs(*leaves, case.target, support=case.support), vocab


def test_steps_are_the_collectives_of_a_call(monkeypatch):
    """Those that a rank goes through once it has failed are those that the others issue, in their order."""
    found, expected = (collections.defaultdict(list) for _ in range(2))
    start, together = Collectives._start, in_step._together

    def recording(self, what, collective, *tensors, result):
        found[torch.distributed.get_rank()].append((what, tuple(tensors[-1].shape), tensors[-1].dtype))
        return start(self, what, collective, *tensors, result=result)

    def listing(steps, *arguments, **keywords):
        expected[torch.distributed.get_rank()] += [(step.what, tuple(step.shape), step.dtype) for step in steps()]
        return together(steps, *arguments, **keywords)

    def calls(rank: int, world_size: int) -> None:
        for input_grad, size in itertools.product(("complete", "partial", "sequence"), (0, 3)):
            case, vocab = of_rank(inputs(24, 5, 11, num_ids=2, size=size), rank, input_grad)
            gradients(values_of(case, vocab=vocab), case.leaves())

    monkeypatch.setattr(Collectives, "_start", recording)
    monkeypatch.setattr(in_step, "_together", listing)
    run_threads(calls, RANKS)
    for rank in range(RANKS):
        assert len(found[rank]) > 10
        assert found[rank] == expected[rank]


@pytest.mark.parametrize("input_grad", ["complete", "partial", "sequence"])
@pytest.mark.parametrize("place", ["_source", "_gathered", "_weight_gradient", "ids"])
def test_one_rank_fails_alone(place, input_grad, monkeypatch):
    """All ranks fail, by name, and are in step afterwards."""
    original = getattr(gathered, place, None)
    failing = set()

    def replacement(*arguments):
        if torch.distributed.get_rank() in failing:
            raise torch.OutOfMemoryError("a simulated one")
        return original(*arguments)

    if original is not None:
        monkeypatch.setattr(gathered, place, replacement)

    def calls(rank: int, world_size: int) -> None:
        whole = inputs(24, 5, 11, num_ids=2, size=3)
        case, vocab = of_rank(whole, rank, input_grad)

        def run(case):
            values = values_of(case, vocab=vocab)
            return [*values.values(), *gradients(values, case.leaves())]

        expected = run(case)
        odd = case
        if rank == ODD_ONE:
            failing.add(rank)
            if place == "ids":  # in a call that is not compared
                odd = Inputs(case.hidden, case.head, case.target, support=case.support.clone().fill_(11))
        torch.distributed.barrier()
        alone = place == "_weight_gradient" and input_grad == "partial"  # no collective: the others go on
        if rank == ODD_ONE:
            error = IndexError if place == "ids" else torch.OutOfMemoryError
            message = "support at position .* is 11" if place == "ids" else "a simulated one"
            with pytest.raises(error, match=message):
                run(odd)
        elif alone:
            run(case)
        else:
            with pytest.raises(RuntimeError, match=f"vocab: rank {ODD_ONE} of the group failed in this call"):
                run(case)
        torch.distributed.barrier()
        failing.discard(rank)
        torch.distributed.barrier()
        for one, other in zip(run(case), expected, strict=True):
            assert torch.equal(one, other)

    run_threads(calls, RANKS)
