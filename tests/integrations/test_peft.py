"""PEFT: adapters beside the head leave it lazy, an adapter on the head is never bypassed, a frozen head costs no dW."""

import warnings

import pytest
import torch

from chunked_ce import LazyLogits, LMHead
from tests.integrations.test_transformers import batch, loss_of, new_model
from tests.integrations.training import assert_same_step, exact_step, training_step
from tests.test_work import work

peft = pytest.importorskip("peft")

ADAPTERS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
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
    assert len(said) == (name == "head") and all("does not follow add:" in line for line in said)
    assert (type(ours(**batch()).logits) is LazyLogits) == (name != "head")


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


@pytest.mark.filterwarnings("ignore")
def test_a_frozen_head_costs_no_gradient_of_it():
    model = adapted(new_model("llama", False), "attention")
    head = LMHead.wrap(model)
    frozen = work(lambda: training_step(model, loss_of())).multiplications
    head.weight.requires_grad_(True)
    tokens = 2 * 39 - 6  # of the batch that count
    assert work(lambda: training_step(model, loss_of())).multiplications - frozen == tokens * head.weight.numel()
