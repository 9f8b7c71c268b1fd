"""The losses of preference tuning against their papers' formulas, and from hidden states to gradients."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from chunked_ce import VocabShard, linear_logprobs, preference
from tests.cases import array, chunks
from tests.distributed.threads import run_threads
from tests.precision import assert_no_worse
from tests.preference_formulas import CASES, Case

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ONE_EACH = [next(case for case in CASES if case.name == name) for name in preference.__all__]


def value_and_gradients(function, leaves, constants, numbers, dtype=None):
    """Of new leaves with the same numbers, in ``dtype`` if given."""
    fresh = {name: leaf.detach().to(dtype or leaf.dtype).requires_grad_() for name, leaf in leaves.items()}
    fixed = {name: x.to(dtype) if dtype and x.is_floating_point() else x for name, x in constants.items()}
    value = function(**fresh, **fixed, **numbers)
    # With alpha=0, neither the likelihood nor a gradient for it is asked for.
    return value, torch.autograd.grad(value, list(fresh.values()), allow_unused=True)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_the_formula_in_the_same_dtype(case, dtype):
    """Against float64, over many batches: both round, the formula as it is printed rounds more."""
    found = []
    for seed in range(40):
        leaves, constants = case.arguments(7, dtype, seed)
        value, gradients = value_and_gradients(case.ours, leaves, constants, case.numbers)
        expected = value_and_gradients(case.plain, leaves, constants, case.numbers, torch.float64)
        work = torch.promote_types(dtype, torch.float32)
        plain = value_and_gradients(case.plain, leaves, constants, case.numbers, work)
        assert value.shape == () and value.dtype == work
        assert all(g.dtype == dtype for g in gradients)
        found.append([(value, plain[0], expected[0])])
        found[-1] += zip(gradients, plain[1], expected[1], strict=True)
    for ours, plain, expected in (zip(*batches, strict=True) for batches in zip(*found, strict=True)):
        expected = torch.stack(expected).detach()
        # A gradient comes back in the dtype of its sums, as the plain one would.
        plain = torch.stack(plain).detach().to(ours[0].dtype)
        assert_no_worse(torch.stack(ours), plain, array(expected))
        assert expected.abs().max() > 1e-4


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(case):
    leaves, constants = case.arguments(4)

    def loss(*tensors):
        return case.ours(**dict(zip(leaves, tensors, strict=True)), **constants, **case.numbers)

    assert gradcheck(loss, tuple(leaves.values()))
    assert gradgradcheck(loss, tuple(leaves.values()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_sums_are_not_changed(case):
    leaves, constants = case.arguments(5, torch.float32)
    before = [x.clone() for x in (*leaves.values(), *constants.values())]
    value_and_gradients(case.ours, leaves, constants, case.numbers)
    assert all(map(torch.equal, before, (*leaves.values(), *constants.values())))


# ---- edges ----


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_empty_batch(case, dtype):
    leaves, constants = case.arguments(0, dtype)
    value, gradients = value_and_gradients(case.ours, leaves, constants, case.numbers)
    likelihood = case.numbers.get("alpha", 1.0) * leaves["nll"].float() if case.with_nll else torch.tensor(0.0)
    assert torch.equal(value.float(), likelihood) and value.requires_grad
    assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves.values()]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("pairs", [1, 3])
def test_few_pairs(case, pairs):
    leaves, constants = case.arguments(pairs)
    values = [f(**leaves, **constants, **case.numbers) for f in (case.ours, case.plain)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
@pytest.mark.parametrize("far", [1e4, 1e15])
def test_margins_that_a_sigmoid_cannot_hold(case, far):
    """Either response is far less probable than the other: sigmoid is 0 below -104 in float32, its log -inf."""
    leaves, constants = case.arguments(3, torch.float32)
    for unlikely in leaves:
        moved = {name: leaf - far if name == unlikely else leaf for name, leaf in leaves.items()}
        value, gradients = value_and_gradients(case.ours, moved, constants, case.numbers)
        assert value.isfinite() and value >= 0
        assert all(g.isfinite().all() for g in gradients)


def test_a_margin_far_below_0():
    """-log sigmoid(x) is -x there, with a slope of -1."""
    chosen = torch.tensor([-1e4], requires_grad=True)
    value = preference.dpo(chosen, torch.zeros(1), torch.zeros(1), torch.zeros(1), beta=0.5)
    assert value == 5000
    assert torch.autograd.grad(value, chosen)[0] == -0.5


@pytest.mark.parametrize("mean", [0.0, -1e-40, -1e-12, -1e-7, 1e-7])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_confident_sequences_have_finite_odds(mean, side):
    """1 - exp(mean) in float32 is 0 above -6e-8: the odds of the formula as it is printed are infinite."""
    leaves = {f"policy_{name}": torch.tensor([mean * 8 if name == side else -8.0]) for name in ("chosen", "rejected")}
    lengths = {f"{name}_length": torch.tensor([8]) for name in ("chosen", "rejected")}
    value, gradients = value_and_gradients(preference.orpo, leaves, lengths, {"beta": 1.0, "alpha": 0.0})
    assert value.isfinite() and all(g.isfinite().all() for g in gradients)
    if mean < -1e-30:
        leaves = {name: leaf.double() for name, leaf in leaves.items()}
        a, b = (leaf / 8 for leaf in leaves.values())
        expected = torch.log1p(torch.exp(-(a - b - torch.log(-torch.expm1(a)) + torch.log(-torch.expm1(b)))))
        torch.testing.assert_close(value.double(), expected.squeeze(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["ipo", "simpo", "orpo"])
def test_a_sequence_without_tokens(name):
    """Its mean is 0, and the pairs beside it are untouched."""
    case = Case(name, with_lengths=True)
    leaves, constants = case.arguments(3)
    for x in (leaves, constants):
        for key in x:
            if "chosen" in key:
                x[key] = x[key].detach().clone()
                x[key][1] = 0
    value, gradients = value_and_gradients(case.ours, leaves, constants, {})
    others = [case.ours(**{key: x[i : i + 1] for key, x in (leaves | constants).items()}) for i in range(3)]
    torch.testing.assert_close(value, torch.stack(others).mean())
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("lengths", [torch.int32, torch.uint8, torch.float32, torch.bfloat16])
def test_lengths_of_any_dtype(lengths):
    leaves, constants = Case("simpo").arguments(5, torch.float32)
    expected = preference.simpo(**leaves, **constants)
    given = {name: x.to(lengths) for name, x in constants.items()}
    assert torch.equal(preference.simpo(**leaves, **given), expected)


def test_float64_if_one_of_the_sums_is():
    leaves, constants = Case("dpo").arguments(3, torch.float32)
    constants["reference_chosen"] = constants["reference_chosen"].double()
    assert preference.dpo(**leaves, **constants).dtype == torch.float64


def test_numpy_numbers():
    leaves, constants = Case("dpo").arguments(3, torch.float32)
    value = preference.dpo(**leaves, **constants, beta=np.float64(0.25))
    assert isinstance(value, torch.Tensor) and value.dtype == torch.float32
    assert torch.equal(value, preference.dpo(**leaves, **constants, beta=0.25))


def test_policy_near_the_reference():
    """Policy minus reference is exact; chosen minus rejected rounds a sum of 1,234 to 6e-5."""
    policy = torch.tensor([-1234.5]), torch.tensor([-0.12503])
    reference = torch.tensor([-1234.25]), torch.tensor([-0.125])
    exact = preference.ipo(*(x.double() for x in (*policy, *reference)), beta=0.5)
    assert preference.ipo(*policy, *reference, beta=0.5) == pytest.approx(exact.item(), rel=1e-6)
    assert preference.dpo(*policy, *policy) == pytest.approx(math.log(2), rel=1e-7)


def test_likelihood_over_all_chosen_tokens():
    """As TRL and Liger have it: `nll` takes the place of the mean over pairs."""
    leaves, constants = Case("orpo").arguments(4)
    chosen, length = leaves["policy_chosen"], constants["chosen_length"]
    nll = -chosen.sum() / length.sum()
    without = preference.orpo(**leaves, **constants, alpha=0.0)
    torch.testing.assert_close(preference.orpo(**leaves, **constants, nll=nll.view(1)), without + nll)
    torch.testing.assert_close(preference.orpo(**leaves, **constants), without - (chosen / length).mean())
    without = preference.cpo(**leaves, alpha=0.0)
    torch.testing.assert_close(preference.cpo(**leaves, nll=nll, alpha=0.5), without + 0.5 * nll)
    torch.testing.assert_close(preference.cpo(**leaves), without - chosen.mean())


def test_a_likelihood_of_no_weight_is_left_out():
    """0 times infinity is NaN."""
    nll = torch.tensor(math.inf)
    assert preference.cpo(torch.zeros(1), torch.zeros(1), alpha=0.0, nll=nll) == pytest.approx(math.log(2))


def test_the_reference_point_of_kto():
    sums = [torch.tensor([value]) for value in (-3.0, -5.0, -4.0, -4.0)]
    values = [
        preference.kto(*sums, kl=kl)
        for kl in (2, 2.0, torch.tensor(2.0), torch.tensor([2.0]), torch.tensor(2.0).double(), np.float32(2.0))
    ]
    assert all(torch.equal(value, values[0]) and value.dtype == torch.float32 for value in values)
    below = [preference.kto(*sums, **kl) for kl in ({}, {"kl": 0.0}, {"kl": -3.0}, {"kl": torch.tensor(-3.0)})]
    assert all(torch.equal(value, below[0]) for value in below)
    assert not torch.equal(values[0], below[0])


def test_kto_of_kinds_of_different_numbers():
    policy, reference, none = torch.tensor([-3.0, -5.0]), torch.tensor([-4.0, -4.0]), torch.zeros(0)
    gain = torch.sigmoid(policy - reference)
    chosen = preference.kto(policy, none, reference, none, beta=1.0)
    torch.testing.assert_close(chosen, 1 - gain.mean())
    rejected = preference.kto(none, policy, none, reference, beta=1.0)
    torch.testing.assert_close(rejected, gain.mean())
    both = preference.kto(policy, policy[:1], reference, reference[:1], beta=1.0)
    torch.testing.assert_close(both, (2 - gain.sum() + gain[0]) / 3)


def test_a_small_kto_does_not_cancel():
    """1 - sigmoid(30) is 0 in float32."""
    value = preference.kto(torch.tensor([30.0]), torch.zeros(0), torch.zeros(1), torch.zeros(0), beta=1.0)
    assert value == pytest.approx(math.exp(-30), rel=1e-6, abs=0)


@pytest.mark.parametrize("loss", [preference.simpo, preference.orpo])
def test_sums_that_are_means_already(loss):
    length = torch.tensor([4, 8, 16])
    chosen, rejected = torch.tensor([-4.0, -9.0, -30.0]), torch.tensor([-8.0, -8.0, -20.0])
    with_lengths = loss(chosen, rejected, chosen_length=length, rejected_length=2 * length)
    assert torch.equal(loss(chosen / length, rejected / (2 * length)), with_lengths)


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_compiled_in_one_graph(case):
    """With a likelihood of its own, and again for another number of pairs."""
    compiled = torch.compile(case.ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for pairs in (5, 8):
        leaves, constants = case.arguments(pairs, torch.float32)
        found, expected = (
            value_and_gradients(function, leaves, constants, case.numbers) for function in (compiled, case.ours)
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_torch_func(case):
    leaves, constants = case.arguments(5)

    def loss(tensors):
        return case.ours(**tensors, **constants, **case.numbers)

    found = torch.func.grad(loss)({name: leaf.detach() for name, leaf in leaves.items()})
    _, expected = value_and_gradients(case.ours, leaves, constants, case.numbers)
    assert all(map(torch.equal, found.values(), expected))


# ---- wrong arguments ----

P = torch.tensor([-4.0, -6.0, -5.0])
L = torch.tensor([3, 4, 5])
LENGTHS = {"chosen_length": L, "rejected_length": L}


def trained(x):
    return x.clone().requires_grad_()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: preference.dpo(P, P, P, P, beta=0.0), ValueError, "beta must be finite and > 0, was 0.0"),
        (lambda: preference.ipo(P, P, P, P, beta=-1), ValueError, "beta must be finite and > 0, was -1"),
        (lambda: preference.cpo(P, P, beta=math.inf), ValueError, "beta must be finite and > 0, was inf"),
        (lambda: preference.cpo(P, P, beta=math.nan), ValueError, "beta must be finite and > 0, was nan"),
        (lambda: preference.cpo(P, P, beta="0.1"), TypeError, "beta must be a number, was '0.1'"),
        (lambda: preference.cpo(P, P, beta=torch.ones(())), TypeError, "beta must be a number, was a torch.float32"),
        (lambda: preference.cpo(P, P, alpha=-1.0), ValueError, "alpha must be finite and >= 0, was -1.0"),
        (lambda: preference.simpo(P, P, **LENGTHS, gamma=-1.0), ValueError, "gamma must be finite and >= 0, was -1.0"),
        (lambda: preference.dpo(P, P, P, P, label_smoothing=0.5), ValueError, r"label_smoothing must be in \[0, 0.5\)"),
        (
            lambda: preference.dpo(P.view(3, 1), P, P, P),
            ValueError,
            r"policy_chosen must have shape \(B,\), one sum of log-probabilities for each sequence, had \(3, 1\)",
        ),
        (lambda: preference.dpo(P[0], P[0], P[0], P[0]), ValueError, r"policy_chosen must have shape \(B,\)"),
        (
            lambda: preference.dpo(P, P[:2], P, P),
            ValueError,
            r"policy_rejected must have the shape of the sums, \(3,\), had \(2,\)",
        ),
        (lambda: preference.dpo(P, P, P, P[:1]), ValueError, "reference_rejected must have the shape of the sums"),
        (lambda: preference.dpo(P, P, P, P.long()), TypeError, "reference_rejected must be of a floating-point dtype"),
        (lambda: preference.dpo(P, [1.0], P, P), TypeError, "policy_rejected must be a tensor, was list"),
        (lambda: preference.dpo(P, P, None, P), TypeError, "reference_chosen must be a tensor, was NoneType"),
        (lambda: preference.dpo(P, P, trained(P), P), ValueError, "reference_chosen requires grad, .* detach it"),
        (lambda: preference.dpo(P, P, P, P.to("meta")), ValueError, "reference_rejected must be on the device of the"),
        (lambda: preference.ipo(P, P, P, P, chosen_length=L), TypeError, "rejected_length was None: give the lengths"),
        (lambda: preference.ipo(P, P, P, P, rejected_length=L), TypeError, "chosen_length was None: give the lengths"),
        (lambda: preference.simpo(P, P, chosen_length=L), TypeError, "rejected_length was None: give the lengths"),
        (
            lambda: preference.simpo(P, P, chosen_length=L[:2], rejected_length=L),
            ValueError,
            r"chosen_length must have the shape of the sums, \(3,\), had \(2,\)",
        ),
        (
            lambda: preference.orpo(P, P, chosen_length=L, rejected_length=L > 3),
            TypeError,
            "rejected_length must be an integer or of a floating-point dtype, .* was torch.bool",
        ),
        (
            lambda: preference.orpo(P, P, chosen_length=3, rejected_length=L),
            TypeError,
            "chosen_length must be a tensor",
        ),
        (
            lambda: preference.orpo(P, P, chosen_length=trained(L.float()), rejected_length=L),
            ValueError,
            "chosen_length requires grad",
        ),
        (lambda: preference.orpo(P, P, **LENGTHS, nll=P), ValueError, r"nll must have one element, had shape \(3,\)"),
        (lambda: preference.cpo(P, P, nll=1.0), TypeError, "nll must be a tensor, was float"),
        (lambda: preference.kto(P, P, P[:2], P), ValueError, "reference_chosen must have the shape of the sums"),
        (lambda: preference.kto(P, P[:2], P, P), ValueError, "reference_rejected must have the shape of the sums"),
        (lambda: preference.kto(P, P, P), TypeError, "reference_rejected"),
        (lambda: preference.kto(P, P, P, P, kl=P), ValueError, r"kl must have one element, had shape \(3,\)"),
        (lambda: preference.kto(P, P, P, P, kl=trained(P[0])), ValueError, "kl requires grad"),
        (lambda: preference.kto(P, P, P, P, kl=None), TypeError, "kl must be a number or a tensor of one element"),
        (lambda: preference.kto(P, P, P, P, kl=math.nan), ValueError, "kl must be finite, was nan"),
        (
            lambda: preference.kto(P, P, P, P, undesirable_weight=-1.0),
            ValueError,
            "undesirable_weight must be finite and >= 0, was -1.0",
        ),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- from hidden states, on one rank and on several ----

PAIRS, TIME, HIDDEN, VOCAB = 5, 7, 12, 101


def hidden_states(width=HIDDEN):
    """Of B chosen and B rejected responses, (2B, T, D), with targets: a prompt, a response and padding in each."""
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(2 * PAIRS, TIME, width, generator=g)
    head, reference = (torch.randn(VOCAB, width, generator=g) * width**-0.5 for _ in range(2))
    target = torch.randint(VOCAB, (2 * PAIRS, TIME), generator=g)
    place, stop = torch.arange(TIME), torch.randint(3, TIME + 1, (2 * PAIRS, 1), generator=g)
    return hidden, head, reference, target.masked_fill((place < 2) | (place >= stop), -100)


def full_logprobs(hidden, head, target):
    counted = target != -100
    logprobs = (hidden @ head.t()).log_softmax(-1).gather(-1, target.where(counted, 0).unsqueeze(-1)).squeeze(-1)
    return logprobs.where(counted, 0)


def loss_of(name, logprobs, reference, target):
    """Each loss as it is called in training, of log-probabilities per token, (2B, T)."""
    policy, frozen = logprobs.sum(-1), reference.detach().sum(-1)
    chosen_length, rejected_length = (target != -100).sum(-1).chunk(2)
    lengths = {"chosen_length": chosen_length, "rejected_length": rejected_length}
    if name in ("dpo", "ipo"):
        return getattr(preference, name)(*policy.chunk(2), *frozen.chunk(2))
    if name == "kto":
        kl = (policy.roll(1) - frozen.roll(1)).mean().detach().abs()
        return preference.kto(*policy.chunk(2), *frozen.chunk(2), kl=kl)
    return getattr(preference, name)(*policy.chunk(2), **(lengths if name in ("simpo", "orpo") else {}))


def full_logits(name, dtype):
    hidden, head, reference, target = (x.to(dtype) if x.is_floating_point() else x for x in hidden_states())
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    logprobs = full_logprobs(hidden, head, target)
    value = loss_of(name, logprobs, full_logprobs(hidden, reference, target), target)
    return value, *torch.autograd.grad(value, (hidden, head))


def chunked(name, vocab=None):
    hidden, head, reference, target = hidden_states()
    rows = slice(None) if vocab is None else slice(vocab.start, vocab.stop)
    hidden, head = hidden.requires_grad_(), head[rows].clone().requires_grad_()
    keywords = {"vocab": vocab, "options": chunks(8)}
    logprobs = linear_logprobs(hidden, head, target, **keywords)
    value = loss_of(name, logprobs, linear_logprobs(hidden.detach(), reference[rows], target, **keywords), target)
    return value.detach(), *torch.autograd.grad(value, (hidden, head))


def assert_right(found, name):
    for ours, plain, expected in zip(
        found, full_logits(name, torch.float32), full_logits(name, torch.float64), strict=True
    ):
        assert_no_worse(ours, plain, array(expected))


@pytest.mark.parametrize("name", preference.__all__)
def test_from_hidden_states(name):
    assert_right(chunked(name), name)


def on_a_shard(rank, ranks, sizes):
    start = sum(sizes[:rank])
    vocab = VocabShard(torch.distributed.group.WORLD, start, start + sizes[rank], VOCAB)
    return {name: chunked(name, vocab) for name in preference.__all__}


@pytest.mark.parametrize("sizes", [(60, 41), (30, 0, 71)], ids=str)
def test_from_a_sharded_vocabulary(sizes):
    found = run_threads(on_a_shard, len(sizes), sizes)
    for name in preference.__all__:
        values, hidden, heads = zip(*(of_rank[name] for of_rank in found), strict=True)
        assert all(torch.equal(value, values[0]) for value in values)
        assert all(torch.equal(gradient, hidden[0]) for gradient in hidden)
        assert_right((values[0], hidden[0], torch.cat(heads)), name)
