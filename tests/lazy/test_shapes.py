"""Lazy tensors say of shape, memory and dtype what is true of their values, after any chain of operations."""

import random
import warnings

import pytest
import torch
import torch.nn.functional as F

from chunked_ce import ChunkOptions, LMHead
from chunked_ce.lazy.logits import Lazy, LazyLogits

WIDTH, VOCAB = 4, 11
FACTS = ("shape", "dtype", "device", "layout")
ASKED = ("storage_offset", "is_contiguous", "numel", "element_size")

ELEMENTWISE = [
    lambda z: z * 0.7,
    lambda z: 3 * z,
    lambda z: torch.tensor(1.5, dtype=torch.float64) * z,
    lambda z: z / 0.7,
    lambda z: torch.div(input=z, other=-2),
    lambda z: -z,
    lambda z: z.float(),
    lambda z: z.bfloat16(),
    lambda z: z.to(torch.float16),
    lambda z: z.type_as(torch.zeros(1)),
    lambda z: z.to(z.dtype, copy=True),
    lambda z: z.clone(),
    lambda z: z.clone(memory_format=torch.contiguous_format),
    lambda z: z.contiguous(),
    lambda z: z.detach(),
    lambda z: z.data,
    lambda z: z.mul_(2.0),
    lambda z: z.div_(0.7),
    lambda z: z.neg_(),
]


def at(dim, index):
    return (slice(None),) * dim + (index,)


def moves(shape, vocab_at, choose):
    """Operations that move dimensions, and where the vocabulary is afterwards."""
    dims = len(shape)
    order = choose.sample(range(dims), dims)
    yield lambda z: z.permute(order), order.index(vocab_at)
    a, b = choose.randrange(dims), choose.randrange(dims)
    yield lambda z: z.transpose(a, b), {a: b, b: a}.get(vocab_at, vocab_at)
    yield lambda z: torch.movedim(z, a, a), vocab_at
    place = choose.randrange(dims + 1)
    yield lambda z: z.unsqueeze(place), vocab_at + (place <= vocab_at)


def parts(shape, vocab_at, choose):
    """Operations that take some of the tokens."""
    dim = choose.choice([dim for dim in range(len(shape)) if dim != vocab_at])
    size, after = shape[dim], vocab_at - (dim < vocab_at)
    start = choose.randrange(size)
    yield lambda z: z.narrow(dim, start, size - start), vocab_at
    yield lambda z: z.select(dim, start), after
    yield lambda z: z.unbind(dim)[start], after
    yield lambda z: z.split(2, dim)[-1], vocab_at
    yield lambda z: z.chunk(2, dim)[0], vocab_at
    yield lambda z: z.index_select(dim, torch.tensor([start, 0, size - 1])), vocab_at
    yield lambda z: z[at(dim, slice(start, None, 2))], vocab_at
    yield lambda z: z[at(dim, start)], after
    yield lambda z: z[at(dim, torch.tensor(start))], after
    yield lambda z: z[at(dim, slice(torch.tensor(start), torch.tensor(size), None))], vocab_at
    yield lambda z: z[at(dim, slice(0, 0))], vocab_at
    if size == 1:
        yield lambda z: z.squeeze(dim), after
    if vocab_at == len(shape) - 1 and 1 not in shape:  # where torch's stand-ins of an index have other strides
        yield lambda z: z[at(dim, [start, 0])], vocab_at
        yield lambda z: z[at(dim, torch.tensor([[start, 0], [0, start]]))], vocab_at + 1
        yield lambda z: z[at(dim, torch.arange(size) != start)], vocab_at
        yield lambda z: z[None, ..., start, :] if dim == vocab_at - 1 else z[None], vocab_at + (dim != vocab_at - 1)


def reshapes(shape):
    """Operations on tensors whose vocabulary is last."""
    yield lambda z: z.reshape(-1, VOCAB), 1
    yield lambda z: z.flatten(0, -2) if z.dim() > 1 else z, min(len(shape) - 1, 1)
    yield lambda z: torch.reshape(input=z, shape=(1, *shape)), len(shape)
    yield lambda z: z.view(*shape, 1)[..., 0] if 0 in shape else z.view(shape), len(shape) - 1
    yield lambda z: z.contiguous().view(1, -1, VOCAB), 2


def step(shape, vocab_at, choose):
    """A random operation that is followed, and where the vocabulary is afterwards."""
    kinds = [[(one, vocab_at) for one in ELEMENTWISE], list(moves(shape, vocab_at, choose))]
    if len(shape) > 1 and 0 not in shape:
        kinds.append(list(parts(shape, vocab_at, choose)))
    if vocab_at == len(shape) - 1 and 0 not in shape:
        kinds.append(list(reshapes(shape)))
    return choose.choice(choose.choice(kinds))


def hidden_states(choose):
    shape = choose.choice([(2, 5), (2, 5), (3, 1), (2, 3, 2), (7,), (1,), (), (0, 3)])
    hidden = torch.randn(*shape, WIDTH)
    if len(shape) > 1 and choose.random() < 0.3:
        hidden = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    return hidden.requires_grad_(choose.random() < 0.8)


def assert_facts(lazy, plain):
    for name in FACTS:
        assert getattr(lazy, name) == getattr(plain, name), name
    if plain.numel():
        for name in ASKED:
            assert getattr(lazy, name)() == getattr(plain, name)(), name
        # In a dimension of size 1 nobody strides, and torch's own stand-ins have another number there now and then.
        for size, stride, expected in zip(plain.shape, lazy.stride(), plain.stride(), strict=True):
            assert size == 1 or stride == expected


def run_chain(choose):
    """A lazy tensor and an ordinary one after the same random operations."""
    hidden = hidden_states(choose)
    options = ChunkOptions(chunk_size=choose.choice([2, 3, "auto"]))
    head = LMHead(WIDTH, VOCAB, bias=choose.random() < 0.5, options=options)
    lazy, plain, vocab_at = head(hidden), F.linear(hidden, head.weight, head.bias), hidden.dim() - 1
    if choose.random() < 0.3:
        lazy, plain = (torch.tanh(z / 0.5) * 0.5 for z in (lazy, plain))
    for _ in range(choose.randrange(8)):
        operation, then_at = step(tuple(plain.shape), vocab_at, choose)
        try:
            plain = operation(plain)
        except RuntimeError as error:  # a view that cannot be had, or not be changed in place
            if "view size is not compatible" in str(error):
                with pytest.raises(RuntimeError, match="view size is not compatible"):
                    operation(lazy)
            continue
        lazy, vocab_at = operation(lazy), then_at
        assert isinstance(lazy, LazyLogits) and not lazy.is_computed
        assert_facts(lazy, plain)
        if choose.random() < 0.15 and lazy.requires_grad:
            lazy.register_hook(lambda grad: grad)
    if choose.random() < 0.2:
        lazy, plain = (z.log_softmax(vocab_at) * -1 for z in (lazy, plain))
    return lazy, plain


@pytest.mark.parametrize("seed", range(6))
def test_facts_are_those_of_the_values(seed):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(60):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lazy, plain = run_chain(choose)
        assert isinstance(lazy, Lazy)
        assert_facts(lazy, plain)
        stride, offset = lazy.stride(), lazy.storage_offset()
        values = lazy.materialize()
        assert_facts(values, plain)
        assert values.stride() == stride and values.storage_offset() == offset
        assert values.requires_grad == plain.requires_grad
        if plain.dtype == torch.float32:
            torch.testing.assert_close(values, plain, rtol=2**-6, atol=2**-6)  # a chain may round to bf16 on its way
        if lazy.numel():
            assert lazy.data_ptr() == values.data_ptr()
