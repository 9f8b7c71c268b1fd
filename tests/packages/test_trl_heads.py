"""The fused head of `chunked_ce.integrations.trl` beside TRL's own, and beside whole logits, model by model."""

import types

import pytest
import torch

from chunked_ce import ChunkOptions, LMHead
from tests.packages.trl_trainers import output_of_logits

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

import trl.trainer.utils as utils  # noqa: E402

from chunked_ce.integrations import trl as integration  # noqa: E402

VOCAB = 300
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "initializer_range": 0.4,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}
# TRL reads the scales and caps of these off the configuration.
FAMILIES = {
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 3.0},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 2.5},
    "Mixtral": EXPERTS,
    "GPT2": {},
}
FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TRL_FUSED = utils.add_fused_lm_head


@pytest.fixture(autouse=True)
def uninstalled():
    yield
    integration.uninstall()


def new_model(family="Llama", **settings):
    names = {"GPT2": ("GPT2Config", "GPT2LMHeadModel")}
    config, model = names.get(family, (f"{family}Config", f"{family}ForCausalLM"))
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": VOCAB} if family == "GPT2" else SIZES
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**(sizes | FAMILIES[family] | settings)))


def batch(rows=3, time=9, seed=1):
    """Sequences with padding, prompts that do not count, and a row of which nothing does."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (rows, time), generator=g)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    labels[-1] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def fused(model, add, inputs=None, **keywords):
    add(model, outputs=FIELDS, **keywords)
    return model(**(batch() if inputs is None else inputs), fused_lm_head=True)


def outputs_and_gradients(model, found):
    """All that a trainer may use, and gradients through each field that has one, weighed token by token."""
    model.zero_grad()
    weight = torch.linspace(0.5, 1.5, found.log_probs.numel()).view_as(found.log_probs)
    (found.loss + (found.log_probs * weight).sum() + (found.entropy * weight.flip(0)).sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value for name, value in found.items() if value is not None}, gradients


def assert_alike(ours, theirs, tolerance=2e-6):
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys() and other
        for name, value in other.items():
            assert mine[name].dtype == value.dtype and mine[name].shape == value.shape, name
            # A gradient that cancels to little is as uncertain as the terms it is summed from.
            size = max(one.double().abs().max().item() for one in (other.values() if value.is_leaf else [value]))
            error = (mine[name].double() - value.double()).abs().max() / size
            assert error <= tolerance, f"{name} is off by {error:.3g}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_fused_output_is_trls(family, mode):
    theirs = getattr(new_model(family), mode)()
    expected = outputs_and_gradients(theirs, fused(theirs, TRL_FUSED, temperature=0.7))
    integration.install(options=ChunkOptions(chunk_size=4))
    ours = getattr(new_model(family), mode)()
    found = outputs_and_gradients(ours, fused(ours, utils.add_fused_lm_head, temperature=0.7))
    assert isinstance(ours.get_output_embeddings(), LMHead)
    assert found[0]["label_mask"].sum() > 5 and (family != "Mixtral" or found[0]["aux_loss"] > 0)
    assert_alike(found, expected)


def whole_logits(model, inputs, temperature=1.0):
    """Log-probabilities and entropies from whole logits, through the model's own forward."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    return output_of_logits(model(**inputs).logits, labels, temperature)


def test_a_temperature_of_each_token():
    temperature = torch.rand(3, 9, generator=torch.Generator().manual_seed(3)) + 0.5
    plain, ours = new_model(), new_model()
    expected = outputs_and_gradients(plain, whole_logits(plain, batch(), temperature))
    integration.install()
    utils.add_fused_lm_head(ours, outputs=("log_probs", "entropy"))
    found = outputs_and_gradients(ours, ours(**batch(), fused_lm_head=True, temperature=temperature))
    del expected[0]["is_top1"]  # not asked for
    assert_alike(found, expected, 1e-5)
    of_rows = ours(**batch(), fused_lm_head=True, temperature=torch.tensor([[0.5], [1.0], [2.0]]))
    same = whole_logits(plain, batch(), torch.tensor([[0.5], [1.0], [2.0]]).expand(3, 9))
    torch.testing.assert_close(of_rows.log_probs, same.log_probs, rtol=1e-5, atol=1e-5)


def test_labels_that_are_shifted_already():
    model = new_model()
    integration.install()
    utils.add_fused_lm_head(model)
    inputs = batch()
    labels = inputs.pop("labels")
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    found = model(**inputs, shift_labels=shifted, fused_lm_head=True, num_items_in_batch=torch.tensor(7))
    expected = model(**inputs, labels=labels, fused_lm_head=True, num_items_in_batch=7)
    torch.testing.assert_close(found.log_probs[:, :-1], expected.log_probs)
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.parametrize("labels", ["none count", "one token"])
def test_edges(labels):
    model = new_model()
    integration.install()
    utils.add_fused_lm_head(model, outputs=FIELDS)
    inputs = batch()
    if labels == "none count":
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
    else:
        inputs = {name: value[:1, :1] for name, value in inputs.items()}
    found = model(**inputs, fused_lm_head=True)
    found.loss.backward()
    assert found.loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_generation_and_the_models_own_loss_stay():
    plain, ours = new_model(), new_model()
    integration.install()
    utils.add_fused_lm_head(ours)
    inputs = batch()
    with torch.no_grad():
        keywords = {"max_new_tokens": 5, "do_sample": True}
        for mode in ("train", "eval"):
            prompts = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(inputs["input_ids"])}
            torch.manual_seed(2)
            expected = getattr(plain, mode)().generate(**prompts, **keywords)
            torch.manual_seed(2)
            assert torch.equal(getattr(ours, mode)().generate(**prompts, **keywords), expected)
    torch.testing.assert_close(ours.train()(**inputs).loss, plain.train()(**inputs).loss)


def test_bf16_and_its_head_in_fp32():
    """`cast_lm_head_to_fp32`, after `GRPOTrainer` has cast the head."""
    found = []
    for add in (TRL_FUSED, None):
        model = new_model(tie_word_embeddings=False).bfloat16()
        head = model.lm_head.float()
        if add is None:
            integration.install()
            add = utils.add_fused_lm_head
            head.forward = types.MethodType(lambda self, x: torch.nn.functional.linear(x.float(), self.weight), head)
        model.eval()
        outputs = fused(model, add, cast_lm_head_to_fp32=True)
        found.append(outputs.log_probs)
        outputs.loss.backward()
        found.append(head.weight.grad)
    assert found[0].dtype == torch.float32 and found[0].abs().max() > 1
    torch.testing.assert_close(found[2], found[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[3], found[1], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert model(batch()["input_ids"]).logits.dtype == torch.float32


def test_a_cast_needs_a_head_of_its_own():
    """In bf16 the product of a user's `LMHead` would round what the cast is to keep."""
    model = LMHead.wrap(new_model(tie_word_embeddings=False).bfloat16())
    model.lm_head.float()
    integration.install()
    with pytest.raises(ValueError, match=r"cast_lm_head_to_fp32 needs a plain .* keywords of LMHead\.wrap to install"):
        utils.add_fused_lm_head(model, cast_lm_head_to_fp32=True)


def test_logits_that_a_hook_must_see():
    integration.install()
    expected = outputs_and_gradients(plain := new_model(), whole_logits(plain, batch()))
    model, seen = new_model(), []
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    model.lm_head.register_forward_hook(lambda *given: seen.append(given[2]))
    with pytest.warns(UserWarning, match="hook"):
        found = outputs_and_gradients(model, model(**batch(), fused_lm_head=True))
    assert seen
    del expected[0]["is_top1"]  # not asked for
    assert_alike(found, expected, 1e-5)


def test_activation_offloading(monkeypatch, recwarn):
    """TRL hooks the head to keep what it saves where it is: the hooks run around the loss."""
    from trl.models import activation_offloading

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cpu"))
    integration.install()
    expected = outputs_and_gradients(plain := new_model(), whole_logits(plain, batch()))
    model, entered = new_model(), []
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    enter = activation_offloading.NoOpManager.__enter__
    monkeypatch.setattr(activation_offloading.NoOpManager, "__enter__", lambda one: entered.append(one) or enter(one))
    with activation_offloading.get_act_offloading_ctx_manager(model, use_pin_memory=False, use_streams=False):
        found = outputs_and_gradients(model, model(**batch(), fused_lm_head=True))
    del expected[0]["is_top1"]  # not asked for
    assert_alike(found, expected, 1e-5)
    (head,) = LMHead.report(model).heads
    assert entered and head.training.taken and not head.training.plain and not recwarn.list


def add_as_sft(model, **keywords):
    """As `SFTTrainer` does while it is built."""
    token = integration._builds_sft.set(True)
    utils.add_fused_lm_head(model, **keywords)
    integration._builds_sft.reset(token)


def test_metrics_of_a_smoothed_loss_need_no_second_forward():
    """TRL takes a smoothed loss from the model's logits, then runs the model once more for its metrics."""
    integration.install()
    model, calls = new_model(), []
    add_as_sft(model, outputs=FIELDS)
    model.model.register_forward_hook(lambda *_: calls.append(1))
    inputs = batch()
    labels = inputs.pop("labels")

    def metrics(**changes):
        with torch.no_grad():
            return model(**inputs | changes, labels=labels, fused_lm_head=True, use_cache=False)

    first = metrics()
    smoother = transformers.trainer_pt_utils.LabelSmoother(epsilon=0.1)
    loss = smoother(model(**inputs, use_cache=False), labels, shift_labels=True)
    again = metrics()
    assert len(calls) == 2
    for name in FIELDS:
        torch.testing.assert_close(again[name], first[name])
    loss.backward()
    metrics()
    assert len(calls) == 3, "they are kept for one forward only"
    smoother(model(**inputs, use_cache=False), labels, shift_labels=True)
    metrics(input_ids=inputs["input_ids"].flip(0))
    assert len(calls) == 5, "other inputs have other outputs"


# ---- what the head adds ----


def test_terms_of_the_head_are_part_of_the_loss_of_sft():
    """As `linear_cross_entropy` has them, in training; the loss of an evaluation has none."""
    integration.install(z_loss=1e-3, label_smoothing=0.1)
    model = new_model()
    add_as_sft(model)
    plain = LMHead.wrap(new_model(), z_loss=1e-3, label_smoothing=0.1)
    found, expected = model(**batch(), fused_lm_head=True).loss, plain(**batch()).loss
    torch.testing.assert_close(found, expected)
    without = whole_logits(new_model(), batch()).loss
    assert abs(found - without) > 1e-3
    torch.testing.assert_close(model.eval()(**batch(), fused_lm_head=True).loss, without)


# ---- installing ----


def test_names_come_and_go():
    modules = [__import__(name, fromlist=["_"]) for name in (*integration._TRAINERS, "trl.trainer.utils")]
    trainers = trl.DistillationTrainer, trl.SFTTrainer
    before = [dict(vars(owner)) for owner in (*modules, *trainers)]
    integration.install()
    first = [vars(owner).get("add_fused_lm_head") for owner in modules]
    assert all(one is not TRL_FUSED for one in first)
    integration.install(z_loss=1e-4)
    assert [vars(owner).get("add_fused_lm_head") for owner in modules] == first
    integration.uninstall()
    assert [dict(vars(owner)) for owner in (*modules, *trainers)] == [dict(one) for one in before]
    integration.uninstall()


def test_what_cannot_be_installed(monkeypatch):
    with pytest.raises(TypeError, match="vocab is not a keyword of install"):
        integration.install(vocab=None)
    with pytest.raises(TypeError, match="smoothing is not a keyword"):
        integration.install(smoothing=0.1)
    with pytest.raises(ValueError, match="z_loss must be"):
        integration.install(z_loss=-1.0)
    with monkeypatch.context() as patch:
        patch.setattr(utils, "add_fused_lm_head", lambda model, outputs=(): None)
        with pytest.raises(RuntimeError, match=rf"TRL {trl.__version__} is not known .* takes \(model, outputs\)"):
            integration.install()
    with monkeypatch.context() as patch:
        patch.delattr(utils, "add_fused_lm_head")
        with pytest.raises(ImportError, match=r"has no trl.*came with 1\.15.*LMHead\.wrap\(model\)"):
            integration.install()
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "trl", None)
        with pytest.raises(ImportError, match="needs TRL 1"):
            integration.install()
    assert utils.add_fused_lm_head is TRL_FUSED


def test_a_head_that_is_no_linear_layer_stays_trls():
    class Head(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x)

    plain, model = new_model(tie_word_embeddings=False), new_model(tie_word_embeddings=False)
    model.lm_head.__class__ = Head
    integration.install()
    with pytest.warns(UserWarning, match="left to TRL's own fused head: .* a forward of its own"):
        found = outputs_and_gradients(model, fused(model, utils.add_fused_lm_head))
    assert_alike(found, outputs_and_gradients(plain, fused(plain, TRL_FUSED)))


def test_a_users_own_head_keeps_its_settings():
    options = ChunkOptions(chunk_size=2)
    model = LMHead.wrap(new_model(), options=options)
    integration.install()
    utils.add_fused_lm_head(model)
    assert model.lm_head.options is options
