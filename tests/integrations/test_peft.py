"""PEFT: adapters beside the head leave it lazy, an adapter on the head is never bypassed, a frozen head costs no dW."""

import copy
import warnings

import pytest
import torch

from chunked_ce import ChunkOptions, LazyLogits, LMHead
from chunked_ce.rows.logits import Logits
from tests.integrations.test_transformers import batch, loss_of, new_model
from tests.integrations.training import assert_same_step, exact_step, training_step
from tests.test_work import work

peft = pytest.importorskip("peft")

ADAPTERS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head, DoRA": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def adapted(model, name):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **ADAPTERS[name])
    return peft.get_peft_model(model, config).train()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", ["wrap first", "adapt first"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_same_step(name, tied, order):
    plain, ours = adapted(new_model("llama", tied), name), new_model("llama", tied)
    if order == "wrap first":
        LMHead.wrap(ours)
    ours = adapted(ours, name)
    if order == "adapt first":
        LMHead.wrap(ours)
    ours.load_state_dict(plain.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = training_step(ours, loss_of())
    assert_same_step(step, training_step(plain, loss_of()), exact_step(plain, loss_of()))
    said = [str(w.message) for w in caught if "LazyLogits" in str(w.message)]
    assert not said
    assert type(ours(**batch()).logits) is LazyLogits


@pytest.mark.filterwarnings("ignore")
def test_merged_and_disabled_adapters():
    plain, ours = adapted(new_model("llama", False), "head"), adapted(new_model("llama", False), "head")
    LMHead.wrap(ours)
    ours.load_state_dict(plain.state_dict())
    with plain.disable_adapter(), ours.disable_adapter():
        assert type(ours(**batch()).logits) is LazyLogits
        torch.testing.assert_close(ours(**batch()).loss, plain(**batch()).loss)
    plain.merge_adapter()
    ours.merge_adapter()
    assert type(ours(**batch()).logits) is LazyLogits
    torch.testing.assert_close(ours(**batch()).loss, plain(**batch()).loss)


def with_tokens(model):
    """Adapters, and some words that are trained in the embedding and the head, which are tied."""
    torch.manual_seed(0)
    words = {"init_lora_weights": False, "trainable_token_indices": [3, 9, 700]}
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], **words)).train()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", ["wrap first", "adapt first"])
def test_trainable_tokens_of_a_tied_head(order):
    plain, ours = with_tokens(new_model("llama", True)), new_model("llama", True)
    if order == "wrap first":
        LMHead.wrap(ours)
    ours = with_tokens(ours)
    if order == "adapt first":
        LMHead.wrap(ours)
    ours.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for model in (plain, ours):
            next(p for name, p in model.named_parameters() if "tokens_delta" in name).mul_(-2)
    for model in (ours, copy.deepcopy(ours)):
        assert type(model(**batch()).logits) is LazyLogits
        step = training_step(model, loss_of())
        assert any("tokens_delta" in name for name in step.gradients)
        assert_same_step(step, training_step(plain, loss_of()), exact_step(plain, loss_of()))
    with plain.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(ours(**batch()).loss, plain(**batch()).loss)
    assert torch.equal(ours.eval()(**batch()).logits, plain.eval()(**batch()).logits)
    adapter = peft.tuners.trainable_tokens.layer.TrainableTokensLayer
    assert type(LMHead.unwrap(ours).get_output_embeddings().token_adapter) is adapter
    assert torch.equal(ours.train()(**batch()).logits, plain.train()(**batch()).logits)


@pytest.mark.filterwarnings("ignore")
def test_a_frozen_head_costs_no_gradient_of_it():
    model = adapted(new_model("llama", False), "attention")
    head = LMHead.wrap(model).get_output_embeddings()
    frozen = work(lambda: training_step(model, loss_of())).multiplications
    head.weight.requires_grad_(True)
    tokens = 2 * 39 - 6  # of the batch that count
    assert work(lambda: training_step(model, loss_of())).multiplications - frozen == tokens * head.weight.numel()


LOW_RANK = {
    "topk": lambda z: z.topk(3).values,
    "logsumexp": lambda z: z.logsumexp(-1),
    "gather": lambda z: z.gather(-1, torch.tensor([[1, 5]]).expand(*z.shape[:-1], 2)),
    "entropy": lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1),
    "mean": lambda z: z.mean(-1),
    "some words": lambda z: z[..., 3:40].log_softmax(-1).gather(-1, torch.tensor([[1, 5]]).expand(*z.shape[:-1], 2)),
    "all logits": lambda z: z.relu(),
    "scaled": lambda z: (torch.tanh(z / 2) * 2).logsumexp(-1),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_two_doras_on_the_head_are_computed_with_one_warning():
    found = []
    for wrapped in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential()
        model.lm_head = torch.nn.Linear(6, 50)
        config = peft.LoraConfig(r=3, init_lora_weights=False, target_modules=["lm_head"], use_dora=True)
        model = peft.get_peft_model(model, config)
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
        hidden = torch.randn(2, 4, 6)
        if wrapped:
            LMHead.wrap(model, "base_model.model.lm_head.base_layer")
            told = r"computes its logits at once, because adapter 'default'.*Adapt the head by plain LoRA"
            with pytest.warns(UserWarning, match=told) as caught:
                model(hidden)
                found.append(model(hidden))
            assert len(caught) == 1
        else:
            found.append(model(hidden))
    assert type(found[0]) is torch.Tensor and torch.equal(*found)


LOW = {"r": 3, "target_modules": ["lm_head"]}
CONFIGS = {
    "LoRA": lambda: peft.LoraConfig(init_lora_weights=False, **LOW),
    "DoRA": lambda: peft.LoraConfig(init_lora_weights=False, use_dora=True, **LOW),
    "LoHa": lambda: peft.LoHaConfig(init_weights=False, **LOW),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keywords", [{"softcap": 2.0}, {"logit_scale": 3.0}, {"softcap": 2.0, "logit_scale": 0.5}])
@pytest.mark.parametrize("name", CONFIGS)
def test_softcap_and_scale_are_of_the_adapted_product(name, keywords):
    """In training, in evaluation and merged alike; a disabled adapter leaves those of the head."""
    torch.manual_seed(0)
    model, hidden = torch.nn.Sequential(), torch.randn(2, 4, 6)
    model.lm_head = torch.nn.Linear(6, 50)
    weight, bias = model.lm_head.parameters()
    model = peft.get_peft_model(model, CONFIGS[name]())
    LMHead.wrap(model, "base_model.model.lm_head.base_layer", **keywords)
    trained = model(hidden)
    trained, evaluated = trained.materialize() if isinstance(trained, LazyLogits) else trained, model.eval()(hidden)
    with model.disable_adapter():
        disabled = model(hidden)
    torch.testing.assert_close(disabled, Logits(**renamed(keywords))(torch.nn.functional.linear(hidden, weight, bias)))
    model.merge_adapter()
    merged = model(hidden)
    assert (merged - disabled).abs().max() > 0.1
    torch.testing.assert_close(trained, merged)
    torch.testing.assert_close(evaluated, merged)


def renamed(keywords):
    return {name.removeprefix("logit_"): value for name, value in keywords.items()}


KINDS = {"LoRA": ({}, 4), "a bias": ({"lora_bias": True}, 6), "DoRA": ({"use_dora": True}, 3)}  # trained parameters


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("form", LOW_RANK)
def test_an_adapter_on_the_head(form, dropout, kind):
    """Two adapters, but of DoRA one, and a bias: whatever is asked of the logits, and the gradients of all factors."""

    def found(wrapped):
        torch.manual_seed(0)
        model = torch.nn.Sequential()
        model.lm_head = torch.nn.Linear(6, 50, bias=True).double()
        keywords, num_trained = KINDS[kind]
        config = peft.LoraConfig(r=3, lora_alpha=8, init_lora_weights=False, target_modules=["lm_head"], **keywords)
        config.lora_dropout = dropout
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        if kind != "DoRA":
            model.add_adapter("second", config)
            model.base_model.set_adapter(["default", "second"])
        model = model.double().train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_magnitude" in name or name.endswith("lora_B.default.bias"):
                    parameter.add_(torch.linspace(-1, 1, 50))
        if wrapped:
            LMHead.wrap(model, "base_model.model.lm_head.base_layer", options=ChunkOptions(chunk_size=3))
        hidden = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(1)
        logits = model(hidden)
        assert isinstance(logits, LazyLogits) == wrapped
        values = LOW_RANK[form](logits)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == num_trained
        upstream = torch.linspace(-1, 2, values.numel(), dtype=torch.float64).view(values.shape)
        return values, *torch.autograd.grad(values, [hidden, *trained], upstream)

    for one, other in zip(found(True), found(False), strict=True):
        torch.testing.assert_close(one, other)
