"""Causal language models of Transformers, unmodified: the same step with an `LMHead` as without."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

from chunked_ce import ChunkOptions, LazyLogits, LMHead
from tests.integrations.training import assert_same_step, exact_step, largest_allocation, training_step

transformers = pytest.importorskip("transformers")

VOCAB, BATCH, LENGTH, WIDTH = 768, 2, 40, 16
# A family that does not know a setting ignores it.
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "ffn_dim": 2 * WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "word_embed_proj_dim": WIDTH,
}
# What differs from `SMALL`, and factors and caps of the logits that are off by default.
FAMILIES = {
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 3.0},
    "ernie4_5": {},
    "exaone4": {},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 0.05},
    "gemma3_text": {"head_dim": 8, "final_logit_softcapping": 0.1},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "gpt2": {"n_embd": WIDTH, "n_layer": 1, "n_head": 2, "n_positions": LENGTH},
    "gpt_bigcode": {"n_embd": WIDTH, "n_layer": 1, "n_head": 2, "n_positions": LENGTH},
    "gpt_neox": {},
    "granite": {"logits_scaling": 0.125},
    "granitemoe": {"logits_scaling": 4.0},
    "helium": {"head_dim": 8},
    "llama": {},
    "mistral": {},
    "mixtral": {"num_local_experts": 2},
    "mpt": {"d_model": WIDTH, "n_heads": 2, "n_layers": 1, "max_seq_len": LENGTH},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
}
CHUNKS = ChunkOptions(chunk_size=8)


def new_model(family: str, tied: bool, **changes):
    settings = SMALL | FAMILIES[family] | {"tie_word_embeddings": tied} | changes
    config = transformers.CONFIG_MAPPING[family](**settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").train()
    head = model.get_output_embeddings()
    assert head.weight.shape == (VOCAB, WIDTH)
    assert (head.weight is model.get_input_embeddings().weight) == tied
    return model


def batch():
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=generator)
    labels = ids.clone()
    labels[0, :7] = -100
    return {"input_ids": ids, "labels": labels}


def loss_of(**keywords):
    return lambda model: model(**batch(), **keywords).loss


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_step(family, tied):
    plain = new_model(family, tied)
    ours = copy.deepcopy(plain)
    LMHead.wrap(ours, options=CHUNKS)
    for keywords in ({}, {"num_items_in_batch": torch.tensor(31)}):
        exact = exact_step(plain, loss_of(**keywords))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "LazyLogits")
            step = training_step(ours, loss_of(**keywords))
        assert_same_step(step, training_step(plain, loss_of(**keywords)), exact)


HALF_OF_THE_LOGITS = BATCH * LENGTH * VOCAB * 4 // 2  # bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_never_exist(family):
    model = new_model(family, tied=False)
    LMHead.wrap(model, options=CHUNKS)
    assert largest_allocation(lambda: training_step(model, loss_of())) < HALF_OF_THE_LOGITS


def test_the_logits_of_the_plain_model_exist():
    model = new_model("llama", tied=False)
    assert largest_allocation(lambda: training_step(model, loss_of())) >= 2 * HALF_OF_THE_LOGITS


def test_a_softcap_or_a_scale_matters():
    """Else the families above would prove nothing about them."""
    for family, changes in {
        "gemma2": {"final_logit_softcapping": None},
        "cohere": {"logit_scale": 1.0},
        "granite": {"logits_scaling": 1.0},
    }.items():
        step = training_step(new_model(family, True), loss_of())
        other = training_step(new_model(family, True, **changes), loss_of())
        weight = next(name for name in step.gradients if "embed" in name)
        change = (step.gradients[weight] - other.gradients[weight]).abs().max()
        assert change > 0.05 * step.gradients[weight].abs().max(), family


def test_evaluation_and_generation_see_tensors():
    plain = new_model("llama", tied=True)
    wrapped = copy.deepcopy(plain)
    LMHead.wrap(wrapped)
    assert type(wrapped(**batch()).logits) is LazyLogits
    plain.eval(), wrapped.eval()
    ids = batch()["input_ids"]
    with torch.no_grad():
        logits = wrapped(ids).logits
    assert type(logits) is torch.Tensor
    assert torch.equal(logits, plain(ids).logits)
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(wrapped.generate(ids[:, :8], **settings), plain.generate(ids[:, :8], **settings))


@pytest.mark.filterwarnings("error:LazyLogits")
@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_k": 7, "temperature": 0.7}, {"top_p": 0.9}], ids=str)
def test_sampling_while_training(settings):
    model = new_model("llama", tied=True)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    ids = batch()["input_ids"][:, :8]
    LMHead.wrap(model, options=ChunkOptions(chunk_size=1))
    for length in (8, 1):
        found = []
        for training in (True, False):
            torch.manual_seed(5)
            settings |= {"max_new_tokens": 12, "do_sample": True, "eos_token_id": None}
            found.append(model.train(training).generate(ids[:, :length], **settings))
        assert torch.equal(*found)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("words", [VOCAB + 10, VOCAB - 10])
def test_resized_embeddings(tied, words):
    plain = new_model("llama", tied)
    wrapped = copy.deepcopy(plain)
    LMHead.wrap(wrapped, options=CHUNKS)
    for model in (plain, wrapped):
        torch.manual_seed(3)
        model.resize_token_embeddings(words)
    ids = batch()["input_ids"].clamp(max=words - 1)
    logits = wrapped(ids).logits
    assert type(logits) is LazyLogits and logits.shape[-1] == words
    assert wrapped.lm_head.options is CHUNKS
    assert (wrapped.lm_head.weight is wrapped.get_input_embeddings().weight) == tied
    torch.testing.assert_close(logits.log_softmax(-1).sum(-1), plain(ids).logits.log_softmax(-1).sum(-1))

    def loss(model):
        return model(input_ids=ids, labels=ids).loss

    assert_same_step(training_step(wrapped, loss), training_step(plain, loss), exact_step(plain, loss))
    assert type(wrapped.eval()(ids).logits) is torch.Tensor
    LMHead.unwrap(wrapped)
    assert type(wrapped.lm_head) is torch.nn.Linear


def test_generation_while_training():
    model = new_model("llama", tied=True)
    ids = batch()["input_ids"][:, :8]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    LMHead.wrap(model)
    assert model.training
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)


def test_saved_and_loaded_as_the_plain_model(tmp_path):
    model = new_model("llama", tied=True)
    names = model.state_dict().keys()
    LMHead.wrap(model)
    assert model.state_dict().keys() == names
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_logits_to_keep():
    plain = new_model("llama", tied=False)
    wrapped = copy.deepcopy(plain)
    LMHead.wrap(wrapped)
    ids, labels = batch().values()

    def last_tokens(model):
        logits = model(ids, logits_to_keep=10).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, -9:].flatten())

    assert_same_step(
        training_step(wrapped, last_tokens), training_step(plain, last_tokens), exact_step(plain, last_tokens)
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    plain = new_model("llama", tied=True)
    wrapped = copy.deepcopy(plain)
    LMHead.wrap(wrapped)
    wrapped.gradient_checkpointing_enable({"use_reentrant": reentrant})
    step = training_step(wrapped, loss_of())
    assert_same_step(step, training_step(plain, loss_of()), exact_step(plain, loss_of()))


@pytest.mark.thorough
def test_compiled():
    plain = new_model("gemma2", tied=True)
    wrapped = copy.deepcopy(plain)
    LMHead.wrap(wrapped, options=CHUNKS)
    compiled = torch.compile(wrapped, backend="aot_eager")
    step = training_step(wrapped, lambda model: compiled(**batch()).loss)
    assert_same_step(step, training_step(plain, loss_of()), exact_step(plain, loss_of()))
