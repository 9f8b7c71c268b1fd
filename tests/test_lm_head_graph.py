"""The graph behind lazy logits, and what may happen between them and their loss: never a wrong gradient."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.nn.utils import prune

from chunked_ce import ChunkOptions, LazyLogits, LMHead
from tests.test_lm_head import VOCAB, WIDTH, Tied, assert_close, data


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


@pytest.mark.filterwarnings("ignore:LazyLogits")
@pytest.mark.parametrize("how", ["detach", "clone", "same"])
def test_functions_of_logits_that_were_changed(how):
    head, (hidden, target) = LMHead(WIDTH, VOCAB), data()
    Seen.how = how

    def found(module):
        logits = module(hidden) * 1
        logits[:, 7] = 2.0
        logits.mul_(3)
        loss = F.cross_entropy(Seen.apply(logits), target) + Seen.apply(logits).square().sum()
        return loss, *torch.autograd.grad(loss, [hidden, module.weight])

    plain = found(copy.deepcopy(head).eval())
    try:
        lazy = found(head)
    except RuntimeError as error:  # rather than a wrong gradient
        assert "changed in place" in str(error)
    else:
        assert_close(lazy, plain)


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


@pytest.mark.parametrize("cls", [nn.Linear, LMHead])
def test_compiled_where_compiled_code_asks_for_it(cls):
    """`torch.compile` puts the head into a module that has none of its attributes yet."""
    head, (hidden, _) = cls(WIDTH, VOCAB), data()
    torch.compiler.reset()
    compiled = torch.compile(lambda: torch.compile(head, backend="eager"), backend="eager")()
    assert compiled._orig_mod is head
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LazyLogits")
        torch.testing.assert_close(compiled(hidden) * 1, F.linear(hidden, head.weight, head.bias))
