"""An `LMHead` in a model that DeepSpeed's AutoTP shards: lost with a word, and left alone where that was asked for."""

import importlib.util
import warnings

import pytest
import torch
import torch.nn.functional as F

from chunked_ce import LazyLogits, LMHead, VocabShard, linear_cross_entropy
from tests.distributed.launch import run

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("deepspeed", "transformers")),
    reason="needs deepspeed and transformers",
)
VOCAB, RANKS = 64, 2


def partition(**kinds: str) -> dict:
    """A configuration of AutoTP by the names of layers."""
    specs = [{"patterns": [f".*{name}.*"], "partition_type": kind} for name, kind in kinds.items()]
    return {"partition_config": {"use_default_specs": False, "layer_specs": specs}}


SETTINGS = {
    "default": {},
    "vocab parallel": {"vocab_parallel_lm_head": True},
    "skipped": partition(up_proj="column", gate_proj="column", down_proj="row", lm_head="skip"),
    "unnamed": partition(up_proj="column", gate_proj="column", down_proj="row"),
}


def new_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=False, **sizes)).train()


def new_engine(model, settings: str):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "tensor_parallel": {"autotp_size": RANKS, **SETTINGS[settings]},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def batch():
    return torch.arange(12).view(1, 12), torch.arange(1, 13).view(1, 12)


def around(order: str, settings: str) -> dict:
    """What is said, and what becomes of the loss, where the head is swapped before AutoTP or after it."""
    model, refusal = new_model(), None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if order == "before":
            LMHead.wrap(model)
        model = new_engine(model, settings).module
        if order == "after":
            try:
                LMHead.wrap(model)
            except ValueError as error:
                refusal = str(error)
    ids, target = batch()
    found = {"refusal": refusal, "warnings": [str(one.message) for one in said if "AutoTP" in str(one.message)]}
    head = model.lm_head
    if isinstance(head, LMHead):
        logits = model(input_ids=ids).logits
        found["lazy"] = type(logits) is LazyLogits
        found["loss"] = F.cross_entropy(logits.flatten(0, 1), target.flatten()).item()
    elif settings == "vocab parallel":
        hidden = model.model(input_ids=ids).last_hidden_state
        vocab = VocabShard.from_deepspeed(head)
        found["loss"] = linear_cross_entropy(hidden, head.weight, target, vocab=vocab).item()
    return found


def two_ranks(rank: int, world_size: int) -> dict:
    import deepspeed

    from tests.integrations.test_deepspeed import quiet_deepspeed

    quiet_deepspeed()
    deepspeed.init_distributed(dist_backend="gloo")
    return {(order, settings): around(order, settings) for settings in SETTINGS for order in ("before", "after")}


@pytest.fixture(scope="module")
def results():
    return run(two_ranks, RANKS)


WHAT_WORKS = ("partition_config", "vocab_parallel_lm_head", "VocabShard.from_deepspeed(layer)")


@pytest.mark.parametrize("settings", ["default", "vocab parallel"])
def test_a_replaced_head_is_lost_with_a_word(results, settings):
    for result in results:
        (warning,) = result["before", settings]["warnings"]
        assert warning.startswith("DeepSpeed's AutoTP puts a layer of its own in the place of this LMHead")
        refusal = result["after", settings]["refusal"]
        assert refusal.startswith("the output embedding must be an nn.Linear, was ")
        assert "of DeepSpeed's AutoTP" in refusal
        for works in WHAT_WORKS:
            assert works in warning and works in refusal


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("settings", ["vocab parallel", "skipped", "unnamed"])
def test_what_works_gives_the_loss_of_one_process(results, order, settings):
    ids, target = batch()
    with torch.no_grad():
        expected = F.cross_entropy(new_model()(input_ids=ids).logits.flatten(0, 1), target.flatten())
    for result in results:
        found = result[order, settings]
        assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
        if settings != "vocab parallel":
            assert found["lazy"] and found["refusal"] is None and not found["warnings"]


def test_a_model_without_output_embeddings_that_it_names(monkeypatch):
    layers = pytest.importorskip("deepspeed.module_inject.layers")

    class Layer(layers.TensorParallel_Layer):
        gather_params = _tp_partition = forward = None

        def __init__(self):
            torch.nn.Module.__init__(self)

    model = torch.nn.Sequential(torch.nn.Embedding(VOCAB, 4), Layer())
    with pytest.raises(
        ValueError, match=r"no output embedding found: .*DeepSpeed's AutoTP has replaced layers"
    ) as error:
        LMHead.wrap(model)
    assert "VocabShard.from_deepspeed(layer)" in str(error.value)
