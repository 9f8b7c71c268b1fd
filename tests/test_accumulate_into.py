"""The head's gradient added to one that exists, block by block."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from chunked_ce import ChunkOptions, VocabShard, linear_cross_entropy
from chunked_ce.plan import predict_memory
from tests.cases import chunks, gradients, problem
from tests.distributed.threads import run_threads
from tests.engine.test_filtered import zipf_problem
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


# --- what is asked of the backward ---

ASKS = {
    "autograd.grad of the input": lambda loss, case: torch.autograd.grad(loss, case.hidden),
    "backward(inputs=[input])": lambda loss, case: loss.backward(inputs=[case.hidden]),
    "autograd.grad of the weight": lambda loss, case: torch.autograd.grad(loss, case.head),
    "autograd.grad of both": lambda loss, case: torch.autograd.grad(loss, [case.hidden, case.head]),
}


def with_sum(into, **changes):
    """A problem whose head has a sum of ones to add to."""
    case = problem(7, 5, 23, dtype=torch.float64).fresh(**changes)
    setattr(case.head, into, torch.ones_like(case.head))
    return case


@pytest.mark.parametrize("into", ["grad", "main_grad"])
@pytest.mark.parametrize("ask", ASKS)
def test_nothing_is_added_that_nobody_asked_for(ask, into):
    case = with_sum(into)
    found = ASKS[ask](case.loss(options=chunks(3, accumulate_into=into)), case)
    assert torch.equal(getattr(case.head, into), torch.ones_like(case.head))
    other = case.fresh()
    expected = ASKS[ask](other.loss(options=chunks(3, "backward")), other)
    for got, wanted in zip(found or [case.hidden.grad], expected or [other.hidden.grad], strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_gradient_that_nobody_asked_for_is_not_formed():
    case = with_sum("grad")
    n, d, vocab = int((case.target >= 0).sum()), 5, 23

    def step():
        case.loss(options=INTO_GRAD).backward(inputs=[case.hidden])

    assert work(step).multiplications == 3 * n * d * vocab


@pytest.mark.parametrize("into", ["grad", "main_grad"])
def test_backward_of_the_weight_alone(into):
    case = with_sum(into)
    case.loss(options=chunks(3, accumulate_into=into)).backward(inputs=[case.head])
    assert case.hidden.grad is None
    check_added(case, into)


def check_added(case, into):
    other = case.fresh()
    other.loss().backward()
    torch.testing.assert_close(getattr(case.head, into), other.head.grad + 1)
    if into == "main_grad":
        assert case.head.grad is None


# --- what autograd hands to the backward ---


class Subclass(torch.nn.Parameter):
    pass


def checkpointed(case, options):
    def loss(hidden, head):
        return linear_cross_entropy(hidden, head, case.target, options=options)

    return checkpoint(loss, case.hidden, case.head, use_reentrant=False)


def saved_on_cpu(case, options):
    with torch.autograd.graph.save_on_cpu():
        return case.loss(options=options)


@pytest.mark.parametrize("into", ["grad", "main_grad"])
@pytest.mark.parametrize("make", [checkpointed, saved_on_cpu])
def test_tensors_that_are_unpacked_as_others(make, into):
    case = with_sum(into)
    held = getattr(case.head, into)
    make(case, chunks(3, accumulate_into=into)).backward()
    assert getattr(case.head, into) is held
    check_added(case, into)


@pytest.mark.parametrize("into", ["grad", "main_grad"])
def test_a_subclass_of_parameter(into):
    case = with_sum(into, head=Subclass(problem(7, 5, 23, dtype=torch.float64).head.detach()))
    case.loss(options=chunks(3, accumulate_into=into)).backward()
    check_added(case, into)


def test_main_grad_has_no_second_derivatives():
    case = with_sum("main_grad")
    loss = case.loss(options=chunks(3, accumulate_into="main_grad"))
    with (
        pytest.warns(UserWarning, match="create_graph=True"),  # torch's own, of a reference cycle
        pytest.raises(RuntimeError, match=r"accumulate_into='main_grad'.*create_graph=True"),
    ):
        loss.backward(create_graph=True)
    assert torch.equal(case.head.main_grad, torch.ones_like(case.head))
    assert case.head.grad is None


def test_second_derivatives_that_are_not_added():
    case, other = with_sum("main_grad"), with_sum("main_grad")
    seconds = []
    for c, options in ((case, chunks(3, accumulate_into="main_grad")), (other, None)):
        (first,) = torch.autograd.grad(c.loss(options=options), c.hidden, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), c.head)[0])
    torch.testing.assert_close(*seconds)
    assert torch.equal(case.head.main_grad, torch.ones_like(case.head))


@pytest.mark.parametrize("later", [None, torch.zeros(3)])
def test_main_grad_has_to_stay(later):
    case = with_sum("main_grad")
    loss = case.loss(options=chunks(3, accumulate_into="main_grad"))
    case.head.main_grad = later
    with pytest.raises(RuntimeError, match=r"needs linear_weight.main_grad.* of shape \(23, 5\), was "):
        loss.backward()


def test_evaluation_needs_no_main_grad():
    case = problem(7, 5, 23)
    with torch.no_grad():
        loss = case.loss(options=chunks(3, accumulate_into="main_grad"))
    torch.testing.assert_close(loss, case.loss().detach())


def test_main_grad_on_another_device():
    case = problem(7, 5, 23)
    case.head.main_grad = torch.zeros(23, 5, device="meta")
    with pytest.raises(ValueError, match=r"main_grad.* on cpu .*was .*on meta"):
        case.loss(options=ChunkOptions(accumulate_into="main_grad"))


def test_main_grad_of_transformed_code():
    case = with_sum("main_grad")
    options = ChunkOptions(accumulate_into="main_grad")
    with pytest.raises(ValueError, match=r"main_grad.*transformed=True"):
        torch.func.grad(lambda x: linear_cross_entropy(x, case.head, case.target, options=options))(case.hidden)


def test_a_sparse_gradient_takes_the_usual_way():
    found = []
    for options in (INTO_GRAD, chunks(3, "backward")):
        embedding = torch.nn.Embedding.from_pretrained(problem(7, 5, 23).head.detach(), freeze=False, sparse=True)
        embedding(torch.tensor([1, 2])).sum().backward()
        case = problem(7, 5, 23).fresh(head=embedding.weight)
        case.loss(options=options).backward()
        found.append(embedding.weight.grad.to_dense())
    torch.testing.assert_close(*found)


# --- the memory law ---


@pytest.mark.parametrize("into", ["grad", "main_grad"])
@pytest.mark.parametrize("filter", [None, "auto"])
def test_the_memory_law_has_no_second_gradient(filter, into):
    shape = {"num_tokens": 64, "vocab_size": 4096, "hidden_size": 64, "dtype": torch.bfloat16}

    def law(**options):
        return predict_memory(**shape, options=chunks(8, gradient_filter=filter, **options)).backward

    found, usual = law(accumulate_into=into), law(gradients="backward")
    assert usual["head_grad"] == 2 * 64 * 4096
    assert found["head_grad"] == 0
    # Filtered chunks are summed in fp32 first where the sum that exists is narrower.
    assert found.get("head_sum", 0) == (4 * 64 * 4096 if filter and into == "grad" else 0)
    if filter is None:
        wide = into == "main_grad"
        others = {"head_grad": 0, "products": found["products"]}
        assert found == usual | others
        assert (found["products"] > usual["products"]) == wide, "the added product is widened in scratch"
    frozen = predict_memory(**shape, train_head=False, options=chunks(8, accumulate_into=into))
    assert frozen == predict_memory(**shape, train_head=False, options=chunks(8, "backward"))


@pytest.mark.parametrize(("into", "sum_dtype"), [("grad", torch.bfloat16), ("main_grad", torch.float32)])
def test_the_memory_law_is_what_is_allocated(into, sum_dtype):
    n, d, vocab = 64, 64, 4096
    options = chunks(8, accumulate_into=into)
    law = predict_memory(n, vocab, d, dtype=torch.bfloat16, options=options)
    case = problem(n, d, vocab, dtype=torch.bfloat16, ignored=0.0)
    setattr(case.head, into, torch.zeros(vocab, d, dtype=sum_dtype))

    def step():
        case.hidden.grad = None
        case.loss(options=options).backward()

    most = sum(law.backward.values()) - law.backward["packed"]  # which is the matrix library's, not torch's
    assert most > sum(law.forward.values()) - law.forward["packed"]
    least = most - min(law.backward["rows"], law.backward["products"])  # they are not there at once
    assert 0.9 * least <= work(step).peak <= 1.02 * most


def test_the_memory_law_of_a_narrow_sum_and_the_filter():
    """The wide sum of the chunks, and a wide copy of the narrow one while the two are added."""
    n, d, vocab = 64, 64, 8192
    options = chunks(8, accumulate_into="grad", gradient_filter="auto")
    law = predict_memory(n, vocab, d, dtype=torch.bfloat16, options=options).backward
    case = zipf_problem(n, d, vocab, dtype=torch.bfloat16, ignored=0.0)
    case.head.grad = torch.zeros_like(case.head)

    def step():
        case.hidden.grad = None
        case.loss(options=options).backward()

    assert work(step).peak <= 1.02 * (sum(law.values()) - law["packed"])
