"""Models of Transformers with a sharded head on two ranks: the step of one process, state dicts, then generation."""

import traceback

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.distributed.launch import run

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.thorough
RANKS, VOCAB = 2, 37
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "d_model": 16,
    "intermediate_size": 24,
    "num_layers": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "max_position_embeddings": 32,
    **{"dropout": 0.0, "dropout_rate": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}
BART = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
# The class, and what its configuration has besides `SMALL`.
FAMILIES = {
    "llama": ("LlamaForCausalLM", {}),
    "llama, tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 1, "n_head": 2}),
    "gemma2, a softcap": ("Gemma2ForCausalLM", {"final_logit_softcapping": 5.0}),
    "gemma3, scaled embeddings": ("Gemma3ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    "granite, scaled logits": ("GraniteForCausalLM", {"logits_scaling": 4.0}),
    "phi, a bias": ("PhiForCausalLM", {}),
    "bert, a bias in two places": ("BertForMaskedLM", {}),
    "t5, three ties": ("T5ForConditionalGeneration", {"d_ff": 24}),
    "bart, three ties and a bias of zeros": ("BartForConditionalGeneration", BART | {"scale_embedding": True}),
}


def new_model(family: str) -> nn.Module:
    name, changes = FAMILIES[family]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**SMALL | changes)).train()


def batch(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(4, VOCAB, (2, 6 + rank), generator=generator)
    return ids, ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)


def loss_of(model: nn.Module, rank: int) -> Tensor:
    """The sum over the tokens of a rank, from the model's own mean."""
    ids, labels = batch(rank)
    predicted = labels[:, 1:] if "CausalLM" in repr(type(model)) or "GPT2" in repr(type(model)) else labels
    return model(input_ids=ids, labels=labels).loss * (predicted != -100).sum()


def step(family: str, rank: int) -> None:
    from chunked_ce import LMHead

    plain, model = new_model(family), LMHead.shard(new_model(family))
    expected = sum(loss_of(plain, other) for other in range(RANKS))
    (expected / RANKS).backward()
    loss = loss_of(model, rank)
    loss.backward()
    for name, parameter in model.named_parameters():
        if name not in set(model._ddp_params_and_buffers_to_ignore) and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= RANKS
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, expected.detach())
    norms = [nn.utils.clip_grad_norm_(one.parameters(), 0.1) for one in (model, plain)]
    torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
    for one in (model, plain):
        torch.optim.SGD(one.parameters(), 0.5).step()
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()), rtol=1e-5, atol=1e-6)
    model.tie_weights()
    with pytest.raises(RuntimeError, match=r"call LMHead\.unwrap"):
        model.resize_token_embeddings(VOCAB + 3)
    LMHead.unwrap(model).eval()
    if model.can_generate():
        keywords = {"max_new_tokens": 3, "do_sample": False}
        generated = [one.eval().generate(batch(0)[0], **keywords) for one in (model, plain)]
        assert torch.equal(*generated)
    model.resize_token_embeddings(VOCAB + 3)


def on_rank(rank: int, world_size: int) -> dict[str, str | None]:
    failures = {}
    for family in FAMILIES:
        try:
            failures[family] = step(family, rank)
        except Exception:
            failures[family] = traceback.format_exc()
        dist.barrier()
    return failures


@pytest.fixture(scope="module")
def ranks():
    return run(on_rank, RANKS)


@pytest.mark.parametrize("family", FAMILIES)
def test_family(ranks, family):
    failures = [found[family] for found in ranks if found[family] is not None]
    assert not failures, failures[0]
