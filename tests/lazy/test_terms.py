"""Entropies, means and what else statistics answer: values and gradients of plain logits, in every spelling."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical

from chunked_ce import ChunkOptions, LazyLogits, LMHead
from chunked_ce.lazy.logits import Lazy
from tests.integrations.training import largest_allocation
from tests.lazy.jensen_shannon import jsd

WIDTH, VOCAB = 5, 40
TOKENS = (2, 6)
WORDS = (torch.arange(12).view(TOKENS) * 7) % VOCAB
SOME = torch.stack([WORDS, (WORDS + 3) % VOCAB, (WORDS * 5) % VOCAB], -1)
MASK = torch.arange(12).view(TOKENS) % 5 != 1
TEMPERATURE = torch.linspace(0.5, 2.0, 6)


def entropy(z):
    logp = F.log_softmax(z, dim=-1)
    return -(torch.exp(logp) * logp).sum(-1)


def of_pieces(z):
    flat = z.reshape(-1, z.shape[-1])
    return torch.cat([entropy(piece) for piece in flat.split(5, dim=0)]).reshape(z.shape[:-1])


def log_probability(z, words=WORDS):
    best = z.gather(-1, words.unsqueeze(-1)).squeeze(-1)
    return best - torch.stack([torch.logsumexp(row, dim=-1) for row in z])


def shifted(z):
    return z - z.logsumexp(-1, keepdim=True)


def by_logsumexp(z, product=torch.mul):
    return z.logsumexp(-1) - product(z.softmax(-1), z).sum(-1)


ENTROPIES = {
    "exp(logp) * logp": entropy,
    "logp * exp(logp)": lambda z: -torch.sum(z.log_softmax(-1) * z.log_softmax(-1).exp(), dim=-1),
    "softmax * log_softmax": lambda z: -(F.softmax(z, dim=-1) * F.log_softmax(z, dim=-1)).sum(dim=-1),
    "softmax and its log": lambda z: -(z.softmax(-1) * z.softmax(-1).log()).sum(-1, keepdim=True),
    "logsumexp - softmax * z": lambda z: z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1),
    "mul and neg": lambda z: torch.neg(torch.mul(z.softmax(-1), z.log_softmax(-1))).sum(-1),
    "shifted": lambda z: -(shifted(z).exp() * shifted(z)).sum(-1),
    "softmax of shifted": lambda z: -(shifted(z).softmax(-1) * shifted(z)).sum(-1),
    "Categorical": lambda z: Categorical(logits=z).entropy(),
    "Categorical without checks": lambda z: Categorical(logits=z, validate_args=False).entropy(),
    "at a temperature": lambda z: entropy(z / 0.7),
    "with a softcap": lambda z: entropy(torch.tanh(z / 3) * 3),
    "in pieces": of_pieces,
    "of some tokens": lambda z: entropy(z[MASK]),
    "of some products": lambda z: -(z.softmax(-1) * z.log_softmax(-1))[MASK].sum(-1),
    "the words in front": lambda z: -(z.mT.softmax(1) * z.mT.log_softmax(1)).sum(1),
    "mean": lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)[MASK].mean(),
    "of all": lambda z: (z.softmax(-1) * z.log_softmax(-1)).sum(),
    "without gradient": lambda z: entropy(z.detach()),
}
OTHERS = {
    "sum over words": lambda z: z.sum(-1),
    "mean over words": lambda z: z.mean(dim=-1, keepdim=True),
    "mean of all": lambda z: z.mean(),
    "mean of some": lambda z: z[MASK].mean(),
    "sum of all": lambda z: torch.sum(z),
    "nansum": lambda z: z[:1].nansum(),
    "mean of words and tokens": lambda z: z.mean(dim=(1, 2)),
    "sum of log-probabilities": lambda z: z.log_softmax(-1).sum(),
    "mean of log-probabilities": lambda z: z.log_softmax(-1).mean(-1),
    "sum of probabilities": lambda z: z.softmax(-1).sum(-1),
    "collision": lambda z: z.softmax(-1).square().sum(-1),
    "collision, a product": lambda z: (z.softmax(-1) * z.softmax(-1)).sum(-1),
    "collision, a power": lambda z: (z.softmax(-1) ** 2).sum(-1),
    "logits and a number": lambda z: (2 * z + 1.5).sum(-1),
    "one minus probabilities": lambda z: (1 - z.softmax(-1)).sum(-1),
    "several log-probabilities": lambda z: z.log_softmax(-1).gather(-1, SOME),
    "several probabilities": lambda z: z.softmax(-1).gather(-1, SOME),
    "several logits": lambda z: z.gather(-1, SOME),
    "one of each": lambda z: z.log_softmax(-1).flatten(0, 1)[torch.arange(12), WORDS.flatten()],
    "one logit of each": lambda z: z.flatten(0, 1)[torch.arange(12), WORDS.flatten()],
    "one logit of each, three indices": lambda z: z[torch.arange(2)[:, None], torch.arange(6), WORDS],
    "one word": lambda z: z[..., 3],
    "one number": lambda z: z[0, 1, -3],
    "one word of one token": lambda z: z[1, 2].log_softmax(-1)[7],
    "a token's words": lambda z: z[0, [1, 2], [5, 6]],
    "one word of some tokens": lambda z: z[:, [1, 2], 5],
    "some words": lambda z: z.log_softmax(-1)[..., torch.tensor([5, 1, 5])],
    "index_select of words": lambda z: z.index_select(-1, torch.tensor([5, 1, 5])),
    "log-probabilities by logsumexp": log_probability,
    "shifted and gathered": lambda z: shifted(z).gather(-1, SOME),
    "shifted by a view": lambda z: (z - z.logsumexp(-1).unsqueeze(-1)).gather(-1, SOME),
    "shifted by more than a number": lambda z: shifted(z + 1.5).gather(-1, SOME),
    "shifted by what is no log-sum-exp": lambda z: z.log_softmax(-1).logsumexp(-1) + z.sum(-1),
    "shifted by another number": lambda z: (z - z.detach().amax(-1, keepdim=True)).logsumexp(-1),
    "Categorical.log_prob": lambda z: Categorical(logits=z).log_prob(WORDS),
    "amax": lambda z: z.amax(-1),
    "amin": lambda z: torch.amin(z, dim=(2,), keepdim=True),
    "largest of all": lambda z: z.max(),
    "min": lambda z: tuple(z.min(-1)),
    "temperature of each token": lambda z: entropy(z / TEMPERATURE.unsqueeze(-1)),
    "temperature of each token, logsumexp - softmax * z": lambda z: by_logsumexp(z / TEMPERATURE[:, None]),
    "temperature of each token in place, the other way": lambda z: by_logsumexp(
        z.clone().div_(TEMPERATURE[:, None]), lambda p, z: z * p
    ),
    "shifted logits at a temperature of each token": lambda z: by_logsumexp(z / TEMPERATURE[:, None] - 3),
    "loss at a temperature of each token": lambda z: F.cross_entropy(
        (z * TEMPERATURE.unsqueeze(-1)).flatten(0, 1), WORDS.flatten()
    ),
    "log-probability at a temperature of each token": lambda z: log_probability(z / TEMPERATURE[:, None]),
    "weights of each token": lambda z: (z.softmax(-1) * z.log_softmax(-1) * MASK.unsqueeze(-1)).sum(),
    "a shift of each token": lambda z: F.cross_entropy((z + TEMPERATURE[:, None]).flatten(0, 1), WORDS.flatten()),
    "trained weights": lambda z: (z.log_softmax(-1) * z.logsumexp(-1, keepdim=True)).gather(-1, SOME),
}


def bias(z):
    return torch.linspace(-1, 1, z.shape[-1])[None]


BIASES = {
    "a bias of the words": lambda z: F.cross_entropy((z + bias(z)).flatten(0, 1), WORDS.flatten()),
    "a bias and a scale": lambda z: entropy(2 * ((z / 3 + bias(z)[0].to(z.dtype)) - bias(z) * 0.5)),
    "its log-probabilities": lambda z: (z + bias(z)).log_softmax(-1).gather(-1, SOME),
    "its logits": lambda z: (bias(z).to(z.dtype) + z).gather(-1, SOME),
    "its log-sum-exp": lambda z: (z + bias(z)).logsumexp(-1),
    "its mean": lambda z: (z + bias(z))[MASK].mean(),
}


def soft(z, normal=True):
    """Soft labels of each token: the last has none, those of the others need not sum to 1."""
    of_words = torch.linspace(0, 3, z.shape[-1], dtype=z.dtype)
    labels = torch.rand(TOKENS, generator=torch.Generator().manual_seed(0)).to(z.dtype)[..., None] + of_words.sin() ** 2
    labels = labels.masked_fill(torch.arange(z.shape[-1]) % 7 == 1, 0)
    labels[1, 5] = 0
    return labels.softmax(-1) if normal else labels


SOFT = {
    "kl_div": lambda z: F.kl_div(z.log_softmax(-1), soft(z), reduction="batchmean"),
    "kl_div, sum": lambda z: F.kl_div(F.log_softmax(z / 2, dim=-1), soft(z, False), reduction="sum"),
    "kl_div, mean": lambda z: F.kl_div(input=z.log_softmax(-1), target=soft(z)),
    "kl_div, of each token": lambda z: F.kl_div(z.log_softmax(-1), soft(z, False), reduction="none").sum(-1),
    "kl_div, of some tokens": lambda z: F.kl_div(z.log_softmax(-1), soft(z), reduction="none")[MASK].sum() / 2,
    "kl_div, a log target": lambda z: F.kl_div(z.log_softmax(-1), soft(z, False), reduction="sum", log_target=True),
    "kl_div, the other way": lambda z: F.kl_div(
        soft(z).log(), z.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1),
    "kl_div, the other way, not normalised": lambda z: F.kl_div(soft(z, False), z.softmax(-1), reduction="sum"),
    "kl_div, to itself": lambda z: F.kl_div(z.log_softmax(-1), z.detach().softmax(-1) / 1, reduction="sum"),
    "kl_div, a temperature of each token": lambda z: F.kl_div(
        (z / TEMPERATURE[:, None]).log_softmax(-1), soft(z), reduction="none"
    ).sum(-1),
    "kl_div, a temperature of each token, the other way": lambda z: F.kl_div(
        soft(z).log(), ((z + bias(z)) / TEMPERATURE[:, None]).softmax(-1), reduction="sum"
    ),
    "kl_div, a temperature of each token, a log target": lambda z: F.kl_div(
        (z / TEMPERATURE[:, None]).log_softmax(-1), soft(z).log(), reduction="batchmean", log_target=True
    ),
    "kl_div to itself, a temperature of each token": lambda z: F.kl_div(
        (z / TEMPERATURE[:, None]).log_softmax(-1), z.detach().softmax(-1), reduction="sum"
    ),
    "soft labels": lambda z: -(soft(z, False) * z.log_softmax(-1)).sum(-1),
    "soft labels, weighted": lambda z: (z.log_softmax(-1) * soft(z) * MASK[..., None]).sum() * -0.5,
    "class probabilities": lambda z: F.cross_entropy(z.flatten(0, 1), soft(z).flatten(0, 1)),
    "class probabilities, each": lambda z: F.cross_entropy(
        z.flatten(0, 1), soft(z, False).flatten(0, 1), reduction="none"
    ),
}
JSD = {
    "jsd": lambda z: jsd(z.log_softmax(-1), soft(z).log(), 0.3).sum() / 7,
    "jsd, of each token": lambda z: jsd((z / 2).log_softmax(-1), soft(z).log(), 0.9)[MASK].sum(-1),
    "jsd, mean": lambda z: jsd(z.log_softmax(-1), soft(z).log()).mean(),
    "jsd, logaddexp and lerp": lambda z: jsd(z.log_softmax(-1), soft(z).log(), 0.25, how="lerp").sum(-1).mean(),
    "jsd, the teacher first": lambda z: jsd(z.log_softmax(-1), soft(z).log(), 0.25, how="swapped").sum(-1),
    "jsd, a temperature of each token": lambda z: jsd(
        (2 * z / TEMPERATURE[:, None]).log_softmax(-1), soft(z).log(), 0.3
    ).sum(-1),
    "jsd, to itself": lambda z: jsd(z.log_softmax(-1), (z.detach() * 0.6).log_softmax(-1), 0.6).sum(-1),
}
PARTS = {
    "first words": lambda z: F.cross_entropy(z[..., :17].flatten(0, 1), WORDS.flatten() % 17),
    "words in the middle": lambda z: entropy(z[..., 15:33]),
    "words of some tokens": lambda z: z[:, 1:, -30:].log_softmax(-1).gather(-1, SOME[:, 1:] % 30),
    "words of tokens by number": lambda z: z[0, [4, 1], 3:].mean(-1),
    "words of words": lambda z: z[..., 3:30][:, :, 2:20].logsumexp(-1),
    "narrow": lambda z: z.narrow(-1, 4, 20).mean(),
    "words with biases": lambda z: entropy((z + bias(z))[..., 7:29] / 2 - bias(z)[..., :22]),
    "soft labels of words": lambda z: F.kl_div(z[..., 4:24].log_softmax(-1), soft(z)[..., 4:24] * 2, reduction="sum"),
    "a teacher's words": lambda z: F.kl_div(
        (z / 2)[..., 4:].log_softmax(-1), z.detach()[..., 4:].softmax(-1), reduction="sum"
    ),
    "every other word": lambda z: entropy(torch.tanh(z)[..., ::2]),
    "best of some words": lambda z: tuple(z[..., 5:25].max(-1)),
}
SMALL = {
    "cpu": lambda z: z.cpu().mean(),
    "type": lambda z: z.type(z.dtype).mean(),
    "requires_grad_": lambda z: z.requires_grad_().mean(),
    "mT": lambda z: z.mT.logsumexp(1),
    "tensor_split": lambda z: z.tensor_split(2, dim=1)[1].mean(),
    "split by name": lambda z: torch.tensor_split(input=z, indices=(2,), dim=1)[0].mean(),
    "cat": lambda z: entropy(torch.cat([z[0, 2:], z[1, :3], z[0, :1]])),
    "cat of later tokens": lambda z: torch.cat([z[:, 1:], z[:, :1]], dim=1).logsumexp(-1),
    "stack": lambda z: F.cross_entropy(torch.stack([z[1, 4], z[0, 2]]), WORDS[0, :2]),
    "stack, later": lambda z: torch.stack([row[2:5] for row in z], dim=1)[1:].mean(-1),
    "type by name": lambda z: z.type("torch.DoubleTensor" if z.dtype == torch.float64 else "torch.FloatTensor").mean(),
    "tensor_split by a tensor": lambda z: z.tensor_split(torch.tensor([2, 3]), dim=1)[2].mean(),
    "cat of scaled tokens": lambda z: torch.cat([torch.tanh(row / 0.7) for row in z.split(1)], dim=1).logsumexp(-1),
    "cat of log-probabilities": lambda z: torch.stack([row.log_softmax(-1) for row in z]).gather(-1, SOME),
    "best of log-probabilities": lambda z: tuple(z.log_softmax(-1).max(-1)),
    "worst of negative ones": lambda z: (-2 * z.log_softmax(-1) + 1).amin(-1),
    "best at a temperature of each token": lambda z: tuple((z / TEMPERATURE[:, None]).topk(3)),
    "best probability": lambda z: z[:, 1:].softmax(-1).amax(-1, keepdim=True),
    "a temperature of each token in place": lambda z: entropy(z[:, 1:].div_(TEMPERATURE[1:, None])),
    "softmax by name": lambda z: torch.softmax(input=z, dim=-1).gather(index=SOME, dim=-1),
}
FOLLOWED = ENTROPIES | OTHERS | BIASES | SOFT | JSD | PARTS | SMALL


def problem(dtype=torch.float64, **keywords):
    torch.manual_seed(0)
    head = LMHead(WIDTH, VOCAB, bias=True, dtype=dtype, options=ChunkOptions(chunk_size=5), **keywords)
    with torch.no_grad():
        head.weight.normal_()
        head.bias.normal_()
    return head, torch.randn(*TOKENS, WIDTH, dtype=dtype, requires_grad=True)


def outcome(form, head, hidden):
    """Values and gradients."""
    found = form(head(hidden))
    found = found if isinstance(found, tuple) else (found,)
    assert not any(isinstance(one, Lazy) for one in found)
    gradients = []
    for value in found:
        if value.requires_grad:
            upstream = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view(value.shape)
            gradients += torch.autograd.grad(value, [hidden, *head.parameters()], upstream, retain_graph=True)
    return found, gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FOLLOWED)
def test_values_and_gradients(name, dtype):
    head, hidden = problem(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = outcome(FOLLOWED[name], head, hidden)
    expected = outcome(FOLLOWED[name], head.eval(), hidden)
    close = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    for mine, theirs in zip(ours, expected, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert one.shape == other.shape and one.requires_grad == other.requires_grad
            torch.testing.assert_close(one, other, **close)


def test_no_logits():
    """The largest tensor is a block of two tokens' logits: here the head itself is smaller."""
    head, hidden = LMHead(2, 4096, options=ChunkOptions(chunk_size=1)), torch.randn(*TOKENS, 2, requires_grad=True)
    labels = torch.rand(*TOKENS, 4096)
    forms = {name: form for name, form in FOLLOWED.items() if name not in SOFT | JSD | PARTS} | {
        "first words": lambda z: F.cross_entropy(z[..., :4000].flatten(0, 1), WORDS.flatten()),
        "many words": lambda z: entropy(z[..., torch.arange(0, 4096, 3)]),
        "jsd, to itself": JSD["jsd, to itself"],
        "kl_div": lambda z: F.kl_div(z.log_softmax(-1), labels),
        "kl_div, the other way": lambda z: F.kl_div(labels, z.log_softmax(-1), log_target=True),
        "kl_div, to itself": lambda z: F.kl_div(z.log_softmax(-1), z.detach().log_softmax(-1), log_target=True),
        "soft labels": lambda z: (labels * z.log_softmax(-1))[MASK].sum(-1),
        "class probabilities": lambda z: F.cross_entropy(z.flatten(0, 1), labels.flatten(0, 1)),
    }

    def every_form():
        for form in forms.values():
            found = form(head(hidden))
            found = found[0] if isinstance(found, tuple) else found
            if found.requires_grad:
                found.sum().backward()

    assert largest_allocation(every_form) < 12 * 4096 * 4 // 3


@pytest.mark.parametrize("name", ["exp(logp) * logp", "several logits", "mean of all", "trained weights"])
def test_materialized_on_the_way(name):
    """What was lazy at first goes on with the values, once something else has computed them."""
    head, hidden = problem()

    def form(z):
        logp = z.log_softmax(-1)
        product = logp.exp() * logp
        if isinstance(z, Lazy):
            z.materialize()
        return product.sum(-1) + product.exp().sum(-1) + FOLLOWED[name](z).sum()

    for one, other in zip(outcome(form, head, hidden), outcome(form, head.eval(), hidden), strict=True):
        torch.testing.assert_close(one, other)


def test_a_trained_bias():
    found = []
    for training in (True, False):
        (head, hidden), bias = problem(), torch.linspace(-1, 1, VOCAB, dtype=torch.float64, requires_grad=True)
        logits = head.train(training)(hidden) * 0.5 + bias
        assert (type(logits) is LazyLogits) == training
        value = entropy(logits).square().sum()
        found.append((value, *torch.autograd.grad(value, [hidden, bias, *head.parameters()])))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("log_target", [True, False])
@pytest.mark.parametrize("way", ["forward", "reverse"])
def test_a_lazy_teacher(way, log_target):
    """Neither the logits of the student nor those of the teacher are formed."""
    found = []
    for lazy in (True, False):
        (head, hidden), (teacher, states) = problem(), problem()
        teacher = LMHead(WIDTH, VOCAB, bias=True, dtype=torch.float64, lazy="always" if lazy else "auto").eval()
        torch.nn.init.normal_(teacher.weight, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            theirs = teacher(states + 1) / 2
        mine = torch.tanh(head.train(lazy)(hidden))
        pair = (mine, theirs) if way == "forward" else (theirs, mine)
        target = pair[1].log_softmax(-1) if log_target else pair[1].softmax(-1)
        value = F.kl_div(pair[0].log_softmax(-1), target, reduction="none", log_target=log_target).sum(-1)
        found.append((value, *torch.autograd.grad(value.square().sum(), [hidden, *head.parameters()])))
    torch.testing.assert_close(*found)


def test_new_tensors_like_lazy_ones():
    head, hidden = problem()
    logits = head(hidden)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(torch.zeros_like(logits), torch.zeros(*TOKENS, VOCAB, dtype=torch.float64))
        for form in (lambda z: z.mT, lambda z: z[:, 1:], lambda z: z[..., 3:20], lambda z: z.permute(2, 0, 1)):
            found, plain = torch.zeros_like(form(logits)), torch.zeros_like(form(torch.empty(logits.shape)))
            assert found.shape == plain.shape and found.stride() == plain.stride()
        assert torch.full_like(input=logits, fill_value=3, dtype=torch.float32).dtype == torch.float32
        assert logits.type() == "torch.DoubleTensor" and logits.requires_grad_() is logits


COMPUTED = {
    "a softcap, then a temperature of each token": lambda z: F.kl_div(
        (torch.tanh(z) / TEMPERATURE[:, None]).log_softmax(-1), soft(z), reduction="sum"
    ),
    "exponentials that overflow": lambda z: (z * 400).detach().exp().gather(-1, z.argmin(-1, keepdim=True)),
    "a stack behind the words": lambda z: torch.stack([z], -1).sum(-1),
    "words put together": lambda z: torch.cat([z, z[..., :3]], -1).logsumexp(-1),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_what_is_computed(name):
    head, hidden = problem()
    with pytest.warns(UserWarning, match="does not follow"):
        ours = outcome(COMPUTED[name], head, hidden)
    torch.testing.assert_close(ours, outcome(COMPUTED[name], head.eval(), hidden))


def test_what_is_put_together_again_has_the_values_of_its_parts():
    head, hidden = problem()
    logits = head(hidden)
    parts = torch.cat([logits[:, 3:], logits[:, :2]], dim=1)
    best, values = parts.max(-1), parts.materialize()
    assert type(parts) is LazyLogits and torch.equal(best.values, values.amax(-1))
    plain = logits.materialize()
    assert torch.equal(values, torch.cat([plain[:, 3:], plain[:, :2]], dim=1))
