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
        head = LMHead.wrap(model, "0", z_loss=0.5)[0]
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
        logits.relu()
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
    assert LMHead.wrap(model, options=ChunkOptions(chunk_size=2)) is model
    assert model.out is out and type(out) is LMHead
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert (model.out.weight is model.embedding.weight) == tied
    lazy, found = gradients(model, ids)
    assert lazy is LazyLogits and kind is torch.Tensor
    assert_close(found, expected)
    assert LMHead.unwrap(model) is model
    assert type(model.out) is nn.Linear and vars(model.out).keys() == vars(nn.Linear(1, 1)).keys()
    assert gradients(model, ids)[0] is torch.Tensor
    assert LMHead.unwrap(model) is model and type(model.out) is nn.Linear
    LMHead.wrap(model)


def test_wrap_takes_the_module_named():
    model = nn.ModuleDict({"a": nn.Linear(WIDTH, VOCAB), "b": nn.Sequential(nn.Linear(WIDTH, VOCAB))})
    assert LMHead.wrap(model, "b.0") is model
    assert type(model["a"]) is nn.Linear and type(model["b"][0]) is LMHead


@pytest.mark.parametrize("name", [None, ""])
@pytest.mark.parametrize("cls", [nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear])
def test_the_model_may_be_the_head_itself(cls, name):
    linear, (hidden, _) = cls(WIDTH, VOCAB), data()
    assert LMHead.wrap(linear, name) is linear and type(linear(hidden)) is LazyLogits
    assert LMHead.unwrap(linear) is linear and type(linear) is cls


def test_wrap_finds_what_the_model_says():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, VOCAB), nn.Linear(WIDTH, VOCAB)

        def get_output_embeddings(self):
            return self.second

    inner = Model()
    LMHead.wrap(nn.Sequential(inner))
    assert type(inner.first) is nn.Linear and type(inner.second) is LMHead


class Shifted(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


def test_wrap_refuses_what_it_cannot_follow():
    with pytest.raises(ValueError, match=r"no output embedding found: .* 0 of its linear layers"):
        LMHead.wrap(nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)))
    two = nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB), nn.Linear(WIDTH, VOCAB))
    with pytest.raises(ValueError, match=r"2 of its linear layers have the 50 outputs .* \(1, 2\)"):
        LMHead.wrap(two)
    with pytest.raises(ValueError, match=r"get_output_embeddings\(\), and no embedding: name it"):
        LMHead.wrap(nn.Sequential(nn.Linear(WIDTH, VOCAB)))
    with pytest.raises(ValueError, match="module must name a module of the model, was 'head'"):
        LMHead.wrap(two, "head")
    with pytest.raises(ValueError, match=r"must be an nn\.Linear, was Embedding"):
        LMHead.wrap(two, "0")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, was int"):
        LMHead.wrap(3)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, was list"):
        LMHead.unwrap([two])
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
    assert (logits + 0).dtype == torch.bfloat16 and (logits + torch.zeros(1)).dtype == torch.float32
    with pytest.warns(UserWarning, match="does not follow relu"):
        assert logits.relu().dtype == torch.bfloat16


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
