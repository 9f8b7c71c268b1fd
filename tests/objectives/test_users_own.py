"""An objective that a user writes runs on every source of logits, rank count, gradient way and backend."""

import dataclasses
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from chunked_ce import ChunkOptions, VocabShard, linear_cross_entropy, linear_loss, logits_loss
from chunked_ce.objectives import CrossEntropy, Objective
from tests.cases import REDUCTIONS_AND_WAYS, WAYS, chunks, problem
from tests.distributed.threads import run_threads
from tests.objectives.users_own import FIELDS, OBJECTIVES, Focal, Policy, expected, per_token

CLOSE = {"rtol": 2e-5, "atol": 2e-6}
NAMES = tuple(OBJECTIVES)


def assert_right(value, leaves, name, case, **keywords):
    want, gradients = expected(name, case, **keywords)
    torch.testing.assert_close(value.double(), want, **CLOSE)
    if gradients is not None:
        got = torch.autograd.grad(value, leaves)
        for one, other in zip(got, gradients, strict=True):
            torch.testing.assert_close(one.double(), other, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_a_head(name, reduction, way):
    case, weight = problem(17, 6, 23, bias=True), torch.rand(17) + 0.5
    value = linear_loss(
        OBJECTIVES[name],
        case.hidden,
        case.head,
        case.target,
        linear_bias=case.bias,
        reduction=reduction,
        token_weight=weight,
        softcap=4.0,
        options=chunks(5, way),
        **per_token(name, 17),
    )
    assert_right(value, case.leaves(), name, case, reduction=reduction, softcap=4.0, token_weight=weight)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 0, 9])
def test_few_tokens_and_none(name, n):
    case = problem(n, 6, 23, ignored=0.0)
    for way in WAYS:
        tensors = per_token(name, n)
        value = linear_loss(
            OBJECTIVES[name], case.hidden, case.head, case.target, reduction="sum", options=chunks(4, way), **tensors
        )
        assert_right(value, case.leaves(), name, case, reduction="sum")


@pytest.mark.parametrize("name", NAMES)
def test_no_token_counts(name):
    case = problem(7, 6, 23, ignored=1.1)
    for way in WAYS:
        tensors = per_token(name, 7)
        value = linear_loss(OBJECTIVES[name], case.hidden, case.head, case.target, options=chunks(4, way), **tensors)
        assert value == 0
        assert all(grad.count_nonzero() == 0 for grad in torch.autograd.grad(value, case.leaves()))


@pytest.mark.parametrize("name", NAMES)
def test_logits_that_exist(name):
    case = problem(17, 6, 23)
    logits = (case.hidden @ case.head.t()).detach().requires_grad_()
    value = logits_loss(OBJECTIVES[name], logits, case.target, **per_token(name, 17))
    dense = dataclasses.replace(case, hidden=logits, head=case.head.detach())
    assert_right(value, [logits], name, dense)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("input_grad", ["complete", "sequence"])
@pytest.mark.parametrize("name", NAMES)
def test_ranks(name, input_grad, ranks):
    """The vocabulary sharded, unevenly for three ranks; hidden states sharded by tokens too."""
    case = problem(12, 6, 23)
    want, gradients = expected(name, case)

    def call(rank: int, world_size: int) -> None:
        vocab = VocabShard.split(23, input_grad=input_grad)
        share = 12 // world_size
        tokens = slice(rank * share, rank * share + share) if input_grad == "sequence" else slice(None)
        hidden = case.hidden.detach()[tokens].clone().requires_grad_()
        head = case.head.detach()[vocab.start : vocab.stop].clone().requires_grad_()
        for way in WAYS:
            value = linear_loss(
                OBJECTIVES[name],
                hidden,
                head,
                case.target,
                vocab=vocab,
                options=chunks(4, way),
                **per_token(name, 12),
            )
            torch.testing.assert_close(value.double(), want, **CLOSE)
            of_hidden, of_head = torch.autograd.grad(value, [hidden, head])
            torch.testing.assert_close(of_hidden.double(), gradients[0][tokens], **CLOSE)
            torch.testing.assert_close(of_head.double(), gradients[1][vocab.start : vocab.stop], **CLOSE)
        if input_grad == "complete":
            logits = hidden.detach() @ head.t()
            value = logits_loss(OBJECTIVES[name], logits, case.target, vocab=vocab, **per_token(name, 12))
            torch.testing.assert_close(value.double(), want, **CLOSE)
            (of_head,) = torch.autograd.grad(value, head)
            torch.testing.assert_close(of_head.double(), gradients[1][vocab.start : vocab.stop], **CLOSE)

    run_threads(call, ranks)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=[pytest.mark.thorough] * ((name == "policy") != (way == "backward")))
        for name in NAMES
        for way in WAYS
    ],
)
def test_compiled(name, way):
    """One graph for all token counts but the first."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def loss(hidden, head, target, tensors):
        return linear_loss(OBJECTIVES[name], hidden, head, target, options=chunks(5, way), **tensors)

    for n in (17, 9, 24):
        case = problem(n, 6, 23)
        value = loss(case.hidden, case.head, case.target, per_token(name, n))
        assert_right(value, case.leaves(), name, case)
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_made_in_compiled_code():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(hidden, head, target):
        return linear_loss(Focal(gamma=2.5), hidden, head, target)

    case = problem(17, 6, 23)
    assert_right(loss(case.hidden, case.head, case.target), case.leaves(), "focal", case)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_of_derivatives(name):
    case = problem(7, 4, 11, dtype=torch.float64)

    def loss(hidden, head):
        return linear_loss(OBJECTIVES[name], hidden, head, case.target, **per_token(name, 7, torch.float64))

    assert torch.autograd.gradgradcheck(loss, (case.hidden, case.head))


@pytest.mark.parametrize("name", NAMES)
def test_torch_func(name):
    case = problem(17, 6, 23)

    def loss(hidden, head):
        return linear_loss(OBJECTIVES[name], hidden, head, case.target, **per_token(name, 17))

    _, gradients = expected(name, case)
    got = torch.func.grad(loss, argnums=(0, 1))(*(leaf.detach() for leaf in case.leaves()))
    for one, other in zip(got, gradients, strict=True):
        torch.testing.assert_close(one.double(), other, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_autocast(name, way):
    """The same bits as of tensors in the autocast dtype."""
    case = problem(17, 6, 23)
    keywords = {"options": chunks(5, way), **per_token(name, 17)}
    with torch.autocast("cpu", torch.bfloat16):
        value = linear_loss(OBJECTIVES[name], case.hidden, case.head, case.target, **keywords)
    narrow = [leaf.detach().bfloat16().requires_grad_() for leaf in case.leaves()]
    expected_value = linear_loss(OBJECTIVES[name], *narrow, case.target, **keywords)
    assert torch.equal(value, expected_value)
    grads = torch.autograd.grad(value, case.leaves())
    for one, other in zip(grads, torch.autograd.grad(expected_value, narrow), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one.bfloat16(), other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_narrow_dtypes(name, dtype):
    """No worse than the dense formula in the same dtype, in the root mean square."""
    case = problem(96, 32, 301, dtype=dtype)
    _, gradients = expected(name, case)
    named, fields = per_token(name, 96), FIELDS[name]
    counted = case.target != -100
    plain = type(OBJECTIVES[name]).dense(
        (case.hidden @ case.head.t()).float(), case.target.where(counted, 0), **named, **fields
    )
    plain = torch.autograd.grad(plain.where(counted, 0).sum() / counted.sum(), case.leaves())
    for way in WAYS:
        value = linear_loss(OBJECTIVES[name], case.hidden, case.head, case.target, options=chunks(40, way), **named)
        got = torch.autograd.grad(value, case.leaves())
        for ours, theirs, right in zip(got, plain, gradients, strict=True):
            error, allowed = (float((one.double() - right).norm()) for one in (ours, theirs))
            assert error <= 1.25 * allowed


@pytest.mark.parametrize("way", WAYS)
def test_the_filter(way):
    """Where the tail has low rank; else the exact way."""
    case = problem(64, 16, 300, spread=6.0, ignored=0.0)
    for name in NAMES:
        found = []
        for filter in (None, 1e-4):
            options = chunks(20, way, gradient_filter=filter)
            tensors = per_token(name, 64)
            value = linear_loss(OBJECTIVES[name], case.hidden, case.head, case.target, options=options, **tensors)
            found.append(torch.autograd.grad(value, case.leaves()))
        for exact, filtered in zip(*found, strict=True):
            assert (filtered - exact).norm() <= 0.05 * exact.norm()
            assert name != "policy" or torch.equal(filtered, exact)


def test_stats():
    case = problem(17, 6, 23)
    value, stats = linear_loss(OBJECTIVES["focal"], case.hidden, case.head, case.target, return_stats=True)
    _, reference = linear_cross_entropy(case.hidden, case.head, case.target, return_stats=True)
    torch.testing.assert_close(stats.loss_sum / stats.num_tokens, value)
    for name in ("num_tokens", "num_correct", "entropy_sum", "lse_max"):
        assert torch.equal(getattr(stats, name), getattr(reference, name))


def test_frozen_tensors_cost_nothing():
    case = problem(17, 6, 23)
    case.head.requires_grad_(False)
    value = linear_loss(OBJECTIVES["focal"], case.hidden, case.head, case.target)
    (gradient,) = torch.autograd.grad(value, case.hidden)
    assert gradient.shape == case.hidden.shape


def test_an_objective_that_ignores_the_row():
    @dataclasses.dataclass(frozen=True)
    class Constant(Objective):
        def loss(self, rows, tokens):
            return torch.ones_like(rows.log_sum)

    case = problem(17, 6, 23, ignored=0.0)
    for way in WAYS:
        value = linear_loss(Constant(), case.hidden, case.head, case.target, options=chunks(5, way))
        assert value == 1
        if value.requires_grad:
            grads = torch.autograd.grad(value, case.leaves(), allow_unused=True)
            assert all(grad is None or grad.count_nonzero() == 0 for grad in grads)


def test_an_exported_program_finds_the_class(tmp_path):
    """In a process that has not imported the file of the objective."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(6, 23, bias=False)

        def forward(self, hidden, target):
            return linear_loss(Focal(2.5), hidden, self.head.weight, target)

    case, model = problem(17, 6, 23), Model()
    arguments = case.hidden.detach(), case.target
    torch.export.save(torch.export.export(model, arguments), tmp_path / "model.pt2")
    torch.save((arguments, model(*arguments).detach()), tmp_path / "expected.pt")
    code = (
        "import sys, torch, chunked_ce; "
        "arguments, expected = torch.load(sys.argv[2]); "
        "assert torch.equal(torch.export.load(sys.argv[1]).module()(*arguments), expected)"
    )
    files = [str(tmp_path / "model.pt2"), str(tmp_path / "expected.pt")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, env=os.environ | {"PYTHONPATH": os.getcwd()})


def test_objectives_pickle():
    assert pickle.loads(pickle.dumps(Focal(3.0))) == Focal(3.0)


def test_a_loss_that_a_subclass_changes():
    """The slopes that its parent wrote out are of another loss."""

    @dataclasses.dataclass(frozen=True)
    class Squared(CrossEntropy):
        def loss(self, rows, tokens):
            return super().loss(rows, tokens) ** 2

    case = problem(9, 4, 7)
    found = []
    for way in WAYS:
        value = linear_loss(Squared(0.1), case.hidden, case.head, case.target, options=chunks(4, way))
        found.append([value, *torch.autograd.grad(value, case.leaves())])
    torch.testing.assert_close(*found)


def test_fields_that_are_equal_but_not_the_same():
    @dataclasses.dataclass(frozen=True)
    class Flagged(Objective):
        flag: object = 1

        def loss(self, rows, tokens):
            return rows.nll * (2.0 if self.flag is True else 1.0)

    case = problem(9, 4, 7)
    values = [linear_loss(Flagged(flag), case.hidden, case.head, case.target) for flag in (1, True)]
    assert values[1] == 2 * values[0]


@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_a_masked_token_counts(way):
    """Masked tokens stay: what a loss makes of their rows and tensors may be infinite."""

    @dataclasses.dataclass(frozen=True)
    class Shared(Objective):
        per_token = ("length",)

        def loss(self, rows, tokens):
            return rows.nll / tokens.length

    case, length = problem(9, 4, 7), torch.full((9,), 2.0)
    ignored = case.target == -100
    assert ignored.any()
    arguments = case.hidden, case.head, case.target
    value = linear_loss(
        Shared(), *arguments, length=length.masked_fill(ignored, 0), options=chunks(4, way, ignored="mask")
    )
    expected = case.loss() / 2
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, case.leaves()) for x in (value, expected)))


# ---- wrong arguments ----


def call(objective, **keywords):
    case = problem(5, 4, 7)
    return linear_loss(objective, case.hidden, case.head, case.target, **keywords)


@pytest.mark.parametrize(
    ("objective", "keywords", "error", "message"),
    [
        (CrossEntropy, {}, TypeError, "objective must be a chunked_ce.objectives.Objective, was <class"),
        (None, {}, TypeError, "objective must be a chunked_ce.objectives.Objective, was None"),
        (
            Policy(),
            {},
            TypeError,
            r"advantage must be a tensor .* for Policy\(bonus=0.1\), was None",
        ),
        (Policy(), {"advantage": torch.ones(4)}, ValueError, r"advantage must have shape \(5,\), had \(4,\)"),
        (Policy(), {"advantage": torch.ones(5, requires_grad=True)}, ValueError, "advantage requires grad"),
        (Policy(), {"advantage": 1.0}, TypeError, "advantage must be a tensor"),
        (Focal(), {"advantage": torch.ones(5)}, TypeError, "advantage is no tensor of Focal: for each token it takes"),
        (Focal(), {"options": ChunkOptions(gradients="forward"), "reduction": "none"}, ValueError, "gradients='forw"),
        (Focal("2"), {}, TypeError, "must be|unsupported operand"),
    ],
)
def test_wrong_arguments(objective, keywords, error, message):
    with pytest.raises(error, match=message):
        call(objective, **keywords)


def test_fields_that_are_no_plain_values():
    @dataclasses.dataclass(frozen=True)
    class Tensors(Objective):
        values: object = None

        def loss(self, rows, tokens):
            return rows.nll

    with pytest.raises(TypeError, match="values of Tensors must be"):
        call(Tensors(torch.ones(3)))
    with pytest.raises(TypeError, match="values of Tensors must be"):
        call(Tensors(float("nan")))


def test_fields_that_travel_nowhere():
    @dataclasses.dataclass(frozen=True)
    class Hidden(Objective):
        scale: float = dataclasses.field(default=1.0, compare=False)

        def loss(self, rows, tokens):
            return self.scale * rows.nll

    with pytest.raises(TypeError, match="scale of Hidden must be a field that is compared"):
        call(Hidden(3.0))


def test_losses_of_another_shape():
    for wrong in (lambda nll: nll.mean(), lambda nll: nll.unsqueeze(1)):

        @dataclasses.dataclass(frozen=True)
        class Wrong(Objective):
            def loss(self, rows, tokens, wrong=wrong):
                return wrong(rows.nll)

        for way in WAYS:
            with pytest.raises(ValueError, match=r"the loss of Wrong must have shape \(\d,\), one loss for each token"):
                call(Wrong(), options=chunks(5, way))


def test_names_that_tokens_have():
    for name in ("vocab_size", "target_weight", "weight"):

        @dataclasses.dataclass(frozen=True)
        class Named(Objective):
            per_token = (name,)

            def loss(self, rows, tokens):
                return rows.nll

        with pytest.raises(
            ValueError, match=f"objective.per_token must not name an argument of the loss, had '{name}'"
        ):
            call(Named(), **{name: torch.ones(5)})


def test_statistics_that_do_not_exist():
    @dataclasses.dataclass(frozen=True)
    class Unknown(Objective):
        statistics = ("median",)

        def loss(self, rows, tokens):
            return rows.nll

    with pytest.raises(ValueError, match=r"objective.statistics must be names among .*, had 'median'"):
        call(Unknown())


def test_fields_of_a_cross_entropy():
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], was 2"):
        CrossEntropy(label_smoothing=2)
    with pytest.raises(ValueError, match="class_weight must have shape"):
        CrossEntropy(class_weight=torch.ones(3, 3))
    case = problem(9, 4, 7)
    weight = torch.rand(7)
    for way in WAYS:
        values = [
            linear_loss(CrossEntropy(0.1, 0.2, weight), case.hidden, case.head, case.target, options=chunks(4, way)),
            case.loss(label_smoothing=0.1, z_loss=0.2, weight=weight, options=chunks(4, way)),
        ]
        assert torch.equal(*values)
