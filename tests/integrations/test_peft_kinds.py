"""Every kind of adapter that PEFT has: the same step, and lazy logits or one warning that says why not."""

import warnings
from typing import Any

import pytest
import torch

from chunked_ce import LazyLogits, LMHead
from tests.integrations.test_transformers import batch, loss_of, new_model
from tests.integrations.training import assert_same_step, exact_step, training_step

peft = pytest.importorskip("peft")

# For docs/drop_in.md. The head stays lazy with an adapter of one of these kinds on it; of the second it is called, but
# its logits are changed in a way that needs their values; of the third it is not called.
LAZY, CHANGED, WITHOUT = "lazy", "LazyLogits does not follow", "LMHead has no effect here"
LOW = {"r": 4}
LORA = {**LOW, "init_lora_weights": False}
PLAIN = {**LOW, "init_weights": False}
ON_THE_HEAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "LoRA": ("Lora", LORA, LAZY),
    "rsLoRA": ("Lora", {**LORA, "use_rslora": True}, LAZY),
    "PiSSA": ("Lora", {**LOW, "init_lora_weights": "pissa"}, LAZY),
    "LoRA, dropout": ("Lora", {**LORA, "lora_dropout": 0.3}, LAZY),
    "LoRA, biases of the model": ("Lora", {**LORA, "bias": "all"}, LAZY),
    "DoRA": ("Lora", {**LORA, "use_dora": True}, LAZY),
    "LoRA with a bias": ("Lora", {**LORA, "lora_bias": True}, LAZY),
    "OFT": ("OFT", {"oft_block_size": 8, "init_weights": False}, LAZY),
    "IA3, feedforward": ("IA3", {"feedforward_modules": ["q_proj", "lm_head"], "init_ia3_weights": False}, LAZY),
    "AdaLoRA": ("AdaLora", {"init_r": 4, "target_r": 2, "total_step": 10, "init_lora_weights": False}, CHANGED),
    "IA3": ("IA3", {"feedforward_modules": [], "init_ia3_weights": False}, CHANGED),
    "LoHa": ("LoHa", PLAIN, CHANGED),
    "LoKr": ("LoKr", PLAIN, CHANGED),
    "BOFT": ("BOFT", {"boft_block_size": 8, "init_weights": False}, CHANGED),
    "VeRA": ("Vera", PLAIN, CHANGED),
    "VB-LoRA": ("VBLoRA", {**LOW, "vector_length": 8, "num_vectors": 8, "topk": 2}, CHANGED),
    "RandLoRA": ("RandLora", PLAIN, CHANGED),
    "FourierFT": ("FourierFT", {"n_frequency": 20, "init_weights": False}, CHANGED),
    "MiSS": ("Miss", PLAIN, CHANGED),
    "HRA": ("HRA", PLAIN, WITHOUT),
    "SHiRA": ("Shira", {**LOW, "init_weights": False}, WITHOUT),
}
ELSEWHERE: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (kind, settings) for name, (kind, settings, _) in ON_THE_HEAD.items() if kind != "IA3"},
    "IA3": ("IA3", {"feedforward_modules": [], "init_ia3_weights": False}),
    "layer norms": ("LNTuning", {"target_modules": ["input_layernorm"]}),
    "embeddings": ("Lora", {**LORA, "target_modules": ["embed_tokens"]}),
    "trained head": ("Lora", {**LORA, "modules_to_save": ["lm_head"]}),
    "trained tokens": ("TrainableTokens", {"token_indices": [3, 9], "target_modules": ["embed_tokens"]}),
    "prompt tuning": ("PromptTuning", {"num_virtual_tokens": 3}),
    "prefix tuning": ("PrefixTuning", {"num_virtual_tokens": 3}),
    "p-tuning": ("PromptEncoder", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
}
# Some of each sort run with `make test`.
THOROUGH = [*ELSEWHERE.keys() - {"prompt tuning", "OFT"}], [*ON_THE_HEAD.keys() - {"OFT", "AdaLoRA", "HRA"}]


def marked(names, thorough):
    return [pytest.param(name, marks=[pytest.mark.thorough] if name in thorough else []) for name in names]


def adapted(model, kind: str, settings: dict[str, Any], modules: list[str]):
    torch.manual_seed(0)
    where = {} if "virtual" in str(settings) else {"target_modules": modules}
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **{**where, **settings})
    return peft.get_peft_model(model, config).train()


def check(kind: str, settings: dict[str, Any], modules: list[str], order: str, outcome: str) -> None:
    plain, ours = adapted(new_model("llama", False), kind, settings, modules), new_model("llama", False)
    if order == "wrap first":
        LMHead.wrap(ours)
    ours = adapted(ours, kind, settings, modules)
    if order == "adapt first":
        LMHead.wrap(ours)
    ours.load_state_dict(plain.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = training_step(ours, loss_of())
        is_lazy = type(ours(**batch()).logits) is LazyLogits
    assert_same_step(step, training_step(plain, loss_of()), exact_step(plain, loss_of()))
    said = {str(w.message) for w in caught if "LazyLogits" in str(w.message) or "LMHead" in str(w.message)}
    if outcome == LAZY:
        assert is_lazy and not said
    else:
        assert len(said) == 1 and said.pop().startswith(outcome)
    assert type(LMHead.unwrap(ours).get_output_embeddings()) is type(plain.get_output_embeddings())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", ["wrap first", "adapt first"])
@pytest.mark.parametrize("name", marked(ELSEWHERE, THOROUGH[0]))
def test_elsewhere(name, order):
    check(*ELSEWHERE[name], ["q_proj", "v_proj"], order, LAZY)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", ["wrap first", "adapt first"])
@pytest.mark.parametrize("name", marked(ON_THE_HEAD, THOROUGH[1]))
def test_on_the_head(name, order):
    kind, settings, outcome = ON_THE_HEAD[name]
    check(kind, settings, ["q_proj", "lm_head"], order, outcome)


@pytest.mark.filterwarnings("ignore")
def test_several_adapters():
    """Switched, added up, disabled, merged and merged for good: the plain model's logits each time."""
    models = [adapted(new_model("llama", False), "Lora", LORA, ["q_proj", "lm_head"]) for _ in range(2)]
    LMHead.wrap(models[1])
    for model in models:
        torch.manual_seed(1)
        model.add_adapter("other", peft.LoraConfig(task_type="CAUSAL_LM", **LORA, target_modules=["lm_head"]))

    def assert_same():
        plain, ours = (training_step(model, loss_of()) for model in models)
        assert type(models[1](**batch()).logits) is LazyLogits
        assert_same_step(ours, plain, exact_step(models[0], loss_of()))

    for change in (
        lambda model: model.set_adapter("other"),
        lambda model: model.base_model.set_adapter(["default", "other"]),
        lambda model: model.add_weighted_adapter(["default", "other"], [0.3, 0.7], "sum", combination_type="linear"),
        lambda model: model.set_adapter("sum"),
        lambda model: model.delete_adapter("other"),
    ):
        for model in models:
            change(model)
        assert_same()
    with models[0].disable_adapter(), models[1].disable_adapter():
        torch.testing.assert_close(models[1](**batch()).loss, models[0](**batch()).loss)
    merged = [model.merge_and_unload().train() for model in models]
    assert type(merged[1].lm_head) is LMHead and type(merged[1](**batch()).logits) is LazyLogits
    torch.testing.assert_close(merged[1](**batch()).loss, merged[0](**batch()).loss)
