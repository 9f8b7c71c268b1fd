"""The loss functions under Transformers' names, and its label smoothing: its own results, with less memory and work."""

import warnings

import pytest
import torch

from chunked_ce import ChunkOptions, LMHead
from tests.integrations.test_transformers import batch, new_model
from tests.integrations.training import assert_same_step, exact_step, largest_allocation, training_step
from tests.precision import assert_no_worse
from tests.test_work import work

transformers = pytest.importorskip("transformers")

from transformers.loss import loss_utils  # noqa: E402
from transformers.trainer_pt_utils import LabelSmoother  # noqa: E402

from chunked_ce.integrations import transformers as ours  # noqa: E402

WIDTH, VOCAB = 6, 40
KEYWORDS = {
    "mean": {},
    "count": {"num_items_in_batch": 7},
    "count, a tensor": {"num_items_in_batch": torch.tensor(7)},
    "another label ignored": {"ignore_index": 3},
    "more keywords": {"cu_seq_lens_q": torch.zeros(3), "return_dict": True},
}


def logits_and_labels(dtype=torch.float32, shape=(3, 5), lazy=False):
    torch.manual_seed(0)
    hidden = torch.randn(*shape, WIDTH, dtype=torch.float64)
    head = LMHead(WIDTH, VOCAB, dtype=torch.float64, options=ChunkOptions(chunk_size=4))
    labels = torch.randint(VOCAB, shape)
    labels[..., 1] = -100
    labels[..., 2] = 3
    hidden, head = hidden.to(dtype).requires_grad_(), head.to(dtype).train(lazy)
    logits = head(hidden)
    assert isinstance(logits, ours.Lazy) == lazy
    return logits, labels, [hidden, head.weight]


def value_and_gradients(loss, leaves):
    return loss, *torch.autograd.grad(loss, leaves)


def test_lazy_logits_with_a_temperature_of_each_token(recwarn):
    temperature = torch.rand(3, 5, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    found = []
    for lazy in (True, False):
        logits, labels, leaves = logits_and_labels(lazy=lazy)
        found.append(value_and_gradients(ours.ForCausalLMLoss(logits / temperature, labels, VOCAB), leaves))
    torch.testing.assert_close(*found)
    assert not recwarn.list


@pytest.mark.parametrize("lazy", [False, True], ids=["plain", "lazy"])
@pytest.mark.parametrize("keywords", KEYWORDS)
@pytest.mark.parametrize("name", ours.LOSS_MAPPING)
def test_the_same_loss(name, keywords, lazy):
    keywords = KEYWORDS[keywords]
    found = []
    for mapping, dtype in ((ours.LOSS_MAPPING, torch.float32), *((loss_utils.LOSS_MAPPING, d) for d in FLOATS)):
        logits, labels, leaves = logits_and_labels(dtype, lazy=lazy and mapping is ours.LOSS_MAPPING)
        if keywords.get("ignore_index"):
            labels[labels == -100] = 0
        if dtype == torch.float64:  # whose own functions make it fp32
            logits.float = lambda logits=logits: logits
        found.append(value_and_gradients(mapping[name](logits, labels, VOCAB, **keywords), leaves))
    for one, plain, exact in zip(*found, strict=True):
        assert_no_worse(one.detach(), plain.detach(), exact.detach().numpy())


FLOATS = (torch.float32, torch.float64)


def test_shifted_labels_and_none_that_count():
    logits, labels, _ = logits_and_labels()
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    expected = loss_utils.ForCausalLMLoss(logits, labels, VOCAB)
    torch.testing.assert_close(ours.ForCausalLMLoss(logits, None, VOCAB, shift_labels=shifted), expected)
    torch.testing.assert_close(ours.ForMaskedLMLoss(logits, shifted, VOCAB), expected)
    for lazy in (False, True):
        logits, labels, leaves = logits_and_labels(lazy=lazy)
        found = value_and_gradients(ours.ForCausalLMLoss(logits, torch.full_like(labels, -100), VOCAB), leaves)
        assert all(not one.any() for one in found)
        with pytest.raises(IndexError, match="target"):
            ours.ForCausalLMLoss(logits, labels + VOCAB, VOCAB)


def test_no_copy_in_fp32():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 500, 9_999).bfloat16().requires_grad_(), torch.randint(9_999, (2, 500))

    def bytes_of(loss):
        return largest_allocation(lambda: loss(logits, labels, 9_999).backward())

    assert bytes_of(loss_utils.ForCausalLMLoss) == 4 * logits.numel()
    assert bytes_of(ours.ForCausalLMLoss) == 2 * logits.numel()  # their gradient


def test_a_model_takes_them():
    model = new_model("llama", True)
    inputs = batch()
    plain = training_step(model, lambda model: model(**inputs).loss)
    exact = exact_step(model, lambda model: model(**inputs).loss)
    model.loss_function = ours.LOSS_MAPPING[model.loss_type]
    assert_same_step(training_step(model, lambda model: model(**inputs).loss), plain, exact)


@pytest.mark.thorough
def test_compiled():
    compiled = torch.compile(ours.ForCausalLMLoss, fullgraph=True, backend="eager")
    logits, labels, _ = logits_and_labels()
    torch.testing.assert_close(compiled(logits, labels, VOCAB), loss_utils.ForCausalLMLoss(logits, labels, VOCAB))


def test_the_protocol_of_kernels():
    """What the library `kernels` asks of a layer: no constructor, no state, the function's arguments."""
    for repository in ours.KERNEL_MAPPING["ForCausalLMLoss"].values():
        layer = repository.load()
        assert layer.__init__ is torch.nn.Module.__init__
        assert set(dir(layer)) - set(dir(torch.nn.Module)) == {"can_torch_compile", "has_backward"}
        logits, labels, _ = logits_and_labels()
        assert layer()(logits, labels, VOCAB) == ours.ForCausalLMLoss(logits, labels, VOCAB)
    kernels = pytest.importorskip("kernels")
    layer_of = kernels.use_kernel_forward_from_hub("ForCausalLMLoss")(loss_utils.ForCausalLMLoss)
    model = kernels.use_kernelized_func(layer_of)(torch.nn.Identity)()
    with kernels.use_kernel_mapping(ours.KERNEL_MAPPING):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu", use_fallback=False)
    assert layer_of.forward.__func__ is ours.ForCausalLMLossLayer.forward


# ---- label smoothing ----

SMOOTHING = {
    "mean": ({}, {}),
    "shifted": ({"shift_labels": True}, {}),
    "count": ({"shift_labels": True, "num_items_in_batch": 7}, {}),
    "count, a tensor": ({"num_items_in_batch": torch.tensor(7)}, {}),
    "another label ignored": ({"shift_labels": True}, {"ignore_index": 3}),
    "labels (B, T, 1)": ({}, {}),
}


@pytest.mark.parametrize("output", ["dict", "tuple"])
@pytest.mark.parametrize("name", SMOOTHING)
def test_label_smoothing(name, output):
    keywords, settings = SMOOTHING[name]
    smoother = LabelSmoother(epsilon=0.3, **settings)
    LMHead.wrap(new_model("llama", True))  # from where on smoothing is in one pass
    found = []
    for lazy, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.float64)):
        logits, labels, leaves = logits_and_labels(dtype, lazy=lazy)
        labels[1, 3] = -1  # is word 0 to Transformers
        labels = labels.unsqueeze(-1) if name == "labels (B, T, 1)" else labels
        logits = {"logits": logits} if output == "dict" else (logits,)
        found.append(value_and_gradients(smoother(logits, labels, **keywords), leaves))
    assert found[0][0].shape == found[1][0].shape and found[0][0].dtype == found[1][0].dtype
    for one, plain, exact in zip(*found, strict=True):
        assert_no_worse(one.detach(), plain.detach(), exact.detach().numpy())


def test_label_smoothing_with_an_argument_that_is_not_known():
    LMHead.wrap(new_model("llama", True))
    logits, labels, _ = logits_and_labels(lazy=True)
    with pytest.raises(TypeError, match="of_a_later_version"):
        LabelSmoother(epsilon=0.3)((logits,), labels, of_a_later_version=1)


def test_label_smoothing_is_one_pass():
    smoother = LabelSmoother(epsilon=0.3)
    model = LMHead.wrap(new_model("llama", True), options=ChunkOptions(chunk_size=16))
    inputs = batch()
    labels = inputs.pop("labels")

    def step():
        model.zero_grad()
        smoother(model(**inputs), labels, shift_labels=True).backward()

    def unsmoothed():
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert work(step).multiplications == work(unsmoothed).multiplications


def test_label_smoothing_of_the_head_and_of_the_trainer():
    smoother = LabelSmoother(epsilon=0.3)
    for mine in (0.3, 0.2):
        torch.manual_seed(0)
        head = LMHead.wrap(torch.nn.Linear(WIDTH, VOCAB), label_smoothing=mine).train()
        logits, labels = head(torch.randn(2, 3, WIDTH)), torch.randint(VOCAB, (2, 3))
        if mine == smoother.epsilon:
            expected = smoother((logits.materialize().detach(),), labels)
            torch.testing.assert_close(smoother((logits,), labels), expected)
        else:
            with pytest.raises(ValueError, match=r"label_smoothing: the loss was given 0\.3, the head 0\.2"):
                smoother((logits,), labels)


@pytest.mark.parametrize("shape", [(1, 1), (2, 0), (0, 3)])
def test_label_smoothing_of_few_tokens(shape):
    LMHead.wrap(new_model("llama", True))
    head = LMHead(WIDTH, VOCAB)
    labels = torch.full(shape, -100)
    loss = LabelSmoother(epsilon=0.3)((head(torch.randn(*shape, WIDTH)),), labels)
    loss.backward()
    assert loss == 0 and not head.weight.grad.any()  # where Transformers' own gives NaN
