"""An unmodified model with an `LMHead` under DDP, FSDP2 and ZeRO-3, on two ranks: the step of one plain process.

The loss is taken inside the model's forward, or outside of it from the logits that the forward returned.
"""

import collections
import itertools
import logging
import traceback
import warnings
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten

from chunked_ce import ChunkOptions, LazyLogits, LMHead
from tests.distributed.launch import run
from tests.integrations.training import Step, assert_same_step, exact_step, training_step

pytest.importorskip("transformers")
pytest.importorskip("deepspeed")

VOCAB, LENGTH, RANKS = 256, 12, 2
OPTIONS = ChunkOptions(chunk_size=8)


class Case(NamedTuple):
    engine: str
    tied: bool
    outside: bool
    wrap: str = "before"  # the engine, after it, or not at all
    setting: str = ""

    def __str__(self):
        where = "outside" if self.outside else "inside"
        said = [self.engine, "tied" if self.tied else "untied", where, f"wrap {self.wrap}", self.setting]
        return "-".join(part for part in said if part)


PLACES = list(itertools.product([True, False], [True, False]))  # tied, outside
WAYS = [*(("before", *place) for place in PLACES), ("after", False, True), ("after", True, False)]
WAYS += [("never", *place) for place in PLACES]

DDP = [
    Case("ddp", tied, tied, setting=setting)
    for setting in ("", "find_unused_parameters", "static_graph")
    for tied in (True, False)
]
FSDP = [
    *(Case("fsdp", tied, outside, wrap) for wrap, tied, outside in WAYS),
    *(Case("fsdp", tied, outside, wrap, "head alone") for wrap, tied, outside in WAYS if not tied),
    *(Case("fsdp", True, False, wrap, "reshard") for wrap in ("before", "never")),
]
ZERO = [
    *(Case("zero3", tied, outside, wrap) for wrap, tied, outside in WAYS),
    *(Case("zero3", False, False, wrap, "bf16") for wrap in ("before", "never")),
    *(Case("zero3", False, True, wrap, "prefetch") for wrap in ("before", "never")),
]
RELEASED = Case("fsdp", False, True, "before", "reshard")


def new_model(tied: bool):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=tied, **sizes)).train()


def batch(rank: int):
    ids = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(rank))
    labels = ids.clone()
    labels[0, : 3 + rank] = -100
    return ids, labels


def loss_of(model, rank: int, outside: bool):
    ids, labels = batch(rank)
    if not outside:
        return model(input_ids=ids, labels=labels).loss
    logits = model(input_ids=ids).logits.float()
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1), reduction="sum") / 20


# ---- on the ranks ----


def step_of(case: Case, rank: int):
    """The second step without an optimizer, and the collectives that it took."""
    model = new_model(case.tied)
    if case.wrap == "before":
        LMHead.wrap(model, options=OPTIONS)
    engine, gradients, backward, end = ENGINES[case.engine](case, model)
    if case.wrap == "after":
        LMHead.wrap(engine, options=OPTIONS)
    try:
        for measured in (False, True):  # ZeRO-3 records the first step, and goes by the record in the second
            model.zero_grad()
            activities = [torch.profiler.ProfilerActivity.CPU]
            with (
                torch.profiler.profile(activities=activities, record_shapes=True)
                if measured
                else nullcontext() as profile
            ):
                loss = loss_of(engine, rank, case.outside)
                backward(loss)
            found = gradients()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() in COLLECTIVES]
        return Step(loss.detach().float(), found), collections.Counter((e.name(), str(e.shapes())) for e in events)
    finally:
        end()


COLLECTIVES = {"c10d::allreduce_", "c10d::_allgather_base_", "c10d::_reduce_scatter_base_", "c10d::allgather_"}


def ddp(case: Case, model):
    engine = DistributedDataParallel(model, **({case.setting: True} if case.setting else {}))
    return engine, lambda: {name: p.grad.clone() for name, p in model.named_parameters()}, torch.Tensor.backward, int


def fsdp(case: Case, model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if case.setting == "head alone":
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True if case.setting == "reshard" else None)
    return (
        model,
        lambda: {name: p.grad.full_tensor() for name, p in model.named_parameters()},
        torch.Tensor.backward,
        int,
    )


def zero3(case: Case, model):
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": case.setting == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Or ZeRO-3 leaves parameters as small as these whole, and proves nothing.
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    if case.setting != "prefetch":  # which gathers all at once, and keeps it until the head's backward
        each = ("stage3_prefetch_bucket_size", "stage3_max_reuse_distance", "stage3_max_live_parameters")
        config["zero_optimization"] |= dict.fromkeys(each, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    def gradients():
        found = {name: safe_get_full_grad(p).float().clone() for name, p in model.named_parameters()}
        engine.step()
        assert model.lm_head.weight.numel() == 0
        return found

    return engine, gradients, engine.backward, engine.destroy


ENGINES = {"ddp": ddp, "fsdp": fsdp, "zero3": zero3}


def attempt(case: Case, rank: int):
    """The result, or the error as text: a case that fails on all ranks must not take the others along."""
    try:
        return step_of(case, rank)
    except Exception:
        return traceback.format_exc()


def metric_after_the_step(rank: int) -> str:
    """What a metric of logits from before an optimizer's step meets with under ZeRO-3."""
    model = new_model(False)
    LMHead.wrap(model)
    engine, gradients, backward, end = zero3(Case("zero3", False, False), model)
    try:
        ids, labels = batch(rank)
        output = engine(input_ids=ids, labels=labels)
        backward(output.loss)
        before = output.logits.argmax(-1)
        gradients()  # and the step
        with pytest.raises(RuntimeError) as refusal:
            output.logits.argmax(-1)
        return f"{tuple(before.shape)}, then: {refusal.value}"
    finally:
        end()


def two_ranks(rank, world_size):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile this, for a minute
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("error", "LazyLogits")
    found = {case: attempt(case, rank) for case in (*DDP, *FSDP, *ZERO, RELEASED)}
    return found | {"after the step": metric_after_the_step(rank)}


@pytest.fixture(scope="module")
def results():
    return run(two_ranks, RANKS)


# ---- here ----


def whole_batch(outside: bool):
    """The mean of the ranks' losses, which is what engines make of them."""
    return lambda model: sum(loss_of(model, rank, outside) for rank in range(RANKS)) / RANKS


def of(results, case: Case) -> list:
    for result in results:
        assert not isinstance(result[case], str), result[case]
    return [result[case] for result in results]


@pytest.mark.parametrize("case", [case for case in (*DDP, *FSDP, *ZERO) if case.setting != "bf16"], ids=str)
def test_the_step_of_one_process(results, case):
    model = new_model(case.tied)
    plain, exact = (step(model, whole_batch(case.outside)) for step in (training_step, exact_step))
    ranks = [step for step, _ in of(results, case)]
    mean = sum(step.loss for step in ranks) / RANKS
    for step in ranks:
        assert_same_step(Step(mean, step.gradients), plain, exact)


def test_bf16(results):
    """No further from the exact step than without an `LMHead`: each matrix, and all parameters together. The roundings
    of a norm's few numbers are luck."""
    exact = exact_step(new_model(False), whole_batch(False))
    ours, plain = (of(results, Case("zero3", False, False, w, "bf16"))[0][0] for w in ("before", "never"))
    totals = [0.0, 0.0]
    for name, expected in exact.gradients.items():
        errors = [(step.gradients[name] - expected).norm() for step in (ours, plain)]
        assert expected.dim() == 1 or errors[0] <= 1.1 * errors[1], name
        totals = [total + (error / expected.norm()) ** 2 for total, error in zip(totals, errors, strict=True)]
    assert totals[0] <= 1.1**2 * totals[1]


@pytest.mark.parametrize("case", [case for case in (*FSDP, *ZERO) if case.wrap != "never"], ids=str)
def test_the_collectives_of_the_plain_model(results, case):
    """The head is gathered as often, and its gradient reduced as often."""
    for (_, found), (_, plain) in zip(of(results, case), of(results, case._replace(wrap="never")), strict=True):
        assert found == plain
        gathered = sum(number for (name, _), number in found.items() if "allgather" in name)
        assert gathered >= (1 if case.setting == "prefetch" else 5)  # parts of the model, each on its own


def test_a_weight_released_before_the_loss_is_a_clear_error(results):
    for result in results:
        assert "is not whole here but" in result[RELEASED] and "fully_shard(model.lm_head)" in result[RELEASED]


def test_logits_from_before_a_step_are_an_error(results):
    for result in results:
        assert result["after the step"].startswith(f"(2, {LENGTH}), then: the head's parameters were changed in place")


def test_logits_stay_lazy_in_outputs():
    model = new_model(True)
    LMHead.wrap(model)
    assert type(model(*batch(0)[:1]).logits) is LazyLogits


def test_answers_are_no_views(monkeypatch):
    """FSDP2 warns of each module that returns a view with a graph, and a head does so for each answer."""
    found, run = [], LMHead.run

    def run_and_keep(*args):
        found.append(run(*args))
        return found[-1]

    monkeypatch.setattr(LMHead, "run", run_and_keep)
    logits = LMHead(6, VOCAB)(torch.randn(2, 3, 6))
    ids = torch.randint(VOCAB, (2, 3, 1))
    answers = [logits.log_softmax(-1).gather(-1, ids), logits.gather(-1, ids), logits.logsumexp(-1), logits.mean(-1)]
    answers += [logits.topk(2).values, F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")]
    assert all(answer.requires_grad for answer in answers)
    tensors = [one for one in tree_flatten(found)[0] if isinstance(one, torch.Tensor) and one.requires_grad]
    assert len(tensors) >= len(answers) and all(one._base is None for one in tensors)
