"""`PolicyGradient` against its formulas on full logits, in float64 and as plain code computes them."""

import math
import pickle

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree

from chunked_ce import LossStats, VocabShard, linear_logprobs, linear_loss, logits_loss
from chunked_ce.objectives import PolicyGradient
from tests.cases import REDUCTIONS_AND_WAYS, WAYS, array, chunks, problem
from tests.distributed.threads import run_threads
from tests.objectives.policies import POLICIES, dense, per_token, policy_losses, rows_of
from tests.precision import assert_gradients_no_worse, assert_no_worse
from tests.test_work import work

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def loss_of(policy, case, tensors, **keywords):
    return linear_loss(policy, case.hidden, case.head, case.target, **case.keywords(), **tensors, **keywords)


def needed(policy, tensors):
    """Without the reference, which is of no use to a policy gradient without a KL term."""
    return tensors if policy.kl else {name: tensor for name, tensor in tensors.items() if name != "ref_logprob"}


# ---- values and gradients ----


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_plain(dtype, reduction, way, name):
    """Against float64, never worse than the formula on the full logits in the same dtype.

    Over several problems: where ratios are large, a few tokens decide about the error of one.
    """
    policy, found = POLICIES[name], []
    for seed in range(6):
        case = problem(100, 32, 301, dtype=dtype, bias=True, seed=seed)
        tensors, weight = needed(policy, per_token(case, ignored_nan=True)), torch.rand(100) + 0.5
        keywords = {"reduction": reduction, "token_weight": weight}
        exact = dense(policy, case, tensors, dtype=torch.float64, **keywords)
        value = loss_of(policy, case, tensors, options=chunks(33, way), **keywords)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        gradients = torch.autograd.grad(value.sum(), case.leaves())
        found.append(
            [(value, *gradients), *((x, *grads) for x, grads in (dense(policy, case, tensors, **keywords), exact))]
        )
    got, plain, exact = ([torch.stack(parts) for parts in zip(*one, strict=True)] for one in zip(*found, strict=True))
    if dtype == torch.float64:
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-13)
        return
    assert_no_worse(got[0], plain[0], array(exact[0]))
    assert_gradients_no_worse(got[1:], plain[1:], [array(gradient) for gradient in exact[1:]], way, dtype)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("way", WAYS)
def test_without_old_logprobs(way, name):
    """The ratio is 1 with the gradient of the log-probability: every kind has the gradient of REINFORCE."""
    case, policy = problem(24, 6, 23), POLICIES[name]
    tensors = needed(policy, per_token(case)) | {"old_logprob": None}
    exact, gradients = dense(policy, case, tensors, dtype=torch.float64)
    value = loss_of(policy, case, tensors, options=chunks(5, way))
    torch.testing.assert_close(value.double(), exact, **CLOSE)
    got = torch.autograd.grad(value, case.leaves())
    torch.testing.assert_close([gradient.double() for gradient in got], list(gradients), **CLOSE)
    del tensors["old_logprob"]
    assert torch.equal(loss_of(policy, case, tensors, options=chunks(5, way)), value)
    if not policy.kl and not policy.entropy:
        value = loss_of(PolicyGradient("reinforce"), case, tensors, options=chunks(5, way))
        torch.testing.assert_close(torch.autograd.grad(value, case.leaves()), got)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("n", "ignored"), [(1, 0.0), (0, 0.0), (7, 1.1)], ids=["one", "none", "all ignored"])
def test_few_tokens(n, ignored, way, name):
    case, policy = problem(n, 6, 23, ignored=ignored), POLICIES[name]
    tensors = needed(policy, per_token(case))
    value, stats = loss_of(policy, case, tensors, options=chunks(4, way), return_stats=True)
    exact, gradients = dense(policy, case, tensors, dtype=torch.float64)
    torch.testing.assert_close(value.double(), exact, **CLOSE)
    got = torch.autograd.grad(value, case.leaves())
    torch.testing.assert_close([gradient.double() for gradient in got], list(gradients), **CLOSE)
    if n != 1:
        assert value == 0 and stats.clipped == 0 and all(gradient.count_nonzero() == 0 for gradient in got)


@pytest.mark.parametrize("name", POLICIES)
def test_logits_that_exist(name):
    case, policy = problem(24, 6, 23, ignored=0.0), POLICIES[name]
    tensors = needed(policy, per_token(case))
    logits = (case.hidden @ case.head.t()).detach().requires_grad_()
    value = logits_loss(policy, logits, case.target, **tensors)
    expected = policy_losses(policy, logits.double(), case.target, **tensors).mean()
    torch.testing.assert_close(value.double(), expected, **CLOSE)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (value, expected)), **CLOSE)


# ---- the bounds of the ratio ----


def one_token():
    """A token in float64, its log-probability, and ratios of it to older ones: about 1.3 and 0.7, exact in float64."""
    case = problem(1, 6, 23, dtype=torch.float64, ignored=0.0)
    logprob = linear_logprobs(case.hidden, case.head, case.target).detach()
    old = [logprob - math.log(about) for about in (1.3, 0.7)]
    return case, old, [(logprob - before).exp().item() for before in old]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("side", ["high", "low"])
def test_a_ratio_at_its_bound_is_not_clipped(side, advantage, way):
    """The next number beyond it is, on the side of the advantage."""
    case, (old_high, old_low), (high, low) = one_token()
    old, ratio = (old_high, high) if side == "high" else (old_low, low)
    bounds = {"clip_low": 1 - low, "clip_high": high - 1}  # exact: both ratios are in [1/2, 2]
    assert 1 - bounds["clip_low"] == low and 1 + bounds["clip_high"] == high
    tensors = {"advantage": torch.full((1,), advantage, dtype=torch.float64), "old_logprob": old}
    logprob = linear_logprobs(case.hidden, case.head, case.target)
    (of_logprob,) = torch.autograd.grad(logprob, case.hidden)
    for beyond in (False, True):
        if beyond:
            name = f"clip_{side}"
            bounds[name] -= 2**-50  # a few units in the last place of the bound
        flat = beyond and (advantage > 0 if side == "high" else advantage < 0)
        policy = PolicyGradient(**bounds)
        value, stats = loss_of(policy, case, tensors, options=chunks(1, way), return_stats=True)
        (gradient,) = torch.autograd.grad(value, case.hidden)
        torch.testing.assert_close(gradient, (0 if flat else -ratio * advantage) * of_logprob, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(value.item(), -ratio * advantage, rtol=1e-9, atol=1e-12)
        assert stats.clipped == flat


@pytest.mark.parametrize("way", WAYS)
def test_bounds_without_width(way):
    """With the policy that sampled them, no token is out of bounds, though the least change would be."""
    case = problem(24, 6, 23)
    old = linear_logprobs(case.hidden, case.head, case.target).detach()
    tensors = {"advantage": torch.randn(24)}
    exact = PolicyGradient(clip_low=0.0, clip_high=0.0)
    _, stats = loss_of(exact, case, tensors, options=chunks(5, way), return_stats=True)
    assert stats.clipped == 0
    value = loss_of(PolicyGradient(), case, tensors | {"old_logprob": old}, options=chunks(5, way))
    expected = loss_of(exact, case, tensors, options=chunks(5, way))
    gradients = [torch.autograd.grad(x, case.leaves()) for x in (value, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["clip", "cispo"])
@pytest.mark.parametrize("advantage", [0.0, 2.0])
def test_a_ratio_beyond_the_range_of_the_dtype(advantage, kind, way):
    """Its product with an advantage or a slope of 0 is 0, not NaN."""
    case = problem(5, 6, 23, ignored=0.0)
    tensors = {"advantage": torch.full((5,), advantage), "old_logprob": torch.full((5,), -200.0)}
    value = loss_of(PolicyGradient(kind), case, tensors, options=chunks(2, way))
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, case.leaves()))


# ---- the vocabulary over ranks ----


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("bounds", [(0, 9, 23), (0, 9, 9, 23), (0, 0, 20, 23)], ids=str)
def test_ranks(name, bounds):
    """Shards that differ in size, some of them empty; losses and sums are the same on every rank."""
    case, policy = problem(13, 6, 23), POLICIES[name]
    tensors = needed(policy, per_token(case))
    exact, gradients = dense(policy, case, tensors, dtype=torch.float64)
    _, alone = loss_of(policy, case, tensors, return_stats=True)

    def call(rank, world_size):
        vocab = VocabShard(dist.group.WORLD, *bounds[rank : rank + 2], bounds[-1])
        hidden = case.hidden.detach().clone().requires_grad_()
        head = case.head.detach()[vocab.start : vocab.stop].clone().requires_grad_()
        for reduction, way in REDUCTIONS_AND_WAYS:
            keywords = {"reduction": reduction, "options": chunks(4, way), "return_stats": True}
            value, stats = linear_loss(policy, hidden, head, case.target, vocab=vocab, **tensors, **keywords)
            value = value if reduction == "mean" else value.sum() / stats.num_tokens
            torch.testing.assert_close(value.double(), exact, **CLOSE)
            of_hidden, of_head = torch.autograd.grad(value, [hidden, head])
            torch.testing.assert_close(of_hidden.double(), gradients[0], **CLOSE)
            torch.testing.assert_close(of_head.double(), gradients[1][vocab.start : vocab.stop], **CLOSE)
            torch.testing.assert_close(stats, alone, rtol=1e-5, atol=1e-5)

    run_threads(call, len(bounds) - 1)


def test_ranks_that_disagree_about_an_optional_tensor():
    case = problem(13, 6, 23)
    tensors = needed(PolicyGradient(), per_token(case))

    def call(rank, world_size):
        vocab = VocabShard.split(23)
        head = case.head.detach()[vocab.start : vocab.stop]
        given = tensors if rank else tensors | {"old_logprob": None}
        with pytest.raises(Exception, match="old_logprob"):
            linear_loss(PolicyGradient(), case.hidden.detach(), head, case.target, vocab=vocab, **given)

    run_threads(call, 2)


# ---- statistics ----


def expected_sums(policy, case, tensors):
    counted = case.target != case.ignore_index
    logits = (case.hidden.double() @ case.head.double().t())[counted]
    logprob, _ = rows_of(logits, case.target[counted])
    advantage, old, ref = (tensors[name].double()[counted] for name in ("advantage", "old_logprob", "ref_logprob"))
    ratio, gap = (logprob - old).exp(), ref - logprob
    high, low = 1 + policy.clip_high, 1 - policy.clip_low
    clipped = {
        "clip": ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low)),
        "cispo": ratio > high,
        "reinforce": torch.zeros_like(counted[counted]),
    }
    return clipped[policy.kind].sum().item(), (gap.exp() - gap - 1).sum().item()


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_stats(reduction, way, name):
    """The reference's divergence without a factor in the loss, too."""
    case, policy = problem(60, 6, 23), POLICIES[name]
    tensors = per_token(case, ignored_nan=True)
    clipped, kl = expected_sums(policy, case, tensors)
    assert clipped > 5 or policy.kind == "reinforce"
    value, stats = loss_of(
        policy,
        case,
        tensors,
        reduction=reduction,
        options=chunks(7, way),
        return_stats=True,
        token_weight=torch.rand(60),
    )
    assert isinstance(stats, LossStats)
    assert stats._fields == (*LossStats._fields, "clipped", "kl")
    assert all(part.shape == () and part.dtype == torch.float32 and not part.requires_grad for part in stats)
    assert stats.clipped == clipped
    assert stats.kl.item() == pytest.approx(kl, rel=1e-5)
    torch.testing.assert_close(value.sum().float() if reduction != "mean" else value * stats.num_tokens, stats.loss_sum)


def test_stats_without_a_reference():
    case = problem(60, 6, 23)
    tensors = needed(PolicyGradient(), per_token(case))
    _, stats = loss_of(PolicyGradient(), case, tensors, return_stats=True)
    assert stats._fields == (*LossStats._fields, "clipped") and not hasattr(stats, "kl")
    loss_sum, *_, clipped = stats
    assert (loss_sum, clipped) == (stats.loss_sum, stats.clipped)
    _, of_cross_entropy = case.loss(return_stats=True)
    assert type(of_cross_entropy) is LossStats and len(of_cross_entropy) == 5


def test_stats_behave_as_a_tuple():
    case = problem(60, 6, 23)
    _, stats = loss_of(PolicyGradient(), case, per_token(case), return_stats=True)
    doubled = _pytree.tree_map(lambda part: 2 * part, stats)
    for other in (doubled, stats._replace(kl=2 * stats.kl), stats._make(doubled)):
        assert type(other) is type(stats) and other.kl == 2 * stats.kl
    copy = pickle.loads(pickle.dumps(stats))
    assert isinstance(copy, LossStats) and type(copy) is type(stats) and copy._asdict() == stats._asdict()
    assert repr(stats).startswith("LossStats(loss_sum=") and ", kl=tensor(" in repr(stats)


def test_stats_add_up():
    whole = problem(60, 6, 23)
    tensors = per_token(whole)
    _, stats = loss_of(PolicyGradient(), whole, tensors, return_stats=True)
    found = []
    for rows in (slice(0, 13), slice(13, 60)):
        part = whole.fresh(hidden=whole.hidden[rows], target=whole.target[rows])
        named = {name: tensor[rows] for name, tensor in tensors.items()}
        found.append(loss_of(PolicyGradient(), part, named, return_stats=True)[1])
    for name in ("loss_sum", "num_tokens", "clipped", "kl"):
        torch.testing.assert_close(sum(getattr(part, name) for part in found), getattr(stats, name))


# ---- the engine ----


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_three_products(name, reduction):
    """Sums and means have their gradients from the forward: 6 N V D, and no tensor of N x V."""
    n, d, v = 256, 16, 1024
    case, policy = problem(n, d, v, ignored=0.0), POLICIES[name]
    tensors = needed(policy, per_token(case))

    def step():
        value = loss_of(policy, case, tensors, reduction=reduction, options=chunks(16))
        return torch.autograd.grad(value, case.leaves())

    cost = work(step)
    assert cost.multiplications == 3 * n * d * v
    assert cost.largest <= 0.1 * n * v * 4


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("clip, all terms", "forward"),
        ("cispo", "backward"),
        pytest.param("clip, all terms", "backward", marks=pytest.mark.thorough),
        pytest.param("cispo", "forward", marks=pytest.mark.thorough),
    ],
)
def test_compiled(name, way):
    """One graph for all numbers of tokens but the first, with the sums."""
    torch._dynamo.reset()
    counter, policy = CompileCounterWithBackend("aot_eager"), POLICIES[name]

    @torch.compile(fullgraph=True, backend=counter)
    def loss(hidden, head, target, tensors):
        value, stats = linear_loss(policy, hidden, head, target, options=chunks(5, way), return_stats=True, **tensors)
        return value, stats, stats.clipped / stats.num_tokens

    for n in (17, 9, 24):
        case = problem(n, 6, 23)
        tensors = needed(policy, per_token(case))
        value, stats, clipped = loss(case.hidden, case.head, case.target, tensors)
        eager, expected = loss_of(policy, case, tensors, options=chunks(5, way), return_stats=True)
        torch.testing.assert_close(stats, expected)
        assert stats._fields == expected._fields and clipped == expected.clipped / expected.num_tokens
        torch.testing.assert_close(*(torch.autograd.grad(x, case.leaves()) for x in (value, eager)))
    assert counter.frame_count == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("name", POLICIES)
def test_derivatives_of_derivatives(name):
    case, policy = problem(7, 4, 11, dtype=torch.float64), POLICIES[name]
    tensors = needed(policy, per_token(case, spread=0.02))  # no ratio moves over its bound

    def loss(hidden, head):
        return linear_loss(policy, hidden, head, case.target, **tensors)

    if policy.kind != "cispo":  # whose weight is a constant to autograd, and not to differences
        assert torch.autograd.gradcheck(loss, (case.hidden, case.head))
        assert torch.autograd.gradgradcheck(loss, (case.hidden, case.head))


# ---- wrong arguments ----


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"kind": "ppo"}, ValueError, "kind must be 'clip', 'cispo' or 'reinforce', was 'ppo'"),
        ({"kind": None}, ValueError, "kind must be 'clip', 'cispo' or 'reinforce', was None"),
        ({"clip_low": 1.0}, ValueError, r"clip_low must be in \[0, 1\), was 1.0"),
        ({"clip_low": -0.1}, ValueError, r"clip_low must be in \[0, 1\), was -0.1"),
        ({"clip_high": -0.1}, ValueError, "clip_high must be finite and >= 0, was -0.1"),
        ({"clip_high": math.inf}, ValueError, "clip_high must be finite and >= 0, was inf"),
        ({"kl": -1}, ValueError, "kl must be finite and >= 0, was -1"),
        ({"kl": math.nan}, ValueError, "kl must be finite and >= 0, was nan"),
        ({"entropy": -1e-3}, ValueError, "entropy must be finite and >= 0, was -0.001"),
        ({"entropy": "0.1"}, TypeError, "entropy must be a number, was '0.1'"),
        ({"clip_low": None}, TypeError, "clip_low must be a number, was None"),
        ({"kl": True}, TypeError, "kl must be a number, was True"),
    ],
)
def test_wrong_fields(fields, error, message):
    with pytest.raises(error, match=message):
        PolicyGradient(**fields)


@pytest.mark.parametrize(
    ("policy", "changes", "error", "message"),
    [
        (
            PolicyGradient(kl=0.1),
            {"ref_logprob": None},
            TypeError,
            "ref_logprob must be a tensor .* kl=0.1.* None",
        ),
        (PolicyGradient(), {"advantage": None}, TypeError, "advantage must be a tensor in the shape of target"),
        (PolicyGradient(), {"old_logprob": torch.zeros(4)}, ValueError, r"old_logprob must have shape \(5,\), had"),
        (PolicyGradient(), {"old_logprob": -1.0}, TypeError, "old_logprob must be a tensor, was float"),
        (PolicyGradient(), {"ref_logprob": torch.zeros(5, requires_grad=True)}, ValueError, "ref_logprob requires gr"),
        (
            PolicyGradient(),
            {"returns": torch.zeros(5)},
            TypeError,
            "returns is no tensor of PolicyGradient: .*old_",
        ),
        (PolicyGradient(), {"returns": None}, TypeError, "returns is no tensor of PolicyGradient"),
    ],
)
def test_wrong_tensors(policy, changes, error, message):
    case = problem(5, 4, 7)
    with pytest.raises(error, match=message):
        loss_of(policy, case, per_token(case) | changes)
