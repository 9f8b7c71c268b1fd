"""What a teacher may be: its sources, dtypes and layouts, distributions with zeros, and what is refused."""

import dataclasses
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from chunked_ce import ChunkOptions, Teacher, linear_cross_entropy, linear_divergence, linear_loss, logits_loss
from chunked_ce.objectives import CrossEntropy, Divergence, Objective
from tests.cases import WAYS, chunks, problem
from tests.objectives.teachers import BETAS, divergence, reduced, teacher_of, teacher_tensors
from tests.test_work import work

CLOSE = {"rtol": 2e-5, "atol": 2e-6}
SOME_BETAS = (0.0, 0.4, 1.0)


def expected(case, logits, beta):
    leaves = [x.detach().double().requires_grad_() for x in case.leaves()]
    value = reduced(divergence(F.linear(*leaves), logits, beta), case.target != -100)
    return value.detach(), torch.autograd.grad(value, leaves)


def assert_right(value, leaves, want):
    torch.testing.assert_close(value.double(), want[0], **CLOSE)
    for one, other in zip(torch.autograd.grad(value, leaves), want[1], strict=True):
        torch.testing.assert_close(one.double(), other, **CLOSE)


# --- values ---


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("way", WAYS)
def test_a_student_that_equals_its_teacher(way, beta):
    """Loss and gradient are 0 up to a rounding of the probabilities."""
    case = problem(33, 8, 40, ignored=0.0)
    teacher = Teacher(case.hidden.detach(), case.head.detach())
    value = linear_divergence(case.hidden, case.head, teacher, beta=beta, reduction="sum", options=chunks(8, way))
    assert value.abs() <= 33 * 2e-7
    assert all(grad.abs().max() <= 2e-6 for grad in torch.autograd.grad(value, case.leaves()))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("step", [1e-2, 1e-4])
def test_a_student_close_to_its_teacher(step, beta):
    """The gradient is as small as the difference, and no less precise: fp32 code that subtracts probabilities is."""
    case = problem(33, 8, 40, ignored=0.0)
    logits = F.linear(case.hidden, case.head).detach()
    moved = (logits + step * torch.randn_like(logits)).requires_grad_()
    value = logits_loss(Divergence(beta), moved, case.target, teacher=Teacher(logits=logits), reduction="sum")
    (gradient,) = torch.autograd.grad(value, moved)
    leaf = moved.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(divergence(leaf, logits.double(), beta).sum(), leaf)
    assert (gradient - want).norm() <= 2e-6 / step * want.norm()


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.8])
@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_entries_that_the_teacher_excludes(kind, beta):
    """0 log 0 is 0, on both gradient ways; without the student's support, the reverse divergence is infinite."""
    case = problem(17, 6, 23)
    logits = F.linear(*teacher_tensors(17, 23)).masked_fill(torch.rand(17, 23) < 0.4, -torch.inf)
    logits[:, 3] = 0.0
    given = {"logits": logits} if kind == "logits" else {"probabilities": logits.softmax(-1)}
    for way in WAYS:
        value = linear_divergence(
            case.hidden, case.head, Teacher(**given), target=case.target, beta=beta, options=chunks(5, way)
        )
        assert_right(value, case.leaves(), expected(case, logits.double(), beta))
        reverse = linear_divergence(case.hidden, case.head, Teacher(**given), beta=1.0, options=chunks(5, way))
        assert reverse == torch.inf


@pytest.mark.parametrize("beta", BETAS)
def test_entries_that_both_exclude(beta):
    """Padding of both vocabularies: the losses and gradients of the entries that are left."""
    case, kept = problem(17, 6, 23), torch.rand(23) < 0.6
    bias = torch.zeros(23).masked_fill(~kept, -torch.inf)
    hidden, weight, _ = teacher_tensors(17, 23)
    small = case.fresh(head=case.head.detach()[kept].requires_grad_())
    want, gradients = expected(small, F.linear(hidden, weight[kept]).double(), beta)
    for way in WAYS:
        value = linear_divergence(
            case.hidden,
            case.head,
            Teacher(hidden, weight, bias),
            target=case.target,
            beta=beta,
            linear_bias=bias,
            options=chunks(5, way),
        )
        torch.testing.assert_close(value.double(), want, **CLOSE)
        of_hidden, of_head = torch.autograd.grad(value, case.leaves())
        torch.testing.assert_close(of_hidden.double(), gradients[0], **CLOSE)
        torch.testing.assert_close(of_head[kept].double(), gradients[1], **CLOSE)
        assert not of_head[~kept].any()


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_entries_that_the_student_excludes(beta):
    case, kept = problem(17, 6, 23, ignored=0.0), torch.rand(23) < 0.6
    bias = torch.zeros(23).masked_fill(~kept, -torch.inf)
    teacher, logits = teacher_of("head", *teacher_tensors(17, 23))
    for way in WAYS:
        value = linear_divergence(case.hidden, case.head, teacher, beta=beta, linear_bias=bias, options=chunks(5, way))
        want = divergence(F.linear(case.hidden, case.head, bias).double(), logits, beta).mean()
        torch.testing.assert_close(value.double(), want, **CLOSE)  # inf for the forward divergence
        if beta:
            assert all(grad.isfinite().all() for grad in torch.autograd.grad(value, case.leaves()))


@pytest.mark.parametrize("beta", [1e-30, 1e-6, 1 - 1e-6, 1 - 2**-53])
@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_mixtures_of_nearly_one_distribution(spread, beta):
    """Finite, also where the two distributions have nothing in common."""
    case = problem(9, 6, 23, ignored=0.0, spread=spread)
    teacher, _ = teacher_of("head", *teacher_tensors(9, 23, spread=spread))
    for way in WAYS:
        value = linear_divergence(case.hidden, case.head, teacher, beta=beta, options=chunks(4, way))
        assert 0 <= value < 0.1
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(value, case.leaves()))


# --- sources, dtypes and layouts ---


@pytest.mark.parametrize("beta", SOME_BETAS)
@pytest.mark.parametrize("kind", ["head", "logits", "probabilities"])
def test_words(kind, beta):
    """A draft vocabulary: the teacher is renormalised over its entries."""
    case, size = problem(17, 6, 23), 51
    words = torch.randperm(size)[:23].to(torch.int32)
    teacher, logits = teacher_of(kind, *teacher_tensors(17, size))
    teacher = Teacher(**teacher.tensors, words=words)
    for way in WAYS:
        value = linear_divergence(
            case.hidden, case.head, teacher, target=case.target, beta=beta, options=chunks(5, way)
        )
        assert_right(value, case.leaves(), expected(case, logits[:, words], beta))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_dtypes_of_teacher_and_student(dtypes, way):
    """A frozen bf16 teacher of an fp32 student, and the reverse: each head's products have its own dtype."""
    own, of_teacher = dtypes
    case = problem(33, 8, 40, dtype=own, ignored=0.0)
    hidden, weight, _ = teacher_tensors(33, 40, dtype=of_teacher)
    value = linear_divergence(case.hidden, case.head, Teacher(hidden, weight), options=chunks(8, way))
    logits = F.linear(hidden, weight).double()  # rounded to the teacher's dtype
    student = F.linear(case.hidden, case.head).double()
    torch.testing.assert_close(value.double(), divergence(student, logits, 0.0).mean(), rtol=1e-5, atol=0)


def test_autocast():
    case = problem(33, 8, 40, ignored=0.0)
    hidden, weight, _ = teacher_tensors(33, 40)
    rounded = Teacher(hidden.bfloat16(), weight.bfloat16())
    want = linear_divergence(case.hidden.bfloat16(), case.head.bfloat16(), rounded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_divergence(case.hidden, case.head, Teacher(hidden, weight)) == want


@pytest.mark.parametrize("beta", SOME_BETAS)
def test_logits_of_any_layout(beta):
    """Tokens of a batch without the last of each sequence, a transposed batch, and one row for all: never copied."""
    case = problem(12, 6, 23, ignored=0.0)
    full = torch.randn(3, 5, 23)
    for logits in (full[:, :-1], full[:, 1:].transpose(0, 1), full[0, 0].expand(3, 4, 23), full[:, :4, :].flip(-1)):
        shape = logits.shape[:-1]
        value = linear_divergence(
            case.hidden.view(*shape, 6), case.head, Teacher(logits=logits), beta=beta, options=chunks(5)
        )
        assert_right(value, case.leaves(), expected(case, logits.reshape(12, 23).double(), beta))


def test_logits_are_never_copied_as_a_whole():
    n, vocab = 512, 4096
    case = problem(n, 8, vocab)
    logits = torch.randn(2, n // 2 + 1, vocab)[:, 1:]

    def step():
        value = linear_divergence(
            case.hidden.view(2, n // 2, 8),
            case.head,
            Teacher(logits=logits),
            target=case.target.view(2, -1),
            options=chunks(16),
        )
        return torch.autograd.grad(value, case.leaves())

    assert work(step).largest < 0.1 * n * vocab * 4


@pytest.mark.parametrize("way", WAYS)
def test_a_live_teacher_gets_no_gradient(way):
    case = problem(17, 6, 23)
    tensors = [x.requires_grad_() for x in teacher_tensors(17, 23)]
    value = linear_divergence(case.hidden, case.head, Teacher(*tensors), options=chunks(5, way))
    value.backward()
    assert all(x.grad is None for x in tensors)


@pytest.mark.parametrize("way", WAYS)
def test_a_teacher_in_inference_mode(way):
    case = problem(17, 6, 23)
    with torch.inference_mode():
        hidden, weight, bias = teacher_tensors(17, 23)
    value = linear_divergence(case.hidden, case.head, Teacher(hidden, weight, bias), options=chunks(5, way))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(value, case.leaves()))


# --- cost ---


N, D, V, C = 64, 32, 1024, 16
PRODUCT = N * D * V


@pytest.mark.parametrize(("frozen", "forward", "backward"), [((), 4, 6), (("hidden",), 3, 5), (("head",), 3, 5)])
@pytest.mark.parametrize("beta", SOME_BETAS)
def test_products(beta, frozen, forward, backward):
    """8 N V D in the forward way: products of teacher and student, and two of gradients; frozen parts cost none."""
    case = problem(N, D, V, ignored=0.0)
    for name in frozen:
        getattr(case, name).requires_grad_(False)
    hidden, weight, _ = teacher_tensors(N, V, width=D)

    def step(way):
        value = linear_divergence(case.hidden, case.head, Teacher(hidden, weight), beta=beta, options=chunks(C, way))
        return torch.autograd.grad(value, case.leaves())

    assert work(lambda: step("forward")).multiplications == forward * PRODUCT
    assert work(lambda: step("backward")).multiplications == backward * PRODUCT


@pytest.mark.parametrize(
    ("way", "beta"),
    [
        ("forward", 0.0),
        ("forward", 0.4),
        ("backward", 0.4),
        ("backward", 1.0),
        pytest.param("forward", 1.0, marks=pytest.mark.thorough),
        pytest.param("backward", 0.0, marks=pytest.mark.thorough),
    ],
)
def test_the_largest_tensor(way, beta):
    """Under a tenth of the logits of either, with the library's own plan."""
    n, d, vocab = 2048, 8, 50257
    case = problem(n, d, vocab, ignored=0.0)
    hidden, weight, _ = teacher_tensors(n, vocab, width=4)
    value = None

    def step():
        nonlocal value
        value = linear_divergence(
            case.hidden, case.head, Teacher(hidden, weight), beta=beta, options=ChunkOptions(gradients=way)
        )
        return torch.autograd.grad(value, case.leaves())

    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert max(sizes) < 0.1 * n * vocab * 4


# --- options ---


@pytest.mark.parametrize("beta", SOME_BETAS)
def test_stats_are_the_students(beta):
    case = problem(17, 6, 23)
    teacher, _ = teacher_of("head", *teacher_tensors(17, 23))
    keywords = {"target": case.target, "beta": beta, "options": chunks(5), "reduction": "sum"}
    value, stats = linear_divergence(case.hidden, case.head, teacher, return_stats=True, **keywords)
    _, wanted = linear_cross_entropy(case.hidden, case.head, case.target, return_stats=True)
    torch.testing.assert_close(stats.loss_sum, value.detach())
    torch.testing.assert_close(stats[1:], wanted[1:])


def test_stats_without_targets():
    case = problem(17, 6, 23)
    teacher, _ = teacher_of("head", *teacher_tensors(17, 23))
    _, stats = linear_divergence(case.hidden, case.head, teacher, return_stats=True)
    assert stats.num_tokens == 17 and stats.num_correct == 0


@pytest.mark.parametrize("way", WAYS)
def test_fp32_logits_of_both(way):
    """``logits_dtype`` is that of the teacher's logits as well."""
    case = problem(33, 8, 40, dtype=torch.bfloat16, ignored=0.0)
    hidden, weight, _ = teacher_tensors(33, 40, dtype=torch.bfloat16)
    options = chunks(8, way, logits_dtype=torch.float32)
    value = linear_divergence(case.hidden, case.head, Teacher(hidden, weight), beta=0.4, options=options)
    student, logits = F.linear(case.hidden.double(), case.head.double()), F.linear(hidden.double(), weight.double())
    torch.testing.assert_close(value.double(), divergence(student, logits, 0.4).mean(), rtol=1e-5, atol=0)


@dataclasses.dataclass(frozen=True)
class Jeffreys(Objective):
    """Both divergences and a mixture at once: each reads the gap between teacher and student."""

    statistics = ("forward_kl", "reverse_kl", "mixture_kl", "student_kl")
    teacher_share = 0.4

    def loss(self, rows, tokens):
        return rows.forward_kl + 2 * rows.reverse_kl + 3 * rows.mixture_kl


@pytest.mark.parametrize("way", WAYS)
def test_an_objective_of_ones_own(way):
    case = problem(17, 6, 23)
    teacher, logits = teacher_of("head", *teacher_tensors(17, 23))
    value = linear_loss(Jeffreys(), case.hidden, case.head, case.target, teacher=teacher, options=chunks(5, way))
    leaves = [x.detach().double().requires_grad_() for x in case.leaves()]
    losses = sum(
        factor * divergence(F.linear(*leaves), logits, beta) for factor, beta in ((1, 0.0), (2, 1.0), (3, 0.4))
    )
    want = reduced(losses, case.target != -100)
    assert_right(value, case.leaves(), (want.detach(), torch.autograd.grad(want, leaves)))


def test_a_given_number_of_tokens():
    case = problem(17, 6, 23)
    teacher, _ = teacher_of("head", *teacher_tensors(17, 23))
    value = linear_divergence(case.hidden, case.head, teacher, target=case.target, num_tokens=40)
    total = linear_divergence(case.hidden, case.head, teacher, target=case.target, reduction="sum")
    torch.testing.assert_close(value, total / 40)


@pytest.mark.parametrize("beta", SOME_BETAS)
def test_a_gradient_filter_changes_nothing(beta):
    case = problem(17, 6, 23)
    teacher, _ = teacher_of("head", *teacher_tensors(17, 23))
    values = [
        linear_divergence(case.hidden, case.head, teacher, beta=beta, options=chunks(5, gradient_filter=threshold))
        for threshold in (None, 0.01)
    ]
    first, second = (torch.autograd.grad(value, case.leaves()) for value in values)
    assert values[0] == values[1] and all(map(torch.equal, first, second))


@pytest.mark.parametrize("beta", SOME_BETAS)
@pytest.mark.parametrize("way", WAYS)
def test_second_derivatives(way, beta):
    case = problem(7, 4, 11, dtype=torch.float64)
    tensors = teacher_tensors(7, 11, dtype=torch.float64)

    def value(hidden, head):
        return linear_divergence(hidden, head, Teacher(*tensors), beta=beta, options=chunks(3, way))

    assert torch.autograd.gradgradcheck(value, case.leaves())


@pytest.mark.parametrize("beta", SOME_BETAS)
def test_transforms(beta):
    case = problem(7, 4, 11)
    teacher = Teacher(*teacher_tensors(7, 11))
    value = linear_divergence(case.hidden, case.head, teacher, beta=beta)
    found = torch.func.grad(lambda h: linear_divergence(h, case.head, teacher, beta=beta))(case.hidden.detach())
    torch.testing.assert_close(found, torch.autograd.grad(value, case.hidden)[0])


@pytest.mark.parametrize(
    ("way", "beta", "kind"),
    [
        ("forward", 0.4, "head"),
        ("backward", 0.4, "logits"),
        pytest.param("forward", 0.0, "logits", marks=pytest.mark.thorough),
        pytest.param("backward", 1.0, "head", marks=pytest.mark.thorough),
    ],
)
def test_compiled(way, beta, kind):
    """One graph for all token counts but the first, and the eager result."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(hidden, head, target, tensors):
        teacher = Teacher(*tensors) if kind == "head" else Teacher(logits=tensors[0])
        return linear_divergence(hidden, head, teacher, target=target, beta=beta, options=chunks(5, way))

    for n in (17, 12, 24):
        case = problem(n, 6, 23)
        teacher, _ = teacher_of(kind, *teacher_tensors(n, 23))
        value = step(case.hidden, case.head, case.target, list(teacher.tensors.values()))
        eager = linear_divergence(
            case.hidden, case.head, teacher, target=case.target, beta=beta, options=chunks(5, way)
        )
        torch.testing.assert_close(value, eager)
        compiled = torch.autograd.grad(value, case.leaves())
        torch.testing.assert_close(compiled, torch.autograd.grad(eager, case.leaves()))
    assert counter.frame_count == 2
    torch._dynamo.reset()


# --- errors ---


def test_teachers_that_cannot_be_made():
    hidden, weight, bias = teacher_tensors(5, 7)
    for arguments, message in [
        ({}, "teacher must have hidden and weight, or logits, or probabilities, had none of them"),
        ({"hidden": hidden}, "teacher.weight must be (V, D) beside teacher.hidden, was None"),
        ({"hidden": hidden, "logits": weight}, "had hidden and logits"),
        ({"logits": weight, "bias": bias}, "teacher.bias belongs to teacher.hidden, was given with teacher.logits"),
        ({"logits": weight.long()}, "teacher.logits must be of a floating-point dtype"),
        ({"logits": weight, "words": bias}, "teacher.words must be int32 or int64 class indices"),
        ({"logits": weight, "softcap": 0.0}, "teacher.softcap must be None or finite and > 0, was 0.0"),
        ({"logits": weight, "logit_scale": math.inf}, "teacher.logit_scale must be finite, was inf"),
        ({"probabilities": weight, "softcap": 3.0}, "belong to logits, were given with probabilities"),
        ({"logits": "logits"}, "teacher.logits must be a tensor, was str"),
    ]:
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            Teacher(**arguments)
    for beta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=re.escape(f"beta must be in [0, 1], was {beta}")):
            Divergence(beta)
    with pytest.raises(TypeError, match="beta must be a number, was '1'"):
        Divergence("1")


def test_teachers_that_do_not_fit():
    case = problem(17, 6, 23)
    hidden, weight, bias = teacher_tensors(17, 23)
    logits = hidden @ weight.t()
    for teacher, message in [
        (None, "teacher must be a Teacher for Divergence, was None"),
        (logits, "teacher must be a chunked_ce.Teacher or None, was a torch.float32 tensor of shape (17, 23)"),
        (Teacher(hidden[:5], weight), "teacher.hidden must have shape (*(17,), D), the tokens of target, had (5, 9)"),
        (Teacher(hidden, weight[:, :4]), "teacher.weight must be (V, D) with D = 9, the last dimension of teacher"),
        (Teacher(hidden, weight[:9]), "teacher.weight must have the student's vocabulary, 23, in its first dimension"),
        (Teacher(hidden, weight, bias[:9]), "teacher.bias must have shape (23,), had (9,)"),
        (Teacher(logits=logits[:9]), "teacher.logits must have shape (*(17,), V), the tokens of target, had (9, 23)"),
        (Teacher(probabilities=logits[:, :9]), "teacher.probabilities must have the student's vocabulary, 23"),
        (Teacher(logits=logits, words=torch.arange(9)), "teacher.words must have shape (23,), the student's vocab"),
        (Teacher(logits=logits, words=torch.arange(23) + 1), "teacher.words must be in [0, 23), the teacher's vocab"),
        (Teacher(logits=logits.to("meta")), "teacher.logits must be on the student's device cpu, was on meta"),
    ]:
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            linear_divergence(case.hidden, case.head, teacher, target=case.target)
    with pytest.raises(TypeError, match="teacher is given, but CrossEntropy has none: use Divergence"):
        linear_loss(CrossEntropy(), case.hidden, case.head, case.target, teacher=Teacher(hidden, weight))


def test_an_ignore_index_is_checked_without_targets_too():
    hidden, head = torch.zeros(2, 4), torch.zeros(8, 4)
    with pytest.raises(TypeError, match="ignore_index must be an integer, was 'none'"):
        linear_divergence(hidden, head, Teacher(hidden, head), ignore_index="none")
