"""An `LMHead` in a model that DeepSpeed's AutoTP shards: lazy on each rank's rows, or lost with a word."""

import functools
import importlib.util
import warnings
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chunked_ce import ChunkOptions, LazyLogits, LMHead
from tests.distributed.launch import run
from tests.integrations.training import largest_allocation

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("deepspeed", "transformers")),
    reason="needs deepspeed and transformers",
)
VOCAB, RANKS, BATCH, LENGTH, STEPS = 511, 2, 2, 128, 2
OPTIONS = ChunkOptions(chunk_size=8)


def partition(**kinds: str) -> dict:
    """A configuration of AutoTP by the names of layers."""
    specs = [{"patterns": [f".*{name}.*"], "partition_type": kind} for name, kind in kinds.items()]
    return {"partition_config": {"use_default_specs": False, "layer_specs": specs}}


LAYERS = {"up_proj": "column", "gate_proj": "column", "down_proj": "row"}
SETTINGS = {
    "default": {},  # a head that gathers its output, or a vocabulary-parallel one if it is tied
    "vocab parallel": {"vocab_parallel_lm_head": True},
    "skipped": partition(**LAYERS, lm_head="skip"),
    "unnamed": partition(**LAYERS),
    "rows": partition(**LAYERS, lm_head="row"),
}


class Case(NamedTuple):
    settings: str
    order: str  # the head is swapped before AutoTP, or after it
    tied: bool = False
    stage: int = 0  # of ZeRO

    def __str__(self):
        return "-".join([self.settings, self.order, "tied" if self.tied else "untied", f"zero{self.stage}"])


LAZY = [
    *(Case("default", order, tied) for order in ("before", "after") for tied in (False, True)),
    *(Case("vocab parallel", order) for order in ("before", "after")),
    *(Case("vocab parallel", order, True, stage) for order, stage in (("before", 3), ("after", 2))),
    Case("skipped", "before"),
    Case("unnamed", "after"),
]
LOST = [Case("rows", order) for order in ("before", "after")]


def new_model(tied: bool = False):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=tied, **sizes)).train()


def new_engine(model, case: Case):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": case.stage,
            "reduce_bucket_size": 10_000,
            "stage3_param_persistence_threshold": 0,
        },
        "tensor_parallel": {"autotp_size": RANKS, **SETTINGS[case.settings]},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def batch() -> dict[str, Any]:
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels}


# ---- on the ranks ----


class Trained(NamedTuple):
    is_lazy: bool
    losses: list[float]  # of the steps, in evaluation, and as a sum over a given number of tokens
    parameters: dict[str, Tensor]  # this rank's after the steps
    largest: int  # bytes at once in a step
    words: int  # in the logits in evaluation
    said: list[str]
    unwrapped: bool


def trained(case: Case) -> Trained:
    from tests.integrations.test_deepspeed import end, masters

    model = new_model(case.tied)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if case.order == "before":
            LMHead.wrap(model, options=OPTIONS)
        engine = new_engine(model, case)
        if case.order == "after":
            LMHead.wrap(engine, options=OPTIONS)
        is_lazy = type(engine(input_ids=batch()["input_ids"]).logits) is LazyLogits
        losses = []

        def step() -> None:
            loss = engine(**batch()).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())

        largest = max(largest_allocation(step) for _ in range(STEPS))
        parameters = masters(engine)
        losses.append(engine(**batch(), num_items_in_batch=torch.tensor(100)).loss.item())
        engine.eval()
        with torch.no_grad():
            evaluated = engine(**batch())
    losses.append(evaluated.loss.item())
    LMHead.unwrap(model)
    unwrapped = not isinstance(model.lm_head, LMHead) and "_settings" not in vars(model.lm_head)
    end(engine)
    said = [str(one.message) for one in caught if "LMHead" in str(one.message) or "Lazy" in str(one.message)]
    return Trained(is_lazy, losses, parameters, largest, evaluated.logits.shape[-1], said, unwrapped)


def lost(case: Case) -> str:
    """What is said where no loss can be taken in chunks."""
    from tests.integrations.test_deepspeed import end

    model = new_model()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if case.order == "before":
            LMHead.wrap(model)
        engine = new_engine(model, case)
    said = [str(one.message) for one in caught if "AutoTP" in str(one.message)]
    if case.order == "after":
        with pytest.raises(ValueError) as error:
            LMHead.wrap(engine)
        said.append(str(error.value))
    end(engine)
    (message,) = said
    return message


def a_layer(training: bool) -> tuple[Tensor, ...]:
    """Loss and gradients of a layer, which is frozen unless AutoTP is in training mode."""
    from deepspeed.module_inject.layers import VocabParallelLinear, set_autotp_mode

    set_autotp_mode(training=training)
    hidden, head, target = layer_inputs()
    model = nn.Sequential(nn.Identity(), VocabParallelLinear(head, torch.distributed.group.WORLD, name="lm_head"))
    set_autotp_mode(training=True)
    model.eval()
    LMHead.wrap(model.train(), "1", softcap=2.0)
    assert "in_features=4" in str(model)
    loss = F.cross_entropy(model(hidden), target)
    loss.backward()
    with pytest.raises(NotImplementedError, match="argmax needs the logits of all words, of which this rank holds"):
        model(hidden).argmax(-1)
    with pytest.raises(ValueError, match="sharded by tensor parallelism"):
        LMHead.shard(model, module="1")
    return loss.detach(), hidden.grad, model[1].weight.grad, model.eval()(hidden).detach()


def layer_inputs() -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 4, requires_grad=True), nn.Linear(4, 11), torch.randint(11, (6,))


def two_ranks(rank: int, world_size: int) -> dict:
    import deepspeed

    from tests.integrations.test_deepspeed import quiet_deepspeed

    quiet_deepspeed()
    deepspeed.init_distributed(dist_backend="gloo")
    layers = {training: a_layer(training) for training in (False, True)}
    return layers | {case: trained(case) for case in LAZY} | {case: lost(case) for case in LOST}


@pytest.fixture(scope="module")
def results():
    return run(two_ranks, RANKS)


# ---- the tests ----


@functools.cache
def one_process(tied: bool) -> tuple[list[float], dict[str, Tensor]]:
    model, losses = new_model(tied), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(STEPS):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    losses.append(model(**batch(), num_items_in_batch=torch.tensor(100)).loss.item())
    losses.append(model.eval()(**batch()).loss.item())
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("case", LAZY, ids=str)
def test_the_training_of_one_process_without_logits(results, case):
    losses, parameters = one_process(case.tied)
    ranks = [result[case] for result in results]
    for found in ranks:
        assert found.is_lazy and found.unwrapped and not found.said
        assert found.losses == pytest.approx(losses, rel=1e-6)
        assert found.largest < BATCH * LENGTH * (VOCAB // RANKS) * 4 / 3
    assert [found.parameters.keys() for found in ranks] == [parameters.keys()] * RANKS
    for name, expected in parameters.items():
        parts = [found.parameters[name] for found in ranks]
        split = [dim for dim in range(expected.dim()) if parts[0].shape[dim] != expected.shape[dim]]
        whole = torch.cat(parts, split[0]) if split else parts[0]
        torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", LAZY, ids=str)
def test_evaluation_gives_the_logits_of_the_layer(results, case):
    shards = case.settings == "vocab parallel" or (case.settings == "default" and case.tied)
    assert [result[case].words for result in results] == ([256, 255] if shards else [VOCAB, VOCAB])


@pytest.mark.parametrize("case", LOST, ids=str)
def test_a_head_whose_loss_needs_all_logits_is_lost_with_a_word(results, case):
    for result in results:
        message = result[case]
        if case.order == "before":
            assert message.startswith("DeepSpeed's AutoTP puts a LinearAllreduceWithReplicatedInput in the place of")
        else:
            assert message.startswith("the output embedding must be an nn.Linear, was LinearAllreduceWithReplicated")
        for works in ("vocab_parallel_lm_head", "partition_config", "gathers its output"):
            assert works in message


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_of_ones_own(results, training):
    hidden, head, target = layer_inputs()
    logits = 2.0 * torch.tanh(head(hidden) / 2.0)
    expected = F.cross_entropy(logits, target)
    expected.backward()
    for result in results:
        loss, grad_hidden, *_ = result[training]
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(grad_hidden, hidden.grad)
    of_ranks = [result[training][2] for result in results]
    if training:
        torch.testing.assert_close(torch.cat(of_ranks), head.weight.grad)
    else:
        assert of_ranks == [None, None]
    torch.testing.assert_close(torch.cat([result[training][3] for result in results], -1), logits.detach())


def test_a_model_without_output_embeddings_that_it_names():
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
    assert "vocab_parallel_lm_head" in str(error.value)
