"""Functions are followed by whatever names their arguments are given, and what computes logits says so."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F

from chunked_ce import ChunkOptions, LazyLogits, LMHead
from chunked_ce.lazy.logits import Lazy

WIDTH, VOCAB = 5, 40
WORDS = torch.arange(12).view(2, 6, 1)
ROWS = torch.tensor([3, 0])

BY_NAME = {
    "argmax": lambda z: torch.argmax(input=z, dim=-1),
    "argmax, axis": lambda z: z.argmax(axis=-1, keepdims=True),
    "argmin": lambda z: torch.argmin(input=z, dim=2, keepdim=True),
    "topk": lambda z: torch.topk(input=z, k=3).values,
    "topk, dim": lambda z: torch.topk(k=2, dim=2, input=z, largest=False, sorted=True)[1],
    "max": lambda z: torch.max(input=z, dim=-1)[0],
    "max, axis": lambda z: z.max(axis=-1).indices,
    "gather": lambda z: torch.gather(input=z, dim=2, index=WORDS),
    "gather of a method": lambda z: z.gather(index=WORDS, dim=-1),
    "take_along_dim": lambda z: torch.take_along_dim(input=z, indices=WORDS, dim=-1),
    "logsumexp": lambda z: torch.logsumexp(input=z, dim=-1, keepdim=True),
    "logsumexp, special": lambda z: torch.special.logsumexp(input=z, dim=(-1,)),
    "log_softmax": lambda z: torch.log_softmax(input=z, dim=-1).gather(-1, WORDS),
    "log_softmax, special": lambda z: torch.special.log_softmax(input=z, dim=-1).gather(-1, WORDS),
    "log_softmax, functional": lambda z: F.log_softmax(input=z, dim=-1).gather(-1, WORDS),
    "sum": lambda z: torch.sum(input=z.log_softmax(-1), dim=-1, keepdim=True),
    "sum, axis": lambda z: z.log_softmax(dim=-1).sum(axis=-1),
    "cross_entropy": lambda z: F.cross_entropy(target=WORDS[0, :, 0], input=z[0]),
    "nll_loss": lambda z: F.nll_loss(target=WORDS[0, :, 0], input=z[0].log_softmax(-1)),
    "mul": lambda z: torch.mul(input=z, other=2),
    "multiply": lambda z: torch.multiply(other=0.5, input=z),
    "mul, a tensor first": lambda z: torch.tensor(2.0) * z,
    "mul, a function of a tensor first": lambda z: torch.mul(torch.tensor(2.0), z),
    "add": lambda z: torch.add(input=z, other=torch.zeros(VOCAB)),
    "add, to a tensor": lambda z: torch.zeros(1, VOCAB) + z,
    "div": lambda z: torch.div(input=z, other=2),
    "true_divide": lambda z: torch.true_divide(input=z, other=3.0),
    "neg": lambda z: torch.neg(input=z),
    "tanh": lambda z: torch.tanh(input=z),
    "transpose": lambda z: torch.transpose(input=z, dim0=1, dim1=2),
    "transpose of a method": lambda z: z.transpose(dim1=0, dim0=1),
    "swapaxes": lambda z: torch.swapaxes(input=z, axis0=0, axis1=1),
    "swapdims": lambda z: torch.swapdims(input=z, dim0=0, dim1=1),
    "permute": lambda z: torch.permute(input=z, dims=(1, 0, 2)),
    "permute of a method": lambda z: z.permute(dims=(1, 0, 2)),
    "movedim": lambda z: torch.movedim(input=z, source=0, destination=1),
    "moveaxis": lambda z: torch.moveaxis(input=z, source=0, destination=1),
    "reshape": lambda z: torch.reshape(input=z, shape=(-1, VOCAB)),
    "reshape of a method": lambda z: z.reshape(shape=(-1, VOCAB)),
    "view": lambda z: z.view(size=(12, VOCAB)),
    "flatten": lambda z: torch.flatten(input=z, start_dim=0, end_dim=1),
    "unflatten": lambda z: torch.unflatten(input=z, dim=1, sizes=(2, 3)),
    "squeeze": lambda z: torch.squeeze(input=z[:1], dim=0),
    "unsqueeze": lambda z: torch.unsqueeze(input=z, dim=0),
    "narrow": lambda z: torch.narrow(input=z, dim=1, start=1, length=3),
    "select": lambda z: torch.select(input=z, dim=1, index=2),
    "index_select": lambda z: torch.index_select(input=z, dim=1, index=ROWS),
    "index_select, axis": lambda z: z.index_select(index=ROWS, axis=1),
    "unbind": lambda z: torch.unbind(input=z, dim=1)[2],
    "split": lambda z: torch.split(tensor=z, split_size_or_sections=2, dim=1)[1],
    "split of a method": lambda z: z.split(split_size=[4, 2], dim=1)[1],
    "chunk": lambda z: torch.chunk(input=z, chunks=2, dim=1)[0],
    "clone": lambda z: torch.clone(input=z),
    "detach": lambda z: torch.detach(input=z),
    "to": lambda z: z.to(dtype=torch.float32, copy=True),
}


def lazy_and_plain(*tokens):
    torch.manual_seed(0)
    head = LMHead(WIDTH, VOCAB, bias=True, options=ChunkOptions(chunk_size=5))
    hidden = torch.randn(*tokens, WIDTH, requires_grad=True)
    return head(hidden), F.linear(hidden, head.weight, head.bias)


@pytest.mark.parametrize("name", BY_NAME)
def test_arguments_by_name(name):
    lazy, plain = lazy_and_plain(2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = BY_NAME[name](lazy)
    assert not lazy.is_computed
    expected = BY_NAME[name](plain)
    found = found.materialize() if isinstance(found, Lazy) else found
    assert found.shape == expected.shape and found.requires_grad == expected.requires_grad
    torch.testing.assert_close(found, expected)


def test_names_that_are_wrong_are_the_functions_own_error():
    lazy, _ = lazy_and_plain(2, 6)
    for wrong in ({"input": lazy, "dims": 1}, {"tensor": lazy}, {"input": lazy, "dim": 1, "axis": 1}):
        with pytest.raises(TypeError, match=r"argmax\(\)"):
            torch.argmax(**wrong)


# ---- one token without a batch ----

ONE_TOKEN = {
    "topk": lambda z: tuple(z.topk(5)),
    "max": lambda z: tuple(z.max(-1)),
    "max kept": lambda z: tuple(z.max(0, keepdim=True)),
    "argmax": lambda z: (z.argmax(-1), z.argmin(0, keepdim=True)),
    "gather": lambda z: (z.gather(0, torch.tensor([3, 3, 9])),),
    "logsumexp": lambda z: (z.logsumexp(0), z.logsumexp(-1, keepdim=True)),
    "log_softmax": lambda z: (z.log_softmax(-1).gather(-1, torch.tensor([7])),),
    "sum of log_softmax": lambda z: (z.log_softmax(-1).sum(-1), z.log_softmax(0).sum(0, keepdim=True)),
    "cross_entropy": lambda z: (F.cross_entropy(z, torch.tensor(7), label_smoothing=0.1),),
    "nll_loss": lambda z: (F.nll_loss(z.log_softmax(-1), torch.tensor(7)),),
    "scaled": lambda z: (z / 0.7 * 3, -z.unsqueeze(0)),
    "softcap": lambda z: (torch.tanh(z / 2) * 2).topk(1),
    "no best words": lambda z: tuple(z.topk(0)),
}


@pytest.mark.filterwarnings("ignore:LazyLogits does not follow topk")  # of no words
@pytest.mark.parametrize(
    ("tokens", "of"),
    [((), lambda z: z), ((3,), lambda z: z[0]), ((2, 3), lambda z: z[0, -1])],
    ids=["1-D", "2-D", "3-D"],
)
@pytest.mark.parametrize("name", ONE_TOKEN)
def test_one_token(name, tokens, of):
    lazy, plain = lazy_and_plain(*tokens)
    assert type(of(lazy)) is LazyLogits and of(lazy).dim() == 1
    for found, expected in zip(ONE_TOKEN[name](of(lazy)), ONE_TOKEN[name](of(plain)), strict=True):
        found = found.materialize() if isinstance(found, Lazy) else found
        assert found.shape == expected.shape and found.requires_grad == expected.requires_grad
        torch.testing.assert_close(found, expected)
        if found.requires_grad and found.numel():
            ours, theirs = (torch.autograd.grad(x.sum(), leaf_of(x), retain_graph=True) for x in (found, expected))
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("of", [lambda z: z, lambda z: z.log_softmax(-1)], ids=["logits", "log-probabilities"])
def test_one_word_of_one_token(of):
    lazy, plain = map(of, lazy_and_plain())
    with pytest.warns(UserWarning, match="does not follow gather"):
        found = lazy.gather(0, torch.tensor(3))
    torch.testing.assert_close(found, plain.gather(0, torch.tensor(3)))


@pytest.mark.filterwarnings("ignore:LazyLogits does not follow gather")
def test_an_index_with_other_dimensions_is_torchs_own_error():
    lazy, plain = lazy_and_plain(2, 6)
    for logits in (lazy, plain):
        with pytest.raises(RuntimeError, match="same number of dimensions"):
            logits.gather(-1, torch.zeros(2, dtype=torch.long))
        with pytest.raises(RuntimeError, match="same number of dimensions"):
            logits.gather(2, torch.zeros(2, 1, dtype=torch.long))


def leaf_of(tensor):
    """The weight of the head behind a tensor."""
    seen, nodes = set(), [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and variable.shape == (VOCAB, WIDTH):
            return variable
        nodes += [one for one, _ in node.next_functions]
    raise AssertionError("no weight behind this tensor")


# ---- copies ----

COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda z: pickle.loads(pickle.dumps(z)),
    "torch.save": lambda z: saved_and_loaded(z),
}


def saved_and_loaded(tensor):
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("how", COPIES)
def test_copies_say_that_they_compute(how):
    lazy, plain = lazy_and_plain(2, 6)
    with pytest.warns(UserWarning, match=rf"does not follow {'pickle' if how == 'torch.save' else how}: ") as caught:
        copied = COPIES[how](lazy)
        COPIES[how](lazy)
    assert len(caught) == 1 and type(copied) is torch.Tensor
    assert not lazy.detach().requires_grad and lazy.requires_grad
    torch.testing.assert_close(copied, plain.detach())


def test_operations_below_python_say_so_too():
    lazy, plain = lazy_and_plain(2, 6)
    with pytest.warns(UserWarning, match=r"does not follow aten\.") as caught, torch._C.DisableTorchFunctionSubclass():
        found = torch.exp(lazy.detach())
    assert len(caught) == 1
    torch.testing.assert_close(found, plain.exp().detach())


# ---- what changes between an operation and the values ----


def test_an_index_that_is_changed_later():
    lazy, plain = lazy_and_plain(2, 6)
    at, row, mask = torch.tensor([1, 3]), torch.tensor(2), torch.arange(6) > 2
    forms = [lambda z: z[:, at], lambda z: z[:, row], lambda z: z[:, mask], lambda z: z.index_select(1, at)]
    found, expected = [form(lazy) for form in forms], [form(plain).clone() for form in forms]
    at.zero_(), row.zero_(), mask.zero_()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.materialize(), other)


# ---- what one handler makes of another's answer ----


@pytest.mark.parametrize("words", [3, torch.tensor(3), torch.tensor([0, 3, 7])], ids=["number", "tensor", "each token"])
def test_words_of_the_tokens_of_a_mask(words):
    lazy, plain = lazy_and_plain(6)
    index = (torch.tensor([True, False, True, False, False, True]), words)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = lazy[index]
    torch.testing.assert_close(found, plain[index])


def test_words_of_a_mask_of_other_tokens():
    lazy, _ = lazy_and_plain(6)
    with pytest.warns(UserWarning, match="__getitem__"), pytest.raises(IndexError, match="shape of the mask"):
        lazy[torch.ones(5, dtype=torch.bool), 3]


def test_class_probabilities_for_what_is_no_logits():
    lazy, plain = lazy_and_plain(6)
    target = torch.rand(6, VOCAB).softmax(-1)
    with pytest.warns(UserWarning, match="does not follow cross_entropy"):
        found = F.cross_entropy(lazy.softmax(-1), target)
    torch.testing.assert_close(found, F.cross_entropy(plain.softmax(-1), target))
