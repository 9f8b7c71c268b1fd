"""What autograd may ask for: any upstream gradient, twice, per token, with frozen tensors."""

import threading

import pytest
import torch
from torch.autograd import gradcheck

from chunked_ce import cross_entropy, linear_cross_entropy, linear_logprobs
from tests.cases import (
    REDUCTIONS,
    REDUCTIONS_AND_WAYS,
    WAYS,
    assert_equal,
    check_loss,
    chunks,
    full_loss,
    gradients,
    problem,
    random_like,
)

SOME_TERMS = {"label_smoothing": 0.1, "z_loss": 0.05, "softcap": 3.0, "logit_scale": 0.8}


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
@pytest.mark.parametrize("terms", [{}, SOME_TERMS], ids=["plain", "terms"])
def test_gradcheck_linear_cross_entropy(reduction, way, terms):
    case = problem(5, 3, 4, dtype=torch.float64, bias=True)
    weights = {"weight": torch.rand(4).double(), "token_weight": torch.rand(5).double()} if terms else {}

    def loss(hidden, head, bias):
        return linear_cross_entropy(
            hidden,
            head,
            case.target,
            linear_bias=bias,
            reduction=reduction,
            options=chunks(2, way),
            **terms,
            **weights,
        )

    assert gradcheck(loss, case.leaves(), check_batched_grad=False)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("terms", [{}, SOME_TERMS], ids=["plain", "terms"])
def test_gradcheck_cross_entropy(reduction, terms):
    target = torch.tensor([0, -100, 3, 1, 1])
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(
        lambda x: cross_entropy(x, target, reduction=reduction, options=chunks(2), **terms),
        [logits],
        check_batched_grad=False,
    )


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("terms", [{}, {"softcap": 3.0, "logit_scale": 0.8}], ids=["plain", "terms"])
def test_gradcheck_linear_logprobs(entropy, terms):
    case = problem(5, 3, 4, dtype=torch.float64, bias=True)

    def logprobs(hidden, head, bias):
        return linear_logprobs(
            hidden, head, case.target, linear_bias=bias, options=chunks(2), return_entropy=entropy, **terms
        )

    assert gradcheck(logprobs, case.leaves(), check_batched_grad=False)


# --- the upstream gradient ---


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_divided_by_eight(way, reduction):
    """peers 2: torchtitan's wrapper and DeepSpeed's TiledFusedLogitsLoss ignore the upstream gradient: 8x."""
    case = problem(16, 5, 9)
    value = case.loss(reduction=reduction, options=chunks(4, way))
    whole = gradients(value, case, retain_graph=True)
    for part, full in zip(gradients(value / 8, case), whole, strict=True):
        torch.testing.assert_close(part, full / 8, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("upstream", [0.0, -3.0, 1e-30, 1e30, 65536.0])
def test_scaled_upstream(way, upstream):
    check_loss(problem(16, 5, 9, bias=True), options=chunks(4, way), upstream=torch.tensor(upstream))


@pytest.mark.parametrize("way", WAYS)
def test_function_of_the_loss(way):
    """A squared loss, and a perplexity: their upstream gradients depend on the loss."""
    case = problem(16, 5, 9, dtype=torch.float64)
    reference = problem(16, 5, 9, dtype=torch.float64)
    for f in (torch.square, torch.exp):
        value = f(case.loss(options=chunks(4, way)))
        expected = f(full_loss(reference.hidden, reference.head, reference.target))
        torch.testing.assert_close(gradients(value, case), gradients(expected, reference), rtol=1e-12, atol=1e-14)


def test_upstream_per_token():
    """A gradient of its own for every token, 0 and negative among them, in the shape of the target."""
    case = problem(24, 5, 9, bias=True)
    upstream = random_like(case.loss(reduction="none"))
    upstream[::3] = 0.0
    for options in (None, chunks(5), chunks(5, "backward"), chunks(100, "backward")):
        check_loss(case, reduction="none", options=options, upstream=upstream)


def test_upstream_of_ignored_tokens_is_without_effect():
    case = problem(24, 5, 9, bias=True)
    upstream = torch.ones(24)
    upstream[case.target == -100] = torch.nan
    got = gradients(case.loss(reduction="none", options=chunks(5)), case, upstream)
    assert_equal(got, gradients(case.loss(reduction="none", options=chunks(5)), case, torch.ones(24)))


@pytest.mark.parametrize("way", WAYS)
def test_expanded_upstream(way):
    """`none.sum()` sends an expanded gradient of stride 0."""
    case = problem(16, 5, 9, dtype=torch.float64)
    total = case.loss(reduction="none", options=chunks(4)).sum()
    expected = case.loss(reduction="sum", options=chunks(4, way))
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(gradients(total, case), gradients(expected, case))


@pytest.mark.parametrize("way", WAYS)
def test_per_sample_gradients_by_hand(way):
    """One backward per token equals one backward of the sum: `none` with one-hot upstream gradients."""
    case = problem(6, 3, 5, dtype=torch.float64, ignored=0.4)
    value = case.loss(reduction="none", options=chunks(2))
    one_by_one = [gradients(value, case, row, retain_graph=True) for row in torch.eye(6, dtype=torch.float64)]
    total = gradients(case.loss(reduction="sum", options=chunks(2, way)), case)
    for i, expected in enumerate(total):
        torch.testing.assert_close(sum(g[i] for g in one_by_one), expected)
    for i, (d_hidden, _) in enumerate(one_by_one):
        assert not d_hidden[torch.arange(6) != i].any()


# --- more than one backward ---


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_second_backward(reduction, way, upstream):
    """peers 2: Liger scales its saved gradients in place: a second backward gives 3x for an upstream of 3."""
    case = problem(16, 5, 9, bias=True)
    value = case.loss(reduction=reduction, options=chunks(4, way))
    upstream = torch.full_like(value, upstream)
    first = gradients(value, case, upstream, retain_graph=True)
    kept = [g.clone() for g in first]
    second = gradients(value, case, upstream, retain_graph=True)
    assert_equal(second, kept)
    assert_equal(first, kept)
    other = gradients(value, case, -2 * upstream, retain_graph=True)
    torch.testing.assert_close(list(other), [-2 * g for g in kept])
    assert_equal(gradients(value, case, upstream), kept)


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_returned_gradients_belong_to_the_caller(reduction, way):
    """peers 2: what is done in place to a returned gradient must not reach the next backward."""
    case = problem(16, 5, 9, bias=True)
    value = case.loss(reduction=reduction, options=chunks(4, way))
    upstream = torch.ones_like(value)
    first = gradients(value, case, upstream, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.fill_(7.0)
    assert_equal(gradients(value, case, upstream), kept)


@pytest.mark.parametrize("way", WAYS)
def test_backward_twice_into_grad(way):
    case = problem(16, 5, 9, bias=True)
    value = case.loss(options=chunks(4, way))
    value.backward(retain_graph=True)
    once = [x.grad.clone() for x in case.leaves()]
    value.backward()
    torch.testing.assert_close([x.grad for x in case.leaves()], [2 * g for g in once])


@pytest.mark.parametrize("way", WAYS)
def test_second_backward_without_retain_graph_is_refused(way):
    case = problem(16, 5, 9)
    value = case.loss(options=chunks(4, way))
    value.backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


@pytest.mark.parametrize("way", WAYS)
def test_two_losses_backward_in_any_order(way):
    """Buffers that calls share would mix the two up."""
    a, b = problem(16, 5, 9, seed=1), problem(16, 5, 9, seed=2)
    expected = [gradients(x.loss(options=chunks(4, way)), x) for x in (a, b)]
    first, second = a.loss(options=chunks(4, way)), b.loss(options=chunks(4, way))
    got = [gradients(first, a, retain_graph=True), gradients(second, b), gradients(first, a)]
    for gradient, want in zip(got, (expected[0], expected[1], expected[0]), strict=True):
        assert_equal(gradient, want)


@pytest.mark.parametrize("way", WAYS)
def test_accumulation_over_two_calls(way):
    case = problem(16, 5, 9, seed=1)
    other = problem(11, 5, 9, seed=2).fresh(head=case.head)
    expected = gradients(case.loss(), case)[1] + gradients(other.loss(), other)[1]
    for x in (case, other):
        x.loss(options=chunks(4, way)).backward()
    torch.testing.assert_close(case.head.grad, expected)
    torch.testing.assert_close(other.hidden.grad, gradients(other.loss(), other)[0])


@pytest.mark.parametrize("way", WAYS)
def test_same_numbers_in_threads(way):
    cases = [problem(64, 16, 301, seed=i) for i in range(4)]
    expected = [gradients(x.loss(options=chunks(8, way)), x) for x in cases]
    wrong = []

    def work(i):
        for _ in range(5):
            got = gradients(cases[i].loss(options=chunks(8, way)), cases[i])
            wrong.extend(i for a, b in zip(got, expected[i], strict=True) if not torch.allclose(a, b))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- frozen tensors ---


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
@pytest.mark.parametrize("trained", [("hidden",), ("head",), ("bias",), ("hidden", "head"), ("hidden", "bias")])
def test_frozen_tensors(reduction, way, trained):
    """peers 3: Liger gives the head no gradient when the input is frozen."""
    case = problem(16, 5, 9, bias=True)
    for name in {"hidden", "head", "bias"} - set(trained):
        getattr(case, name).requires_grad_(False)
    assert len(case.leaves()) == len(trained)
    check_loss(case, reduction=reduction, options=chunks(4, way))
    case.loss(reduction=reduction, options=chunks(4, way)).sum().backward()
    for name in ("hidden", "head", "bias"):
        assert (getattr(case, name).grad is not None) == (name in trained)


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_nothing_to_train(reduction, way):
    case = problem(16, 5, 9, bias=True)
    value = case.loss(reduction=reduction, options=chunks(4, way))
    for x in case.leaves():
        x.requires_grad_(False)
    frozen = case.loss(reduction=reduction, options=chunks(4, way))
    assert not frozen.requires_grad
    torch.testing.assert_close(frozen, value.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_no_gradient_wanted(guard):
    case = problem(16, 5, 9, bias=True)
    for reduction, way in REDUCTIONS_AND_WAYS:
        expected = case.loss(reduction=reduction, options=chunks(4, way))
        with guard():
            value = case.loss(reduction=reduction, options=chunks(4, way))
            logprobs = case.logprobs(options=chunks(4))
        assert not value.requires_grad
        assert not logprobs.requires_grad
        torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_only_one_gradient_asked_for(way):
    case = problem(16, 5, 9, bias=True)
    everything = gradients(case.loss(options=chunks(4, way)), case)
    for leaf, expected in zip(case.leaves(), everything, strict=True):
        (got,) = torch.autograd.grad(case.loss(options=chunks(4, way)), leaf)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_asked_for_one_after_another(way):
    case = problem(16, 5, 9, bias=True)
    expected = gradients(case.loss(options=chunks(4, way)), case)
    value = case.loss(options=chunks(4, way)) * 3
    got = [torch.autograd.grad(value, x, retain_graph=x is not case.bias)[0] for x in case.leaves()]
    torch.testing.assert_close(got, [3 * g for g in expected])


@pytest.mark.parametrize("way", WAYS)
def test_saved_tensors_moved_away(way):
    """Hooks on saved tensors, as offloading to the host uses them."""
    case = problem(16, 5, 9, bias=True)
    expected = gradients(case.loss(options=chunks(4, way)), case)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        value = case.loss(options=chunks(4, way))
    for keep in (True, False):
        got = gradients(value * 3, case, retain_graph=keep)
        torch.testing.assert_close(list(got), [3 * g for g in expected])


@pytest.mark.parametrize("way", WAYS)
def test_inputs_of_a_model(way):
    """The hidden states come from a layer, the head is tied to the embedding that made its input."""
    tokens = torch.arange(12) % 9
    target = tokens.roll(-1)

    def train(loss):
        torch.manual_seed(0)
        embedding, layer = torch.nn.Embedding(9, 5), torch.nn.Linear(5, 5)
        loss(layer(embedding(tokens)).tanh(), embedding.weight, target).backward()
        return [p.grad for p in (embedding.weight, *layer.parameters())]

    got = train(lambda *inputs: linear_cross_entropy(*inputs, options=chunks(4, way)))
    torch.testing.assert_close(got, train(full_loss))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_activation_checkpointing(way, reentrant):
    case = problem(16, 5, 9)
    value = torch.utils.checkpoint.checkpoint(
        lambda hidden, head: linear_cross_entropy(hidden, head, case.target, options=chunks(4, way)),
        case.hidden,
        case.head,
        use_reentrant=reentrant,
    )
    value.backward()
    expected = gradients(case.loss(options=chunks(4, way)), case)
    torch.testing.assert_close([case.hidden.grad, case.head.grad], list(expected))


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_inputs_are_never_modified(reduction, way):
    """peers 2, 14: no gradient is written into an input, and no version moves."""
    case = problem(16, 5, 9, bias=True)
    given = {
        "weight": torch.rand(9), "token_weight": torch.rand(16), "num_tokens": torch.tensor(5.0)
    } if reduction == "mean" else {}  # fmt: skip
    tensors = [case.hidden, case.head, case.bias, case.target, *given.values()]
    before = [x.detach().clone() for x in tensors]
    versions = [x._version for x in tensors]
    value = case.loss(reduction=reduction, options=chunks(4, way), label_smoothing=0.1, softcap=3.0, **given)
    upstream = torch.full_like(value, 2.0)
    value.backward(upstream)
    assert (upstream == 2.0).all()
    assert [x._version for x in tensors] == versions
    assert_equal(tensors, before)


def test_logits_are_never_modified():
    logits = torch.randn(16, 9, requires_grad=True)
    kept = logits.detach().clone()
    cross_entropy(logits, torch.arange(16) % 9, softcap=2.0, options=chunks(4)).backward()
    assert torch.equal(logits, kept)
    assert logits._version == 0


@pytest.mark.parametrize("way", WAYS)
def test_input_changed_before_the_backward(way):
    """An input changed in place: the gradients of the forward or autograd's error, never others."""
    case = problem(16, 5, 9)
    expected = gradients(case.loss(options=chunks(4, way)), case)
    value = case.loss(options=chunks(4, way))
    with torch.no_grad():
        case.head.add_(1.0)
    try:
        got = gradients(value, case)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert_equal(got, expected)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_batched_backwards(reduction):
    """The backward runs once, on a batch of upstream gradients: as in `torch.autograd.functional.jacobian`."""
    case = problem(5, 4, 7)
    value = case.loss(reduction=reduction)
    upstream = torch.eye(5) if reduction == "none" else torch.arange(3.0)
    batched = torch.autograd.grad(value, case.leaves(), upstream, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(value, case.leaves(), row, retain_graph=True) for row in upstream]
    for found, expected in zip(batched, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected))
        assert not found.requires_grad
