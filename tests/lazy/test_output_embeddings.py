"""Which layer `LMHead.wrap` takes, and what it says where no layer makes the logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chunked_ce import LazyLogits, LMHead

WIDTH, VOCAB = 6, 50


class Model(nn.Module):
    """A dense layer, an embedding tied to the last layer, and a method that returns one of them."""

    def __init__(self, returned: str, tied: bool = True):
        super().__init__()
        self.dense, self.embedding = nn.Linear(WIDTH, WIDTH), nn.Embedding(VOCAB, WIDTH)
        self.out, self.returned = nn.Linear(WIDTH, VOCAB, bias=False), returned
        if tied:
            self.out.weight = self.embedding.weight

    def get_output_embeddings(self):
        return getattr(self, self.returned)

    def forward(self, ids):
        return self.out(self.dense(self.embedding(ids)))


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_stands_for_the_layer_with_its_weight(tied):
    """FSMT returns its input embedding."""
    model = LMHead.wrap(Model("embedding", tied))
    assert type(model.out) is LMHead and type(model.dense) is nn.Linear
    assert type(model(torch.arange(3))) is LazyLogits


def test_the_layer_with_the_weight_is_taken_among_others():
    model = Model("embedding")
    model.other = nn.Linear(WIDTH, VOCAB)
    model.larger = nn.Embedding(2 * VOCAB, WIDTH)
    LMHead.wrap(model)
    assert [name for name, part in model.named_modules() if type(part) is LMHead] == ["out"]
    assert [name for name, part in LMHead.unwrap(model).named_modules() if type(part) is LMHead] == []


def test_a_layer_before_the_logits_is_refused():
    """DeBERTa returns a dense layer where its logits are a function of the embedding."""
    model = Model("dense")
    with pytest.raises(ValueError, match=r"a layer from 6 to 6 features, .* largest embedding has 50 words: name"):
        LMHead.wrap(model)
    assert type(model.dense) is nn.Linear
    assert type(LMHead.wrap(model, "out").out) is LMHead
    model.embedding = nn.Embedding(WIDTH, WIDTH)
    assert type(LMHead.wrap(model).dense) is LMHead  # as many words as features


@pytest.mark.parametrize("module", [None, "0"])
def test_logits_that_are_a_function(module):
    """The error says how to make them a layer's, and that works."""
    model = nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH))
    with pytest.raises(ValueError, match=r"let the model call a layer with this weight: head = LMHead\(\*reversed"):
        LMHead.wrap(model, module)
    embedding = model[0]
    head = LMHead(*reversed(embedding.weight.shape))
    head.weight = embedding.weight
    ids = torch.randint(VOCAB, (9,))
    hidden = model(ids)
    gradients = []
    for logits in (head(hidden), F.linear(hidden, embedding.weight)):
        loss = F.cross_entropy(logits, ids.flip(0))
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))
    torch.testing.assert_close(*gradients)


def test_several_heads_are_refused():
    model = nn.Module()
    model.heads = nn.ModuleList(nn.Linear(WIDTH, VOCAB) for _ in range(3))
    model.get_output_embeddings = lambda: model.heads
    with pytest.raises(ValueError, match=r"was ModuleList of 3: LMHead\.wrap\(model, name\) takes one"):
        LMHead.wrap(model)
    assert type(LMHead.wrap(model, "heads.1").heads[1]) is LMHead
