"""``chunked-ce plan --verify``: the small model has the planned shape, its losses agree, and predictions hold."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.verify import markdown
from chunked_ce.cli import main, memory, verify
from chunked_ce.cli.model_shapes import MODELS, ModelShape
from chunked_ce.cli.planning import Run, paths_of
from chunked_ce.cli.planning.activations import layer_bytes
from chunked_ce.cli.small_model import SmallModel
from chunked_ce.cli.training_losses import LossTensors, loss_on

NOT_HERE = memory.why_not_measured("cpu")
SHAPE = ModelShape("small", "here", 64, 640, layers=2, intermediate=192, heads=4, kv_heads=2, head_dim=16)
RUN = Run(SHAPE, tokens=64, dtype="fp32", device="cpu")
OTHER = dataclasses.replace(SHAPE, hidden=32, heads=2, kv_heads=2, intermediate=96)
TRAINERS = [
    {},
    {"trainer": "dpo"},
    {"trainer": "grpo"},
    {"trainer": "distill", "other_model": OTHER},
]


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied": True}, {"qkv_bias": True}, {"qk_norm": True}, {"norms": 4}, {"gated": False}],
    ids=str,
)
def test_the_small_model_has_the_planned_parameters(changes):
    shape = dataclasses.replace(SHAPE, **changes)
    assert sum(one.numel() for one in SmallModel(shape).parameters()) == shape.parameters
    model = SmallModel(shape, lora=4)
    run = dataclasses.replace(RUN, model=dataclasses.replace(shape, gated=shape.gated), lora=4)
    assert sum(one.numel() for one in model.parameters() if one.requires_grad) == run.adapter_parameters


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_the_small_model_keeps_the_planned_activations(checkpointing):
    run = dataclasses.replace(RUN, checkpointing=checkpointing)
    kept = []
    for layers in (1, 3):
        model = SmallModel(dataclasses.replace(SHAPE, layers=layers), checkpointing=checkpointing)
        before = {one.untyped_storage().data_ptr() for one in model.parameters()}
        found = {}

        def keep(tensor, found=found):
            found[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.randint(640, (1, 64)))
        kept.append(sum(one.untyped_storage().nbytes() for at, one in found.items() if at not in before))
    per_layer = (kept[1] - kept[0]) / 2 / 64
    if checkpointing == "none":
        assert per_layer == pytest.approx(layer_bytes(run), rel=0.02)
    else:
        assert per_layer < layer_bytes(run) / 2  # selective checkpointing keeps its tensors elsewhere


@pytest.mark.parametrize("changes", TRAINERS, ids=lambda changes: changes.get("trainer", "sft"))
def test_losses_agree_on_all_paths(changes):
    run = dataclasses.replace(RUN, **changes)
    tensors = LossTensors.random(run)
    weight = torch.randn(640, 64) / 8
    hidden = torch.randn(run.local_tokens, 64)
    found = {}
    for path in paths_of(run):
        if path in ("full", "forward", "backward"):
            leaf = hidden.clone().requires_grad_()
            loss = loss_on(run, path, leaf, weight, tensors)
            loss.backward()
            found[path] = loss.detach(), leaf.grad
    for value, gradient in found.values():
        torch.testing.assert_close(value, found["full"][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, found["full"][1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [*TRAINERS, {"lora": 4}, {"checkpointing": "selective"}, {"precision": "autocast"}, {"accumulation": 2}],
    ids=str,
)
def test_a_step_trains(changes):
    run = dataclasses.replace(RUN, **changes)
    work, held = verify._training_step(run, "forward" if "forward" in paths_of(run) else "backward")
    before = held()
    work()
    moments = 2 * 4 * run.trained
    assert held() - before == pytest.approx(moments, rel=0.01)  # and a counter for each parameter


def test_shapes_are_halved_until_a_step_takes_seconds():
    run = Run(MODELS["llama-3-8b"], tokens=8192, device="cpu", data=8, engine="zero3", lora=8)
    loss, step = verify.loss_run(run, 2**34), verify.step_run(run, 2**34)
    for small in (loss, step):
        assert small.ranks == 1 and small.dtype == "fp32"
        assert not verify._is_large(small, 2**34)
        assert verify._is_large(dataclasses.replace(small, tokens=64 * small.tokens), 2**34)
    assert not loss.train_head and not loss.model.layers
    assert step.lora == 8 and step.model.layers == 2
    assert step.model.intermediate / step.model.hidden == 3.5
    assert step.model.heads * step.model.head_dim == step.model.hidden


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--model mixtral-8x7b", "experts"),
        ("--model llama-3.2-1b --optimizer muon", "adamw, sgd, none"),
        ("--model llama-3.2-1b --ids 4", "without --ids"),
    ],
)
def test_it_says_what_it_cannot_measure(words, reason, capsys):
    with pytest.raises(SystemExit) as ending:
        main(["plan", *words.split(), "--device", "cpu", "--verify"])
    assert ending.value.code == 2
    assert reason in capsys.readouterr().err


def test_an_outcome_outside_of_its_bound_does_not_hold():
    case = verify.Case("loss", RUN, "forward")
    step, unit = case._replace(kind="step"), 2**20
    held = [(case, 1000, 1099), (case, 1000, 901), (step, 1000, 1199), (case, 20, 27)]
    broken = [(case, 1000, 1101), (case, 1000, 899), (step, 1000, 1201), (case, 20, 29)]
    for cases, holds in ((held, True), (broken, False)):
        outcomes = [verify.Outcome(one, predicted * unit, found * unit) for one, predicted, found in cases]
        assert [outcome.holds for outcome in outcomes] == [holds] * 4
        assert verify.summary(outcomes).startswith(f"{4 * holds} of 4 predictions hold")


@pytest.mark.skipif(NOT_HERE is not None, reason=NOT_HERE or "")
def test_the_prediction_for_a_loss_holds():
    head = ModelShape("head", "here", 128, 16384)
    case = verify.Case("loss", Run(head, tokens=1024, dtype="fp32", device="cpu"), "forward")
    (outcome,) = verify.measured([case])
    assert outcome.holds, outcome


@pytest.mark.thorough
@pytest.mark.skipif(NOT_HERE is not None, reason=NOT_HERE or "")
@pytest.mark.parametrize("changes", [*TRAINERS, {"lora": 16}, {"checkpointing": "full"}], ids=str)
@pytest.mark.parametrize("model", ["llama-3-8b", "gemma-2-2b"])
def test_predictions_hold(model, changes):
    changes = changes | ({"other_model": MODELS["llama-3.2-1b"]} if "other_model" in changes else {})
    run = Run(MODELS[model], tokens=8192, device="cpu", **changes)
    outcomes = list(verify.measured(verify.cases_of(run, "backward" if run.trainer == "dpo" else "forward")))
    assert all(outcome.holds for outcome in outcomes), [(one.case.kind, one.difference) for one in outcomes]


def test_the_page_shows_the_results():
    root = Path(__file__).parents[2]
    results = json.loads((root / "benchmarks" / "results" / "verify.json").read_text())["results"]
    assert {one["trainer"] for one in results} == {"sft", "dpo", "grpo", "distill"}
    assert all(one["holds"] for one in results)
    shown = re.search(
        r"<!-- verify -->\n(.*?)<!-- /verify -->", (root / "docs" / "plan.md").read_text(), flags=re.DOTALL
    )
    assert shown[1].strip() == markdown(results).strip()
