"""Llama models that Transformers shards by a tp_plan, with an `LMHead`: the step of one process, without logits."""

import functools
import importlib.util
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from chunked_ce import ChunkOptions, LazyLogits, LMHead
from tests.distributed.launch import run
from tests.integrations.training import Step, assert_same_step, exact_step, largest_allocation, training_step

pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
VOCAB, RANKS, BATCH, LENGTH = 511, 2, 2, 128
OPTIONS = ChunkOptions(chunk_size=8)
WAYS = [("auto", False), ("auto", True), ("before", False)]  # how the model is sharded, and whether it is tied


def new_model(tied: bool):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=tied, **sizes)).train()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels}


def loss_of(model: nn.Module) -> Tensor:
    return model(**batch()).loss


# ---- on the ranks ----


def sharded(way: str, tied: bool, folder: str, head: str | None = None):
    """A model by ``from_pretrained``, or one whose head is swapped before it is sharded."""
    from transformers import AutoModelForCausalLM, DistributedConfig

    plan = "auto" if head is None else {"lm_head": head}
    config = DistributedConfig(tp_size=RANKS, tp_plan=plan)
    if way == "auto":
        return AutoModelForCausalLM.from_pretrained(f"{folder}/{tied}", distributed_config=config).train()
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    model = LMHead.wrap(new_model(tied), options=OPTIONS)
    return apply_tensor_parallelism(model, init_device_mesh("cpu", (RANKS,)), model._resolve_parallel_plans(config)[0])


class Trained(NamedTuple):
    is_lazy: bool
    step: Step
    largest: int  # bytes at once in a step
    evaluated: Tensor
    generated: Tensor
    unwrapped: Step
    said: list[str]


def trained(way: str, tied: bool, folder: str) -> Trained:
    model = sharded(way, tied, folder)
    if way != "before":
        LMHead.wrap(model, options=OPTIONS)
    steps = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        is_lazy = type(model(**batch()).logits) is LazyLogits
        largest = largest_allocation(lambda: steps.append(whole_step(model)))
    model.eval()
    with torch.no_grad():
        evaluated = model(**batch()).logits
    generated = model.generate(batch()["input_ids"][:, :8], max_new_tokens=4, do_sample=False)
    LMHead.unwrap(model.train())
    assert type(model.lm_head) is nn.Linear
    said = [str(one.message) for one in caught if "LMHead" in str(one.message) or "Lazy" in str(one.message)]
    return Trained(is_lazy, steps[0], largest, evaluated, generated, whole_step(model), said)


def whole_step(model: nn.Module) -> Step:
    loss, gradients = training_step(model, loss_of)
    return Step(loss, {name: getattr(g, "full_tensor", g.clone)() for name, g in gradients.items()})


def two_ranks(rank: int, world_size: int, folder: str) -> dict:
    found = {(way, tied): trained(way, tied, folder) for way, tied in WAYS}
    with pytest.raises(ValueError) as error:
        LMHead.wrap(sharded("auto", False, folder, head="rowwise_split_input"))
    return found | {"rowwise": str(error.value)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for tied in (False, True):
        new_model(tied).save_pretrained(Path(folder, str(tied)))
    return run(two_ranks, RANKS, str(folder))


@functools.cache
def one_process(tied: bool) -> tuple[Step, Step, Tensor, Tensor]:
    model = new_model(tied)
    steps = training_step(model, loss_of), exact_step(model, loss_of)
    logits = model.eval()(**batch()).logits.detach()
    return *steps, logits, model.generate(batch()["input_ids"][:, :8], max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize(("way", "tied"), WAYS)
def test_the_step_of_one_process_without_logits(results, way, tied):
    plain, exact, _, _ = one_process(tied)
    for result in results:
        found = result[way, tied]
        assert found.is_lazy and not found.said
        assert_same_step(found.step, plain, exact)
        assert_same_step(found.unwrapped, plain, exact)
        assert found.largest < BATCH * LENGTH * (VOCAB // RANKS) * 4 / 4


@pytest.mark.parametrize(("way", "tied"), WAYS)
def test_evaluation_and_generation(results, way, tied):
    *_, logits, generated = one_process(tied)
    for result in results:
        torch.testing.assert_close(result[way, tied].evaluated, logits)
        assert torch.equal(result[way, tied].generated, generated)


def test_a_row_wise_head_is_refused(results):
    for result in results:
        assert "must be sharded by ColwiseParallel, if at all, but is sharded by RowwiseParallel" in result["rowwise"]
