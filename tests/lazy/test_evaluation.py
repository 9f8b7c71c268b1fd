"""Evaluation: losses are taken without logits where nothing reads logits, and what reads them gets the layer's own."""

import copy
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chunked_ce import ChunkOptions, LazyLogits, LMHead
from tests.integrations.training import largest_allocation
from tests.test_work import work

VOCAB, WIDTH, TOKENS = 3000, 8, (4, 16)
IDS = torch.randint(VOCAB, TOKENS, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    """As those of Transformers: a loss with labels, and the logits beside it."""

    def __init__(self, cap=None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.out, self.cap = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB), cap

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids, labels=None):
        logits = self.out(self.embedding(input_ids))
        if self.cap:
            logits = self.cap * torch.tanh(logits / self.cap)
        if labels is None:
            return None, logits
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()), logits


class Trainer:
    """As that of Transformers calls a model."""

    def prediction_step(self, model, inputs, prediction_loss_only, use=lambda loss, logits: None):
        with torch.no_grad():
            loss, logits = model(**inputs)
            found = use(loss, logits)
        return (loss, None, found) if prediction_loss_only else (loss, logits, found)


def pair(cap=None, **keywords):
    model = Model(cap).eval()
    return LMHead.wrap(copy.deepcopy(model), options=ChunkOptions(chunk_size=5), **keywords), model


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def both(ours, plain, **inputs):
    inputs = {"input_ids": IDS, "labels": IDS} | inputs
    with torch.no_grad():
        return ours(**inputs), plain(**inputs)


# ---- losses ----


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_a_loss_forms_no_logits(mode, cap):
    ours, plain = pair(cap=cap, z_loss=0.5)
    with mode():
        (loss, logits), (expected, _) = ours(IDS, IDS), plain(IDS, IDS)
        torch.testing.assert_close(loss, expected)
        assert isinstance(logits, LazyLogits) and not logits.is_computed and not logits.requires_grad
        bar = 0.4 * 4 * IDS.numel() * VOCAB
        assert largest_allocation(lambda: ours(IDS, IDS)) < bar < largest_allocation(lambda: plain(IDS, IDS))


def test_the_terms_of_a_head_are_for_training():
    """As they are left out of the losses of ordinary tensors; `lazy="always"` asks for the loss of the training."""
    ours, plain = pair(z_loss=0.5, label_smoothing=0.1)
    (loss, logits), (expected, plain_logits) = both(ours, plain)
    torch.testing.assert_close(loss, expected)
    with torch.no_grad():
        soft = plain_logits.flatten(0, 1).softmax(-1)
        found = F.cross_entropy(logits.flatten(0, 1), soft)
        torch.testing.assert_close(found, F.cross_entropy(plain_logits.flatten(0, 1), soft))
    always, _ = pair(z_loss=0.5, lazy="always")
    assert both(always, plain)[0][0] > expected + 1


def test_other_calls_return_ordinary_tensors():
    ours, plain = pair()
    assert type(ours(IDS, IDS)[1]) is torch.Tensor  # gradients may be asked for
    for inputs in ({"labels": None}, {"input_ids": IDS[:1, :5], "labels": IDS[:1, :5]}):  # or they are one chunk
        (_, logits), (_, expected) = both(ours, plain, **inputs)
        assert type(logits) is torch.Tensor and torch.equal(logits, expected)
    with torch.no_grad():
        assert type(ours.out(ours.embedding(IDS))) is torch.Tensor
    hook = ours.out.register_forward_hook(lambda *_: None)
    assert type(both(ours, plain)[0][1]) is torch.Tensor
    hook.remove()
    assert type(both(ours, plain)[0][1]) is LazyLogits


@pytest.mark.parametrize("labels", [torch.full(TOKENS, -100), IDS[:, :1].expand(TOKENS)])
def test_labels_that_do_not_count(labels):
    ours, plain = pair()
    (loss, _), (expected, _) = both(ours, plain, labels=labels)
    torch.testing.assert_close(loss, torch.nan_to_num(expected))


def test_a_forward_that_deletes_its_labels_has_none():
    class Deleting(Model):
        def forward(self, input_ids, labels=None):
            del labels
            return self.out(self.embedding(input_ids))

    model = LMHead.wrap(Deleting().eval(), options=ChunkOptions(chunk_size=5))
    with torch.no_grad():
        assert type(model(IDS, IDS)) is torch.Tensor


def test_the_labels_of_a_model_around_it_are_not_its_own():
    class Student(nn.Module):
        def __init__(self, teacher):
            super().__init__()
            self.teacher = teacher

        def forward(self, input_ids, labels=None):
            return self.teacher(input_ids)

    ours, plain = pair()
    (_, logits), (_, expected) = both(Student(ours), Student(plain))
    assert type(logits) is torch.Tensor and torch.equal(logits, expected)


# ---- logits that are read ----

READERS = {
    "values": lambda z: z + 0,
    "equal": lambda z: z * (z == z),
    "argmax": lambda z: z.argmax(-1),
    "last words": lambda z: z[:, -1].argmax(-1),
    "detached": lambda z: z.detach().cpu().numpy().argmax(-1),
    "log-probabilities": lambda z: z.log_softmax(-1)[..., :7],
    "in place": lambda z: z.mul_(2).clone(),
    "kept": lambda z: torch.cat([z, z])[2:],
}


@pytest.mark.parametrize("reader", READERS)
def test_logits_have_the_bits_of_the_layer(reader):
    ours, plain = pair()
    with torch.no_grad():
        for kind in (LazyLogits, torch.Tensor):  # the second time they are expected to be read
            (_, logits), (_, expected) = both(ours, plain)
            assert type(logits) is kind
            found, expected = READERS[reader](logits), READERS[reader](expected)
            assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


def test_what_reads_logits_pays_for_one_product():
    """But for the loss of the very first call."""
    product = IDS.numel() * VOCAB * WIDTH

    def evaluate(model):
        with torch.no_grad():
            loss, logits = model(IDS, IDS)
            return loss, logits.argmax(-1), logits.max(-1)

    ours, _ = pair()
    assert product < work(lambda: evaluate(pair()[0])).multiplications <= 2 * product
    assert work(lambda: evaluate(ours)).multiplications == product


def test_logits_that_are_kept_for_later_are_an_error_once_the_head_has_changed():
    ours, plain = pair()
    (_, logits), _ = both(ours, plain)
    with torch.no_grad():
        ours.out.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"materialize\(\)"):
        logits.argmax(-1)
    assert type(both(ours, plain)[0][1]) is torch.Tensor


# ---- a Trainer ----


def test_a_trainer_that_keeps_the_loss_only_never_forms_logits():
    """Not for its own metrics either, nor if it calls the model without labels; one that keeps logits gets them."""
    ours, plain = pair()
    step, metrics = Trainer().prediction_step, lambda _, z: (z.argmax(-1), torch.logsumexp(z, -1))
    for inputs in ({"input_ids": IDS, "labels": IDS}, {"input_ids": IDS}):
        for _ in range(2):
            found, expected = (step(model, inputs, True, metrics) for model in (ours, plain))
            torch.testing.assert_close(found, expected)
            assert largest_allocation(lambda inputs=inputs: step(ours, inputs, True)) < 0.4 * 4 * IDS.numel() * VOCAB
        for _ in range(2):
            found, expected = (step(model, inputs, False) for model in (ours, plain))
            assert type(found[1]) is torch.Tensor and torch.equal(found[1], expected[1])
            cost = work(lambda inputs=inputs: step(ours, inputs, False, metrics))
            assert cost.multiplications == IDS.numel() * VOCAB * WIDTH


def test_what_a_trainer_generates_is_read():
    def generate():
        kinds.append(type(ours(IDS)[1]))

    ours, kinds = pair()[0], []
    Trainer().prediction_step(ours, {"input_ids": IDS}, True, lambda *_: generate())
    assert kinds == [torch.Tensor]


class Unit:
    """What `fully_shard` puts before a model's class."""


Unit.__module__ = "torch.distributed.fsdp"


@pytest.mark.parametrize("shared", ["ZeRO-3", "FSDP2", "FSDP2, the head apart"])
def test_heads_that_ranks_share_wait_in_a_trainer_only(monkeypatch, shared):
    """Where one rank may read logits alone they are computed by all, whatever the size of their batches."""
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", types.SimpleNamespace(FSDPModule=Unit))
    ours, _ = pair()
    if shared == "ZeRO-3":
        ours.out.weight.ds_id, ours.out.weight.ds_shape = 0, ours.out.weight.shape
    else:
        for module in (ours, ours.out)[: 1 + ("apart" in shared)]:
            module.__class__ = type("Sharded", (Unit, type(module)), {})
    few = {"input_ids": IDS[:1, :5], "labels": IDS[:1, :5]}
    with torch.no_grad():
        assert type(ours(IDS, IDS)[1]) is torch.Tensor

    kinds = []
    for inputs in (few, {"input_ids": IDS}):  # with labels the loss is taken inside of the forward
        Trainer().prediction_step(ours, inputs, True, lambda _, logits: kinds.append(type(logits)))
    assert kinds == [LazyLogits, torch.Tensor if shared == "FSDP2" else LazyLogits]


# ---- heads of adapters ----


def test_the_sum_of_two_heads():
    class Two(nn.Module):
        def __init__(self, *models):
            super().__init__()
            self.one, self.two = models

        def forward(self, input_ids, labels=None):
            logits = self.one.out(self.one.embedding(input_ids)) + 0.5 * self.two.out(self.two.embedding(input_ids))
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits

    (one, first), (two, second) = pair(z_loss=0.5), pair(z_loss=0.5)
    (loss, logits), (expected, plain_logits) = both(Two(one, two), Two(first, second))
    assert type(logits) is LazyLogits and LMHead.report(one).heads[0].evaluation.calls == 1
    torch.testing.assert_close(loss, expected)  # without z_loss
    with torch.no_grad():
        torch.testing.assert_close(logits + 0, plain_logits)


def test_lora_on_the_head():
    peft = pytest.importorskip("peft")
    plain = Model()
    plain.config = {"tie_word_embeddings": False}
    config = peft.LoraConfig(target_modules=["out"], r=2, init_lora_weights=False)
    plain = peft.get_peft_model(plain, config).eval()
    ours = LMHead.wrap(copy.deepcopy(plain), options=ChunkOptions(chunk_size=5))
    (loss, logits), (expected, plain_logits) = both(ours, plain)
    assert type(logits) is LazyLogits
    torch.testing.assert_close(loss, expected)
    assert largest_allocation(lambda: both(ours, lambda **_: None)) < 0.4 * 4 * IDS.numel() * VOCAB
    with torch.no_grad():
        torch.testing.assert_close(logits + 0, plain_logits)
    assert type(both(ours, plain)[0][1]) is torch.Tensor
