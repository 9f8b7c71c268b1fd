"""`ChunkOptions(invariant=True)`: the bits of a token's statistics depend on its hidden state and the head only."""

import random
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_ce import (
    ChunkOptions,
    LMHead,
    Teacher,
    VocabShard,
    cross_entropy,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_loss,
    linear_statistics,
)
from chunked_ce.engine import invariant
from chunked_ce.objectives import PolicyGradient
from chunked_ce.plan import INVARIANT_ENTRIES, INVARIANT_TOKENS, Settings, predict_memory
from tests.cases import gradients, problem
from tests.distributed.threads import run_threads
from tests.precision import assert_gradients_no_worse, assert_no_worse, plain_and_expected
from tests.test_work import train, work

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
INVARIANT = ChunkOptions(invariant=True)
WIDE = replace(INVARIANT, logits_dtype=torch.float32)
OUTPUTS = ("logprob", "entropy", "lse", "log_sum_sq_probs", "mean_logit", "predicted", "is_top1")
TOKENS = 2 * INVARIANT_TOKENS + 40
# D and V, even and odd, below and beyond a vector and a block of the vocabulary.
SHAPES = [(1, 2), (7, 3), (16, 48), (65, 7), (31, 1009), (257, 1000), (96, 4096), (33, INVARIANT_ENTRIES + 907)]


@pytest.fixture(params=[1, 2], ids=lambda number: f"{number} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Pool:
    """Tokens of which batches are made."""

    hidden: Tensor  # (N, D)
    head: Tensor  # (V, D)
    bias: Tensor  # (V,)
    target: Tensor  # (N,)
    ids: Tensor  # (N, 3)
    temperature: Tensor  # (N,)

    @classmethod
    def of(cls, d, vocab, dtype, seed=0):
        case = problem(TOKENS, d, vocab, dtype=dtype, bias=True, ignored=0.0, spread=3.0, seed=seed)
        g = torch.Generator().manual_seed(seed)
        ids, temperature = torch.randint(vocab, (TOKENS, 3), generator=g), 0.5 + torch.rand(TOKENS, generator=g)
        return cls(case.hidden.detach(), case.head.detach(), case.bias.detach(), case.target, ids, temperature)

    def batch(self, generator):
        """Some tokens in random order, with others among them, ignored or not; and the places of the former."""
        size = generator.choice([1, 2, 17, INVARIANT_TOKENS, INVARIANT_TOKENS + 1, TOKENS])
        tokens = torch.tensor(generator.sample(range(TOKENS), size))
        kept = torch.tensor([generator.random() < 0.6 for _ in range(size)])
        kept[generator.randrange(size)] = True
        hidden, target, ids = self.hidden[tokens], self.target[tokens], self.ids[tokens]
        others = torch.randn(size, self.hidden.shape[1]) * 10.0 ** generator.randrange(-3, 3)
        hidden = hidden.where(kept.unsqueeze(1), others.to(hidden.dtype))
        if generator.random() < 0.5:  # the others are ignored, whatever they hold
            target, ids = target.where(kept, -100), ids.where(kept.unsqueeze(1), -100)
            hidden = hidden.where(kept.unsqueeze(1), torch.nan)
        batch = replace(self, hidden=hidden, target=target, ids=ids, temperature=self.temperature[tokens])
        return batch, tokens[kept], kept

    def statistics(self, options, *, with_ids=False, **keywords):
        target, outputs = (self.ids, OUTPUTS[:-1]) if with_ids else (self.target, OUTPUTS)
        arguments = self.hidden, self.head, target
        found = linear_statistics(*arguments, outputs=outputs, linear_bias=self.bias, options=options, **keywords)
        return [part for part in found if part is not None]

    def losses(self, options, **keywords):
        terms = {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": "none"} | keywords
        return linear_cross_entropy(*self.arguments, linear_bias=self.bias, options=options, **terms)

    @property
    def arguments(self):
        return self.hidden, self.head, self.target


def assert_invariant(pool, found_of, rounds=12, seed=0):
    """``found_of(pool)``, a list of tensors (N, ...), has the same bits for each token in any batch."""
    generator = random.Random(seed)
    whole = found_of(pool)
    assert all(part.isfinite().all() for part in whole)
    for _ in range(rounds):
        batch, tokens, places = pool.batch(generator)
        for part, of_batch in zip(whole, found_of(batch), strict=True):
            assert torch.equal(of_batch[places], part[tokens]), f"{len(places)} tokens"


# --- the bits ---


@pytest.mark.parametrize(("d", "vocab"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(d, vocab, dtype, threads):
    pool = Pool.of(d, vocab, dtype)
    assert_invariant(pool, lambda pool: pool.statistics(INVARIANT))
    assert_invariant(pool, lambda pool: pool.statistics(INVARIANT, with_ids=True), rounds=4)


@pytest.mark.parametrize("dtype", DTYPES[1::2], ids=str)
def test_fp32_logits(dtype, threads):
    for d, vocab in SHAPES[3:]:
        assert_invariant(Pool.of(d, vocab, dtype), lambda pool: pool.statistics(WIDE), rounds=6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap_scale_and_temperature(dtype, threads):
    for (d, vocab), seed in zip(SHAPES, range(len(SHAPES)), strict=True):
        pool = Pool.of(d, vocab, dtype, seed)
        terms = {"softcap": 5.0, "logit_scale": 0.7}
        assert_invariant(pool, lambda pool, t=terms: pool.statistics(INVARIANT, temperature=1.3, **t), rounds=4)
        assert_invariant(
            pool, lambda pool, t=terms: pool.statistics(INVARIANT, temperature=pool.temperature, **t), rounds=4
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses(dtype, threads):
    """Those of `reduction="none"`, with class weights, and an objective of a likelihood ratio."""
    for d, vocab in SHAPES[1:]:
        pool, weight = Pool.of(d, vocab, dtype), torch.linspace(0.5, 2.0, vocab)
        assert_invariant(pool, lambda pool, w=weight: [pool.losses(INVARIANT, weight=w)], rounds=6)

        def ratios(pool):
            per_token = {"advantage": pool.temperature, "old_logprob": -5 * pool.temperature}
            keywords = {"reduction": "none", "options": INVARIANT} | per_token
            return [linear_loss(PolicyGradient(entropy=0.1), *pool.arguments, **keywords)]

        assert_invariant(pool, ratios, rounds=6)


def test_adapters_and_depths(threads):
    for dtype in DTYPES[:3]:
        pool, low_rank = Pool.of(33, 1009, dtype), Pool.of(5, 1009, dtype, seed=1)
        low = {row.tobytes(): low_rank.hidden[at] for at, row in enumerate(pool.hidden.double().numpy())}

        def adapter(hidden, head=low_rank.head, low=low):
            rows = hidden.double().numpy()
            return torch.stack([low.get(row.tobytes(), torch.ones(5, dtype=hidden.dtype)) for row in rows]), head

        def found(pool, adapter=adapter):
            hidden, head, target = pool.arguments
            return [linear_logprobs(hidden, head, target, linear_adapter=adapter(hidden), options=INVARIANT)]

        assert_invariant(pool, found, rounds=6)
        hidden, head, target = pool.arguments
        (whole,) = pool.statistics(INVARIANT)[:1]
        depths = [hidden[:70], hidden[70:]], head, [target[:70], target[70:]]
        parts = linear_logprobs(*depths, linear_bias=pool.bias, options=INVARIANT)
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_layouts(dtype, threads):
    """Neither the alignment nor the layout of hidden states and head matters, nor their shape."""
    for d, vocab in SHAPES[2:]:
        pool = Pool.of(d, vocab, dtype)
        whole = pool.statistics(INVARIANT)
        for at in (1, 3):
            memory = torch.empty(pool.head.numel() + at, dtype=dtype)[at:].view(vocab, d)
            moved = replace(pool, head=memory.copy_(pool.head), hidden=pool.hidden.t().contiguous().t())
            moved = replace(moved, bias=torch.empty(vocab + at, dtype=dtype)[at:].copy_(pool.bias))
            for one, other in zip(whole, moved.statistics(INVARIANT), strict=True):
                assert torch.equal(one, other)
        turned = replace(pool, head=pool.head.t().contiguous().t())
        assert all(map(torch.equal, whole, turned.statistics(INVARIANT)))
        one_token = linear_logprobs(pool.hidden[5], pool.head, pool.target[5], linear_bias=pool.bias, options=INVARIANT)
        assert torch.equal(one_token, whole[0][5])


def test_what_else_is_asked_for_makes_no_difference(threads):
    pool = Pool.of(31, 1009, torch.float32)
    whole = pool.statistics(INVARIANT)
    assert torch.equal(linear_logprobs(*pool.arguments, linear_bias=pool.bias, options=INVARIANT), whole[0])
    logprobs, entropy = linear_logprobs(
        *pool.arguments, linear_bias=pool.bias, options=replace(INVARIANT, chunk_size=3), return_entropy=True
    )
    assert torch.equal(logprobs, whole[0]) and torch.equal(entropy, whole[1])
    losses = pool.losses(replace(INVARIANT, memory_budget=4096), label_smoothing=0.0, z_loss=0.0)
    assert torch.equal(losses, -whole[0])
    leaf = pool.hidden.clone().requires_grad_()
    found = linear_logprobs(leaf, *pool.arguments[1:], linear_bias=pool.bias, options=INVARIANT)
    assert torch.equal(found, whole[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_a_head_in_another_dtype(dtype, threads):
    pool = Pool.of(33, 1009, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_invariant(pool, lambda pool: pool.statistics(INVARIANT), rounds=6)
    narrow = replace(pool, hidden=pool.hidden.to(dtype))
    assert_invariant(narrow, lambda pool: pool.statistics(INVARIANT), rounds=6)


def test_the_check_sees_what_depends_on_the_place(monkeypatch):
    """A last bit that depends on the row of a product does not pass."""
    product = invariant.project

    def uneven(*arguments):
        out = product(*arguments)
        out[1::2] = out[1::2].nextafter(torch.tensor(torch.inf))
        return out

    monkeypatch.setattr(invariant, "project", uneven)
    with pytest.raises(AssertionError):
        assert_invariant(Pool.of(31, 1009, torch.float32), lambda pool: pool.statistics(INVARIANT))


# --- values and gradients ---


@pytest.mark.parametrize("spread", [2.0, 30.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_plain(dtype, reduction, spread):
    case = problem(200, 65, 501, dtype=dtype, bias=True, spread=spread)
    (plain, of_plain), (expected, of_expected) = plain_and_expected(case, reduction=reduction)
    value = case.loss(reduction=reduction, options=replace(INVARIANT, chunk_size=33))
    if reduction == "none":
        assert_no_worse(value, plain, expected)
    found = gradients(value, case, torch.ones_like(value))
    assert_gradients_no_worse(found, of_plain, of_expected, "backward", dtype)


def test_statistics_and_gradients_of_stats():
    case = problem(200, 33, 501)
    value, stats = case.loss(options=INVARIANT, return_stats=True)
    same, expected = case.loss(options=ChunkOptions(gradients="backward"), return_stats=True)
    torch.testing.assert_close(value, same)
    torch.testing.assert_close(stats, expected)


def test_masked_entries_and_no_tokens():
    case = problem(9, 5, 20, bias=True, ignored=0.0)
    with torch.no_grad():
        case.bias[3:] = -torch.inf
    case.target.clamp_(max=2)
    found = case.logprobs(options=INVARIANT)
    torch.testing.assert_close(found, case.logprobs())
    case.target[:] = -100
    value = case.loss(options=INVARIANT)
    assert value == 0 and all(grad.count_nonzero() == 0 for grad in gradients(value, case))


def test_a_compiled_loss_and_lazy_logits():
    case = problem(24, 33, 101)
    expected = case.loss(options=INVARIANT, reduction="none")
    step = torch.compile(lambda: case.loss(options=INVARIANT, reduction="none"), fullgraph=True, backend="aot_eager")
    assert torch.equal(step(), expected)
    head = LMHead(33, 101, bias=False, options=INVARIANT)
    head.weight = torch.nn.Parameter(case.head.detach().clone())
    assert torch.equal(F.cross_entropy(head(case.hidden), case.target, reduction="none"), expected)


# --- memory ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [INVARIANT, WIDE], ids=["", "wide"])
def test_the_memory_law(dtype, options):
    """The forward's logits are those of one group and one block."""
    case, options = problem(400, 40, 20001, dtype=dtype, ignored=0.0), replace(options, memory_budget=2**22)
    law = predict_memory(400, 20001, 40, dtype=dtype, options=options)
    itemsize = Settings.of(options, dtype, "cpu").logits_dtype.itemsize
    assert law.forward["logits"] == INVARIANT_TOKENS * INVARIANT_ENTRIES * itemsize
    with torch.no_grad():
        cost = work(lambda: case.loss(options=options))
    assert cost.largest <= law.forward["logits"] + law.forward["rows"]
    assert 0.9 <= cost.peak / (sum(law.forward.values()) - law.forward["packed"]) <= 1.1
    backward = sum(law.backward.values()) - law.backward["packed"]
    assert 0.9 <= work(train(case, options=options)).peak / backward <= 1.1


# --- errors ---


@pytest.mark.parametrize(
    ("keywords", "error", "said"),
    [
        ({"invariant": 1}, TypeError, "invariant must be True or False, was 1"),
        ({"invariant": "yes"}, TypeError, "invariant must be True or False, was 'yes'"),
        ({"invariant": True, "gradients": "forward"}, ValueError, "needs gradients 'backward' or 'auto'"),
        ({"invariant": True, "backend": "triton"}, ValueError, "needs backend 'auto' or 'torch'"),
    ],
)
def test_options(keywords, error, said):
    with pytest.raises(error, match=said):
        ChunkOptions(**keywords)


def refused(what):
    return pytest.raises(ValueError, match=rf"options\.invariant=True is proven for .* was given with {what}")


def test_refusals():
    case, teacher = problem(6, 5, 9, ignored=0.0), Teacher(hidden=torch.randn(6, 5), weight=torch.randn(9, 5))
    arguments = case.hidden, case.head, case.target
    with refused("logits that exist"):
        cross_entropy(torch.randn(6, 9), case.target, options=INVARIANT)
    with refused("a teacher"):
        linear_divergence(case.hidden, case.head, teacher, options=INVARIANT)
    with refused("a support"):
        linear_statistics(*arguments, support=case.target[:, None], options=INVARIANT)
    with refused("a transform of torch.func"):
        torch.func.grad(lambda hidden: linear_cross_entropy(hidden, *arguments[1:], options=INVARIANT))(
            case.hidden.detach()
        )
    with refused("target on meta"):
        linear_cross_entropy(*(part.to("meta") for part in arguments), options=INVARIANT)


def one_of_two(rank, size):
    vocab = VocabShard(torch.distributed.group.WORLD, 4 * rank, 4 * rank + 4, 8)
    with refused("vocab, a shard of the vocabulary"):
        linear_logprobs(torch.randn(3, 5), torch.randn(4, 5), torch.tensor([0, 1, 2]), vocab=vocab, options=INVARIANT)


def test_shards_are_refused():
    run_threads(one_of_two, 2)
