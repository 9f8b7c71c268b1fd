"""`TopKDivergence` against its formulas on full logits in float64, and against plain code in the same dtype."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from chunked_ce import ChunkOptions, VocabShard, linear_loss, linear_statistics, logits_loss
from chunked_ce.objectives import CrossEntropy, Objective, Tokens, TopKDivergence
from chunked_ce.rows.statistics import RowStatistics
from tests.cases import REDUCTIONS_AND_WAYS, WAYS, array, chunks, full_loss, gradients, problem
from tests.distributed.threads import run_threads
from tests.precision import assert_no_worse, parts_in
from tests.test_work import work

TAILS = ("bucket", "drop", "renormalize")
IGNORED = -100
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
TERMS = {"softcap": 4.0, "logit_scale": 0.8}


def teacher(n, vocab, k, *, padded=0.2, seed=1, dtype=torch.float32, spread=2.0):
    """The K likeliest ids of random logits and their log-probabilities; some are padding, with whatever value."""
    g = torch.Generator().manual_seed(seed)
    logprobs, ids = (spread * torch.randn(n, vocab, generator=g, dtype=torch.float64)).log_softmax(-1).topk(k)
    padding = torch.rand(n, k, generator=g) < padded
    if n > 2 and padded:
        padding[0] = True
    logprobs = logprobs.masked_fill(padding, torch.nan).to(dtype)
    return {"teacher_ids": ids.masked_fill(padding, IGNORED), "teacher_logprobs": logprobs}


def dense(logits, tail, teacher_ids, teacher_logprobs):
    """The formulas, one token after another."""
    losses = []
    for z, ids, log_p in zip(logits.log_softmax(-1), teacher_ids, teacher_logprobs, strict=True):
        valid = ids != IGNORED
        p, q = log_p[valid].to(z.dtype).exp(), z[ids[valid]].exp()
        if tail == "renormalize" and len(p):
            p, q = p / p.sum(), q / q.sum()
        terms = torch.special.xlogy(p, p) - p * q.log()
        if tail == "bucket":
            rest = (1 - p.sum()).clamp(min=0)
            terms = torch.cat([terms, (torch.xlogy(rest, rest) - torch.xlogy(rest, 1 - q.sum())).view(1)])
        losses.append(terms.sum())
    return torch.stack(losses) if losses else logits.sum(-1)


def plain(case, tail, named, reduction="mean", token_weight=None, temperature=None, **terms):
    """The loss from full logits in the dtype of the case, float32 at least."""
    z = F.linear(case.hidden, case.head, case.bias)
    z = z if z.dtype == torch.float64 else z.float()
    z = z * terms.get("logit_scale", 1.0)
    z = z if "softcap" not in terms else terms["softcap"] * torch.tanh(z / terms["softcap"])
    z = z if temperature is None else z / temperature.to(z.dtype).unsqueeze(-1)
    counted = case.target != IGNORED
    weight = torch.ones(len(z), dtype=z.dtype) if token_weight is None else token_weight.to(z.dtype)
    losses = (dense(z, tail, **named) * weight).where(counted, 0)
    if reduction == "none":
        return losses
    return losses.sum() / ((weight * counted).sum().clamp(min=1e-30) if reduction == "mean" else 1)


def double(case):
    tensors = {"hidden": case.hidden, "head": case.head, "bias": case.bias}
    return case.fresh(
        **{name: x.detach().double().requires_grad_(x.requires_grad) for name, x in tensors.items() if x is not None}
    )


def ours(case, tail, named, **keywords):
    return linear_loss(
        TopKDivergence(tail), case.hidden, case.head, case.target, **case.keywords(), **named, **keywords
    )


def assert_right(value, case, leaves, *arguments, **keywords):
    wide = double(case)
    right = plain(wide, *arguments, **keywords)
    torch.testing.assert_close(value.double(), right, **CLOSE)
    upstream = torch.linspace(0.5, 2, max(1, value.numel())).view(value.shape) if value.numel() else value.detach()
    wanted = torch.autograd.grad(right, wide.leaves(), upstream.double())
    for one, other in zip(torch.autograd.grad(value, leaves, upstream), wanted, strict=True):
        torch.testing.assert_close(one.double(), other, **CLOSE)


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
@pytest.mark.parametrize("tail", TAILS)
def test_random_shapes(tail, reduction, way):
    for seed, (n, d, vocab, k) in enumerate(
        [(17, 6, 23, 5), (1, 3, 7, 1), (0, 2, 3, 2), (9, 600, 31, 31), (5, 4, 2, 1)]
    ):
        for terms, bias in [({}, False), (TERMS | {"temperature": torch.rand(n) + 0.5}, True)]:
            case = problem(n, d, vocab, bias=bias, seed=seed)
            named = teacher(n, vocab, k, seed=seed)
            weight = {"token_weight": torch.rand(n) + 0.5} if bias else {}
            value = ours(case, tail, named, reduction=reduction, options=chunks(5, way), **weight, **terms)
            assert_right(value, case, case.leaves(), tail, named, reduction=reduction, **weight, **terms)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tail", TAILS)
def test_nothing_to_learn(tail, way):
    """No token counts, all ids are padding, or the student is the teacher."""
    case = problem(9, 4, 11, ignored=1.1)
    value = ours(case, tail, teacher(9, 11, 3), options=chunks(4, way))
    assert value == 0 and all(grad.count_nonzero() == 0 for grad in gradients(value, case))
    case, named = problem(9, 4, 11), teacher(9, 11, 3, padded=1.1)
    value = ours(case, tail, named, options=chunks(4, way))
    assert value == 0 and all(grad.count_nonzero() == 0 for grad in gradients(value, case))
    if tail == "drop":
        return  # least where the ids are certain
    logprobs = F.linear(case.hidden, case.head).log_softmax(-1).detach()
    ids = torch.stack([torch.randperm(11)[:6] for _ in range(9)])
    value = ours(case, tail, {"teacher_ids": ids, "teacher_logprobs": logprobs.gather(-1, ids)}, options=chunks(4, way))
    assert abs(value) < 1e-6
    assert all(grad.abs().max() < 1e-6 for grad in gradients(value, case))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_plain(dtype, tail, way):
    case, named = problem(160, 64, 501, dtype=dtype, spread=2.0), teacher(160, 501, 16)
    wide = double(case)
    right = plain(wide, tail, named)
    of_plain = plain(case, tail, named)
    # In the backward, one block: more of them are each rounded where the device gives no product in fp32.
    size = 33 if way == "forward" or dtype == torch.float32 else "auto"
    value = ours(case, tail, named, options=chunks(size, way))
    assert_no_worse(value, of_plain, array(right), "loss")
    wanted = torch.autograd.grad(right, wide.leaves())
    grads = zip(gradients(value, case), torch.autograd.grad(of_plain, case.leaves()), wanted, strict=True)
    for name, (one, other, exact) in zip(("input", "linear_weight"), grads, strict=True):
        assert_no_worse(one, other, array(exact), f"gradient of {name}", parts_in(name, way, dtype))


@pytest.mark.parametrize("confidence", [3.0, 8.0, 12.0])
@pytest.mark.parametrize("way", WAYS)
def test_a_small_rest(way, confidence):
    """Of teacher and student, who agree on one id: error of value and gradients within that of plain code in fp32."""
    n, vocab = 40, 50
    case, g = problem(n, 16, vocab, ignored=0.0), torch.Generator().manual_seed(5)
    ids = torch.stack([torch.randperm(vocab, generator=g)[:4] for _ in range(n)])
    logits = torch.randn(n, vocab, generator=g, dtype=torch.float64).scatter_(1, ids[:, :1], confidence)
    head = torch.linalg.lstsq(case.hidden.detach().double(), logits).solution.t().float()  # what few tokens can learn
    case = case.fresh(head=head.requires_grad_())
    named = {"teacher_ids": ids, "teacher_logprobs": logits.log_softmax(-1).gather(1, ids).float()}
    wide = double(case)
    right = plain(wide, "bucket", named)
    of_plain, value = plain(case, "bucket", named), ours(case, "bucket", named, options=chunks(7, way))
    assert_no_worse(value, of_plain, array(right), "loss")
    grads = gradients(value, case), torch.autograd.grad(of_plain, case.leaves())
    for one, other, exact in zip(*grads, torch.autograd.grad(right, wide.leaves()), strict=True):
        assert_no_worse(one, other, array(exact))


@pytest.mark.parametrize("way", WAYS)
def test_a_student_without_a_rest(way):
    """What it gives the ids rounds to 1: the loss and its gradients are finite, of the right sign."""
    head = torch.zeros(6, 1).index_fill_(0, torch.tensor([2]), 200.0).requires_grad_()
    ids, logprobs = torch.tensor([[2, 3]]), torch.tensor([[0.5, 0.25]]).log()
    value = linear_loss(
        TopKDivergence(),
        torch.ones(1, 1),
        head,
        torch.tensor([0]),
        teacher_ids=ids,
        teacher_logprobs=logprobs,
        options=chunks(1, way),
    )
    (grad,) = torch.autograd.grad(value, head)
    assert value.isfinite() and grad.isfinite().all()
    torch.testing.assert_close(grad.flatten()[2:4], torch.tensor([0.25, -0.25]))


@pytest.mark.parametrize("tail", TAILS)
def test_an_id_that_the_teacher_excludes(tail):
    """0 log 0 is 0."""
    case = problem(6, 4, 11, ignored=0.0)
    named = teacher(6, 11, 4, padded=0.0)
    named["teacher_logprobs"][:, 1] = -torch.inf
    without = {name: tensor[:, [0, 2, 3]] for name, tensor in named.items()}
    for way in WAYS:
        value = ours(case, tail, named, options=chunks(4, way))
        assert_right(value, case, case.leaves(), tail, named)
        if tail == "drop":
            torch.testing.assert_close(value, ours(case, tail, without, options=chunks(4, way)))


@pytest.mark.parametrize("tail", TAILS)
def test_slopes(tail):
    """Those that are written out, and those that autograd finds."""
    g = torch.Generator().manual_seed(0)
    n, k, vocab = 30, 5, 12
    z = torch.randn(n, vocab, generator=g, dtype=torch.float64)
    named = teacher(n, vocab, k, dtype=torch.float64)
    named["teacher_ids"] = named["teacher_ids"].where(named["teacher_ids"] >= 0, -1)
    at_ids = z.gather(-1, named["teacher_ids"].clamp(min=0)).masked_fill(named["teacher_ids"] < 0, -torch.inf)
    rows = RowStatistics(torch.zeros(n), z.logsumexp(-1), z[:, 0], at_ids=at_ids)
    tokens, objective = Tokens(vocab, float(vocab), None, named), TopKDivergence(tail)
    written, found = objective.slopes(rows, tokens), Objective.slopes(objective, rows, tokens)
    assert written.maximum is None
    for name in ("log_sum", "target", "at_ids"):
        one, other = getattr(written, name), getattr(found, name)
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tail", TAILS)
def test_logits_that_exist(tail):
    case, named = problem(17, 6, 23), teacher(17, 23, 5)
    logits = (case.hidden @ case.head.t()).detach().requires_grad_()
    value = logits_loss(TopKDivergence(tail), logits, case.target, **named)
    eye = case.fresh(hidden=logits, head=torch.eye(23))
    assert_right(value, eye, [logits], tail, named)


def test_ids_and_statistics_agree():
    """The loss from the log-probabilities at the ids that `linear_statistics` gives."""
    case, named = problem(17, 6, 23, ignored=0.0), teacher(17, 23, 5, padded=0.0)
    log_q = linear_statistics(case.hidden, case.head, named["teacher_ids"]).logprob
    log_p = named["teacher_logprobs"]
    by_hand = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    value = ours(case, "drop", named)
    torch.testing.assert_close(value, by_hand)
    torch.testing.assert_close(gradients(value, case), gradients(by_hand, case))


def test_shapes_of_tokens():
    case, named = problem(12, 6, 23), teacher(12, 23, 5)
    flat = ours(case, "bucket", named, reduction="none")
    batched = case.fresh(hidden=case.hidden.view(3, 4, 6), target=case.target.view(3, 4))
    of_batch = {name: tensor.view(3, 4, 5) for name, tensor in named.items()}
    assert torch.equal(ours(batched, "bucket", of_batch, reduction="none"), flat.view(3, 4))
    one = case.fresh(hidden=case.hidden[7], target=case.target[7])
    torch.testing.assert_close(ours(one, "bucket", {n: t[7] for n, t in named.items()}, reduction="none"), flat[7])
    narrow = named | {"teacher_ids": named["teacher_ids"].int()}
    assert torch.equal(ours(case, "bucket", narrow, reduction="none"), flat)


@pytest.mark.parametrize("input_grad", ["complete", "sequence"])
@pytest.mark.parametrize("tail", TAILS)
def test_ranks(tail, input_grad):
    """Uneven shards, an empty one among three."""
    n, vocab = 12, 23
    case, named = problem(n, 6, vocab), teacher(n, vocab, 5)
    wide = double(case)
    right = plain(wide, tail, named)
    wanted = torch.autograd.grad(right, wide.leaves())
    bounds = {1: [0, vocab], 2: [0, 9, vocab], 3: [0, 14, 14, vocab]}

    def of_rank(rank, ranks):
        start, stop = bounds[ranks][rank : rank + 2]
        shard = VocabShard(None, start, stop, vocab, input_grad=input_grad)
        share = slice(rank * n // ranks, (rank + 1) * n // ranks) if input_grad == "sequence" else slice(None)
        hidden = case.hidden.detach()[share].clone().requires_grad_()
        head = case.head.detach()[start:stop].clone().requires_grad_()
        for way in WAYS:
            value = linear_loss(
                TopKDivergence(tail), hidden, head, case.target, vocab=shard, options=chunks(4, way), **named
            )
            torch.testing.assert_close(value.double(), right, **CLOSE)
            of_hidden, of_head = torch.autograd.grad(value, [hidden, head])
            torch.testing.assert_close(of_hidden.double(), wanted[0][share], **CLOSE)
            torch.testing.assert_close(of_head.double(), wanted[1][start:stop], **CLOSE)

    for ranks in bounds:
        run_threads(of_rank, ranks)


def test_ranks_compare_the_teacher():
    case, named = problem(6, 4, 10), teacher(6, 10, 3, padded=0.0)

    def of_rank(rank, ranks):
        vocab = VocabShard.split(10)
        mine = named | {"teacher_ids": named["teacher_ids"].roll(rank, 1)}
        with pytest.raises(ValueError, match="disagree on teacher_ids's values"):
            linear_loss(
                TopKDivergence(), case.hidden, case.head[vocab.start : vocab.stop], case.target, vocab=vocab, **mine
            )

    run_threads(of_rank, 2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tail", TAILS)
def test_the_filter_is_exact(tail, way):
    case, named = problem(64, 16, 300, spread=6.0, ignored=0.0), teacher(64, 300, 8)
    found = [
        gradients(ours(case, tail, named, options=chunks(20, way, gradient_filter=filter)), case)
        for filter in (None, 1e-4)
    ]
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_stats(way):
    case, named = problem(17, 6, 23), teacher(17, 23, 5)
    value, stats = ours(case, "bucket", named, return_stats=True, options=chunks(4, way))
    _, reference = linear_loss(CrossEntropy(), case.hidden, case.head, case.target, return_stats=True)
    torch.testing.assert_close(stats.loss_sum / stats.num_tokens, value)
    for name in ("num_tokens", "num_correct", "entropy_sum", "lse_max"):
        torch.testing.assert_close(getattr(stats, name), getattr(reference, name))


@pytest.mark.parametrize("way", WAYS)
def test_fp16_scaling(way):
    """A mean over a million tokens, whose share is below fp16's smallest number."""
    case, named = problem(64, 16, 100, dtype=torch.float16, ignored=0.0), teacher(64, 100, 8)
    wide = double(case)
    right = plain(wide, "bucket", named, reduction="sum") / 10**6 * 65536
    of_plain = plain(case, "bucket", named, reduction="sum") * (65536 / 10**6)
    value = ours(case, "bucket", named, num_tokens=10**6, options=chunks(16, way)) * 65536
    grads = gradients(value, case), torch.autograd.grad(of_plain, case.leaves())
    for name, one, other, exact in zip(
        ("input", "linear_weight"), *grads, torch.autograd.grad(right, wide.leaves()), strict=True
    ):
        assert_no_worse(one, other, array(exact), name, parts_in(name, way, torch.float16))


@pytest.mark.parametrize("tail", TAILS)
def test_second_derivatives_and_transforms(tail):
    case = problem(5, 3, 7, dtype=torch.float64)
    named = teacher(5, 7, 3, dtype=torch.float64)

    def loss(hidden, head):
        return linear_loss(TopKDivergence(tail), hidden, head, case.target, **named)

    assert torch.autograd.gradcheck(loss, case.leaves())
    assert torch.autograd.gradgradcheck(loss, case.leaves())
    grads = torch.func.grad(loss, argnums=(0, 1))(*(leaf.detach() for leaf in case.leaves()))
    torch.testing.assert_close(grads, gradients(loss(*case.leaves()), case))


@pytest.mark.parametrize("way", ["forward", pytest.param("backward", marks=pytest.mark.thorough)])
def test_one_graph_for_all_token_counts(way):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(hidden, head, target, ids, logprobs):
        return linear_loss(
            TopKDivergence(), hidden, head, target, teacher_ids=ids, teacher_logprobs=logprobs, options=chunks(5, way)
        )

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for n in (24, 17, 3, 40):
        case, named = problem(n, 6, 23, seed=n), teacher(n, 23, 5, seed=n)
        arguments = case.hidden, case.head, case.target, *named.values()
        for tensor in (case.hidden, case.target, *named.values()):
            torch._dynamo.mark_dynamic(tensor, 0)
        values = compiled(*arguments), loss(*arguments)
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*(gradients(value, case) for value in values))
    assert counter.frame_count == 1


@pytest.mark.parametrize("way", WAYS)
def test_masked_tokens(way):
    """Masked tokens stay, whatever their teacher holds."""
    case, named = problem(9, 4, 7), teacher(9, 7, 3)
    ignored = case.target == IGNORED
    assert ignored.any()
    value = ours(case, "bucket", named, options=chunks(4, way, ignored="mask"))
    named["teacher_logprobs"] = named["teacher_logprobs"].masked_fill(ignored.unsqueeze(-1), torch.inf)
    again = ours(case, "bucket", named, options=chunks(4, way, ignored="mask"))
    assert torch.equal(value, again)
    torch.testing.assert_close(gradients(value, case), gradients(again, case), rtol=0, atol=0)


def test_memory():
    """No tensor of N V / 10 at V = 50,257, where the plain loss has several of N V."""
    case, named = problem(512, 8, 50257, ignored=0.0), teacher(512, 50257, 64)
    for way in WAYS:
        options = ChunkOptions(memory_budget=2**20, gradients=way)
        cost = work(lambda options=options: gradients(ours(case, "bucket", named, options=options), case))
        assert cost.largest < 0.1 * 512 * 50257 * 4
    assert work(lambda: gradients(full_loss(case.hidden, case.head, case.target), case)).largest >= 512 * 50257 * 4


# ---- wrong arguments ----


def test_wrong_fields():
    for tail in ("none", 1, None, ["bucket"]):
        with pytest.raises(ValueError, match="tail must be 'bucket', 'drop' or 'renormalize', was"):
            TopKDivergence(tail)


IDS, LOGPROBS = torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"teacher_ids": None},
            TypeError,
            "teacher_ids must be a tensor .*, K ids for each token, for TopKDiv.*, was No",
        ),
        ({"teacher_logprobs": None}, TypeError, "teacher_logprobs must be a tensor .* for TopKDivergence.*, was None"),
        ({"teacher_ids": IDS[0].tolist()}, TypeError, "teacher_ids must be a tensor, was list"),
        (
            {"teacher_ids": IDS.float()},
            TypeError,
            "teacher_ids must be int32 or int64 class indices, was torch.float32",
        ),
        (
            {"teacher_ids": IDS[:, 0]},
            ValueError,
            r"teacher_ids must have \(5,\), the shape of the tokens, .* had \(5,\)",
        ),
        ({"teacher_ids": IDS[:4]}, ValueError, r"teacher_ids must have \(5,\), .*, had \(4, 2\)"),
        ({"teacher_ids": IDS[:, :0]}, ValueError, r"teacher_ids must have .* at least 1, had \(5, 0\)"),
        (
            {"teacher_logprobs": LOGPROBS[:, :1]},
            ValueError,
            r"teacher_logprobs must have the shape of teacher_ids, \(5, 2",
        ),
        ({"teacher_logprobs": LOGPROBS.tolist()}, TypeError, "teacher_logprobs must be a tensor, was list"),
        ({"teacher_logprobs": LOGPROBS.clone().requires_grad_()}, ValueError, "teacher_logprobs requires grad"),
        ({"advantage": LOGPROBS}, TypeError, "advantage is no tensor of TopKDivergence: for each token it takes"),
        ({"teacher_ids": IDS + 7}, IndexError, r"teacher_ids at position \(0, 0\) is 7, allowed are \[0, 7\)"),
        ({"teacher_ids": IDS - 1}, IndexError, r"teacher_ids at position \(0, 0\) is -1, allowed are"),
    ],
)
def test_wrong_arguments(changes, error, message):
    case = problem(5, 4, 7)
    for way in WAYS:
        with pytest.raises(error, match=message):
            ours(case, "bucket", {"teacher_ids": IDS, "teacher_logprobs": LOGPROBS} | changes, options=chunks(4, way))


def test_wrong_classes():
    """Of a user: what names the ids, and what goes with them."""

    def check(message, **attributes):
        kind = type("Wrong", (Objective,), {"loss": lambda self, rows, tokens: rows.nll, **attributes})
        case = problem(5, 4, 7)
        with pytest.raises(ValueError, match=message):
            linear_loss(dataclasses.dataclass(frozen=True)(kind)(), case.hidden, case.head, case.target)

    check("objective.ids must name a tensor of per_token for 'at_ids' and per_id, was None", statistics=("at_ids",))
    check("objective.ids must name a tensor of per_token", per_token=("words",), per_id=("words",))
    check("objective.ids must be None or a name among .*, was 'words'", ids="words")
    check(
        "objective.per_id must be names among .*, had 'chances'", per_token=("words",), ids="words", per_id=("chances",)
    )
