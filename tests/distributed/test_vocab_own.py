"""`VocabShard(tokens="own")` against one process with the whole head, for every function; ranks are threads."""

import collections
import functools
import itertools

import pytest
import torch
import torch.distributed as dist

from chunked_ce import (
    Teacher,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_loss,
    linear_statistics,
)
from chunked_ce.engine import in_step
from chunked_ce.objectives import PolicyGradient, TopKDivergence
from chunked_ce.parallel.collectives import Collectives
from tests.cases import WAYS, chunks
from tests.distributed.own_tokens import RANKS, Case, alone, results_of, shard_of
from tests.distributed.threads import run_threads

CHUNK = 5
LOW = (torch.float16, torch.bfloat16)


def keywords_of(x, *names):
    return {name: x.more[name] for name in names}


def loss(x, vocab, way="forward", reduction="mean", options=(), **keywords):
    options = chunks(CHUNK, way, **dict(options))
    arguments = {"linear_bias": x.bias, "reduction": reduction, "options": options, "vocab": vocab}
    return [linear_cross_entropy(x.hidden, x.weight, x.target, **arguments, **keywords)]


def weighted_loss(x, vocab, **keywords):
    keywords |= keywords_of(x, "token_weight", "temperature") | {"softcap": 3.0, "z_loss": 0.1}
    return loss(x, vocab, label_smoothing=0.2, weight=torch.linspace(0.5, 1.5, 19), **keywords)


def loss_with_stats(x, vocab):
    (value, stats) = loss(x, vocab, return_stats=True)[0]
    return [value, *[part for name, part in stats._asdict().items() if name != "lse_max" or x.target.numel()]]


def adapted(x, vocab, way, depths=1):
    """An adapter; with several depths, tokens of different numbers on each rank in each."""
    if depths == 1:
        return loss(x, vocab, way, linear_adapter=(x.adapter_hidden, x.adapter_weight))
    parts = [list(part.tensor_split((2, 2, 6))) for part in (x.hidden, x.adapter_hidden, x.target)]
    keywords = {"linear_adapter": (parts[1], x.adapter_weight), "options": chunks(CHUNK, way), "vocab": vocab}
    return [linear_cross_entropy(parts[0], x.weight, parts[2], reduction="sum", **keywords)]


def depths_of_logprobs(x, vocab):
    hidden, target = (part.tensor_split((4, 4)) for part in (x.hidden, x.target))
    return linear_logprobs(list(hidden), x.weight, list(target), options=chunks(CHUNK), vocab=vocab)


def logprobs(x, vocab):
    return linear_logprobs(x.hidden, x.weight, x.target, options=chunks(CHUNK), return_entropy=True, vocab=vocab)


def statistics(x, vocab, target=None, **keywords):
    keywords = {"options": chunks(CHUNK), "vocab": vocab} | keywords
    found = linear_statistics(x.hidden, x.weight, x.target if target is None else x.more[target], **keywords)
    return [values for values in found if values is not None]


def of_a_support(x, vocab, target=None):
    return statistics(x, vocab, target, support=x.more["full_ids"], outputs=("logprob", "entropy", "lse"))


ALL = ("logprob", "entropy", "lse", "log_sum_sq_probs", "mean_logit", "predicted", "is_top1")


def policy(x, vocab, way, **keywords):
    tensors = keywords_of(x, "advantage", "old_logprob", "ref_logprob")
    objective, options = PolicyGradient(kl=0.1, entropy=0.01), chunks(CHUNK, way)
    return [linear_loss(objective, x.hidden, x.weight, x.target, options=options, vocab=vocab, **tensors, **keywords)]


def top_k(x, vocab, way):
    keywords = {"teacher_ids": x.more["full_ids"], "teacher_logprobs": x.more["teacher_logprobs"], "vocab": vocab}
    return [linear_loss(TopKDivergence(), x.hidden, x.weight, x.target, options=chunks(CHUNK, way), **keywords)]


def taught(x, vocab, way, kind, beta, options=(), reduction="mean"):
    """Followed by the kinds of teacher: with words, one of a larger vocabulary."""
    words = {"words": x.more["words"]} if "words" in kind else {}
    size = "larger" if words else "teacher"
    if "head" in kind:
        teacher = Teacher(x.more["teacher_hidden"], x.more[f"{size}_weight"], softcap=4.0, **words)
        if "rows" in kind and vocab is not None:
            teacher = Teacher(teacher.hidden, teacher.weight[vocab.start : vocab.stop], softcap=4.0)
    elif "probabilities" in kind:
        teacher = Teacher(probabilities=x.more[f"{size}_logits"].softmax(-1), **words)
    else:
        logits = x.more[f"{size}_logits"]
        if "strided" in kind:  # tokens without a single stride
            logits = torch.stack([logits, 5 - logits], 1).view(-1, 2, logits.shape[-1])[:, 0]
        teacher = Teacher(logits=logits, **words)
    keywords = {"target": x.target, "beta": beta, "reduction": reduction, "temperature": x.more["temperature"]}
    keywords |= {"options": chunks(CHUNK, way, **dict(options)), "vocab": vocab}
    return [linear_divergence(x.hidden, x.weight, teacher, **keywords)]


def case(function, *, name="", sizes="uneven", dtype=torch.float64, differ=False, frozen=(), ignored=None, **keywords):
    said = [function.__name__, *map(str, keywords.values()), name, sizes, str(dtype)[6:], "differ" * differ, *frozen]
    ignored = {} if ignored is None else {"ignored": ignored}
    function = functools.partial(function, **keywords)
    return Case("-".join(part for part in said if part), function, sizes, dtype, differ, frozen, **ignored)


ALL_IGNORED, ONE_IGNORED = (1.0, 1.0, 1.0), (1.0, 0.3, 0.0)
MASK, FILTERED, WIDE = ({"ignored": "mask"}, {"gradient_filter": 1e-6}, {"logits_dtype": torch.float32})
BOTH = (False, True)
FROZEN = (("hidden",), ("weight", "bias"), ("hidden", "weight", "bias"), ("hidden", "weight"))
FROZEN_PAIRS = (("hidden",), ("adapter_hidden",), ("weight", "adapter_weight"))
KINDS = ("head", "logits", "probabilities")
MORE_KINDS = ("head words", "logits words", "probabilities words", "head rows", "logits strided")


def cases_of(way):
    """Those of a function whose gradients are computed in the forward or in the backward."""
    for differ, sizes in itertools.product(BOTH, ("uneven", "even")):
        yield case(loss, way=way, reduction="sum", differ=differ, sizes=sizes)
        yield case(loss, way=way, differ=differ, sizes=sizes)
    yield from (case(loss, way=way, sizes=sizes, differ=True) for sizes in ("nowhere", "one"))
    yield case(loss, way=way, ignored=ALL_IGNORED, name="ignored")
    yield case(loss, way=way, ignored=ONE_IGNORED, name="one-ignored")
    yield from (case(loss, way=way, frozen=frozen) for frozen in FROZEN)
    yield case(loss, way=way, options=WIDE, dtype=torch.bfloat16)
    for differ in BOTH:
        yield case(weighted_loss, way=way, differ=differ)
        yield from (case(loss, way=way, options=options, differ=differ) for options in (MASK, FILTERED))
        yield from (case(loss, way=way, dtype=dtype, differ=differ) for dtype in LOW)
        yield from (case(adapted, way=way, depths=depths, differ=differ) for depths in (1, 4))
        yield case(policy, way=way, differ=differ)
    yield from (case(adapted, way=way, depths=4, frozen=frozen) for frozen in FROZEN_PAIRS)
    yield case(top_k, way=way)
    yield from (case(taught, way=way, kind=kind, beta=0.4) for kind in KINDS)
    yield from (case(taught, way=way, kind="head" if way == "forward" else "logits", beta=beta) for beta in (0.0, 1.0))
    yield from (case(taught, way=way, kind=kind, beta=0.4, differ=True) for kind in MORE_KINDS)
    yield from (case(taught, way=way, kind=kind, beta=1.0, options=MASK) for kind in ("head", "logits"))


CASES = [
    *itertools.chain.from_iterable(map(cases_of, WAYS)),
    case(loss, way="auto", reduction="none"),
    case(weighted_loss, reduction="none", way="auto"),
    case(policy, way="auto", reduction="none"),
    *(case(loss_with_stats, sizes=sizes) for sizes in ("uneven", "nowhere")),
    *(case(depths_of_logprobs, sizes=sizes) for sizes in ("uneven", "nowhere")),
    *(case(logprobs, sizes=sizes) for sizes in ("uneven", "even", "nowhere")),
    case(statistics, outputs=ALL),
    case(statistics, target="ids", outputs=ALL[:-1]),
    case(of_a_support, target="ids"),
    *(case(of_a_support, sizes=sizes) for sizes in ("uneven", "nowhere")),
    *(
        case(taught, way="auto", kind=kind, beta=0.4, reduction="none", sizes=sizes)
        for kind in ("head", "logits")
        for sizes in ("even", "nowhere")
    ),
    *(case(taught, way="forward", kind=kind, beta=0.0, dtype=torch.bfloat16) for kind in ("head", "logits")),
]
TOLERANCE = {torch.float64: 1e-12, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module")
def found():
    """What each rank got, by case, and the collectives that it started and those that `in_step` says."""
    started, said = (collections.defaultdict(list) for _ in range(2))
    start, exchange, together = Collectives._start, Collectives.all_to_all, in_step._together

    def starting(self, what, collective, *tensors, result):
        started[dist.get_rank()].append((what, tuple(tensors[-1].shape), tensors[-1].dtype, ()))
        return start(self, what, collective, *tensors, result=result)

    def exchanging(self, part, what, *sizes):
        started[dist.get_rank()].append((what, tuple(part.shape), part.dtype, sizes))
        return exchange(self, part, what, *sizes)

    def listing(steps, *arguments, **keywords):
        said[dist.get_rank()] += [(step.what, tuple(step.shape), step.dtype, tuple(step.sizes)) for step in steps()]
        return together(steps, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Collectives, "_start", starting)
        patch.setattr(Collectives, "all_to_all", exchanging)
        patch.setattr(in_step, "_together", listing)
        results = run_threads(lambda rank, _: {one.name: results_of(one, rank, shard_of(rank)) for one in CASES}, RANKS)
    return results, started, said


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_one_process_with_the_whole_head(found, case):
    for rank, expected in enumerate(alone(case)):
        of_rank = found[0][rank][case.name]
        assert of_rank.keys() == expected.keys()
        for name, value in expected.items():
            size = max(1e-3, value[value.isfinite()].abs().max().item()) if value.isfinite().any() else 1.0
            tolerance = {"rtol": 0, "atol": TOLERANCE[case.dtype] * size}
            torch.testing.assert_close(of_rank[name], value, **tolerance, msg=lambda said, name=name: f"{name}: {said}")


def test_steps_are_the_collectives_of_a_call(found):
    """Those that a rank goes through once it has failed are those that the others issue, in their order."""
    _, started, said = found
    for rank in range(RANKS):
        assert len(started[rank]) > 5 * len(CASES)
        assert started[rank] == said[rank]
