"""What the ranks of `test_vocab.py` run: every case, and the situations that have a test of their own.

A situation is a function of a group of all four ranks that raises if something is wrong on this rank.
"""

import itertools
import traceback
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from chunked_ce import (
    ChunkOptions,
    LinearCrossEntropyLoss,
    Teacher,
    VocabShard,
    cross_entropy,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
)
from chunked_ce.cli.counted_collectives import REDUCE, SCATTER, counted
from tests.cases import (
    REDUCTIONS_AND_WAYS,
    WAYS,
    array,
    assert_close,
    assert_equal,
    chunks,
    full_loss,
    problem,
    random_like,
)
from tests.distributed import vocab_cases
from tests.precision import LOW, NAMES, assert_no_worse, plain_and_expected
from tests.reference import rows

INPUT_GRADS = ("complete", "partial", "sequence")
ALL_TOKENS = ("own", *INPUT_GRADS)  # own tokens that are the same on all ranks
UNEVEN = (40, 1, 0, 60)
EVEN = (26, 25, 25, 25)
PAIR = [1, 3]  # the ranks that compile, which takes seconds on each


def run_cases(rank: int, world_size: int, rounds: tuple[int, ...]) -> dict[str, str | None]:
    """The error of this rank, or None, by name of case."""
    # Groups whose ranks have other numbers than in the whole world.
    groups = {2: dist.new_group([2, 3]), 3: dist.new_group([1, 2, 3]), 4: dist.group.WORLD}
    found = {}
    for seed, (function, case) in enumerate(vocab_cases.all_cases(rounds)):
        if rank >= world_size - case["ranks"]:
            group = groups[case["ranks"]]
            found[f"{function}-{vocab_cases.name(case)}"] = _error(vocab_cases.check, function, case, group, seed)
    return found


def run_all(rank: int, world_size: int) -> dict[str, str | None]:
    """The error of this rank, or None, by name of case and situation."""
    found = run_cases(rank, world_size, vocab_cases.ROUNDS)
    for name, situation in SITUATIONS.items():
        dist.barrier()
        found[name] = _error(situation)
    return found


def _error(function: Callable, *args) -> str | None:
    try:
        function(*args)
    except Exception:
        return traceback.format_exc()
    return None


def sharded(case, sizes, group=None, **keywords):
    """This rank's leaves of a problem, its shard, and its words and tokens."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    start = sum(sizes[:rank])
    words = slice(start, start + sizes[rank])
    if keywords.get("input_grad") == "own":
        keywords = {name: value for name, value in keywords.items() if name != "input_grad"} | {"tokens": "own"}
    vocab = VocabShard(group, words.start, words.stop, sum(sizes), **keywords)
    tokens = slice(None)
    if vocab.input_grad == "sequence":
        share = len(case.target) // ranks
        tokens = slice(rank * share, rank * share + share)
    leaves = {"hidden": case.hidden[tokens], "head": case.head[words]}
    if case.bias is not None:
        leaves["bias"] = case.bias[words]
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    return leaves, vocab, words, tokens


def loss_of(leaves, vocab, case, **keywords):
    return linear_cross_entropy(
        leaves["hidden"],
        leaves["head"],
        case.target,
        linear_bias=leaves.get("bias"),
        vocab=vocab,
        ignore_index=case.ignore_index,
        **keywords,
    )


def smoothing_is_over_the_whole_vocabulary():
    torch.manual_seed(0)
    logits = torch.randn(7, 9, dtype=torch.float64)
    target = torch.randint(9, (7,))
    sizes = (4, 2, 0, 3)
    start = sum(sizes[: dist.get_rank()])
    words = slice(start, start + sizes[dist.get_rank()])
    vocab = VocabShard(None, words.start, words.stop, 9)
    mine = logits[:, words].clone().requires_grad_()
    loss = cross_entropy(mine, target, label_smoothing=0.1, vocab=vocab)
    whole = logits.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(whole, target, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(expected, whole)
    assert abs(loss - expected) < 1e-12
    assert torch.allclose(torch.autograd.grad(loss, mine)[0], gradient[:, words], rtol=0, atol=1e-12)
    # What the ranks would say with the mean over their own words.
    log_probs = logits.log_softmax(-1)[:, words]
    if words.start < words.stop:
        local = 0.9 * (loss * 0) - 0.1 * log_probs.mean()
        whole_mean = -0.1 * logits.log_softmax(-1).mean()
        assert abs(local - whole_mean) > 1e-4


def ignored_label_costs_nothing():
    torch.manual_seed(0)
    head = torch.randn(9, 4)
    start = (0, 4, 6, 6)[dist.get_rank()]
    stop = (4, 6, 6, 9)[dist.get_rank()]
    for reduction, way in REDUCTIONS_AND_WAYS:
        hidden = torch.randn(3, 4, requires_grad=True)
        dist.broadcast(hidden.detach(), 0)
        rows = head[start:stop].clone().requires_grad_()
        loss = linear_cross_entropy(
            hidden,
            rows,
            torch.full((3,), -100),
            vocab=VocabShard(None, start, stop, 9),
            label_smoothing=0.1,
            z_loss=0.1,
            reduction=reduction,
            options=chunks(2, way),
        )
        assert loss.requires_grad and not loss.any()
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss.sum(), [hidden, rows]))


def every_rank_issues_the_same_collectives():
    """Shards of very different sizes, and chunks as many as the plan says."""
    sizes = (3000, 1, 0, 17)
    for input_grad in INPUT_GRADS:
        for ignored in (0.0, 0.3, 0.9):
            case = problem(64, 8, sum(sizes), ignored=ignored)
            for reduction, way in REDUCTIONS_AND_WAYS:
                leaves, vocab, _, _ = sharded(case, sizes, input_grad=input_grad)
                options = ChunkOptions(gradients=way, memory_budget=40_000)
                with counted() as collectives:
                    loss_of(leaves, vocab, case, reduction=reduction, options=options).sum().backward()
                    mine = [collective for collective in collectives() if collective.name != "all_gather"]
                everyone = [None] * dist.get_world_size()
                dist.all_gather_object(everyone, mine)
                assert all(other == mine for other in everyone), everyone
                assert ignored > 0.5 or len(mine) > 4  # several chunks


def no_tokens():
    for input_grad in ALL_TOKENS:
        case = problem(0, 8, sum(EVEN), bias=True)
        for reduction, way in REDUCTIONS_AND_WAYS:
            leaves, vocab, _, _ = sharded(case, EVEN, input_grad=input_grad)
            loss, stats = loss_of(
                leaves, vocab, case, reduction=reduction, options=chunks(4, way), return_stats=True, label_smoothing=0.1
            )
            assert loss.shape == ((0,) if reduction == "none" else ()) and not loss.any()
            assert [float(value) for value in stats] == [0, 0, 0, 0, -torch.inf]
            gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
            assert all(g.shape == leaf.shape for g, leaf in zip(gradients, leaves.values(), strict=True))
            assert not any(gradient.any() for gradient in gradients)
        logprobs = linear_logprobs(leaves["hidden"], leaves["head"], case.target, vocab=vocab)
        assert logprobs.shape == (0,)
    logits = torch.zeros(0, EVEN[dist.get_rank()], requires_grad=True)
    loss = cross_entropy(logits, case.target, vocab=vocab)
    assert loss == 0 and torch.autograd.grad(loss, logits)[0].shape == logits.shape


def low_precision_is_no_worse_than_the_plain_loss():
    """peers 15: within the error of the plain loss in the dtype; a sum over shards has rounded parts."""
    assert sum(EVEN) == sum(UNEVEN)
    for dtype in LOW:
        case = problem(400, 32, sum(EVEN), dtype=dtype, bias=True, seed=1)
        upstreams = {"mean": None, "sum": None, "none": random_like(torch.empty(400))}
        known = {reduction: plain_and_expected(case, upstream, reduction) for reduction, upstream in upstreams.items()}
        for sizes in (EVEN, UNEVEN):
            for input_grad in INPUT_GRADS if sizes is EVEN else ALL_TOKENS:
                for reduction, way in REDUCTIONS_AND_WAYS:
                    upstream = upstreams[reduction]
                    (plain, plain_gradients), (exact, gradients) = known[reduction]
                    leaves, vocab, _, _ = sharded(case, sizes, input_grad=input_grad)
                    value = loss_of(leaves, vocab, case, reduction=reduction, options=chunks(128, way))
                    found = torch.autograd.grad(value, list(leaves.values()), upstream)
                    if reduction == "none":
                        assert_no_worse(value, plain, exact)
                    for name, mine, other, expected in zip(NAMES, found, plain_gradients, gradients, strict=True):
                        # Tokens that are sharded come chunk by chunk in the backward too.
                        sums = name == "input" or way == "forward" or input_grad in ("sequence", "own")
                        everyone = [None] * dist.get_world_size()
                        dist.all_gather_object(everyone, mine)
                        whole = mine
                        if name == "input" and input_grad == "partial":
                            whole = sum(part.double() for part in everyone)
                        elif name != "input" or input_grad == "sequence":
                            whole = torch.cat(everyone)
                        what = f"{name}, {dtype} {sizes} {input_grad} {reduction} {way}"
                        assert_no_worse(whole, other, expected, what, dtype if sums else None)


def fp16_mean_over_many_tokens():
    case = problem(64, 16, sum(UNEVEN), dtype=torch.float16, ignored=0.0)
    for way in WAYS:
        leaves, vocab, words, _ = sharded(case, UNEVEN)
        loss = loss_of(leaves, vocab, case, num_tokens=10**6, options=chunks(20, way)) * 65536
        hidden, head = torch.autograd.grad(loss, list(leaves.values()))
        _, (_, expected) = plain_and_expected(case, torch.tensor(65536e-6), "sum")
        assert abs(array(hidden) - expected[0]).max() <= 2**-8 * abs(expected[0]).max()
        if len(head):
            assert abs(array(head) - expected[1][words]).max() <= 2**-8 * abs(expected[1]).max()


def autocast():
    for dtype in LOW:
        for reduction, way in REDUCTIONS_AND_WAYS:
            case = problem(40, 8, sum(UNEVEN), bias=True)
            leaves, vocab, _, _ = sharded(case, UNEVEN)
            with torch.autocast("cpu", dtype):
                loss = loss_of(leaves, vocab, case, reduction=reduction, options=chunks(16, way))
            gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
            assert loss.dtype == torch.float32 and {g.dtype for g in gradients} == {torch.float32}
            cast = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
            expected = loss_of(cast, vocab, case, reduction=reduction, options=chunks(16, way))
            assert torch.equal(loss, expected)
            for mine, other in zip(gradients, torch.autograd.grad(expected.sum(), list(cast.values())), strict=True):
                assert torch.allclose(mine, other.float(), rtol=2**-7, atol=1e-3)


def input_and_head_of_different_dtypes():
    case = problem(40, 8, sum(UNEVEN))
    for hidden_dtype, head_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        for way in WAYS:
            leaves, vocab, _, _ = sharded(case, UNEVEN)
            leaves["hidden"] = leaves["hidden"].detach().to(hidden_dtype).requires_grad_()
            leaves["head"] = leaves["head"].detach().to(head_dtype).requires_grad_()
            loss = loss_of(leaves, vocab, case, options=chunks(16, way))
            gradients = torch.autograd.grad(loss, list(leaves.values()))
            assert [g.dtype for g in gradients] == [hidden_dtype, head_dtype]
            expected = full_loss(case.hidden.to(hidden_dtype), case.head.to(head_dtype).to(hidden_dtype), case.target)
            assert abs(loss - expected) < 1e-2


def reduction_in_the_dtype_asked_for():
    case = problem(32, 8, sum(EVEN), dtype=torch.bfloat16)
    for input_grad in ("complete", "sequence"):
        for way in WAYS:
            for asked, expected in ((None, 4), (torch.bfloat16, 2), (torch.float64, 8)):
                leaves, vocab, _, _ = sharded(case, EVEN, input_grad=input_grad, reduce_dtype=asked)
                loss = loss_of(leaves, vocab, case, options=chunks(100, way))
                with counted() as collectives:
                    loss = loss_of(leaves, vocab, case, options=chunks(100, way))
                    torch.autograd.grad(loss, list(leaves.values()))
                    sizes = {c.bytes // expected // 8 for c in collectives() if c.name in (REDUCE, SCATTER)}
                counts = case.target != -100
                most = 4 * int(counts.view(4, -1).sum(1).max())  # each rank's part is as large as the largest
                moved = 32 if way == "backward" else int(counts.sum())
                assert sizes == {most if input_grad == "sequence" else moved}, sizes


def frozen_input_takes_no_reduction():
    case = problem(32, 8, sum(EVEN))
    for input_grad in ALL_TOKENS:
        for reduction, way in REDUCTIONS_AND_WAYS:
            leaves, vocab, _, _ = sharded(case, EVEN, input_grad=input_grad)
            leaves["hidden"].requires_grad_(False)
            with counted() as collectives:
                loss = loss_of(leaves, vocab, case, reduction=reduction, options=chunks(10, way))
                (gradient,) = torch.autograd.grad(loss.sum(), [leaves["head"]])
                assert gradient.any()
                assert not {c.name for c in collectives()} & {REDUCE, SCATTER}


def nothing_to_differentiate():
    case = problem(32, 8, sum(EVEN))
    leaves, vocab, _, _ = sharded(case, EVEN)
    for way in WAYS:
        with torch.no_grad():
            loss = loss_of(leaves, vocab, case, options=chunks(10, way))
        assert not loss.requires_grad
        assert abs(loss - full_loss(case.hidden, case.head, case.target)) < 1e-5
    frozen = {name: leaf.detach() for name, leaf in leaves.items()}
    assert not loss_of(frozen, vocab, case).requires_grad


def any_upstream_gradient_twice():
    """peers 2: scaled, and twice through one graph, without touching what is saved."""
    case = problem(32, 8, sum(EVEN), dtype=torch.float64)
    for input_grad in ALL_TOKENS:
        for way in WAYS:
            leaves, vocab, _, _ = sharded(case, EVEN, input_grad=input_grad)
            loss = loss_of(leaves, vocab, case, options=chunks(10, way))
            wanted = list(leaves.values())
            once = torch.autograd.grad(loss, wanted, retain_graph=True)
            thrice = torch.autograd.grad(3 * loss, wanted, retain_graph=True)
            again = torch.autograd.grad(loss, wanted)
            assert_equal(once, again)
            assert all(torch.allclose(3 * a, b, rtol=1e-12) for a, b in zip(once, thrice, strict=True))


def words_masked_by_a_bias_of_minus_infinity():
    """Shard 3 holds nothing but masked words: they have no probability, and gradients of 0."""
    sizes = (4, 3, 2, 2)
    case = problem(20, 5, sum(sizes), dtype=torch.float64, bias=True)
    bias = case.bias.detach().clone()
    bias[9:] = bias[2] = -torch.inf
    target = torch.where((case.target >= 9) | (case.target == 2), 0, case.target)
    case = case.fresh(bias=bias.requires_grad_(), target=target)
    reference = case.rows()
    for reduction, way in REDUCTIONS_AND_WAYS:
        leaves, vocab, words, _ = sharded(case, sizes)
        value, stats = loss_of(leaves, vocab, case, reduction=reduction, options=chunks(6, way), return_stats=True)
        upstream = random_like(value)
        found = torch.autograd.grad(value, list(leaves.values()), upstream)
        assert_close(value, *reference.reduce(reduction), torch.float64)
        assert_close(stats.entropy_sum, reference.entropy.sum(), reference.entropy_scale.sum(), torch.float32)
        coefficient = array(upstream) * reference.coefficient(reduction)
        exact = reference.gradients("loss", array(case.hidden), array(case.head), coefficient)
        for gradient, (expected, scale), places in zip(found, exact, (slice(None), words, words), strict=True):
            assert_close(gradient, expected[places], scale[places], torch.float64, "gradient")


def class_weights_where_one_rank_holds_all_words():
    case = problem(20, 5, 9, dtype=torch.float64)
    weight = torch.rand(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = full_loss(case.hidden, case.head, case.target, weight=weight, label_smoothing=0.2)
    for sizes in ((0, 9, 0, 0), (0, 0, 0, 9)):
        for given in ("whole", "shard"):
            leaves, vocab, words, _ = sharded(case, sizes)
            mine = weight if given == "whole" else weight[words]
            loss = loss_of(leaves, vocab, case, weight=mine, label_smoothing=0.2)
            assert abs(loss - expected) < 1e-12, given
            depths = list(leaves["hidden"].split(12)), leaves["head"], list(case.target.split(12))
            loss = linear_cross_entropy(*depths, vocab=vocab, weight=mine, label_smoothing=0.2)
            assert abs(loss - expected) < 1e-12, (given, "depths")


def shapes_of_targets():
    case = problem(24, 5, sum(EVEN), dtype=torch.float64)
    expected = full_loss(case.hidden, case.head, case.target, reduction="none")
    leaves, vocab, _, _ = sharded(case, EVEN)
    losses = linear_cross_entropy(
        leaves["hidden"].view(2, 3, 4, 5),
        leaves["head"],
        case.target.view(2, 3, 4).int(),
        reduction="none",
        vocab=vocab,
    )
    assert torch.allclose(losses.flatten(), expected)
    at = int((case.target != -100).nonzero()[0])
    loss = linear_cross_entropy(leaves["hidden"][at], leaves["head"], case.target[at], vocab=vocab)
    assert loss.shape == () and torch.allclose(loss, expected[at])


def as_a_module():
    case = problem(24, 5, sum(EVEN), dtype=torch.float64)
    leaves, vocab, _, _ = sharded(case, EVEN)
    loss = LinearCrossEntropyLoss(vocab=vocab, label_smoothing=0.1)(leaves["hidden"], leaves["head"], case.target)
    assert torch.allclose(loss, full_loss(case.hidden, case.head, case.target, label_smoothing=0.1))


def logits_with_the_shard_of_a_sequence_parallel_head():
    """Logits hold all tokens already: how the head's input is sharded does not matter to them."""
    case = problem(24, 5, sum(EVEN), dtype=torch.float64)
    _, vocab, words, _ = sharded(case, EVEN, input_grad="sequence")
    logits = (case.hidden @ case.head.t()).detach()
    mine = logits[:, words].clone().requires_grad_()
    expected = rows(array(logits), array(case.target))
    loss = cross_entropy(mine, case.target, vocab=vocab, reduction="sum")
    assert_close(loss, *expected.reduce("sum"), torch.float64)
    (gradient,) = torch.autograd.grad(loss, mine)
    assert_close(gradient, expected.d_loss[:, words], expected.d_loss_scale[:, words], torch.float64)


def compiled():
    """In one graph, with a shard that the eager call before has compared, or not."""
    group = dist.new_group(PAIR)
    if dist.get_rank() not in PAIR:
        return
    sizes = EVEN[:2]
    case = problem(12, 5, sum(sizes))
    weight = torch.linspace(0.5, 1.5, sum(sizes))
    for way, given in (("forward", None), ("backward", "whole"), ("forward", "shard")):
        leaves, vocab, words, _ = sharded(case, sizes, group)
        _, fresh, _, _ = sharded(case, sizes, group)
        mine = {None: None, "whole": weight, "shard": weight[words]}[given]

        def loss(hidden, head, vocab, mine=mine, way=way):
            options = chunks(5, way)
            return linear_cross_entropy(
                hidden, head, case.target, weight=mine, label_smoothing=0.1, vocab=vocab, options=options
            )

        wanted = list(leaves.values())
        expected = loss(*wanted, vocab)
        torch._dynamo.reset()
        found = torch.compile(loss, fullgraph=True, backend="aot_eager")(*wanted, vocab if given == "shard" else fresh)
        gradients = torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted)
        assert torch.equal(found, expected)
        assert_equal(*gradients)


def compiled_with_tokens_of_each_ranks_own():
    """In one graph for any number of tokens; upstream gradients that differ are computed again inside the operator."""
    group = dist.new_group(PAIR)
    if dist.get_rank() not in PAIR:
        return
    rank, sizes = dist.get_rank(group), EVEN[:2]
    whole = problem(12, 5, sum(sizes), seed=rank)
    leaves, vocab, _, _ = sharded(problem(12, 5, sum(sizes)), sizes, group, tokens="own")

    def loss(hidden, head, target):
        return linear_cross_entropy(hidden, head, target, vocab=vocab, options=chunks(5))

    torch._dynamo.reset()
    graph = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens, upstream in ((12, 1.0), (12, 1.0 + rank), (9 - 3 * rank, 1.0), (6 - rank, 1.0)):
        wanted = [whole.hidden.detach()[:tokens].clone().requires_grad_(), leaves["head"]]
        values = [function(*wanted, whole.target[:tokens]) for function in (loss, graph)]
        expected, found = (torch.autograd.grad(value * upstream, wanted) for value in values)
        assert torch.equal(*values)
        assert_equal(found, expected)


def teachers_of_each_ranks_own_tokens():
    """Real groups exchange the columns of a teacher's logits in any dtype, with ranks that have no token or no row."""
    rank, sizes = dist.get_rank(), (7, 0, 1, 4)
    for dtype, kind in itertools.product((torch.float32, torch.bfloat16), ("head", "logits")):
        case = problem(sizes[rank], 5, sum(UNEVEN), dtype=dtype, ignored=0.2, seed=rank)
        head, other = (problem(1, 5, sum(UNEVEN), dtype=dtype, seed=seed).head.detach() for seed in (10, 11))
        hidden = case.hidden.detach()
        teacher = Teacher(hidden, other) if kind == "head" else Teacher(logits=hidden @ other.t())
        _, vocab, words, _ = sharded(case, UNEVEN, tokens="own")
        for way in WAYS:
            keywords = {"target": case.target, "beta": 0.4, "options": chunks(4, way)}
            found = linear_divergence(case.hidden, head[words], teacher, vocab=vocab, **keywords)
            expected = linear_divergence(case.hidden, head, teacher, **keywords)
            gradients = [torch.autograd.grad(value, case.hidden)[0] for value in (found, expected)]
            close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
            torch.testing.assert_close(found, expected, **close)
            torch.testing.assert_close(*gradients, **close)


def second_derivatives_are_refused():
    case = problem(24, 5, sum(EVEN))
    for reduction, way in REDUCTIONS_AND_WAYS:
        leaves, vocab, _, _ = sharded(case, EVEN)
        loss = loss_of(leaves, vocab, case, reduction=reduction, options=chunks(10, way)).sum()
        with pytest.raises(NotImplementedError, match="create_graph"):
            torch.autograd.grad(loss, leaves["head"], create_graph=True)
    logits = torch.zeros(24, EVEN[dist.get_rank()], requires_grad=True)
    with pytest.raises(NotImplementedError, match="create_graph"):
        torch.autograd.grad(cross_entropy(logits, case.target, vocab=vocab), logits, create_graph=True)


def transforms_are_refused():
    case = problem(24, 5, sum(EVEN))
    leaves, vocab, _, _ = sharded(case, EVEN)
    hidden, head = leaves["hidden"].detach(), leaves["head"].detach()

    def loss(hidden, target):
        return linear_cross_entropy(hidden, head, target, vocab=vocab)

    def logprobs(hidden, target):
        return linear_logprobs(hidden, head, target, vocab=vocab)

    def loss_of_logits(hidden, target):
        return cross_entropy(hidden @ head.t(), target, vocab=vocab)

    for function in (loss, logprobs, loss_of_logits):
        with pytest.raises(NotImplementedError, match=r"torch\.func"):
            torch.func.grad(lambda hidden, function=function: function(hidden, case.target).sum())(hidden)
        with pytest.raises(NotImplementedError, match=r"torch\.func"):
            torch.func.vmap(function)(hidden, case.target)
        with pytest.raises(NotImplementedError, match=r"torch\.func"):
            torch.func.jvp(lambda hidden, function=function: function(hidden, case.target), (hidden,), (hidden,))


def chunks_without_a_token_that_counts():
    """Those of a sequence are chunks of all tokens; one chunk of three here has none that counts, or all have none."""
    first = {name: values[0] for name, values in vocab_cases.DIMENSIONS["loss"].items()}
    of_all = {"ranks": 4, "dtype": torch.float16, "input_grad": "sequence", "chunk_size": 8, "bias": True}
    for ignored, reduction in itertools.product((0.85, 1.0), ("mean", "sum")):
        case = first | of_all | {"ignored": ignored, "call": (reduction, "forward")}
        target = vocab_cases.mine(case, dist.group.WORLD, seed=13).whole.target.view(4, 3, 2)
        counted = (target != -100).any(-1).any(0).tolist()
        assert counted == ([True, False, True] if ignored < 1 else [False] * 3)
        vocab_cases.check("loss", case, dist.group.WORLD, seed=13)


SITUATIONS = {
    situation.__name__: situation
    for situation in (
        smoothing_is_over_the_whole_vocabulary,
        ignored_label_costs_nothing,
        every_rank_issues_the_same_collectives,
        no_tokens,
        low_precision_is_no_worse_than_the_plain_loss,
        fp16_mean_over_many_tokens,
        autocast,
        input_and_head_of_different_dtypes,
        reduction_in_the_dtype_asked_for,
        frozen_input_takes_no_reduction,
        nothing_to_differentiate,
        any_upstream_gradient_twice,
        words_masked_by_a_bias_of_minus_infinity,
        class_weights_where_one_rank_holds_all_words,
        shapes_of_targets,
        as_a_module,
        logits_with_the_shard_of_a_sequence_parallel_head,
        compiled,
        compiled_with_tokens_of_each_ranks_own,
        teachers_of_each_ranks_own_tokens,
        second_derivatives_are_refused,
        transforms_are_refused,
        chunks_without_a_token_that_counts,
    )
}
