"""The generalised Jensen-Shannon divergence of lazy logits: its teachers, its precision, and what is not one."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

from chunked_ce import ChunkOptions, LMHead
from tests.integrations.training import largest_allocation
from tests.lazy.jensen_shannon import jsd
from tests.precision import assert_no_worse

TOKENS, VOCAB = (2, 9), 60
MASK = torch.arange(18).view(TOKENS) % 4 != 1


def problem(dtype=torch.float64, teacher_options=None, vocab=VOCAB):
    torch.manual_seed(0)
    head = LMHead(6, vocab, bias=True, options=ChunkOptions(chunk_size=5))
    teacher = LMHead(4, vocab, lazy="always", options=teacher_options).eval()
    for parameter in (*head.parameters(), *teacher.parameters()):
        torch.nn.init.normal_(parameter)
    hidden, states = torch.randn(*TOKENS, 6), torch.randn(*TOKENS, 4) * 2
    return head.to(dtype), teacher.to(dtype), hidden.to(dtype).requires_grad_(), states.to(dtype)


def loss_of(head, teacher, hidden, states, beta=0.5, how="stack", temperature=1.5):
    with torch.no_grad():
        theirs = teacher(states)
    mine = (head(hidden) / temperature).log_softmax(-1)
    return jsd(mine, (theirs / temperature).log_softmax(-1), beta, how)[MASK].sum() / MASK.sum()


def gradients(value, head, hidden):
    return torch.autograd.grad(value, [hidden, *head.parameters()])


FEW = ChunkOptions(memory_budget=1)  # of a teacher, so that its logits are not computed as those of a few tokens are


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.97])
@pytest.mark.parametrize("how", ["stack", "lerp", "swapped"])
@pytest.mark.parametrize("kind", ["lazy", "few tokens", "plain"])
def test_values_and_gradients(kind, how, beta):
    head, teacher, *states = problem(teacher_options=FEW if kind == "lazy" else None)
    other = torch.nn.Linear(4, VOCAB, bias=False, dtype=torch.float64)
    other.load_state_dict(teacher.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = loss_of(head, other if kind == "plain" else teacher, *states, beta, how)
    plain = loss_of(head.eval(), other, *states, beta, how)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradients(ours, head, states[0]), gradients(plain, head, states[0]))


@pytest.mark.parametrize("how", ["stack", "lerp", "swapped"])
@pytest.mark.parametrize("kind", ["lazy", "plain"])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_low_precision(kind, how, beta):
    """No further from float64 than the same code with logits, in bf16."""
    head, teacher, hidden, states = problem(torch.bfloat16, FEW if kind == "lazy" else None)
    other = torch.nn.Linear(4, VOCAB, bias=False, dtype=torch.bfloat16)
    other.load_state_dict(teacher.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = loss_of(head, teacher if kind == "lazy" else other, hidden, states, beta, how)
    plain = loss_of(head.eval(), other, hidden, states, beta, how)
    exact = [one.double() for one in map(copy.deepcopy, (head, other))]
    inputs = [one.detach().double().requires_grad_() for one in (hidden, states)]
    expected = loss_of(*exact, *inputs, beta, how)
    for mine, theirs, right in zip(
        (ours, *gradients(ours, head, hidden)),
        (plain, *gradients(plain, head, hidden)),
        (expected, *gradients(expected, exact[0], inputs[0])),
        strict=True,
    ):
        assert_no_worse(mine, theirs, right.detach().numpy())


def test_no_logits():
    head, teacher, hidden, states = problem(torch.float32, FEW, vocab=4096)

    def step():
        loss_of(head, teacher, hidden, states).backward()

    assert largest_allocation(step) < 18 * 4096 * 4 // 2


def kl(mixture, target):
    return F.kl_div(mixture, target, reduction="none", log_target=True)


def mixed(student, teacher):
    return torch.logaddexp(student - 1.2, teacher + torch.log1p(-torch.tensor(-1.2, dtype=torch.float64).exp()))


def halves(mixture, student, teacher):
    return 0.5 * kl(mixture, teacher) + 0.5 * kl(mixture, student)


# With student and teacher, log-probabilities; the first shares of the mixture are exp(-1.2) and 1 - exp(-1.2).
COMPUTED = {
    "other weights": lambda s, t: (0.5 * kl(mixed(s, t), t) + 0.5 * kl(mixed(s, t), s)).sum(-1),
    "other weights of one mixture": lambda s, t: halves(mixed(s, t), s, t).sum(-1),
    "one of the two": lambda s, t: kl(mixed(s, t), t).sum(-1),
    "the student's": lambda s, t: kl(mixed(s, t), s).sum(-1),
    "summed before": lambda s, t: 0.5 * kl(mixed(s, t), t).sum() + 0.5 * kl(mixed(s, t), s).mean(),
    "batchmean": lambda s, t: F.kl_div(mixed(s, t), t, reduction="batchmean", log_target=True),
    "no distribution": lambda s, t: kl(torch.logaddexp(s - 1.2, t - 0.1), t).sum(-1),
    "another teacher": lambda s, t: kl(mixed(s, t), t.roll(1, -1)).sum(-1),
    "the mixture itself": lambda s, t: mixed(s, t).exp().sum(-1),
    "a difference": lambda s, t: (kl(mixed(s, t), t) - kl(mixed(s, t), s)).sum(-1),
    "words of it": lambda s, t: jsd(s, t)[..., 3],
    "stacked otherwise": lambda s, t: torch.stack([s - 1.2, t - 0.36], 1).logsumexp(2),
    "a teacher with a gradient": lambda s, t: jsd(s, (s * 0.5).log_softmax(-1)).sum(),
    "times something per token": lambda s, t: torch.stack([s * s.detach()[..., :1], t - 0.5]).logsumexp(0).sum(-1),
    "of the stack": lambda s, t: torch.stack([s - 0.7, t - 0.7]).mean(),
    "detached": lambda s, t: kl(mixed(s, t).detach(), s).sum(),
    "plus something": lambda s, t: (0.3 * kl(mixed(s, t), s) + s).sum(-1),
    "something plus it": lambda s, t: (s + 0.3 * kl(mixed(s, t), s)).sum(-1),
}


@pytest.mark.filterwarnings("ignore:LazyLogits does not follow")
@pytest.mark.parametrize("form", COMPUTED)
@pytest.mark.parametrize("is_lazy", [True, False], ids=["lazy teacher", "plain teacher"])
def test_what_is_no_such_divergence(form, is_lazy):
    found = []
    for training in (True, False):
        head, teacher, hidden, states = problem(teacher_options=FEW)
        with torch.no_grad():
            theirs = teacher(states).log_softmax(-1)
        theirs = theirs if is_lazy and training else theirs.materialize()
        value = COMPUTED[form](head.train(training)(hidden).log_softmax(-1), theirs)
        upstream = torch.linspace(1, 2, value.numel(), dtype=value.dtype).view(value.shape)
        found.append((value, *torch.autograd.grad(value, [hidden, *head.parameters()], upstream)))
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:LazyLogits does not follow")
@pytest.mark.parametrize("when", ["before the divergence", "before the sum", "after it"])
def test_a_teacher_that_is_changed_on_the_way(when):
    """The divergence is that of the values at the time, as with logits, or the error says what happened."""
    found = []
    for training in (True, False):
        head, teacher, hidden, states = problem()
        theirs = F.linear(states, teacher.weight).detach().log_softmax(-1)
        mine = head.train(training)(hidden).log_softmax(-1)
        mixture = torch.logaddexp(mine - 0.6931471805599453, theirs - 0.6931471805599453)
        if when == "before the divergence":
            theirs.mul_(0.5)
        of_teacher, of_student = kl(mixture, theirs) * 0.5, kl(mixture, mine) * 0.5
        if when == "before the sum":
            theirs.zero_()
            if training:
                with pytest.raises(RuntimeError, match="changed in place"):
                    (of_teacher + of_student).sum()
                return
        total = of_teacher + of_student
        if when == "after it":
            theirs.zero_()
        found.append(total.sum(-1))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens):
    head, teacher, hidden, states = problem(teacher_options=FEW)
    for training in (True, False):
        with torch.no_grad():
            theirs = teacher(states[0, :tokens]).log_softmax(-1)
        value = jsd(head.train(training)(hidden[0, :tokens]).log_softmax(-1), theirs).sum()
        (grad,) = torch.autograd.grad(value, hidden)
        found = (value, grad) if training else found  # noqa: F821
    torch.testing.assert_close(found, (value, grad))
