"""The head's gradient added to one that exists, block by block."""

import pytest
import torch

from chunked_ce import ChunkOptions, VocabShard, linear_cross_entropy
from tests.cases import chunks, gradients, problem
from tests.distributed.threads import run_threads
from tests.test_work import work

INTO_GRAD = chunks(3, accumulate_into="grad")


def accumulated(case, options, steps=3, **terms):
    """The gradients after some backward passes, each of another loss."""
    for step in range(steps):
        (case.loss(options=options, **terms) * (step + 1)).backward()
    return [leaf.grad for leaf in case.leaves()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("filtered", [False, True])
def test_into_grad(reduction, filtered, dtype):
    case = problem(7, 5, 23, bias=True, dtype=torch.float64)
    case = case.fresh(**{n: t.detach().to(dtype).requires_grad_() for n, t in vars(case).items() if n in FLOATS})
    filter = 0.02 if filtered else None
    options = chunks(3, accumulate_into="grad", gradient_filter=filter)
    wanted = chunks(3, "backward", gradient_filter=filter)

    def loss(case, options, step):
        value = case.loss(options=options, reduction=reduction)
        return (value * torch.arange(1, 8) * step).sum() if reduction == "none" else value * step

    other, held = case.fresh(), set()
    for step in (1, 2, 3):
        loss(case, options, step).backward()
        held.add(case.head.grad.data_ptr())
        loss(other, wanted, step).backward()
    assert len(held) == 1
    tolerance = 1e-14 if dtype == torch.float64 else 2e-2
    for got, expected in zip(case.leaves(), other.leaves(), strict=True):
        assert (got.grad - expected.grad).abs().max() <= tolerance * expected.grad.abs().max()


FLOATS = ("hidden", "head", "bias")


def test_into_a_wider_main_grad():
    case = problem(40, 16, 300, dtype=torch.bfloat16)
    case.head.main_grad = torch.ones(300, 16)
    for factor in (1.0, 0.7):
        options = ChunkOptions(accumulate_into="main_grad", memory_budget=4000)
        (factor * case.loss(options=options, reduction="sum")).backward()
    assert case.head.grad is None
    wide = case.fresh(
        hidden=case.hidden.detach().float().requires_grad_(), head=case.head.detach().float().requires_grad_()
    )
    (_, expected) = gradients(wide.loss(reduction="sum"), wide)
    got = (case.head.main_grad - 1) / 1.7
    # Two steps of one product each, rounded to bf16 before it is added.
    assert (got - expected).norm() <= 2 * torch.finfo(torch.bfloat16).eps * expected.norm()
    assert (got - got.bfloat16()).abs().max() > 0, "the sum is no wider than bf16"


def test_no_second_gradient():
    case = problem(32, 64, 2048, ignored=0.0)
    case.hidden.requires_grad_(False)
    case.head.grad = torch.zeros_like(case.head)

    def step(options):
        return lambda: case.loss(options=options).backward()

    gradient = 4 * 2048 * 64
    usual = work(step(chunks(4, "backward")))
    found = work(step(chunks(4, accumulate_into="grad")))
    assert usual.largest >= gradient
    assert found.peak < gradient / 2
    assert found.multiplications == usual.multiplications


@pytest.mark.parametrize("input_grad", ["complete", "partial", "sequence"])
def test_shards(input_grad):
    whole = problem(12, 5, 21, dtype=torch.float64, ignored=0.2)
    expected = accumulated(whole.fresh(), chunks(6), reduction="sum")[1]

    def worker(rank, ranks):
        rows = slice(rank * 7, rank * 7 + 7)
        own = slice(rank * 4, rank * 4 + 4) if input_grad == "sequence" else slice(None)
        hidden = whole.hidden.detach()[own].clone().requires_grad_()
        head = whole.head.detach()[rows].clone().requires_grad_()
        vocab = VocabShard(torch.distributed.group.WORLD, rows.start, rows.stop, 21, input_grad=input_grad)
        for step in (1, 2, 3):
            options = chunks(6, accumulate_into="grad")
            loss = linear_cross_entropy(hidden, head, whole.target, vocab=vocab, options=options, reduction="sum")
            (loss * step).backward()
        return head.grad

    found = torch.cat(run_threads(worker, 3))
    assert (found - expected).abs().max() <= 1e-13 * expected.abs().max()


def test_a_weight_that_is_no_leaf_and_a_frozen_one_take_the_usual_way():
    case = problem(7, 5, 23)
    other = case.fresh()
    for _ in range(2):
        linear_cross_entropy(case.hidden, case.head * 1.0, case.target, options=INTO_GRAD).backward()
        other.loss().backward()
    torch.testing.assert_close(case.head.grad, other.head.grad)
    case.head.requires_grad_(False)
    case.head.grad = None
    case.loss(options=INTO_GRAD).backward()
    assert case.head.grad is None


def test_compiled_code_takes_the_usual_way():
    case, other = problem(7, 5, 23), problem(7, 5, 23)
    step = torch.compile(lambda c: linear_cross_entropy(c.hidden, c.head, c.target, options=INTO_GRAD), fullgraph=True)
    for _ in range(2):
        step(case).backward()
        other.loss().backward()
    torch.testing.assert_close(case.head.grad, other.head.grad)


@pytest.mark.parametrize("main_grad", [None, torch.zeros(3), torch.zeros(23, 5, dtype=torch.int32)])
def test_main_grad_has_to_be_there(main_grad):
    case = problem(7, 5, 23)
    if main_grad is not None:
        case.head.main_grad = main_grad
    with pytest.raises(ValueError, match=r"main_grad.* of shape \(23, 5\), was "):
        case.loss(options=ChunkOptions(accumulate_into="main_grad"))


def test_main_grad_needs_a_leaf():
    case = problem(7, 5, 23)
    head = case.head * 1.0
    head.main_grad = torch.zeros(23, 5)
    with pytest.raises(ValueError, match="is_leaf=False"):
        linear_cross_entropy(case.hidden, head, case.target, options=ChunkOptions(accumulate_into="main_grad"))


def test_values_that_are_not_allowed():
    with pytest.raises(ValueError, match="accumulate_into must be None, 'grad' or 'main_grad', was 'sum'"):
        ChunkOptions(accumulate_into="sum")
    with pytest.raises(ValueError, match="accumulate_into='grad' needs gradients 'backward' or 'auto', was 'forward'"):
        ChunkOptions(accumulate_into="grad", gradients="forward")
