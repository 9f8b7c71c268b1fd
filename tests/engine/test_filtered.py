"""The gradient filter: what it keeps, what it makes of the rest, and how far that is from the exact gradient."""

import itertools
import math

import pytest
import torch

from chunked_ce import ChunkOptions, VocabShard, linear_cross_entropy
from chunked_ce.engine.filtered import Filter, groups_of
from chunked_ce.plan import GROUPS
from chunked_ce.rows.columns import ColumnSums
from tests.cases import Problem, gradients, problem
from tests.distributed.threads import run_threads
from tests.precision import errors
from tests.test_work import train, work

EPS = 1e-3


def zipf_problem(n=96, d=24, vocab=700, *, dtype=torch.float64, bias=False, ignored=0.2, seed=0):
    """A head as training leaves it: word v has a frequency of about 1 / v^2, and each hidden state likes a few more."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    head = normal(vocab, d) * d**-0.5
    head[:, 0] = -2 * torch.arange(1, vocab + 1).double().log()
    hidden = 1.5 * normal(n, d)
    hidden[:, 0] = 1
    order = torch.randperm(vocab, generator=g)
    target = (
        torch.multinomial(torch.softmax(hidden @ head.t(), -1), 1, generator=g)[:, 0] if n else torch.zeros(0).long()
    )
    places = torch.empty(vocab, dtype=torch.long)
    places[order] = torch.arange(vocab)
    target = places[target]
    target[torch.rand(n, generator=g) < ignored] = -100
    return Problem(
        hidden.to(dtype).requires_grad_(),
        head[order].to(dtype).requires_grad_(),
        target,
        normal(vocab).mul_(0.1).to(dtype).requires_grad_() if bias else None,
    )


def quarters(total):
    """The group of each number: where its sum with all that are no larger stands among equal parts of the whole sum.

    Numbers that agree in exponent and 7 bits of mantissa stand at the same place.
    """
    share = total / total.sum()
    size = torch.frexp(share.float())
    size = size.exponent * 128 + (size.mantissa * 256).floor() - 128
    reached = (share[None] * (size[None] <= size[:, None])).sum(1)
    return (reached * GROUPS * (1 - 1e-9)).long()


def slow_twin(case: Problem, eps, sizes, *, first=0, last=None, **terms):
    """Gradients of input, head and bias with the filter's tail written out, chunk by chunk, for the words of a shard.

    The logit gradients themselves are autograd's. `sizes` are the chunks of counted tokens.
    """
    last = last or len(case.head)
    smoothing, softcap = terms.get("label_smoothing", 0.0), terms.get("softcap")
    counted = case.target != -100
    x, target = case.hidden.detach()[counted], case.target[counted]
    head, vocab = case.head.detach(), len(case.head)
    classes = terms.get("weight", torch.ones(vocab, dtype=head.dtype))
    tokens = terms.get("token_weight", torch.ones(len(case.target), dtype=head.dtype))[counted]
    bias = torch.zeros(vocab, dtype=head.dtype) if case.bias is None else case.bias.detach()
    products = (x @ head.t() + bias).requires_grad_()
    z = products * terms.get("logit_scale", 1.0)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    lse = z.logsumexp(-1)
    loss = (1 - smoothing) * classes[target] * (lse - z.gather(1, target[:, None])[:, 0])
    loss = loss + smoothing / vocab * (classes * (lse[:, None] - z)).sum(-1) + terms.get("z_loss", 0.0) * lse**2
    (dense,) = torch.autograd.grad((tokens * loss).sum(), products, retain_graph=True)
    # The share of the softmax in it, and that of the smoothing, which is of rank one without a softcap.
    (through_lse,) = torch.autograd.grad(lse.sum(), products)
    slope = tokens * ((1 - smoothing) * classes[target] + smoothing / vocab * classes.sum())
    slope = (slope + tokens * 2 * terms.get("z_loss", 0.0) * lse).detach()
    soft = slope[:, None] * through_lse
    smooth = -smoothing / vocab * terms.get("logit_scale", 1.0) * tokens[:, None] * classes[None]

    approximate, kept_share = dense.clone(), []
    for rows in torch.arange(len(x)).split(sizes):
        largest = soft[rows].abs().amax(0)
        kept = largest > eps * slope[rows].abs().amax() * terms.get("logit_scale", 1.0)
        kept[target[rows]] = True
        here = (torch.arange(vocab) >= first) & (torch.arange(vocab) < last)
        kept_share.append((kept & here).sum() / here.sum())
        dropped = (~kept & here).nonzero()[:, 0]
        total = soft[rows][:, dropped].abs().sum(0)
        group = quarters(total)
        for g in range(GROUPS):
            words = dropped[group == g]
            if len(words):
                mass, share = soft[rows][:, words].sum(1), total[group == g] / total[group == g].sum()
                approximate[rows[:, None], words] = mass[:, None] * share + smooth[rows][:, words]
    approximate = approximate[:, first:last]
    hidden = torch.zeros_like(case.hidden)
    hidden[counted] = approximate @ head[first:last]
    return (hidden, approximate.t() @ x, approximate.sum(0)), max(kept_share)


TERMS = {
    "plain": {},
    "z_loss, scale": {"z_loss": 1e-2, "logit_scale": 1.2},
    "softcap": {"softcap": 8.0},
    "label_smoothing": {"label_smoothing": 0.2},
    "weights": {"weight": torch.linspace(0.2, 2, 700).double(), "label_smoothing": 0.1},
    "token_weight": {"token_weight": torch.linspace(-1, 2, 96).double(), "z_loss": 1e-3},
}


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("chunk", [96, 17])
def test_filtered_gradients_are_those_of_the_slow_twin(terms, way, chunk):
    case = zipf_problem(bias=True)
    counted = int((case.target != -100).sum())
    options = ChunkOptions(chunk_size=chunk, gradients=way, gradient_filter=EPS)
    got = gradients(case.loss(reduction="sum", options=options, **terms), case)
    exact = gradients(case.loss(reduction="sum", **terms), case)
    expected, kept = slow_twin(case, EPS, min(chunk, counted), **terms)
    assert 0.02 < kept < 0.4, "the case filters nothing, or falls back to dense products"
    for g, e in zip(got, expected, strict=True):
        assert (g - e).abs().max() <= 1e-12 * e.abs().max()
    for g, e in zip(got[:2], exact[:2], strict=True):
        assert (g - e).abs().max() > 1e-7 * e.abs().max(), "nothing was filtered"
    if "token_weight" in terms:  # of both signs
        return
    # The tail has the columns' sums, and they are the bias's gradient.
    assert (got[2] - exact[2]).abs().max() <= 1e-12 * exact[2].abs().max()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_gradients_weigh_the_tail(reduction):
    case = zipf_problem()
    options = ChunkOptions(gradient_filter=EPS)
    if reduction == "none":
        upstream = torch.linspace(-1, 2, 96).double()
        got = gradients(case.loss(reduction="none", options=options), case, upstream)
        expected, _ = slow_twin(case, EPS, 96, token_weight=upstream)
    else:
        got = gradients(case.loss(options=options), case, torch.tensor(-3.0, dtype=torch.float64))
        count = int((case.target != -100).sum())
        expected = [-3 / count * part for part in slow_twin(case, EPS, 96)[0]]
    for g, e in zip(got, expected, strict=False):
        assert (g - e).abs().max() <= 1e-12 * e.abs().max()


def test_every_row_sums_to_zero_and_every_word_gets_a_gradient():
    case = zipf_problem(bias=True)
    loss = case.loss(reduction="none", options=ChunkOptions(gradient_filter=EPS, chunk_size=32))
    for token in torch.linspace(0, 95, 7).long():
        _, _, bias = gradients(loss, case, torch.eye(96, dtype=torch.float64)[token], retain_graph=True)
        assert bias.sum().abs() <= 1e-14
    _, _, bias = gradients(loss.sum(), case)
    assert (bias != 0).all()


@pytest.mark.parametrize("eps", [0.0, 1e-4, 0.01])
def test_an_untrained_head_gets_dense_products(eps):
    """Its probabilities are about 1 / 700: all of them are kept, or all would be dropped."""
    case = zipf_problem(bias=True).fresh(head=torch.randn(700, 24, dtype=torch.float64).mul_(0.01).requires_grad_())
    got = gradients(case.loss(options=ChunkOptions(gradient_filter=eps, chunk_size=40)), case)
    exact = gradients(case.loss(options=ChunkOptions(chunk_size=40)), case)
    for g, e in zip(got, exact, strict=True):
        assert (g - e).abs().max() <= 1e-14 * e.abs().max()


@pytest.mark.parametrize(
    "n, d, vocab, ignored",
    [(1, 8, 300, 0.0), (0, 8, 300, 0.0), (5, 8, 300, 1.0), (7, 1, 1, 0.0), (3, 4, 2, 0.0), (33, 700, 401, 0.5)],
)
def test_edges(n, d, vocab, ignored):
    case = zipf_problem(n, max(d, 2), vocab, ignored=ignored, bias=True)
    for way in ("forward", "backward"):
        options = ChunkOptions(chunk_size=8, gradients=way, gradient_filter=1e-9)
        got = gradients(case.loss(reduction="sum", options=options), case)
        exact = gradients(case.loss(reduction="sum"), case)
        for g, e in zip(got, exact, strict=True):
            assert torch.isfinite(g).all()
            assert g.numel() == 0 or (g - e).abs().max() <= 1e-6 * max(1.0, e.abs().max())


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_frozen_tensors_get_nothing(frozen, way):
    case = zipf_problem()
    getattr(case, frozen).requires_grad_(False)
    (got,) = gradients(case.loss(options=ChunkOptions(gradients=way, gradient_filter=EPS)), case)
    trained = zipf_problem()
    both = gradients(trained.loss(options=ChunkOptions(gradients=way, gradient_filter=EPS)), trained)
    torch.testing.assert_close(got, both[1 if frozen == "hidden" else 0], rtol=1e-13, atol=0)


@pytest.mark.parametrize("confident", [False, True], ids=["dense", "filtered"])
def test_fp16_class_weights_of_all_sizes(confident):
    """Their mean is of one size whatever theirs is, and so is what label smoothing adds to all columns."""
    case = zipf_problem(dtype=torch.float16) if confident else problem(40, 24, 300, dtype=torch.float16)
    vocab = len(case.head)
    options = ChunkOptions(chunk_size=16, gradients="forward", gradient_filter=EPS)

    def found(size):
        weight = size * torch.linspace(0.2, 2, vocab)
        return gradients(case.loss(weight=weight, label_smoothing=0.1, options=options), case)

    for got, expected in zip(found(2.0**-30), found(1.0), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_auto_stays_below_the_rounding_of_the_dtype(dtype, smoothing):
    case = zipf_problem(256, 48, 16384, dtype=dtype)
    wide = case.fresh(
        hidden=case.hidden.detach().double().requires_grad_(), head=case.head.detach().double().requires_grad_()
    )
    expected = [part.numpy() for part in gradients(wide.loss(label_smoothing=smoothing), wide)]
    logits = torch.nn.functional.linear(case.hidden, case.head)
    plain = torch.nn.functional.cross_entropy(logits.float(), case.target, label_smoothing=smoothing)
    options = ChunkOptions(gradient_filter="auto", chunk_size=256)
    got = gradients(case.loss(options=options, label_smoothing=smoothing), case)
    eps = options.filter_threshold(dtype)
    options = ChunkOptions(gradient_filter=eps, chunk_size=256)
    filtered = gradients(wide.loss(options=options, label_smoothing=smoothing), wide)
    for g, p, f, e in zip(got, gradients(plain, case), filtered, expected, strict=True):
        ours, theirs, filters = (errors(part, e)[0] for part in (g, p, f))
        assert ours <= 1.5 * theirs
        assert 1e-12 * abs(e).max() < filters <= theirs


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_what_is_not_finite_is_so_in_the_gradients(way, bad):
    case = zipf_problem(dtype=torch.float32)
    hidden = case.hidden.detach().clone()
    hidden[(case.target != -100).nonzero()[3]] = bad
    case = case.fresh(hidden=hidden.requires_grad_())
    got = gradients(case.loss(options=ChunkOptions(gradients=way, gradient_filter=EPS)), case)
    assert not got[1].isfinite().any()


def test_tokens_that_are_mostly_tail_make_the_products_dense():
    """Most tokens are sure of their word, a few spread over thousands: the sum over the chunk shows little of them."""
    g = torch.Generator().manual_seed(0)
    words = torch.randn(6000, 16, generator=g, dtype=torch.float64)
    head = torch.cat([30 * torch.eye(16, dtype=torch.float64), words * 0.01])
    hidden = torch.eye(16, dtype=torch.float64).repeat(16, 1)
    hidden[:4] = 0.01
    case = Problem(hidden.requires_grad_(), head.requires_grad_(), torch.arange(16).repeat(16))
    got, exact = (gradients(case.loss(options=o), case) for o in (ChunkOptions(gradient_filter=2.0**-11), None))
    for a, b in zip(got, exact, strict=True):
        assert (a - b).abs().max() <= 1e-14 * b.abs().max()


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_an_untrained_head_is_dense_on_every_shard(ranks):
    case = problem(32, 8, 640, dtype=torch.float64, spread=0.3)
    exact = gradients(case.loss(), case)

    def worker(rank, _):
        rows = slice(rank * 640 // ranks, (rank + 1) * 640 // ranks)
        hidden = case.hidden.detach().clone().requires_grad_()
        head = case.head.detach()[rows].clone().requires_grad_()
        vocab = VocabShard(torch.distributed.group.WORLD, rows.start, rows.stop, 640)
        loss = linear_cross_entropy(hidden, head, case.target, vocab=vocab, options=ChunkOptions(gradient_filter=0.5))
        return torch.autograd.grad(loss, (hidden, head))

    found = run_threads(worker, ranks)
    for g, e in zip((found[0][0], torch.cat([part[1] for part in found])), exact, strict=True):
        assert (g - e).abs().max() <= 1e-13 * e.abs().max()


def test_a_frozen_head_pays_for_no_tail(monkeypatch):
    case = zipf_problem()
    case.head.requires_grad_(False)
    kept = []
    make = Filter.add_head_gradients
    monkeypatch.setattr(Filter, "add_head_gradients", lambda self, *a: (make(self, *a), kept.append(self._rights))[0])
    gradients(case.loss(options=ChunkOptions(gradient_filter=EPS, chunk_size=8)), case)
    assert kept
    assert not any(kept)


def test_a_narrow_gradient_that_exists_is_added_to_once():
    """64 chunks of a bf16 head: added one by one, each would be rounded."""
    case = zipf_problem(512, 16, 2000, dtype=torch.bfloat16, ignored=0.0)
    wide = case.fresh(
        hidden=case.hidden.detach().double().requires_grad_(), head=case.head.detach().double().requires_grad_()
    )
    expected = gradients(wide.loss(), wide)[1].numpy()
    usual = gradients(case.loss(options=ChunkOptions(chunk_size=8, gradient_filter=1e-4)), case)[1]
    case.head.grad = torch.zeros_like(case.head)
    case.loss(options=ChunkOptions(chunk_size=8, gradient_filter=1e-4, accumulate_into="grad")).backward()
    assert errors(case.head.grad, expected)[0] <= 1.05 * errors(usual, expected)[0]


def test_the_tail_is_what_makes_it_accurate():
    case = zipf_problem(512, 64, 4000)
    exact, _ = gradients(case.loss(reduction="sum"), case)
    got, _ = gradients(case.loss(reduction="sum", options=ChunkOptions(gradient_filter=1e-4, chunk_size=512)), case)
    counted, head = case.target != -100, case.head.detach()
    probabilities = torch.softmax(case.hidden.detach()[counted] @ head.t(), -1)
    rare = probabilities.amax(0) <= 1e-4
    rare[case.target[counted]] = False
    assert rare.double().mean() > 0.6
    without = exact.clone()
    without[counted] -= probabilities[:, rare] @ head[rare]
    assert (got - exact).norm() < 0.1 * (without - exact).norm()


def test_the_products_are_narrower():
    case = zipf_problem(256, 64, 6000, dtype=torch.float32, ignored=0.0)
    for way, products in (("forward", 3), ("backward", 4)):
        exact = work(train(case, options=ChunkOptions(chunk_size=128, gradients=way)))
        found = work(train(case, options=ChunkOptions(chunk_size=128, gradients=way, gradient_filter=1e-4)))
        assert exact.multiplications == products * 256 * 64 * 6000
        assert found.multiplications < ((products - 2) + 2 * 0.4) * 256 * 64 * 6000


def test_entropy_and_softcapped_smoothing_are_exact():
    case = zipf_problem()
    options = ChunkOptions(gradient_filter=EPS)
    terms = {"softcap": 8.0, "label_smoothing": 0.1}
    for got, exact in zip(
        gradients(case.loss(options=options, **terms), case), gradients(case.loss(**terms), case), strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=1e-13, atol=1e-18)
    for got, exact in zip(
        *(
            gradients(sum(part.sum() for part in case.logprobs(return_entropy=True, options=o)), case)
            for o in (options, None)
        ),
        strict=True,
    ):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-15)
    got = gradients(case.logprobs(options=options).sum(), case)
    expected, _ = slow_twin(case, EPS, 96)
    assert (got[0] + expected[0]).abs().max() <= 1e-12 * expected[0].abs().max()


SHARDS = [0, 150, 150, 640, 700]  # one of them empty


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("input_grad", ["complete", "partial", "sequence"])
def test_each_shard_has_a_tail_of_its_own(way, input_grad):
    whole = zipf_problem(bias=True)
    chunk = 40

    def worker(rank, ranks):
        start, stop = SHARDS[rank : rank + 2]
        own = slice(rank * 24, (rank + 1) * 24) if input_grad == "sequence" else slice(None)
        hidden = whole.hidden.detach()[own].clone().requires_grad_()
        head = whole.head.detach()[start:stop].clone().requires_grad_()
        bias = whole.bias.detach()[start:stop].clone().requires_grad_()
        vocab = VocabShard(torch.distributed.group.WORLD, start, stop, 700, input_grad=input_grad)
        options = ChunkOptions(chunk_size=chunk, gradients=way, gradient_filter=EPS)
        loss = linear_cross_entropy(
            hidden, head, whole.target, linear_bias=bias, vocab=vocab, options=options, reduction="sum"
        )
        return [part.clone() for part in torch.autograd.grad(loss, (hidden, head, bias))]

    found = run_threads(worker, 4)
    exact = gradients(whole.loss(reduction="sum"), whole)
    hidden = [part[0] for part in found]
    hidden = torch.cat(hidden) if input_grad == "sequence" else sum(hidden) if input_grad == "partial" else hidden[0]
    head, bias = (torch.cat([part[i] for part in found]) for i in (1, 2))
    if input_grad == "sequence":  # its chunks are of other tokens
        for g, e in zip((hidden, head), exact[:2], strict=True):
            assert 1e-7 < (g - e).norm() / e.norm() < 0.02
        return
    counted = int((whole.target != -100).sum())
    parts = [
        slow_twin(whole, EPS, min(chunk, counted), first=start, last=stop)[0]
        for start, stop in itertools.pairwise(SHARDS)
        if stop > start
    ]
    expected = (sum(p[0] for p in parts), torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts]))
    for g, e in zip((hidden, head, bias), expected, strict=True):
        assert (g - e).abs().max() <= 1e-12 * e.abs().max()


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("n, vocab", [(1, 1), (5, 33), (64, 700)])
def test_columns_a_few_rows_at_a_time_are_those_of_all_rows(n, vocab, negative):
    g = torch.Generator().manual_seed(n)
    slope = torch.rand(n, generator=g) - 0.5 * negative
    parts = slope.unsqueeze(1) * torch.rand(n, vocab, generator=g)
    found = ColumnSums(vocab, torch.float32, parts.device)
    for rows in range(0, n, 3):
        found.add(parts[rows : rows + 3], slope[rows : rows + 3])
    assert torch.equal(found.largest, parts.abs().amax(0))
    torch.testing.assert_close(found.total, parts.abs().sum(0))


def test_compiles_in_one_graph():
    case = zipf_problem(dtype=torch.float32)
    for way in ("forward", "backward"):
        options = ChunkOptions(gradient_filter=EPS, gradients=way)
        compiled = torch.compile(linear_cross_entropy, fullgraph=True)
        got = gradients(compiled(case.hidden, case.head, case.target, options=options), case)
        for a, b in zip(got, gradients(case.loss(options=options), case), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("value", [-0.1, 1, 1.0, True, "on", math.nan, 2**-14j])
def test_a_filter_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match="gradient_filter must be None, 'auto' or in"):
        ChunkOptions(gradient_filter=value)


def test_a_column_whose_sum_rounds_below_zero_has_a_group():
    """As under a softcap and a temperature, where the slope of a saturated logit may round to -2e-7."""
    group, right = groups_of(torch.tensor([-1e-6, 1.0, 2.0, 3.0]), torch.zeros(4, dtype=torch.bool))
    assert group.min() >= 0 and right.isfinite().all()
