"""`linear_statistics` against its formulas in float64, and against plain code in the same dtype."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from chunked_ce import ChunkOptions, TokenStatistics, VocabShard, linear_logprobs, linear_statistics
from chunked_ce.engine import dispatch
from chunked_ce.rows import torch_rows
from tests.cases import array, chunks, problem
from tests.distributed.threads import run_threads
from tests.precision import FP32, RMS_SLACK, assert_no_worse, errors, parts_in, rounded
from tests.statistics_reference import IGNORED, OF_SUPPORT, OUTPUTS, expected, gradients, inputs
from tests.test_work import work

TERMS = ("softcap", "logit_scale", "temperature")
# Ids per token and size of the support.
KINDS = {"target": (None, None), "ids": (3, None), "one id": (1, None), "support": (None, 5), "both": (2, 4)}
# For what takes long: the kind that has all, and with the thorough tests the others.
BOTH = [pytest.param(*kind, id=name, marks=[pytest.mark.thorough] * (name != "both")) for name, kind in KINDS.items()]
CLOSE = {torch.float64: {"rtol": 1e-10, "atol": 1e-11}, torch.float32: {"rtol": 2e-5, "atol": 5e-6}}


def found(call, outputs=None, **keywords):
    outputs = outputs or call.outputs()
    values = linear_statistics(*call.arguments(), outputs=outputs, **call.keywords(), **keywords)
    return {name: value for name, value in values._asdict().items() if value is not None}


def assert_right(call, outputs=None, tolerance=None, **keywords):
    """Values and the gradients of all leaves."""
    ours, double = found(call, outputs, **keywords), call.double()
    right = expected(double, outputs)
    dtype = torch.float64 if call.hidden.dtype == torch.float64 else torch.float32
    tolerance = tolerance or CLOSE[dtype]
    assert ours.keys() == right.keys()
    for name, value in ours.items():
        assert value.dtype == dtype and value.shape == right[name].shape
        assert value.requires_grad == (name != "is_top1" and bool(call.leaves()))
        torch.testing.assert_close(value.double(), right[name], **tolerance, msg=lambda text, name=name: name + text)
    if not any(value.requires_grad for value in ours.values()):
        return
    pairs = zip(gradients(ours, call.leaves()), gradients(right, double.leaves()), call.leaves(), strict=True)
    for one, other, leaf in pairs:
        assert one.dtype == leaf.dtype
        torch.testing.assert_close(one.double(), other, **tolerance)


@pytest.mark.parametrize(("num_ids", "size"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_random_shapes(num_ids, size, dtype):
    for seed, (n, d, vocab) in enumerate([(1, 3, 7), (0, 2, 3), (17, 5, 23), (9, 600, 31), (6, 4, 1)]):
        for terms, bias, chunk in [((), False, "auto"), (TERMS, True, 4), (TERMS[:1], False, 1)]:
            call = inputs(n, d, vocab, num_ids=num_ids, size=size, dtype=dtype, bias=bias, terms=terms, seed=seed)
            assert_right(call, options=chunks(chunk))


@pytest.mark.parametrize(("num_ids", "size"), KINDS.values(), ids=KINDS)
def test_nothing_counts(num_ids, size):
    call = inputs(5, 4, 11, num_ids=num_ids, size=size, ignored=1.1, terms=TERMS)
    values = found(call)
    assert all(value.count_nonzero() == 0 for value in values.values())
    assert all(grad.count_nonzero() == 0 for grad in gradients(values, call.leaves()))


@pytest.mark.parametrize(("num_ids", "size"), KINDS.values(), ids=KINDS)
def test_garbage_of_ignored_tokens(num_ids, size):
    """Hidden states and temperatures of ignored tokens reach no value and no gradient."""
    call = inputs(12, 4, 11, num_ids=num_ids, size=size, terms=TERMS)
    ignored = (call.target == IGNORED).view(12, -1).all(-1)
    assert ignored.any() and not ignored.all()
    for value in (torch.nan, torch.inf):
        hidden = call.hidden.detach().masked_fill(ignored.unsqueeze(-1), value).requires_grad_()
        terms = call.terms | {"temperature": call.terms["temperature"].masked_fill(ignored, 0.0)}
        odd = dataclasses.replace(call, hidden=hidden, terms=terms)
        for one, other in zip(found(odd).values(), found(call).values(), strict=True):
            assert torch.equal(one, other)
        results = [gradients(found(each), each.leaves()) for each in (odd, call)]
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_ids", "size"), KINDS.values(), ids=KINDS)
def test_no_worse_than_plain(num_ids, size, dtype):
    """Each output alone, value and gradients: error within that of plain code on full logits in the same dtype."""
    call = inputs(200, 64, 501, num_ids=num_ids, size=size and 40, dtype=dtype, terms=("temperature",), ignored=0.1)
    double = call.double()
    for name in [one for one in call.outputs() if one != "is_top1"]:
        plain, right = expected(call, (name,)), expected(double, (name,))
        plain_gradients, right_gradients = gradients(plain, call.leaves()), gradients(right, double.leaves())
        for options in (None, chunks(33)):
            ours = found(call, (name,), options=options)
            assert_no_worse(ours[name], plain[name], array(right[name]), name)
            grads = zip(gradients(ours, call.leaves()), plain_gradients, right_gradients, strict=True)
            for leaf, (one, other, wanted) in zip(("input", "linear_weight"), grads, strict=True):
                if options is None or size:
                    assert_no_worse(one, other, array(wanted), f"gradient of {leaf} for {name}")
                else:  # a sum over blocks of the vocabulary, rounded each, which may cancel out
                    parts = parts_in(leaf, "backward", dtype)
                    of_parts = 0.0 if parts is None else errors(rounded(array(wanted), parts), array(wanted))[0]
                    allowed = RMS_SLACK * math.hypot(errors(other, array(wanted))[0], of_parts)
                    assert errors(one, array(wanted))[0] <= allowed + 4 * FP32 * abs(array(wanted)).max()


def test_any_subset():
    """Those that were not asked for are None; the others do not depend on them."""
    call = inputs(9, 4, 11)
    everything = found(call, OUTPUTS)
    for size in range(len(OUTPUTS) + 1):
        for outputs in itertools.combinations(OUTPUTS, size):
            values = linear_statistics(*call.arguments(), outputs=outputs)
            assert isinstance(values, TokenStatistics)
            for name, value in values._asdict().items():
                assert value is None if name not in outputs else torch.equal(value, everything[name])


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (("logprob", "lse"), ()),
        (("entropy",), ("mean",)),
        (("log_sum_sq_probs", "is_top1"), ("correct", "squares")),
        (["mean_logit"], ("total",)),
    ],
)
def test_only_what_is_needed(outputs, names, monkeypatch):
    seen, statistics = [], dispatch.statistics

    def spying(call):
        seen.append(call.specification.names)
        return statistics(call)

    monkeypatch.setattr(dispatch, "statistics", spying)
    case = problem(5, 4, 7)
    linear_statistics(case.hidden, case.head, case.target, outputs=outputs)
    linear_statistics(case.hidden, case.head, case.target.unsqueeze(-1), outputs=[o for o in outputs if o != "is_top1"])
    plain = ("maximum", "log_sum", "target")
    assert seen[0] == (*plain, *names)
    at_ids = ("at_ids",) if "logprob" in outputs else ()
    assert seen[1] == (*plain, *(name for name in names if name != "correct"), *at_ids)


def test_no_copy_of_the_head_is_made_for_a_support(monkeypatch):
    """The full logits are never formed for it."""
    monkeypatch.setattr(torch_rows, "shard_statistics", None)
    call = inputs(9, 4, 11, size=3)
    gradients(found(call), call.leaves())


def test_as_log_probabilities():
    case = problem(17, 6, 23)
    logprobs, entropy = linear_logprobs(case.hidden, case.head, case.target, return_entropy=True)
    values = linear_statistics(case.hidden, case.head, case.target, outputs=("logprob", "entropy"))
    assert torch.equal(values.logprob, logprobs) and torch.equal(values.entropy, entropy)
    whole = torch.arange(23).expand(17, -1)
    of_support = linear_statistics(case.hidden, case.head, case.target, outputs=OF_SUPPORT, support=whole)
    torch.testing.assert_close(of_support.logprob, logprobs)
    torch.testing.assert_close(of_support.entropy, entropy)


def test_one_id_is_a_target():
    call = inputs(17, 6, 23)
    with_ids = dataclasses.replace(call, target=call.target.unsqueeze(-1))
    ours, other = found(call, OUTPUTS[:-1]), found(with_ids)
    torch.testing.assert_close(ours.pop("logprob"), other.pop("logprob").squeeze(-1))
    torch.testing.assert_close(ours, other)


def test_top1():
    """The first of equals; an ignored token is not."""
    hidden, head = torch.eye(4), torch.tensor([[1.0, 2.0, 0.0, 0.0], [1.0, 3.0, 0.0, 5.0], [0.0, 3.0, 0.0, 0.0]])
    for target, hits in [([0, 1, 0, IGNORED], [1, 1, 1, 0]), ([1, 2, 1, 1], [0, 0, 0, 1])]:
        values = linear_statistics(hidden, head.requires_grad_(), torch.tensor(target), outputs=("is_top1",))
        assert values.is_top1.tolist() == hits and not values.is_top1.requires_grad


@pytest.mark.parametrize("options", [None, chunks(4)], ids=str)
@pytest.mark.parametrize("num_ids", [None, 2])
def test_predicted(num_ids, options):
    """The first of equals, whatever the ids of the target; -1 where a token is ignored."""
    call = inputs(12, 4, 11, num_ids=num_ids, bias=True, terms=("softcap", "logit_scale"))
    with torch.no_grad():
        call.head[7] = call.head[3]
        call.bias[[3, 7]] = 2.0
    values = linear_statistics(*call.arguments(), outputs=("predicted",), options=options, **call.keywords())
    ignored = (call.target == IGNORED).view(12, -1).all(-1)
    assert ignored.any() and (values.predicted == 3).any()
    products = torch.nn.functional.linear(call.hidden, call.head, call.bias)
    assert torch.equal(values.predicted, products.argmax(-1).masked_fill(ignored, -1))
    assert values.predicted.dtype == torch.int64 and not values.predicted.requires_grad


def test_shapes_of_tokens():
    call = inputs(12, 4, 11, num_ids=2, size=3)
    flat = found(call)
    batched = dataclasses.replace(
        call, hidden=call.hidden.view(3, 4, -1), target=call.target.view(3, 4, 2), support=call.support.view(3, 4, 3)
    )
    for name, value in found(batched).items():
        assert value.shape == (3, 4, 2) if name == "logprob" else (3, 4)
        assert torch.equal(value.flatten(), flat[name].flatten())
    one = dataclasses.replace(call, hidden=call.hidden[5], target=call.target[5], support=call.support[5])
    for name, value in found(one).items():
        assert value.shape == ((2,) if name == "logprob" else ())
        torch.testing.assert_close(value, flat[name][5])
    for name, value in found(dataclasses.replace(one, target=call.target[5, 1], support=None)).items():
        assert value.shape == () and (name != "logprob" or value != 0)
    narrow = dataclasses.replace(call, target=call.target.int(), support=call.support.int())
    torch.testing.assert_close(found(narrow), flat, rtol=0, atol=0)


@pytest.mark.parametrize("ignore_index", [0, 7, 10**12, -1])
def test_other_ignored_ids(ignore_index):
    """An id may be that of a vocabulary entry; one in the support is padding too."""
    for num_ids, size in KINDS.values():
        call = inputs(12, 4, 11, num_ids=num_ids, size=size)
        ids = {"target": call.target, "support": call.support}
        ids = {
            name: one if one is None else one.masked_fill(one == ignore_index, 5).where(one != IGNORED, ignore_index)
            for name, one in ids.items()
        }
        usual = {name: one if one is None else one.where(one != ignore_index, IGNORED) for name, one in ids.items()}
        ours = found(dataclasses.replace(call, **ids), ignore_index=ignore_index)
        torch.testing.assert_close(ours, found(dataclasses.replace(call, **usual)), rtol=0, atol=0)


def test_a_large_offset_costs_nothing():
    """Statistics are relative to the largest logit."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randint(-3, 4, (20, 6), generator=g).float()
    head = torch.randint(-3, 4, (50, 6), generator=g) / 4
    target, support = torch.randint(50, (20,), generator=g), torch.randint(50, (20, 7), generator=g)
    for keywords in ({"outputs": OUTPUTS}, {"outputs": OF_SUPPORT, "support": support}):
        near, far = (
            linear_statistics(hidden, head, target, linear_bias=torch.full((50,), offset), **keywords)
            for offset in (0.0, 8192.0)
        )
        for name in keywords["outputs"]:
            if name not in ("lse", "mean_logit"):
                assert torch.equal(getattr(near, name), getattr(far, name)), name


def test_masked_vocabulary_entries():
    """A bias of -inf takes an entry out, in a support too, with gradients that are numbers."""
    hidden, head = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    bias = torch.zeros(9).index_fill(0, torch.tensor([0, 5]), -torch.inf)
    target, support = torch.tensor([1, 2, 3, 4, 6, 7]), torch.tensor([[0, 5, 8, IGNORED]] * 6)
    for keywords in (
        {"outputs": ("logprob", "entropy", "lse", "log_sum_sq_probs")},
        {"outputs": OF_SUPPORT, "support": support},
    ):
        masked = linear_statistics(hidden, head, target, linear_bias=bias, **keywords)
        kept = [1, 2, 3, 4, 6, 7, 8]
        columns = torch.tensor([kept.index(int(one)) for one in target])
        if "support" in keywords:
            keywords = keywords | {"support": torch.full((6, 1), 6)}
        right = linear_statistics(hidden, head[kept], columns, **keywords)
        for name in keywords["outputs"]:
            torch.testing.assert_close(getattr(masked, name), getattr(right, name))
        grads = [
            torch.autograd.grad(sum(getattr(v, name).sum() for name in keywords["outputs"]), (hidden, head))
            for v in (masked, right)
        ]
        torch.testing.assert_close(*grads)


# ---- autograd, autocast, compilers ----


@pytest.mark.parametrize("frozen", ["hidden", "head"])
@pytest.mark.parametrize(("num_ids", "size"), KINDS.values(), ids=KINDS)
def test_frozen_tensors_cost_nothing(num_ids, size, frozen):
    call = inputs(64, 32, 512, num_ids=num_ids, size=size, bias=True, ignored=0.0)
    costs = []
    for leaves in ((), (frozen,)):
        for leaf in leaves:
            getattr(call, leaf).requires_grad_(False)
        costs.append(work(lambda: gradients(found(call, options=chunks(8)), call.leaves())))
    assert_right(call)
    if size is None:
        assert costs[1].multiplications == 3 / 4 * costs[0].multiplications
    if frozen == "head":
        assert costs[1].largest < 512 * 32 * 4


def test_without_gradients():
    for num_ids, size in KINDS.values():
        call = inputs(9, 4, 11, num_ids=num_ids, size=size)
        with torch.no_grad():
            assert not any(value.requires_grad for value in found(call).values())


@pytest.mark.parametrize(("num_ids", "size"), BOTH)
def test_second_derivatives_and_transforms(num_ids, size):
    call = inputs(5, 3, 6, num_ids=num_ids, size=size, dtype=torch.float64, terms=TERMS, bias=True)
    outputs = tuple(name for name in call.outputs() if name != "is_top1")

    def total(*leaves):
        hidden, head, bias = leaves
        values = found(dataclasses.replace(call, hidden=hidden, head=head, bias=bias), outputs)
        return torch.cat([value.flatten() for value in values.values()])

    assert torch.autograd.gradcheck(total, call.leaves(), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(total, call.leaves())
    leaves = [leaf.detach() for leaf in call.leaves()]
    right = torch.autograd.grad(total(*call.leaves()).sin().sum(), call.leaves())
    grads = torch.func.grad(lambda *given: total(*given).sin().sum(), argnums=(0, 1, 2))(*leaves)
    torch.testing.assert_close(grads, right)


def test_twice_through_one_graph():
    for num_ids, size in KINDS.values():
        call = inputs(9, 4, 11, num_ids=num_ids, size=size)
        values = found(call)
        torch.testing.assert_close(
            gradients(values, call.leaves(), retain_graph=True), gradients(values, call.leaves()), rtol=0, atol=0
        )


@pytest.mark.parametrize(("num_ids", "size"), KINDS.values(), ids=KINDS)
def test_autocast(num_ids, size):
    """As of tensors in the autocast dtype."""
    call = inputs(17, 6, 23, num_ids=num_ids, size=size, bias=True)
    narrow = dataclasses.replace(
        call, **{name: getattr(call, name).detach().bfloat16().requires_grad_() for name in ("hidden", "head", "bias")}
    )
    with torch.autocast("cpu", torch.bfloat16):
        ours = found(call)
        grads = gradients(ours, call.leaves())
    right = found(narrow)
    for name, value in ours.items():
        assert value.dtype == torch.float32 and torch.equal(value, right[name])
    for one, other in zip(grads, gradients(right, narrow.leaves()), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one.bfloat16(), other)


@pytest.mark.parametrize(("num_ids", "size"), BOTH)
def test_one_graph_for_all_token_counts(num_ids, size):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call_of(hidden, head, target, support, temperature):
        outputs = OF_SUPPORT if size else ("logprob", "entropy", "log_sum_sq_probs", "mean_logit", "lse")
        values = linear_statistics(
            hidden, head, target, outputs=outputs, softcap=4.0, temperature=temperature, support=support
        )
        return [value for value in values if value is not None]

    compiled = torch.compile(call_of, backend=counter, fullgraph=True)
    for n in (24, 17, 3, 40):
        call = inputs(n, 6, 11, num_ids=num_ids, size=size, terms=("temperature",), seed=n)
        arguments = *call.arguments(), call.support, call.terms["temperature"]
        for tensor in (call.hidden, call.target, call.support, call.terms["temperature"]):
            if tensor is not None:
                torch._dynamo.mark_dynamic(tensor, 0)
        ours, right = (dict(enumerate(function(*arguments))) for function in (compiled, call_of))
        torch.testing.assert_close(ours, right)
        torch.testing.assert_close(gradients(ours, call.leaves()), gradients(right, call.leaves()))
    assert counter.frame_count == 1


# ---- ranks ----


@pytest.mark.parametrize("input_grad", ["complete", "partial", "sequence"])
@pytest.mark.parametrize(("num_ids", "size"), KINDS.values(), ids=KINDS)
def test_ranks(num_ids, size, input_grad):
    """Uneven shards, an empty one among three; gradients of a rank's rows, and of hidden states as asked for."""
    n, vocab = 12, 23
    call = inputs(n, 6, vocab, num_ids=num_ids, size=size, bias=True, terms=TERMS)
    right = expected(call.double())
    double = call.double()
    wanted = gradients(expected(double), double.leaves())
    bounds = {1: [0, vocab], 2: [0, 9, vocab], 3: [0, 14, 14, vocab]}

    def of_rank(rank, ranks):
        start, stop = bounds[ranks][rank : rank + 2]
        vocab_shard = VocabShard(None, start, stop, vocab, input_grad=input_grad)
        share = slice(rank * n // ranks, (rank + 1) * n // ranks) if input_grad == "sequence" else slice(None)

        def leaf(values):
            return values.detach().clone().requires_grad_()

        mine = dataclasses.replace(
            call, hidden=leaf(call.hidden[share]), head=leaf(call.head[start:stop]), bias=leaf(call.bias[start:stop])
        )
        for chunk in ("auto", 4):
            values = found(mine, vocab=vocab_shard, options=chunks(chunk))
            for name, value in values.items():
                torch.testing.assert_close(value.double(), right[name], **CLOSE[torch.float32])
            hidden, head, bias = gradients(values, mine.leaves())
            if input_grad == "partial":
                torch.distributed.all_reduce(hidden)
            torch.testing.assert_close(hidden.double(), wanted[0][share], **CLOSE[torch.float32])
            torch.testing.assert_close(head.double(), wanted[1][start:stop], **CLOSE[torch.float32])
            torch.testing.assert_close(bias.double(), wanted[2][start:stop], **CLOSE[torch.float32])

    for ranks in bounds:
        run_threads(of_rank, ranks)


def test_ranks_that_disagree():
    """Outputs, ids and supports are compared: a difference is an error on every rank."""
    call = inputs(6, 4, 10, num_ids=2, size=3)

    def of_rank(rank, ranks):
        vocab = VocabShard.split(10)
        head = call.head.detach()[vocab.start : vocab.stop]
        other = call.target.roll(1, 0) if rank else call.target
        for arguments, message in [
            ({"outputs": ("entropy", "lse") if rank else ("entropy",)}, "outputs has 'lse'"),
            ({"target": other}, "target's values"),
            ({"support": call.support + rank}, "support's values"),
            ({"support": None if rank else call.support}, "support"),
            ({"outputs": "entropy" if rank else ("entropy",)}, "outputs must be a tuple|could not take part"),
        ]:
            keywords = {"target": call.target, "outputs": ("entropy",), "support": call.support} | arguments
            with pytest.raises((ValueError, TypeError), match=message):
                linear_statistics(call.hidden, head, vocab=vocab, **keywords)

    run_threads(of_rank, 2)


def test_sharded_second_derivatives_are_refused():
    call = inputs(6, 4, 10, size=3)

    def of_rank(rank, ranks):
        value = found(call, vocab=VocabShard(None, 0, 10, 10))["logprob"].sum()
        with pytest.raises(NotImplementedError, match="no derivatives of derivatives"):
            torch.autograd.grad(value, call.leaves(), create_graph=True)

    run_threads(of_rank, 1)


# ---- wrong arguments ----


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"outputs": "logprob"}, TypeError, "outputs must be a tuple of names among 'logprob', .*, was 'logprob'"),
        ({"outputs": None}, TypeError, "outputs must be a tuple of names"),
        ({"outputs": ("logprob", 3)}, TypeError, "outputs must be a tuple of names"),
        ({"outputs": ("logit",)}, ValueError, "outputs must be a tuple of names among .*, had 'logit'"),
        ({"target": torch.zeros(5, 2, dtype=torch.int64), "outputs": ("is_top1",)}, ValueError, "not have 'is_top1'"),
        ({"target": torch.zeros(5, 0, dtype=torch.int64)}, ValueError, r"target must have \(5,\), .* at least 1, had"),
        ({"target": torch.zeros(4, 2, dtype=torch.int64)}, ValueError, r"target must have \(5,\), .*had \(4, 2\)"),
        ({"target": torch.zeros(5, 2, 2, dtype=torch.int64)}, ValueError, r"target must have the shape of input with"),
        ({"target": torch.zeros(5, 2)}, TypeError, "target must be int32 or int64 class indices, was torch.float32"),
        ({"target": torch.zeros(5)}, TypeError, "target must be int32 or int64 class indices, was torch.float32"),
        ({"target": None}, TypeError, "target must be a tensor, was NoneType"),
        ({"support": torch.zeros(5, dtype=torch.int64)}, ValueError, r"support must have \(5,\), .* had \(5,\)"),
        ({"support": torch.zeros(4, 2, dtype=torch.int64)}, ValueError, r"support must have \(5,\), .*had \(4, 2\)"),
        ({"support": torch.zeros(5, 2)}, TypeError, "support must be int32 or int64 class indices, was torch.float32"),
        ({"support": [[1]]}, TypeError, "support must be a tensor, was a list of 1"),
        (
            {"support": torch.zeros(5, 2, dtype=torch.int64), "outputs": ("lse", "mean_logit")},
            ValueError,
            "outputs must be among 'logprob', 'entropy', 'lse' with a support, had 'mean_logit'",
        ),
        ({"options": ChunkOptions(gradients="forward")}, ValueError, "options.gradients='forward' needs one loss"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and > 0, was 0.0"),
        ({"ignore_index": "0"}, TypeError, "ignore_index must be an integer"),
        ({"target": torch.tensor([0, 1, 7, 2, 3])}, IndexError, "target at position 2 .* is 7, allowed are"),
        ({"target": torch.tensor([[0, 1]] * 4 + [[-2, 1]])}, IndexError, r"target at position \(4, 0\) is -2"),
        ({"target": torch.tensor([[0, 1]] * 4 + [[0, 7]])}, IndexError, r"target at position \(4, 1\) is 7"),
        ({"support": torch.tensor([[0, 1]] * 4 + [[0, 7]])}, IndexError, r"support at position \(4, 1\) is 7"),
        ({"support": torch.tensor([[0, -1]] * 5)}, IndexError, r"support at position \(0, 1\) is -1"),
    ],
)
def test_wrong_arguments(changes, error, message):
    case = problem(5, 4, 7, ignored=0.0)
    arguments = {"target": case.target} | changes
    with pytest.raises(error, match=message):
        linear_statistics(case.hidden, case.head, **arguments)


@pytest.mark.parametrize("with_support", [False, True])
@pytest.mark.parametrize("name", ["input", "target"])
def test_what_is_no_tensor_is_refused_by_name(name, with_support):
    tensors = {"input": torch.zeros(2, 4), "linear_weight": torch.zeros(8, 4), "target": torch.zeros(2).long()}
    support = torch.zeros(2, 3).long() if with_support else None
    with pytest.raises(TypeError, match=rf"{name} must be a tensor, was NoneType"):
        linear_statistics(**(tensors | {name: None}), support=support)


def test_sparse_ids_are_refused_by_name():
    with pytest.raises(TypeError, match="target must be a dense tensor"):
        linear_statistics(torch.zeros(2, 4), torch.zeros(8, 4), torch.zeros(2, 3).long().to_sparse())
