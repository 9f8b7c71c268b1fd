"""The head: a linear layer to its users, wrapped and unwrapped, right when it cannot be lazy."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.nn.utils import prune

from chunked_ce import ChunkOptions, LazyLogits, LMHead, linear_cross_entropy
from tests.test_work import work

WIDTH, VOCAB = 6, 50


def data(*shape, dtype=torch.float32):
    hidden = torch.randn(*(shape or (8,)), WIDTH, dtype=dtype, requires_grad=True)
    return hidden, torch.randint(VOCAB, shape or (8,))


class Tied(nn.Module):
    """A language model that is not of any library."""

    def __init__(self, tied=True):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.out.weight = self.embedding.weight

    def forward(self, ids):
        return self.out(self.body(self.embedding(ids)).tanh())


def gradients(model, ids):
    model.zero_grad()
    logits = model(ids)
    F.cross_entropy(logits.flatten(0, -2), ids.flatten()).backward()
    return type(logits), [parameter.grad.clone() for parameter in model.parameters()]


def assert_close(first, second):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


# ---- a linear layer ----


def test_is_a_linear_layer():
    head, linear = LMHead(WIDTH, VOCAB, bias=True), nn.Linear(WIDTH, VOCAB)
    assert isinstance(head, nn.Linear)
    assert head.state_dict().keys() == linear.state_dict().keys()
    linear.load_state_dict(head.state_dict())
    hidden, _ = data()
    assert torch.equal(head.eval()(hidden), linear(hidden))
    assert LMHead(WIDTH, VOCAB).bias is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_copies_keep_their_settings(copied, wrapped):
    if wrapped:
        model = nn.Sequential(nn.Linear(WIDTH, VOCAB))
        head = LMHead.wrap(model, "0", z_loss=0.5)
    else:
        head = LMHead(WIDTH, VOCAB, z_loss=0.5)
    hidden, target = data()
    assert torch.equal(F.cross_entropy(copied(head)(hidden), target), F.cross_entropy(head(hidden), target))


def test_printed_without_computing():
    head = LMHead(WIDTH, VOCAB, z_loss=0.5)
    assert "z_loss=0.5" in repr(head)
    logits = head(data(2, 3)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for said in (repr(logits), str(logits), f"{logits}", repr([logits])):
            assert "LazyLogits(shape=(2, 3, 50), dtype=torch.float32, device=cpu)" in said
    assert not logits.is_computed


def test_answers_as_the_logits_would():
    head = LMHead(WIDTH, VOCAB)
    hidden, _ = data(2, 3)
    lazy, logits = head(hidden), head.eval()(hidden)
    assert isinstance(lazy, torch.Tensor) and torch.is_tensor(lazy) and torch.is_floating_point(lazy)
    for name in ("shape", "dtype", "device", "requires_grad", "is_leaf", "ndim", "layout", "is_cuda", "itemsize"):
        assert getattr(lazy, name) == getattr(logits, name), name
    for name in ("size", "dim", "numel", "stride", "is_contiguous", "element_size", "nelement", "__len__"):
        assert getattr(lazy, name)() == getattr(logits, name)(), name
    assert lazy.size(-1) == VOCAB and len({lazy, lazy}) == 1
    assert lazy.transpose(0, 1).stride() == logits.transpose(0, 1).stride()
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        lazy.transpose(0, 1).view(-1, VOCAB)
    assert not lazy.detach().requires_grad and not lazy.is_computed


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_of_logits_are_tensors(copied):
    head = LMHead(WIDTH, VOCAB)
    hidden, _ = data()
    assert torch.equal(copied(head(hidden)), head.eval()(hidden))


# ---- keywords ----


def test_keywords_apply_where_the_loss_is_taken():
    keywords = {"z_loss": 0.25, "label_smoothing": 0.125, "options": ChunkOptions(chunk_size=3)}
    head = LMHead(WIDTH, VOCAB, **keywords, softcap=2.0, logit_scale=3.0)
    hidden, target = data()
    with torch.no_grad():
        head.weight *= 5
    expected = linear_cross_entropy(hidden, head.weight, target, **keywords, softcap=2.0, logit_scale=3.0)
    assert torch.equal(F.cross_entropy(head(hidden), target), expected)
    logits = head(hidden)
    with pytest.warns(UserWarning, match=r"z_loss=0\.25 and label_smoothing=0\.125 of the head apply to F\.cross_ent"):
        logits.mean()
    torch.testing.assert_close(F.cross_entropy(logits, target), expected)
    torch.testing.assert_close(head.eval()(hidden), 2 * torch.tanh(3 * hidden @ head.weight.T / 2))


def test_label_smoothing_in_two_places():
    hidden, target = data()
    head = LMHead(WIDTH, VOCAB, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing: the loss was given 0\.2, the head 0\.1"):
        F.cross_entropy(head(hidden), target, label_smoothing=0.2)
    same = F.cross_entropy(head(hidden), target, label_smoothing=0.1)
    assert torch.equal(same, F.cross_entropy(head(hidden), target))


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"z_loss": -1.0}, ValueError, "z_loss must be finite and >= 0"),
        ({"softcap": 0.0}, ValueError, "softcap must be None or finite and > 0"),
        ({"label_smoothing": 2.0}, ValueError, r"label_smoothing must be in \[0, 1\]"),
        ({"logit_scale": "a"}, TypeError, "logit_scale must be a number"),
        ({"options": 3}, TypeError, "options must be a ChunkOptions"),
        ({"vocab": 3}, TypeError, "vocab must be a VocabShard"),
        ({"lazy": "never"}, ValueError, "lazy must be 'auto' or 'always'"),
        ({"reduction": "sum"}, TypeError, "reduction is not a keyword of a head"),
        ({"weight": None}, TypeError, "weight is not a keyword of a head"),
    ],
)
def test_bad_keywords(keywords, error, message):
    with pytest.raises(error, match=message):
        LMHead(WIDTH, VOCAB, **keywords)
    with pytest.raises(error, match=message):
        LMHead.wrap(Tied(), **keywords)


def test_lazy_in_evaluation_if_asked():
    hidden, _ = data()
    assert type(LMHead(WIDTH, VOCAB).eval()(hidden)) is torch.Tensor
    head = LMHead(WIDTH, VOCAB, lazy="always").eval()
    with torch.no_grad():
        assert type(head(hidden)) is LazyLogits


def test_targets_are_checked():
    hidden, _ = data()
    head = LMHead(WIDTH, VOCAB)
    with pytest.raises(IndexError, match="50"):
        F.cross_entropy(head(hidden), torch.full((8,), VOCAB))
    with pytest.raises(ValueError, match="target must have the shape"):
        F.cross_entropy(head(hidden), torch.zeros(7, dtype=torch.long))
    for bad in (-100, VOCAB):
        with pytest.raises(IndexError):
            head(hidden).log_softmax(-1).gather(-1, torch.full((8, 1), bad))
        with pytest.raises(IndexError):
            head(hidden).gather(-1, torch.full((8, 1), bad))


# ---- wrap ----


@pytest.mark.parametrize("tied", [True, False])
def test_wrap_and_unwrap(tied):
    model, ids = Tied(tied), torch.randint(VOCAB, (2, 5))
    kind, expected = gradients(model, ids)
    parameters, out = list(model.parameters()), model.out
    head = LMHead.wrap(model, options=ChunkOptions(chunk_size=2))
    assert head is out is model.out
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert (model.out.weight is model.embedding.weight) == tied
    lazy, found = gradients(model, ids)
    assert lazy is LazyLogits and kind is torch.Tensor
    assert_close(found, expected)
    assert LMHead.unwrap(model) == 1 and LMHead.unwrap(model) == 0
    assert type(model.out) is nn.Linear and vars(model.out).keys() == vars(nn.Linear(1, 1)).keys()
    assert gradients(model, ids)[0] is torch.Tensor
    LMHead.wrap(model)


def test_wrap_takes_the_module_named():
    model = nn.ModuleDict({"a": nn.Linear(WIDTH, VOCAB), "b": nn.Sequential(nn.Linear(WIDTH, VOCAB))})
    assert LMHead.wrap(model, "b.0") is model["b"][0]
    assert type(model["a"]) is nn.Linear


def test_wrap_finds_what_the_model_says():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, VOCAB), nn.Linear(WIDTH, VOCAB)

        def get_output_embeddings(self):
            return self.second

    assert LMHead.wrap(nn.Sequential(Model()))
    inner = Model()
    assert LMHead.wrap(nn.Sequential(inner)) is inner.second


class Shifted(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


def test_wrap_refuses_what_it_cannot_follow():
    with pytest.raises(ValueError, match=r"no output embedding found: .* 0 of its linear layers"):
        LMHead.wrap(nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)))
    two = nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB), nn.Linear(WIDTH, VOCAB))
    with pytest.raises(ValueError, match=r"2 of its linear layers have the 50 outputs .* \(1, 2\)"):
        LMHead.wrap(two)
    with pytest.raises(ValueError, match="module must name a module of the model, was 'head'"):
        LMHead.wrap(two, "head")
    with pytest.raises(ValueError, match=r"must be an nn\.Linear, was Embedding"):
        LMHead.wrap(two, "0")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, was int"):
        LMHead.wrap(3)
    with pytest.raises(ValueError, match="was Shifted with a forward of its own"):
        LMHead.wrap(nn.Sequential(Shifted(WIDTH, VOCAB)), "0")
    model = Tied()
    LMHead.wrap(model)
    with pytest.raises(ValueError, match="is an LMHead already"):
        LMHead.wrap(model)
    assert type(model.out) is LMHead


def test_a_bias_set_later():
    model, ids = Tied(), torch.randint(VOCAB, (2, 5))
    LMHead.wrap(model)
    model.out.bias = nn.Parameter(torch.linspace(-1, 1, VOCAB))
    lazy, found = gradients(model, ids)
    LMHead.unwrap(model)
    assert lazy is LazyLogits
    assert_close(found, gradients(model, ids)[1])


# ---- precision ----


@pytest.mark.parametrize("outside", [True, False])
def test_autocast_of_the_call_holds_for_the_loss(outside):
    head, (hidden, target) = LMHead(WIDTH, VOCAB), data()
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(hidden)
        inside = F.cross_entropy(logits, target)
        expected = linear_cross_entropy(hidden, head.weight, target)
    assert logits.dtype == torch.bfloat16
    found = F.cross_entropy(logits.float(), target) if outside else inside
    assert torch.equal(found, expected) and not torch.equal(found, linear_cross_entropy(hidden, head.weight, target))
    with pytest.warns(UserWarning):
        assert (logits + 0).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_low_and_high_precision(dtype):
    head = LMHead(WIDTH, VOCAB, dtype=dtype)
    hidden, target = data(dtype=dtype)
    logits = head(hidden)
    assert logits.dtype == dtype
    loss = F.cross_entropy(logits, target)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(loss, linear_cross_entropy(hidden, head.weight, target))
    assert logits.float().dtype == torch.float32 and logits.to(torch.bfloat16).dtype == torch.bfloat16


def test_no_more_precision_than_there_is():
    head, (hidden, target) = LMHead(WIDTH, VOCAB), data()
    with pytest.warns(UserWarning, match="does not follow double"):
        logits = head(hidden).double()
    expected = F.cross_entropy(head.eval()(hidden).double(), target)
    assert torch.equal(F.cross_entropy(logits, target), expected) and expected.dtype == torch.float64


# ---- what is frozen costs nothing ----


def test_a_frozen_head_gets_no_gradient_and_costs_no_product():
    head, hidden = LMHead(32, 512), torch.randn(64, 32, requires_grad=True)
    target = torch.randint(512, (64,))

    def step():
        loss = F.cross_entropy(head(hidden), target)
        loss.backward()
        return loss

    trained = work(step).multiplications
    head.requires_grad_(False)
    assert trained == 3 * 64 * 32 * 512 and work(step).multiplications == 2 * 64 * 32 * 512
    head.requires_grad_(True)
    hidden.requires_grad_(False)
    assert work(step).multiplications == 2 * 64 * 32 * 512
    head.requires_grad_(False)
    assert not head(hidden).requires_grad and not F.cross_entropy(head(hidden), target).requires_grad
    assert work(lambda: F.cross_entropy(head(hidden), target)).multiplications == 64 * 32 * 512


def test_no_grad_takes_no_gradient():
    head, (hidden, target) = LMHead(WIDTH, VOCAB), data()
    with torch.no_grad():
        logits = head(hidden)
    assert not logits.requires_grad and not F.cross_entropy(logits, target).requires_grad
    logits = head(hidden)
    with torch.no_grad():
        assert not F.cross_entropy(logits, target).requires_grad
    assert F.cross_entropy(logits, target).requires_grad
    with torch.inference_mode():
        logits = head(hidden)
        loss = F.cross_entropy(logits, target)
    torch.testing.assert_close(loss, F.cross_entropy(head.eval()(hidden), target).detach())


class Payload:
    """Something that a graph holds."""


class Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.payload = Payload()
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_what_is_detached_keeps_no_graph():
    head = LMHead(WIDTH, VOCAB)
    hidden, target = data()
    hidden = Kept.apply(hidden)
    graph = weakref.ref(hidden.grad_fn.payload)
    kept = head(hidden).detach()[1:]
    assert graph() is not None
    del hidden
    gc.collect()
    assert graph() is None
    assert F.cross_entropy(kept, target[1:]) > 0


# ---- graphs ----


def test_several_losses_and_backwards():
    head, (hidden, target) = LMHead(WIDTH, VOCAB), data()
    linear = copy.deepcopy(head).eval()

    def grads(module):
        logits = module(hidden)
        first, second = F.cross_entropy(logits[:4], target[:4]), F.cross_entropy(logits, target, reduction="none")
        total = 3 * first + (second * torch.arange(8)).sum()
        once = torch.autograd.grad(total, [hidden, module.weight], retain_graph=True)
        return *once, *torch.autograd.grad(total, [hidden, module.weight])

    assert_close(grads(head), grads(linear))


class Seen(torch.autograd.Function):
    """What engines do to outputs, to be called in the backward."""

    seen = 0

    @staticmethod
    def forward(ctx, x):
        return x.detach() if Seen.how == "detach" else x.clone() if Seen.how == "clone" else x

    @staticmethod
    def backward(ctx, grad):
        Seen.seen += 1
        return grad


@pytest.mark.parametrize("how", ["detach", "clone", "same"])
@pytest.mark.parametrize(
    "use",
    [
        lambda z, y: F.cross_entropy(z[1:], y[1:]),
        lambda z, y: F.cross_entropy(z, y),
        lambda z, y: -z.float().log_softmax(-1).gather(-1, y[:, None]).mean(),
        lambda z, y: F.cross_entropy(z[:4], y[:4]) + z.logsumexp(-1).sum(),
    ],
)
@pytest.mark.parametrize("frozen", ["", "head", "hidden"])
def test_functions_in_the_graph_are_part_of_it(how, use, frozen):
    head, (hidden, target) = LMHead(WIDTH, VOCAB), data()
    leaves = [hidden] if frozen == "head" else [head.weight] if frozen == "hidden" else [hidden, head.weight]
    hidden.requires_grad_(frozen != "hidden")
    head.requires_grad_(frozen != "head")
    Seen.how, Seen.seen = how, 0
    found = torch.autograd.grad(use(Seen.apply(head(hidden)), target), leaves)
    assert Seen.seen == 1
    assert_close(found, torch.autograd.grad(use(head.eval()(hidden), target), leaves))


class LossOfOnesOwn(torch.autograd.Function):
    """As fused losses are written: the gradient of the logits comes from the values."""

    @staticmethod
    def forward(ctx, logits, target):
        log_probs = logits.float().log_softmax(-1)
        ctx.save_for_backward(log_probs.exp() - F.one_hot(target, VOCAB))
        return -log_probs.gather(-1, target[:, None]).sum()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad, None


@pytest.mark.filterwarnings("ignore:LazyLogits")
@pytest.mark.parametrize("frozen", ["", "weight", "bias", "hidden"])
@pytest.mark.parametrize("form", [lambda z: z, lambda z: (z * 2).tanh()[:8], lambda z: -z.log_softmax(-1)])
def test_functions_that_form_the_gradient_of_logits(form, frozen):
    head, (hidden, target) = LMHead(WIDTH, VOCAB, bias=True), data()
    named = {"weight": head.weight, "bias": head.bias, "hidden": hidden}
    for name, leaf in named.items():
        leaf.requires_grad_(name != frozen)
    leaves = [leaf for leaf in named.values() if leaf.requires_grad]

    def found(module):
        loss = 3 * LossOfOnesOwn.apply(form(module(hidden)), target)
        return loss, *torch.autograd.grad(loss, leaves)

    lazy = found(head)
    assert_close(lazy, found(head.eval()))


@pytest.mark.filterwarnings("ignore:LazyLogits")
@pytest.mark.parametrize("change", [lambda z: z.mul_(2), lambda z: z.clamp_(-0.1, 0.1), lambda z: z[:, :3].zero_()])
def test_such_a_function_of_logits_changed_in_place(change):
    head, (hidden, target) = LMHead(WIDTH, VOCAB), data()
    logits = head(hidden)
    change(logits)
    loss = LossOfOnesOwn.apply(logits, target)
    with pytest.raises(RuntimeError, match=r"changed in place: call materialize\(\)"):
        loss.backward()
    values = head(hidden).materialize()
    change(values)
    found = torch.autograd.grad(LossOfOnesOwn.apply(values, target), hidden)
    plain = head.eval()(hidden)
    change(plain)
    assert_close(found, torch.autograd.grad(LossOfOnesOwn.apply(plain, target), hidden))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", [F.cross_entropy, lambda z, y: z.softmax(-1)[range(8), y].log().sum()])
def test_a_checkpointed_loss(form, reentrant):
    head, (hidden, target) = LMHead(WIDTH, VOCAB), data()

    def found(module):
        loss = torch.utils.checkpoint.checkpoint(form, module(hidden), target, use_reentrant=reentrant)
        hidden.grad = head.weight.grad = None
        loss.backward()
        return loss, hidden.grad, head.weight.grad

    lazy = found(head)
    assert_close(lazy, found(head.eval()))


def test_gradients_that_meet_at_lazy_logits_add_up():
    head, (hidden, target) = LMHead(WIDTH, VOCAB), data()
    Seen.how = "detach"

    def found(module):
        logits = module(hidden)
        first, second = Seen.apply(logits), Seen.apply(logits)
        loss = F.cross_entropy(first, target) + 2 * F.cross_entropy(second[3:], target[3:])
        return torch.autograd.grad(loss, [hidden, module.weight])

    assert_close(found(head), found(copy.deepcopy(head).eval()))


def test_hooks_on_logits_are_called():
    head, (hidden, target) = LMHead(WIDTH, VOCAB), data()
    logits, called = head(hidden), []
    logits.register_hook(lambda grad: called.append(grad.shape))
    F.cross_entropy(logits[2:], target[2:]).backward()
    assert called == [(8, VOCAB)]
    found = hidden.grad
    hidden.grad = None
    F.cross_entropy(head.eval()(hidden)[2:], target[2:]).backward()
    torch.testing.assert_close(found, hidden.grad)


def test_the_gradient_of_logits_is_refused_unless_they_exist():
    head, (hidden, target) = LMHead(WIDTH, VOCAB), data()
    logits = head(hidden)
    logits.register_hook(lambda grad: grad * 0.5)
    with pytest.raises(RuntimeError, match=r"gradient of lazy logits, which is never formed\. .* materialize\(\)"):
        F.cross_entropy(logits, target).backward()
    for allow_unused in (True, False):
        with pytest.raises(RuntimeError, match="the gradient of lazy logits is never formed"):
            logits = head(hidden)
            torch.autograd.grad(F.cross_entropy(logits, target), logits, allow_unused=allow_unused)
    logits = head(hidden).materialize()
    (found,) = torch.autograd.grad(F.cross_entropy(logits, target), logits)
    assert found.shape == (8, VOCAB)


def test_second_derivatives():
    head = LMHead(WIDTH, VOCAB, options=ChunkOptions(gradients="backward"), dtype=torch.float64)
    hidden, target = data(dtype=torch.float64)

    def second(module):
        loss = F.cross_entropy(module(hidden)[1:], target[1:])
        (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [hidden, module.weight])

    assert_close(second(head), second(copy.deepcopy(head).eval()))


def test_detect_anomaly():
    head, (hidden, target) = LMHead(WIDTH, VOCAB), data()
    Seen.how = "detach"
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        F.cross_entropy(Seen.apply(head(hidden)), target).backward()
    assert hidden.grad is not None


# ---- never a wrong loss ----


def test_parameters_changed_in_between():
    head, (hidden, target) = LMHead(WIDTH, VOCAB), data()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    logits = head(hidden)
    F.cross_entropy(logits, target).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="changed in place, by an optimizer's step perhaps"):
        logits.argmax(-1)


def test_hidden_states_changed_in_between():
    head, (hidden, target) = LMHead(WIDTH, VOCAB), data()
    hidden = hidden * 1
    logits = head(hidden)
    view = logits[1:]
    hidden.zero_()
    for use in (lambda: F.cross_entropy(logits, target), lambda: view.argmax(-1), lambda: view.materialize()):
        with pytest.raises(RuntimeError, match="hidden states were changed in place"):
            use()


def test_parameters_of_a_functional_call():
    model, ids = Tied(), torch.randint(VOCAB, (2, 5))
    other = {name: torch.randn_like(p).requires_grad_() for name, p in model.named_parameters()}

    def found():
        loss = F.cross_entropy(torch.func.functional_call(model, other, (ids,)).flatten(0, 1), ids.flatten())
        return loss, *torch.autograd.grad(loss, list(other.values()))

    expected = found()
    LMHead.wrap(model)
    assert type(torch.func.functional_call(model, other, (ids,))) is LazyLogits
    assert_close(found(), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_head(reentrant):
    head, (hidden, target) = LMHead(WIDTH, VOCAB), data()
    linear = copy.deepcopy(head).eval()

    def found(module):
        inner = hidden * 2
        logits = torch.utils.checkpoint.checkpoint(module, inner, use_reentrant=reentrant)
        loss = F.cross_entropy(logits[1:].float(), target[1:]) + logits.logsumexp(-1).mean()
        hidden.grad = module.weight.grad = None
        loss.backward()
        return loss, hidden.grad, module.weight.grad

    assert_close(found(head), found(linear))


def test_transforms_see_tensors():
    head, (hidden, target) = LMHead(WIDTH, VOCAB), data()
    linear = copy.deepcopy(head).eval()

    def loss(module, hidden):
        return F.cross_entropy(module(hidden), target)

    for derivative in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(
            derivative(lambda h: loss(head, h))(hidden), derivative(lambda h: loss(linear, h))(hidden)
        )


@pytest.mark.filterwarnings("ignore:LazyLogits")
def test_transforms_of_functions_of_logits():
    head, (hidden, target) = LMHead(WIDTH, VOCAB), data()

    def found(module):
        logits = module(hidden)
        slope = torch.func.grad(lambda t: F.cross_entropy(logits[1:] * t, target[1:]))(torch.tensor(2.0))
        losses = torch.vmap(F.cross_entropy)(logits, target)
        return slope, losses, *torch.autograd.grad(slope + losses.sum(), [hidden, module.weight])

    lazy = found(head)
    assert_close(lazy, found(head.eval()))


def halve(module, args, output):
    return output / 2


def replace_forward(linear):
    before = linear.forward
    linear.forward = lambda input, **ignored: before(input) / 2


class Halved(LMHead):
    def forward(self, input):
        return super().forward(input) / 2


def test_a_forward_of_ones_own():
    head = Halved(WIDTH, VOCAB)
    hidden, target = data()
    torch.testing.assert_close(
        F.cross_entropy(head(hidden), target), F.cross_entropy(hidden @ head.weight.T / 2, target)
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_tokens(reduction):
    head = LMHead(WIDTH, VOCAB)
    hidden, target = data(2, 0)
    loss = F.cross_entropy(head(hidden).reshape(-1, VOCAB), target.reshape(-1), reduction=reduction)
    assert loss.sum() == 0
    loss.sum().backward()
    assert head.weight.grad.count_nonzero() == 0
    assert head(hidden).argmax(-1).shape == (2, 0) and head(hidden).logsumexp(-1).shape == (2, 0)


GLOBAL = []
WAYS_TO_CHANGE_A_LAYER = {
    "forward hook": lambda linear: linear.register_forward_hook(halve),
    "backward hook": lambda linear: linear.register_full_backward_hook(lambda m, g_in, g_out: (2 * g_in[0],)),
    "backward pre-hook": lambda linear: linear.register_full_backward_pre_hook(lambda m, g_out: (2 * g_out[0],)),
    "another forward": replace_forward,
    "pre-hook": lambda linear: linear.register_forward_pre_hook(lambda m, args: (args[0] * 3,)),
    "weight norm": lambda linear: nn.utils.parametrizations.weight_norm(linear),
    "old weight norm": lambda linear: nn.utils.weight_norm(linear),
    "pruned": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    "hook on every module": lambda linear: GLOBAL.append(nn.modules.module.register_module_forward_hook(halve)),
    "half frozen": lambda linear: linear.bias.requires_grad_(False),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", WAYS_TO_CHANGE_A_LAYER)
def test_a_layer_that_something_changed(how):
    torch.manual_seed(0)
    head = LMHead(WIDTH, VOCAB, bias=True)
    linear = nn.Linear(WIDTH, VOCAB)
    linear.load_state_dict(head.state_dict())
    hidden, target = data()
    results = []
    for module in (head, linear):
        WAYS_TO_CHANGE_A_LAYER[how](module)
        loss = F.cross_entropy(module(hidden), target)
        while GLOBAL:
            GLOBAL.pop().remove()
        trained = [p for p in module.parameters() if p.requires_grad]
        results.append((loss, *torch.autograd.grad(loss, [hidden, *trained])))
    assert_close(*results)


def test_the_wrong_width_is_the_layers_own_error():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        LMHead(WIDTH, VOCAB)(torch.randn(3, WIDTH + 1))


@pytest.mark.parametrize(
    "use",
    [
        lambda z, y: F.cross_entropy(z[..., :-1, :].contiguous().view(-1, VOCAB), y[..., 1:].contiguous().view(-1)),
        lambda z, y: nn.CrossEntropyLoss()((torch.tanh(z / 3.0) * 3.0).float().transpose(1, 2), y),
        lambda z, y: -torch.log_softmax(z * 0.5, -1).gather(-1, y[..., None]).mean(),
        lambda z, y: (z + 1).logsumexp(-1).mean(),
    ],
)
def test_compiled(use):
    class Model(Tied):
        def forward(self, ids):
            z = super().forward(ids)
            return use(z, ids)

    model, ids = Model(), torch.randint(VOCAB, (2, 5))
    expected = torch.autograd.grad(model(ids), list(model.parameters()))
    LMHead.wrap(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LazyLogits")
        assert_close(torch.autograd.grad(compiled(ids), list(model.parameters())), expected)
