"""``chunked-ce plan --details``: the memory law, the operations and the traffic, for any number of ranks."""

import json
import math

import pytest
import torch

from chunked_ce import ChunkOptions
from chunked_ce.cli import main
from chunked_ce.cli.capacity import BACKWARD, FORWARD, FULL, Request, cost_of, largest
from chunked_ce.plan import predict_memory

N, D, V = 8192, 4096, 128256


def planned(capsys, *arguments, code=0):
    with pytest.raises(SystemExit) as ending:
        main(["plan", "--memory", "800GiB", *arguments])
    assert ending.value.code == code
    return capsys.readouterr().out


def document(capsys, *arguments, code=0):
    found = json.loads(planned(capsys, *arguments, "--json", code=code))
    return found, {(plan["way"], plan["tensor_parallel"]): plan for plan in found["plans"]}


def test_terms_are_those_of_the_law(capsys):
    found, plans = document(capsys, "--model", "llama-3-8b", "--tokens", str(N), "--tp", "1", "4")
    assert "Meta-Llama-3-8B" in found["request"]["head"]
    for (way, ranks), plan in plans.items():
        assert plan["peak"] == sum(plan["terms"].values())
        assert plan["total"] == plan["peak"] + sum(plan["held"].values())
        if way in (FORWARD, BACKWARD):
            options = ChunkOptions(gradients=way.split()[0])
            law = predict_memory(N, V, D, dtype=torch.bfloat16, options=options, device_type="cuda", ranks=ranks)
            assert plan["peak"] == law.peak
    assert plans[FULL, 1]["peak"] == 12 * N * V  # three times the logits in fp32
    assert plans[FORWARD, 1]["held"]["head"] == 2 * V * D


@pytest.mark.parametrize("trained", ["", "--frozen-head", "--frozen-input"])
def test_operations(trained, capsys):
    _, plans = document(capsys, "--model", "llama-3-8b", "--tokens", str(N), "--tp", "1", "8", *trained.split())
    products = {FULL: 3, FORWARD: 3, BACKWARD: 4}
    for (way, ranks), plan in plans.items():
        if way in products:
            assert plan["operations"] == 2 * (products[way] - bool(trained)) * N * V // ranks * D
    terms = plans[FORWARD, 1]["terms"]
    assert ("head_sum" in terms) == (trained != "--frozen-head")
    assert ("hidden_grad" in terms) == (trained != "--frozen-input")


def test_communication(capsys):
    """The formulas of docs/distributed.md, and a gradient of the head for the data-parallel ranks."""
    arguments = ["--model", "llama-3-8b", "--tp", "1", "8", "--dp", "64", "--sp", "4", "--accumulation", "4"]
    found, plans = document(capsys, *arguments, "--tokens", str(4 * N), "--zero", "2")
    assert found["request"]["tokens"] == 4 * N
    assert plans[FORWARD, 8]["ranks"] == 8 * 64 * 4
    sent = plans[FORWARD, 8]["communication"]
    assert sent["row statistics"] == N * 3 * 4
    assert sent["gradient of the input"] == N * D * 4
    assert sent["gradient of the head, per step"] == V // 8 * D * 2 * 4  # ZeRO 2 reduces every micro-batch
    assert "row statistics" not in plans[FORWARD, 1]["communication"]
    held = plans[FORWARD, 8]["held"]
    assert held["optimizer"] == 12 * V // 8 * D // 256
    assert held["held_grad"] == 2 * V // 8 * D // 256


@pytest.mark.parametrize("way", [FULL, FORWARD, BACKWARD])
@pytest.mark.parametrize("name", ["tokens", "vocab"])
def test_the_largest_fits_and_one_more_does_not(way, name):
    request = Request(tokens=2048, hidden=512, vocab=32000)
    room = 2**30
    most = largest(request, way, 2, name, lambda _: room)
    peaks = [
        cost_of(Request(**{"tokens": 2048, "hidden": 512, "vocab": 32000} | {name: size}), way, 2).peak
        for size in (most, most + 2)  # the words of two ranks are rounded up
    ]
    assert peaks[0] <= room < peaks[1]


def test_nothing_fits(capsys):
    with pytest.raises(SystemExit) as ending:
        main(["plan", "--model", "gpt2", "--tp", "1", "--budget", "1K", "--json"])
    assert ending.value.code == 1
    plans = {(plan["way"], plan["tensor_parallel"]): plan for plan in json.loads(capsys.readouterr().out)["plans"]}
    assert all(plan["largest_tokens"] == plan["largest_vocab"] == 0 for plan in plans.values())


def test_a_transformers_config(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"text_config": {"hidden_size": 96, "vocab_size": 1000}, "hidden_size": 7}))
    found, _ = document(capsys, "--config", str(path), "--tp", "1")
    assert (found["request"]["hidden"], found["request"]["vocab"]) == (96, 1000)
    path.write_text(json.dumps({"hidden_size": "many"}))
    with pytest.raises(SystemExit) as ending:
        main(["plan", "--config", str(path)])
    assert ending.value.code == 2
    assert "hidden_size" in capsys.readouterr().err


def test_the_table(capsys):
    shape = ["--hidden", "2304", "--vocab", "256000"]  # a head alone, whose tensor-parallel sizes nothing limits
    out = planned(capsys, *shape, "--tp", "1", "8", "--chunk", "256", "--memory", "24GB", "--dp", "512", "--details")
    for text in (
        "512 ranks",
        "4,096 ranks",
        "peak of the loss",
        "dW accumulator",
        "as asked",
        "22.35 GiB",
        "Estimated",
    ):
        assert text in out
    assert f"{12 * N * 256000 / 2**30:,.2f} GiB" in out


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_chunks_explain_themselves(ranks, dtype):
    for tokens in (1, 100, 4096, 70000):
        for way in (FORWARD, BACKWARD):
            plan = cost_of(Request(tokens=tokens, hidden=256, vocab=50257, dtype=dtype), way, ranks)
            parts = math.ceil(tokens / plan.chunk)
            assert plan.why.startswith(f"{parts} equal chunks" if parts > 1 else "one chunk")


@pytest.mark.parametrize(
    ("asked", "more"),
    [("--teacher-hidden 2048", 2048), ("--adapter 8", 3 * 8), ("--ids 64", 0)],
)
def test_other_losses(asked, more, capsys):
    """A teacher's product, an adapter's three; the filter, which none of them has, is left out."""
    arguments = "--model", "llama-3-8b", "--tokens", str(N), "--tp", "1"
    _, plans = document(capsys, *arguments, *asked.split())
    assert list(plans) == [(FULL, 1), (FORWARD, 1), (BACKWARD, 1)]
    _, bare = document(capsys, *arguments)
    assert plans[FORWARD, 1]["operations"] == bare[FORWARD, 1]["operations"] + 2 * more * N * V
    assert plans[FORWARD, 1]["peak"] > bare[FORWARD, 1]["peak"]
