"""What becomes of ignored tokens on an accelerator, where the one wait of a loss is, and when there is none.

A CPU stands for the accelerator: the host is said to wait for its values, and each reading is counted.
`test_no_waiting.py` shows that nothing else waits.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from chunked_ce import (
    ChunkOptions,
    TokenMean,
    VocabShard,
    count_tokens,
    cross_entropy,
    devices,
    invocation,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_statistics,
    sequence_weights,
)
from chunked_ce.engine.ignored_tokens import with_ignored
from tests.cases import WAYS, chunks, gradients, problem
from tests.distributed.threads import run_threads
from tests.objectives.teachers import KINDS, teacher_of, teacher_tensors

N, D, V = 13, 5, 11


class Device:
    """How often the host has waited, and what became of the ignored tokens of each call."""

    def __init__(self):
        self.waits, self.decided = 0, []

    def since(self):
        found = self.waits, self.decided
        self.__init__()
        return found


@pytest.fixture
def device(monkeypatch):
    seen = Device()

    def read(values):
        seen.waits += 1
        return values.clone()

    def deciding(*arguments, **keywords):
        call = with_ignored(*arguments, **keywords)
        seen.decided.append(call.specification.settings.ignored)
        return call

    monkeypatch.setattr(devices, "reads_at_once", lambda device: False)
    monkeypatch.setattr(devices, "read", read)
    monkeypatch.setattr(devices, "start_reading", lambda values: values.clone)
    monkeypatch.setattr(invocation, "with_ignored", deciding)
    return seen


def options(way, ignored, **more):
    return chunks(4, way, ignored=ignored, **more)


def loss(case, way, ignored):
    return case.loss(options=options(way, ignored), return_stats=True, label_smoothing=0.1)[0]


def logprobs(case, way, ignored):
    return linear_logprobs(case.hidden, case.head, case.target, temperature=0.5, options=chunks(4, ignored=ignored))


def depths(case, way, ignored):
    hidden, target = (list(x.split([4, N - 4])) for x in (case.hidden, case.target))
    return linear_cross_entropy(hidden, case.head, target, options=options(way, ignored))


def filtered(case, way, ignored):
    return case.loss(options=options(way, ignored, gradient_filter=1e-3))


def supported(case, way, ignored):
    support = torch.arange(4).expand(N, 4)
    keywords = {"outputs": ("logprob", "lse"), "support": support, "options": chunks(4, ignored=ignored)}
    return sum(linear_statistics(case.hidden, case.head, case.target, **keywords)[:1])


def of_ids(case, way, ignored):
    ids = torch.stack([case.target, case.target], -1)
    return linear_statistics(case.hidden, case.head, ids, options=chunks(4, ignored=ignored)).logprob


def taught(kind):
    def divergence(case, way, ignored):
        teacher, _ = teacher_of(kind, *teacher_tensors(N, V))
        return linear_divergence(case.hidden, case.head, teacher, target=case.target, options=options(way, ignored))

    return divergence


FUNCTIONS = {function.__name__: function for function in (loss, logprobs, depths, filtered, supported, of_ids)}
FUNCTIONS |= {f"divergence from {kind}": taught(kind) for kind in KINDS}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_wait(name, way, device, monkeypatch):
    """Forward and backward together wait once, if tokens may be dropped; the results are those of a CPU."""
    function, found = FUNCTIONS[name], {}
    for share in (0.25, 0.0, 1.1):
        case = problem(N, D, V, ignored=share)
        for ignored in ("auto", "drop", "mask"):
            value = function(case, way, ignored)
            found[share, ignored] = value, *gradients(value.sum(), case)
            waits = int(ignored != "mask")
            decided = "mask" if ignored == "mask" else "drop" if share else "none"
            assert device.since() == (waits, [decided])
    monkeypatch.undo()
    for (share, _), values in found.items():
        case = problem(N, D, V, ignored=share)
        value = function(case, way, "drop")
        torch.testing.assert_close(values, (value, *gradients(value.sum(), case)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_existing_logits(garbage, device):
    """No product is saved: they are masked, without a wait, unless dropping is asked for."""
    target = problem(N, D, V).target
    scores = torch.randn(N, V).masked_fill((target == -100).unsqueeze(-1), garbage).requires_grad_()
    found = []
    for ignored, waits in (("auto", 0), ("mask", 0), ("drop", 1)):
        value = cross_entropy(scores, target, options=ChunkOptions(ignored=ignored))
        found.append((value, *torch.autograd.grad(value, scores)))
        assert device.since() == (waits, ["drop" if waits else "mask"])
        torch.testing.assert_close(found[0], found[-1])
        assert found[-1][1].isfinite().all() and found[-1][1][target == -100].count_nonzero() == 0


@pytest.mark.parametrize("input_grad", ["complete", "sequence"])
@pytest.mark.parametrize("way", WAYS)
def test_sharded(way, input_grad, device):
    """Each rank waits once; all have the same chunks, whichever tokens count in them."""
    case = problem(12, D, V, seed=3)
    case.target[:5] = -100  # the whole share of the first rank, and more

    def of_rank(rank, ranks):
        vocab = VocabShard.split(V, input_grad=input_grad)
        tokens = slice(rank * 4, rank * 4 + 4) if input_grad == "sequence" else slice(None)
        leaves = [
            x.detach().clone().requires_grad_() for x in (case.hidden[tokens], case.head[vocab.start : vocab.stop])
        ]
        value = linear_cross_entropy(*leaves, case.target, vocab=vocab, options=options(way, "auto"))
        return value.detach(), *torch.autograd.grad(value, leaves)

    values, hidden, head = zip(*run_threads(of_rank, 3), strict=True)
    assert device.since() == (3, ["drop"] * 3)
    expected = case.loss()
    of_hidden, of_head = gradients(expected, case)
    for value in values:
        torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(torch.cat(head), of_head)
    torch.testing.assert_close(torch.cat(hidden) if input_grad == "sequence" else hidden[1], of_hidden)


def test_out_of_range(device):
    """An assertion of the device, not an error that would need another wait."""
    case = problem(N, D, V)
    case.target[2] = V
    for ignored in ("auto", "mask"):
        with pytest.raises(RuntimeError, match=r"neither in \[0, V\) nor ignore_index"):
            case.loss(options=ChunkOptions(ignored=ignored))
    assert device.waits == 1


# ---- nothing to wait for ----


def test_counted_by_a_mean(device):
    """A window's mean reads its targets; a loss of one of them need not wait for what the device does by then."""
    case = problem(N, D, V)
    expected = gradients(case.loss(reduction="sum", options=ChunkOptions(ignored="mask")), case)
    device.since()
    for over in (
        lambda: TokenMean.over([case.target]),
        lambda: TokenMean.over(case.target, weights=sequence_weights(case.target)),
        lambda: count_tokens(case.target),
    ):
        over()
        value = case.loss(reduction="sum")
        torch.testing.assert_close(gradients(value, case), expected)
        assert device.since() == (0, ["drop"])
    depths = list(case.target.split([4, N - 4]))
    TokenMean.over(depths)
    linear_cross_entropy(list(case.hidden.split([4, N - 4])), case.head, depths)
    assert device.since() == (0, ["drop"])


def test_none_to_ignore(device):
    """Without a target, as in distillation, every token counts."""
    case = problem(N, D, V, ignored=0.0)
    teacher, _ = teacher_of("logits", *teacher_tensors(N, V))
    gradients(linear_divergence(case.hidden, case.head, teacher), case)
    assert device.since() == (0, ["none"])


def test_counted_otherwise(device):
    """What was counted serves the very same target, unchanged, with the same ``ignore_index``."""
    case = problem(N, D, V)
    TokenMean.over(case.target)
    for target, keywords in (
        (case.target.clone(), {}),
        (case.target, {"ignore_index": 3}),
        (case.target[None], {}),
    ):
        hidden = case.hidden.view(*target.shape, D)
        right = target.where(target != -100, 3) if keywords else target
        value = linear_cross_entropy(hidden, case.head, right, **keywords)
        assert device.since()[0] == 1
    case.target[:4] = -100
    value = case.loss()
    assert device.since()[0] == 1
    torch.testing.assert_close(value, case.loss(options=ChunkOptions(ignored="mask")))


def test_targets_on_the_host():
    """Shapes and errors on the meta device, which holds no values: only the host's targets can say what counts."""
    case = problem(N, D, V)
    hidden, head = case.hidden.to("meta"), case.head.to("meta")
    value, stats = linear_cross_entropy(hidden, head, case.target, return_stats=True)
    assert value.device.type == stats.num_tokens.device.type == "meta"
    ids = torch.stack([case.target, case.target], -1)
    assert linear_statistics(hidden, head, ids).logprob.shape == (N, 2)
    temperature = torch.ones(N, device="meta")
    assert linear_logprobs(hidden, head, case.target, temperature=temperature).device.type == "meta"
    linear_cross_entropy([hidden, hidden], head, [case.target, case.target.to("meta")])
    with pytest.raises(ValueError, match=r"target must be on input's device cpu or the CPU, was on meta"):
        linear_cross_entropy(case.hidden, case.head, case.target.to("meta"))
    with pytest.raises(ValueError, match=r"token_weight must be on input's device meta, was on cpu"):
        linear_cross_entropy(hidden, head, case.target, token_weight=torch.ones(N))


# ---- where values must not be read ----


def test_while_a_graph_is_captured(device, monkeypatch):
    monkeypatch.setattr(devices, "captures", lambda device: True)
    case = problem(N, D, V)
    gradients(case.loss(options=chunks(4)), case)
    TokenMean.over(case.target)
    assert device.since() == (0, ["mask"])
    monkeypatch.setattr("chunked_ce.checks.captures", lambda device: True)
    with pytest.raises(ValueError, match=r"target must be on input's device meta, was on cpu"):
        linear_cross_entropy(case.hidden.to("meta"), case.head.to("meta"), case.target)
    with pytest.raises(ValueError, match=r"options\.ignored must be 'auto' or 'mask' while a CUDA graph is captured"):
        case.loss(options=ChunkOptions(ignored="drop"))
    filtered = ChunkOptions(gradient_filter="auto")
    with torch.no_grad():
        case.loss(options=filtered)
    with pytest.raises(ValueError, match=r"options\.gradient_filter must be None for gradients in a CUDA graph"):
        case.loss(options=filtered)


def test_modes_and_transforms(device):
    """Where something else runs the operations, it may have no values."""
    case = problem(N, D, V)
    with FlopCounterMode(display=False):
        case.loss()
    assert device.since() == (0, ["mask"])
    torch.func.grad(lambda head: linear_cross_entropy(case.hidden, head, case.target))(case.head)
    assert device.since() == (0, ["mask"])


@pytest.mark.parametrize(
    ("ignored", "waits"), [("auto", 0), ("drop", 2), pytest.param("mask", 0, marks=pytest.mark.thorough)]
)
@pytest.mark.parametrize("way", WAYS)
def test_compiled(way, ignored, waits, device):
    """Compiled code masks; if it is to drop, each of its operators reads what it needs."""

    def step(hidden, head, target):
        return linear_cross_entropy(hidden, head, target, options=chunks(4, way, ignored=ignored))

    case = problem(N, D, V)
    torch._dynamo.reset()
    value = torch.compile(step, fullgraph=True, backend="aot_eager")(case.hidden, case.head, case.target)
    found = value, *gradients(value, case)
    assert device.waits == (waits if way == "backward" else min(waits, 1))
    torch.testing.assert_close(found, (case.loss(), *gradients(case.loss(), case)))


@pytest.mark.parametrize("ignored", ["keep", None, 1, True, ("mask",)])
def test_wrong_values(ignored):
    with pytest.raises(ValueError, match="ignored must be 'auto', 'drop' or 'mask', was"):
        ChunkOptions(ignored=ignored)
