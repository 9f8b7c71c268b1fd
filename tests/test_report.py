"""`LMHead.report` says what happens to the logits; where a wrap has no effect, one warning does."""

import copy
import pickle
import sys
import types
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from chunked_ce import ChunkOptions, LMHead, VocabShard
from tests.test_lm_head import VOCAB, WIDTH, Tied
from tests.test_lm_head_changes import replica_of

IDS = torch.randint(VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))


def loss_of(model):
    return F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())


def train(model, loss=loss_of, steps=1):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        loss(model).backward()
        optimizer.step()
    (head,) = LMHead.report(model).heads
    return head


@pytest.fixture
def said():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


# ---- what heads are ----


def test_kinds_and_settings():
    def kinds(model, **keywords):
        (head,) = LMHead.report(LMHead.wrap(model, **keywords)).heads
        return head.name, head.kinds, head.settings

    options = ChunkOptions(chunk_size=3)
    settings = "z_loss=0.5, logit_scale=2.0, lazy=always, chunk_size=3"
    assert kinds(Tied(), z_loss=0.5, logit_scale=2, lazy="always", options=options) == (
        "out",
        ("tied to embedding",),
        settings,
    )
    assert kinds(nn.Sequential(Tied(tied=False)))[:2] == ("0.out", ("plain",))
    assert kinds(nn.Linear(WIDTH, VOCAB)) == ("", ("plain",), "")
    assert str(LMHead.report(LMHead(WIDTH, VOCAB))) == "the model itself (plain): lazy"


def test_shards_are_kinds():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        rows = LMHead(WIDTH, VOCAB, vocab=VocabShard(None, 0, VOCAB, VOCAB)).eval()
        (head,) = LMHead.report(rows).heads
        assert head.kinds == (f"vocab-parallel, rows 0 to {VOCAB} of {VOCAB}",) and head.is_lazy
        (head,) = LMHead.report(LMHead.shard(Tied())).heads
        assert head.kinds == ("tied to embedding", "sharded over 1 ranks") and head.is_lazy
    finally:
        dist.destroy_process_group()


def test_lora_is_a_kind():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(Tied(tied=False))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["out"], r=2))
    (head,) = LMHead.report(LMHead.wrap(model, "base_model.model.0.out")).heads
    assert head.kinds == ("LoRA",) and head.name == "base_model.model.0.out.base_layer"


def test_without_a_head():
    for model in (Tied(), LMHead.unwrap(LMHead.wrap(Tied()))):
        with pytest.raises(ValueError, match=r"the model has no LMHead: LMHead\.wrap\(model\)"):
            LMHead.report(model)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, was int"):
        LMHead.report(3)


def a_hook(*_):
    """Sees the logits."""


def replace_forward(head):
    head.forward = nn.Linear(WIDTH, VOCAB).forward


OBSTACLES = {
    "a hook on the head, a_hook": lambda head: head.register_forward_hook(a_hook),
    "its forward has been replaced": replace_forward,
    "its weight is parametrized or pruned": lambda head: nn.utils.parametrizations.weight_norm(head),
    "in evaluation mode logits wait for a loss": lambda head: head.eval(),
}


@pytest.mark.parametrize("why", OBSTACLES)
def test_why_a_head_is_not_lazy(why):
    model = LMHead.wrap(Tied(tied=False))
    OBSTACLES[why](model.out)
    (head,) = LMHead.report(model).heads
    assert not head.is_lazy and why in head.why_not and f"not lazy: {head.why_not}" in str(head)
    assert type(model(IDS)) is torch.Tensor
    plain = LMHead.report(model).heads[0].training.plain + LMHead.report(model).heads[0].evaluation.plain
    assert plain.total() == 1 and (next(iter(plain)) in head.why_not or "evaluation" in why)


# ---- what happened ----


def test_the_last_step():
    model = LMHead.wrap(Tied())

    def loss(model):
        first, second = model(IDS), model(IDS)
        assert first.argmax(-1).shape == IDS.shape and second.log_softmax(-1).gather(-1, IDS[..., None]).dim() == 3
        return loss_of(model) + first.logsumexp(-1).mean()

    for steps in (1, 2):  # each step starts anew
        step = train(model, loss, steps).training
        assert step.calls == 3 and not step.computed and not step.plain
        assert dict(step.taken) == {"argmax": 1, "gather": 1, "cross_entropy": 1, "logsumexp": 1}
    loss(model)
    loss(model)
    assert LMHead.report(model).heads[0].training.calls == 6  # of two micro-batches, say
    assert "without logits: cross_entropy (2 x)" in str(LMHead.report(model))
    assert step.calls == 3  # a report does not change


def test_logits_that_are_computed(said):
    model = LMHead.wrap(Tied())
    line = sys._getframe().f_lineno + 1
    step = train(model, lambda model: model(IDS).sigmoid().mean() + model(IDS).materialize().mean()).training
    found = {(one.operation, one.where): n_and_shape for one, n_and_shape in step.computed.items()}
    expected = (1, torch.Size([*IDS.shape, VOCAB]))
    assert found == {("sigmoid", f"{__file__}:{line}"): expected, ("materialize", f"{__file__}:{line}"): expected}
    assert f"logits computed: (2, 5, {VOCAB}) by sigmoid at {__file__}:{line} (1 x)" in str(LMHead.report(model))
    assert len(said) == 1 and "does not follow sigmoid" in str(said[0].message)


def test_evaluation_is_apart():
    model = LMHead.wrap(Tied())
    train(model)
    model.eval()
    model(IDS)
    (head,) = LMHead.report(model).heads
    assert head.training.calls == 1 and dict(head.evaluation.plain) == {"in evaluation mode": 1}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_start_anew(copied):
    model = LMHead.wrap(Tied())
    train(model)
    again = copied(model)
    assert LMHead.report(again).heads[0].training.calls == 0
    train(again)
    assert LMHead.report(model).heads[0].training.calls == 1


# ---- a wrap, or a setting, without effect ----

FUSED = """
def {function}(head, hidden, target):
    return torch.nn.functional.cross_entropy(hidden @ head.weight.T, target)
"""


def function_of(module, function):
    space = types.ModuleType(module)
    space.torch = torch
    exec(FUSED.format(function=function), vars(space))
    return getattr(space, function)


@pytest.mark.parametrize(
    ("module", "function", "advice"),
    [
        ("trl.trainer.utils", "_fused_forward", r"chunked_ce\.integrations\.trl\.install\(\)"),
        ("liger_kernel.transformers.model.llama", "_liger_for_causal_lm_loss", "use_liger_kernel=False"),
        ("cut_cross_entropy.transformers.llama", "cce_forward", "cce_patch"),
        ("verl.models.transformers.qwen3_vl", "forward_with_torch_backend", "use_fused_kernels"),
    ],
)
def test_a_forward_that_goes_around_the_head(said, module, function, advice):
    model, fused = LMHead.wrap(Tied()), function_of(module, function)

    def loss(model):
        return fused(model.out, model.embedding(IDS).flatten(0, 1), IDS.flatten())

    for _ in range(3):
        step = train(model, loss).training
    (warning,) = said
    assert f"LMHead has no effect here: {module} reads the weight" in str(warning.message)
    with pytest.raises(UserWarning, match=advice):
        raise warning.message
    assert step.calls == 0 and dict(step.bypasses) == {f"{module}.{function}": 1}
    assert f"{module}.{function} (1 x)" in str(LMHead.report(model))


def test_others_may_read_the_weight(said):
    model = LMHead.wrap(Tied())
    for module, function in (("trl.trainer.grpo_trainer", "__init__"), ("trlx.models", "forward"), ("my", "loss")):
        function_of(module, function)(model.out, model.embedding(IDS).flatten(0, 1), IDS.flatten())
    model.eval()
    function_of("trl.trainer.utils", "_fused_forward")(model.out, model.embedding(IDS).flatten(0, 1), IDS.flatten())
    assert not said


class AroundItsHead(Tied):
    calls_too = False

    def forward(self, ids):
        hidden = self.body(self.embedding(ids)).tanh()
        return self.out(hidden) if self.calls_too and self.out.weight is not None else hidden @ self.out.weight.T


def test_a_model_that_never_calls_its_head(said):
    model = LMHead.wrap(AroundItsHead())
    step = train(model, steps=3).training
    (warning,) = said
    assert "LMHead had no effect in this step: tests.test_report.forward reads the weight" in str(warning.message)
    assert step.calls == 0 and dict(step.bypasses) == {"tests.test_report.forward": 1}


def test_a_trainer_that_never_calls_the_head(said):
    """As those of TRL 1.14, which take log-probabilities from the weight in functions of other names."""
    model = LMHead.wrap(Tied())
    fused = function_of("trl.trainer.dpo_trainer", "_get_per_token_logps_and_entropies")
    for _ in range(3):
        train(model, lambda model: fused(model.out, model.embedding(IDS).flatten(0, 1), IDS.flatten()))
    (warning,) = said
    assert "had no effect in this step: trl.trainer.dpo_trainer._get_per_token_logps_and_entropies" in str(
        warning.message
    )


def test_a_model_that_reads_the_weight_and_calls_the_head(said):
    model = LMHead.wrap(AroundItsHead())
    model.calls_too = True
    step = train(model, steps=3).training
    assert not said and step.calls == 1 and not step.bypasses


def test_replicas_of_data_parallel_that_return_logits(said):
    model = LMHead.wrap(Tied())
    for _ in range(2):
        torch.cat([replica_of(model)(part) for part in IDS.chunk(2)])
    (warning,) = said
    assert "LazyLogits does not follow cat" in str(warning.message)
    assert "nn.DataParallel gathers what its replicas return" in str(warning.message)
    assert LMHead.report(model).heads[0].training.calls == 4


TERMS = {
    "log_softmax, gather": lambda z: -z.log_softmax(-1).gather(-1, IDS[..., None]).mean(),
    "computed": lambda z: F.cross_entropy(z.sigmoid().flatten(0, 1), IDS.flatten()),
    "materialized": lambda z: F.cross_entropy(z.materialize().flatten(0, 1), IDS.flatten()),
    "soft labels": lambda z: F.cross_entropy(z.flatten(0, 1), torch.full((10, VOCAB), 1 / VOCAB)),
}


@pytest.mark.parametrize("how", TERMS)
def test_terms_that_no_loss_has(said, how):
    model = LMHead.wrap(Tied(), z_loss=0.25, label_smoothing=0.1)
    train(model, lambda model: TERMS[how](model(IDS)), steps=3)
    found = [str(one.message) for one in said if "LazyLogits does not follow" not in str(one.message)]
    (message,) = found
    assert message.startswith("z_loss=0.25 and label_smoothing=0.1 of the head had no effect in this step")
    assert "add the terms to it yourself" in message


REMEDIES = {
    "a hook on the head, a_hook": "Remove the hook",
    "its forward has been replaced": "Give it back its own forward",
    "its weight is parametrized or pruned": "remove_parametrizations(head, 'weight')",
}


@pytest.mark.parametrize("why", REMEDIES)
def test_terms_of_a_head_that_computes_logits_at_once(said, why):
    model = LMHead.wrap(Tied(tied=False), z_loss=0.25)
    OBSTACLES[why](model.out)
    train(model, steps=2)
    (warning,) = said
    message = str(warning.message)
    assert message.startswith("z_loss=0.25 of the head have no effect: it computes its logits at once")
    assert why in message and REMEDIES[why] in message
    assert warning.filename == sys.modules[Tied.__module__].__file__


def test_terms_that_a_loss_has(said):
    """In a step of several calls and micro-batches; nothing is said of heads without them, nor of metrics."""
    model = LMHead.wrap(Tied(), z_loss=0.25)

    def loss(model):
        logits = model(IDS)
        with torch.no_grad():
            assert logits.logsumexp(-1).shape == IDS.shape and model(IDS).argmax(-1).shape == IDS.shape
        return F.cross_entropy(logits.flatten(0, 1), IDS.flatten()) + F.nll_loss(
            logits.log_softmax(-1).flatten(0, 1), IDS.flatten()
        )

    train(model, loss, steps=2)
    train(LMHead.wrap(Tied()), lambda model: TERMS["log_softmax, gather"](model(IDS)))
    with torch.no_grad():
        TERMS["log_softmax, gather"](model(IDS))
    train(model)
    assert not said
