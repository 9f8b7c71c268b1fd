"""A head that changes after it was wrapped: another weight, another place, another class, replicas of it."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from chunked_ce import ChunkOptions, LazyLogits, LMHead
from tests.test_lm_head import VOCAB, WIDTH, Tied, assert_close, data, gradients

# ---- another weight ----


@pytest.mark.parametrize("words", [VOCAB - 7, VOCAB + 7])
def test_another_weight(words):
    """The number of words is that of the weight, whatever the layer was made with."""
    model = Tied()
    LMHead.wrap(model)
    model.out.weight = model.embedding.weight = nn.Parameter(torch.randn(words, WIDTH))
    hidden, _ = data()
    logits = model.out(hidden)
    assert type(logits) is LazyLogits and logits.shape == (8, words)
    for ask in (lambda z: z.log_softmax(-1).sum(-1), lambda z: z.logsumexp(-1), lambda z: z.argmax(-1)):
        torch.testing.assert_close(ask(logits), ask(F.linear(hidden, model.out.weight)))
    assert logits.materialize().shape == (8, words)


def test_another_weight_for_a_call():
    head, (hidden, target) = LMHead(WIDTH, VOCAB), data()
    weight = torch.randn(VOCAB + 3, WIDTH, requires_grad=True)
    logits = torch.func.functional_call(head, {"weight": weight}, (hidden,))
    assert type(logits) is LazyLogits and logits.shape == (8, VOCAB + 3)
    torch.testing.assert_close(F.cross_entropy(logits, target), F.cross_entropy(F.linear(hidden, weight), target))
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        logits.argmax(-1)


# ---- another place ----


def test_a_linear_layer_in_its_place_is_a_head_too():
    model = Tied(tied=False)
    head = LMHead.wrap(model, z_loss=0.5, options=ChunkOptions(chunk_size=3)).out
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.out = nn.Linear(WIDTH, 2 * VOCAB)
    assert type(model.out) is LMHead and model.out is not head
    assert model.out.options is head.options and model.out.loss_keywords == head.loss_keywords
    assert type(model(torch.zeros(2, 3, dtype=torch.long))) is LazyLogits
    model.eval()
    model.out = nn.Linear(WIDTH, VOCAB)
    assert type(model(torch.zeros(2, 3, dtype=torch.long))) is torch.Tensor
    assert type(LMHead.unwrap(model).out) is nn.Linear


class Other(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


@pytest.mark.parametrize("other", [lambda: Other(WIDTH, VOCAB), lambda: nn.Linear(2 * WIDTH, VOCAB), nn.Sequential])
def test_anything_else_in_its_place_is_not_and_a_warning_says_so(other):
    model, other = Tied(), other()
    LMHead.wrap(model)
    with pytest.warns(UserWarning, match=r"takes the place of the LMHead 'out', .* LMHead\.wrap") as caught:
        model.out = other
    assert len(caught) == 1 and caught[0].filename == __file__ and model.out is other
    assert not isinstance(other, LMHead)


@pytest.mark.filterwarnings("error")
def test_places_that_say_nothing():
    model = Tied()
    head = LMHead.wrap(model).out
    for module in (head, nn.Sequential(head), LMHead(WIDTH, VOCAB), nn.Identity(), None):
        model.out = module
        assert model.out is module
        model.out = None
        model.out = head
    LMHead.unwrap(model)
    model.out = nn.Linear(WIDTH, VOCAB)
    assert type(model.out) is nn.Linear


# ---- another class ----


class Named(nn.Linear):
    """A linear layer by another name."""


class OwnHead(LMHead):
    """A head by another name."""


def weight_norm(model):
    parametrizations.weight_norm(model.out)


def fully_shard(model):
    """As FSDP2 changes the class, without its processes."""
    cls = type(model.out)
    model.out.__class__ = type(f"FSDP{cls.__name__}", (Unit, cls), {"__deepcopy__": None})


class Unit:
    """What an engine adds to a module."""

    def reshard(self):
        return type(self).__name__


CHANGES = {"weight_norm": weight_norm, "fully_shard": fully_shard}


@pytest.mark.parametrize("kind", [LMHead, OwnHead])
@pytest.mark.parametrize("linear", [nn.Linear, Named])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("how", CHANGES)
def test_unwrap_keeps_what_was_made_of_the_class(how, before, after, linear, kind):
    model, plain, ids = Tied(tied=False), Tied(tied=False), torch.randint(VOCAB, (2, 5))
    model.out.__class__ = plain.out.__class__ = linear
    plain.load_state_dict(model.state_dict())
    for one in (model, plain):
        if before:
            CHANGES[how](one)
        if one is model:
            kind.wrap(model)
        if after and not before:
            CHANGES[how](one)
    assert isinstance(model.out, kind)
    assert_close(gradients(model, ids)[1], gradients(plain, ids)[1])
    LMHead.unwrap(model)
    assert not isinstance(model.out, LMHead) and isinstance(
        model.out, linear if before or linear is Named else nn.Linear
    )
    assert [cls.__name__ for cls in type(model.out).__mro__] == [cls.__name__ for cls in type(plain.out).__mro__]
    assert model.out.extra_repr() == plain.out.extra_repr()
    assert gradients(model, ids)[0] is torch.Tensor
    assert_close(gradients(model, ids)[1], gradients(plain, ids)[1])
    if how == "weight_norm" and (before or after):
        for one in (model, plain):
            parametrize.remove_parametrizations(one.out, "weight")
        assert type(model.out) is type(plain.out)
        torch.testing.assert_close(model.out.weight, plain.out.weight)
    if how == "fully_shard" and (before or after):
        assert model.out.reshard() == plain.out.reshard()


def test_unwrap_after_the_change_is_undone():
    model = Tied(tied=False)
    weight_norm(model)
    LMHead.wrap(model)
    parametrize.remove_parametrizations(model.out, "weight")
    assert type(model(torch.zeros(1, 2, dtype=torch.long))) is LazyLogits
    assert type(LMHead.unwrap(model).out) is nn.Linear


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved_and_loaded],
    ids=["copy", "deepcopy", "pickle", "saved"],
)
@pytest.mark.parametrize("linear", [nn.Linear, Named, nn.modules.linear.NonDynamicallyQuantizableLinear])
def test_copies_of_a_wrapped_subclass(copied, linear):
    model = Tied()
    model.out.__class__ = linear
    LMHead.wrap(model, z_loss=0.5)
    again = copied(model)
    assert type(again.out) is type(model.out) and isinstance(again.out, linear)
    assert again.out.weight is again.embedding.weight
    ids = torch.randint(VOCAB, (2, 5))
    assert_close(gradients(again, ids)[1], gradients(model, ids)[1])
    assert type(LMHead.unwrap(again).out) is linear


# ---- replicas ----


class CopyOfParameter(torch.autograd.Function):
    """What `nn.DataParallel` broadcasts a parameter with."""

    @staticmethod
    def forward(ctx, parameter):
        return parameter.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


def replica_of(model):
    """As `torch.nn.parallel.replicate` makes them, on any device."""
    copies = {id(p): CopyOfParameter.apply(p) for p in model.parameters()}
    made = {id(module): module._replicate_for_data_parallel() for module in model.modules()}
    for module in model.modules():
        replica = made[id(module)]
        for name, child in module._modules.items():
            setattr(replica, name, made[id(child)])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, copies[id(parameter)])
    return made[id(model)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_replicas_of_data_parallel_are_lazy(tied, biased):
    model, ids = Tied(tied), torch.randint(VOCAB, (4, 5))
    if biased:
        model.out.bias = nn.Parameter(torch.randn(VOCAB))
    _, expected = gradients(model, ids)
    LMHead.wrap(model, options=ChunkOptions(chunk_size=3))
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for part in ids.chunk(2):
            logits = replica_of(model)(part)
            assert type(logits) is LazyLogits
            (F.cross_entropy(logits.flatten(0, 1), part.flatten()) / 2).backward()
            assert logits.detach().argmax(-1).shape == part.shape
    assert_close([parameter.grad for parameter in model.parameters()], expected)


@pytest.mark.filterwarnings("ignore:LazyLogits")
def test_outputs_of_replicas_are_gathered():
    """As `nn.DataParallel` gathers them: by a function that sees values only."""
    model, ids = Tied(), torch.randint(VOCAB, (4, 5))
    expected, plain = gradients(model, ids)[1], model(ids)
    LMHead.wrap(model)
    model.zero_grad()
    logits = torch.cat([replica_of(model)(part) for part in ids.chunk(2)])
    torch.testing.assert_close(logits, plain)
    F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    assert_close([parameter.grad for parameter in model.parameters()], expected)
