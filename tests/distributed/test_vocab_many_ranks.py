"""64 ranks in one process: the value, and the collectives against the formula of docs/distributed.md."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch

from chunked_ce import ChunkOptions, VocabShard, cross_entropy, linear_cross_entropy, linear_logprobs
from chunked_ce.cli.counted_collectives import GATHER, REDUCE, SCATTER, Collective, counted
from tests.cases import array, assert_close, chunks, gradients, problem, random_like
from tests.distributed.threads import run_threads

RANKS = 64
VOCAB, HIDDEN, TOKENS, CHUNK = 500, 8, 192, 128  # the last of 63 shards of 8 rows holds 4, the 64th none
OWN = (0, 5, 4, 3) * 16  # tokens of each rank, where these are its own


class Case(NamedTuple):
    function: str = "loss"
    way: str = "forward"
    input_grad: str = "complete"
    dtype: torch.dtype = torch.float32
    reduce_dtype: torch.dtype | None = None
    smoothing: bool = False
    stats: bool = False  # of a loss; the entropy of log-probabilities
    weight: bool = False  # of the shard's classes
    train_input: bool = True
    check: str = "auto"

    def __str__(self):
        return "-".join(str(value) for value in self)


CASES = [
    *(Case(way=way, input_grad=at) for way in ("forward", "backward") for at in ("complete", "partial", "sequence")),
    Case(smoothing=True, stats=True),
    Case(way="backward", smoothing=True, weight=True),
    *(
        Case(way=way, input_grad=at, dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
        for way, at, reduce_dtype in (
            ("forward", "complete", None),
            ("backward", "sequence", torch.bfloat16),
        )
    ),
    *(Case(way=way, input_grad="own", smoothing=way == "backward") for way in ("forward", "backward")),
    Case(input_grad="own", dtype=torch.bfloat16, train_input=False),
    Case("logprobs", "backward", input_grad="own"),
    *(Case(input_grad=at, train_input=False) for at in ("complete", "sequence")),
    Case("logprobs", "backward"),
    Case("logits", "backward", smoothing=True, stats=True),
    Case(check="first"),
]
MORE_CASES = [
    Case(input_grad="own", smoothing=True),
    Case(way="backward", input_grad="own"),
    Case("logprobs", "backward", stats=True),
    Case(way="backward", smoothing=True, stats=True),
    Case(smoothing=True, weight=True),
    *(
        Case(way=way, input_grad=at, dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
        for way, at, reduce_dtype in (
            ("forward", "complete", torch.bfloat16),
            ("forward", "sequence", None),
            ("forward", "sequence", torch.bfloat16),
            ("backward", "complete", None),
            ("backward", "complete", torch.bfloat16),
            ("backward", "sequence", None),
        )
    ),
]


def the_problem(case: Case):
    return problem(TOKENS, HIDDEN, VOCAB, dtype=case.dtype, ignored=0.25)


def class_weights(case: Case):
    return torch.linspace(0.5, 1.5, VOCAB) if case.weight else None


def parts_of_chunks(sizes: list[int]) -> list[list[int]]:
    """The tokens of each rank in each chunk, where ranks with ``sizes`` counted tokens have hidden states of their own:
    the fewest chunks that are small enough, and as many tokens of a rank in each chunk as it has, divided by their
    number."""
    number = next(n for n in itertools.count(1) if sum(math.ceil(size / n) for size in sizes) <= CHUNK)
    ends = [[min(size, math.ceil(size / number) * at) for size in sizes] for at in range(number + 1)]
    parts = [[stop - start for start, stop in zip(*pair, strict=True)] for pair in itertools.pairwise(ends)]
    return [part for part in parts if any(part)]


def expected_collectives(case: Case) -> list[Collective]:
    """The formula of docs/distributed.md, what each rank puts in.

    Per chunk one all-gather of statistics and one reduction of the hidden gradient (one for all tokens in the backward
    way); where ranks have hidden states of their own, also an all-gather of these for each time a chunk's logits are
    formed, as many as the rank with the most tokens in the chunk has. Tokens that do not count take no part, but in the
    one reduction. Where all else is the rank's own too, each time that logits are formed begins with the bytes of the
    tokens.
    """
    counts = the_problem(case).target != -100
    own = case.input_grad == "own"
    sequence = (own or case.input_grad == "sequence") and case.function != "logits"
    number = int(counts.sum())
    sizes = [int(part.sum()) for part in counts.split(OWN if own else TOKENS // RANKS)]
    parts = parts_of_chunks(sizes) if sequence else [[min(CHUNK, number - at)] for at in range(0, number, CHUNK)]
    if case.function == "logits":
        parts = [[number]]
    columns = 3 + 2 * case.smoothing + case.stats + (case.stats and case.function != "logprobs")
    size, reduced = case.dtype.itemsize, (case.reduce_dtype or torch.float32).itemsize

    gathers = [Collective(GATHER, max(part) * HIDDEN * size) for part in parts] if sequence else []
    statistics = [Collective(GATHER, sum(part) * columns * 4) for part in parts]
    if case.input_grad == "partial" or not case.train_input or case.function == "logits":
        reductions = []
    elif sequence:
        reductions = [Collective(SCATTER, RANKS * max(part) * HIDDEN * reduced) for part in parts]
    elif case.way == "forward":
        reductions = [Collective(REDUCE, sum(part) * HIDDEN * reduced) for part in parts]
    else:
        reductions = [Collective(REDUCE, TOKENS * HIDDEN * reduced)]
    again = gathers if case.way == "backward" else []
    weights = [Collective(GATHER, 8 * 4)] if case.weight else []  # of the largest shard
    # Target and coefficient; or the target, in the backward with three statistics and two slopes or more.
    of_tokens = [16] if case.way == "forward" else [8, 8 + 4 * (5 + case.smoothing)]
    of_own = [Collective(GATHER, max(sizes) * width) for width in of_tokens] if own else []
    return weights + of_own + gathers + statistics + reductions + again


def expected_meetings(case: Case) -> int:
    """For the comparison of calls, the forward, and a backward with collectives; that of ranks with tokens of their own
    tells their upstream gradients at least."""
    reduces = case.input_grad != "partial" and case.train_input and case.function != "logits"
    gathers = case.input_grad == "sequence" and case.function != "logits"
    backward = case.input_grad == "own" or (case.way == "backward" and (reduces or gathers))
    return (case.check != "first") + 1 + backward


def call(case: Case, hidden, head, target, weight, vocab=None):
    """The value, and what is returned with it."""
    options = chunks(CHUNK, case.way)
    if case.function == "logprobs":
        found = linear_logprobs(hidden, head, target, options=options, return_entropy=case.stats, vocab=vocab)
    else:
        keywords = {
            "label_smoothing": 0.1 * case.smoothing,
            "weight": weight,
            "reduction": "sum",
            "return_stats": case.stats,
            "vocab": vocab,
        }
        if case.function == "logits":
            found = cross_entropy((hidden @ head.t()).detach().requires_grad_(), target, **keywords)
        else:
            found = linear_cross_entropy(hidden, head, target, options=options, **keywords)
    return found if case.stats else (found, None)


def one_call(rank: int, case: Case, collectives) -> tuple:
    whole = the_problem(case)
    own = case.input_grad == "own"
    of_tokens = {"tokens": "own"} if own else {"input_grad": case.input_grad}
    vocab = VocabShard.split(VOCAB, reduce_dtype=case.reduce_dtype, check=case.check, padded=512, **of_tokens)
    words = slice(vocab.start, vocab.stop)
    share = TOKENS // RANKS
    tokens = slice(rank * share, rank * share + share) if case.input_grad == "sequence" else slice(None)
    tokens = slice(sum(OWN[:rank]), sum(OWN[: rank + 1])) if own else tokens
    hidden = whole.hidden.detach()[tokens].clone().requires_grad_(case.train_input)
    head = whole.head.detach()[words].clone().requires_grad_()
    weight = class_weights(case)
    arguments = (
        hidden,
        head,
        whole.target[tokens] if own else whole.target,
        None if weight is None else weight[words],
        vocab,
    )
    if case.check == "first":
        call(case, *arguments)
    before = len(collectives())
    value, _ = call(case, *arguments)
    total = (value * random_like(value)).sum()
    if total.requires_grad:
        leaves = [leaf for leaf in (hidden, head) if leaf.requires_grad]
        if case.function == "logits":
            total.backward()
            gradients = []
        else:
            gradients = torch.autograd.grad(total, leaves)
    return value.detach(), gradients, collectives()[before:]


def all_of(rank: int, world_size: int, cases: list[Case], collectives) -> dict[Case, tuple]:
    return {case: one_call(rank, case, collectives) for case in cases}


@pytest.fixture(scope="module")
def of_ranks():
    """What a case gave on each rank; it runs with all others of its list."""
    found: dict[Case, list[tuple]] = {}

    def of(case: Case) -> list[tuple]:
        if case not in found:
            cases = CASES if case in CASES else MORE_CASES
            ranks = run_threads(all_of, RANKS, cases, collectives)
            found.update((one, [of_rank[one] for of_rank in ranks]) for one in cases)
        return found[case]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with counted() as collectives:
        yield of
    torch.set_num_threads(threads)


EACH_CASE = pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.thorough) for case in MORE_CASES)], ids=str
)


@EACH_CASE
def test_value_and_gradients_are_those_of_one_process(of_ranks, case):
    results = of_ranks(case)
    whole = the_problem(case)
    weight = class_weights(case)
    expected = whole.rows(label_smoothing=0.1 * case.smoothing, **({} if weight is None else {"weight": weight}))
    of = "logprob" if case.function == "logprobs" else "loss"
    exact = expected.logprob, expected.logprob_scale
    if of == "loss":
        exact = expected.reduce("sum")
    values, own = [value for value, _, _ in results], case.input_grad == "own"
    assert own or all(torch.equal(value, values[0]) for value in values)
    value = (sum(values) if of == "loss" else torch.cat(values)) if own else values[0]
    assert_close(value, *exact, case.dtype)
    if case.function == "logits":
        return
    upstream = torch.cat([random_like(value) for value in values]) if own and of == "logprob" else random_like(value)
    upstream = array(upstream) * (expected.coefficient("sum") if of == "loss" else 1)
    (hidden, hidden_scale), (head, head_scale), _ = expected.gradients(
        of, array(whole.hidden), array(whole.head), upstream
    )
    head, head_scale = (part / (RANKS if own else 1) for part in (head, head_scale))
    assert_close(torch.cat([grads[-1] for _, grads, _ in results]), head, head_scale, case.dtype, "head")
    if not case.train_input:
        return
    found = [grads[0] for _, grads, _ in results]
    if case.input_grad in ("sequence", "own"):
        found = [torch.cat(found)]
    elif case.input_grad == "partial":
        found = [sum(found)]
    # Each of the 64 ranks rounds its share to the dtype that is summed in.
    roundings = 3.0 + RANKS * (case.reduce_dtype is not None)
    for gradient in found:
        assert_close(gradient, hidden, hidden_scale, case.dtype, "hidden", roundings)


@EACH_CASE
def test_number_and_bytes_of_collectives(of_ranks, case):
    for _, _, found in of_ranks(case):
        meetings = [collective for collective in found if collective.name == "all_to_all_single"]
        assert meetings == [Collective("all_to_all_single", RANKS * 6 * 8)] * expected_meetings(case)
        assert sorted(each for each in found if each not in meetings) == sorted(expected_collectives(case))


def test_chunks_are_those_of_a_plan_for_the_group():
    """The default plan sees the sizes that all ranks share, so that 64 ranks make the same chunks."""
    options = ChunkOptions(memory_budget=2 * 8 * 4 * 50)  # for 2 chunks in flight of 50 tokens and 8 words

    def count(rank, world_size):
        whole = the_problem(Case())
        vocab = VocabShard.split(VOCAB, check="first")
        with torch.no_grad():
            before = len(collectives())
            head = whole.head.detach()[vocab.start : vocab.stop]
            linear_cross_entropy(whole.hidden.detach(), head, whole.target, vocab=vocab, options=options)
            return [collective for collective in collectives()[before:] if collective.name == GATHER]

    with counted() as collectives:
        found = run_threads(count, RANKS)
    counts = int((the_problem(Case()).target != -100).sum())
    assert all(of_rank == found[0] for of_rank in found)
    assert len(found[0]) == -(-counts // 50) and sum(c.bytes for c in found[0]) == counts * 3 * 4


@pytest.mark.parametrize("ignored", [[0, 1, 4, 5], list(range(8))], ids=["a_chunk", "all"])
def test_fp16_sequence_chunks_without_tokens_that_count(ignored):
    """A chunk of a sequence whose tokens are all ignored goes through its collectives: there is nothing to scale."""
    case = problem(8, 4, 6, dtype=torch.float16, ignored=0.0)
    target = case.target.index_fill(0, torch.tensor(ignored), -100)

    def rank_main(rank, ranks):
        hidden = case.hidden.detach().chunk(ranks)[rank].clone().requires_grad_()
        head = case.head.detach()[3 * rank : 3 * rank + 3].clone().requires_grad_()
        shard = VocabShard(None, 3 * rank, 3 * rank + 3, 6, input_grad="sequence")
        linear_cross_entropy(hidden, head, target, vocab=shard, options=ChunkOptions(chunk_size=4)).backward()
        return hidden.grad, head.grad

    got = [torch.cat(grads) for grads in zip(*run_threads(rank_main, 2), strict=True)]
    whole = case.fresh(target=target)
    for found, expected in zip(got, gradients(whole.loss(), whole), strict=False):
        torch.testing.assert_close(found, expected, rtol=4e-3, atol=1e-4)
