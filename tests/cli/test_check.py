"""``chunked-ce check`` passes, and fails where something is wrong."""

import json

import pytest
import torch

from chunked_ce.cli import check_command, main, objective_checks, process_checks, self_checks


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ending:
        main(["check", *arguments])
    return ending.value.code, capsys.readouterr().out


def test_all_is_right_here(capsys):
    code, out = run(capsys, "--no-processes", "--device", "cpu", "--json")
    found = json.loads(out)
    wrong = [row for row in found["results"] if row["wrong"]]
    assert (code, wrong, found["failed"]) == (0, [], {})
    assert found["passed"] and found["skipped"]
    names = {row["case"] for row in found["results"]}
    assert names >= {*self_checks.OPTIONS, "frozen head", "log-probabilities", "logits that exist", "statistics"}
    assert {"bfloat16", "float16", "float32", "float64"} == {row["where"].split(", ")[1] for row in found["results"]}


@pytest.mark.parametrize("broken", ["loss", "gradient", "crash"])
def test_a_mistake_is_found(broken, monkeypatch, capsys):
    real = self_checks.linear_cross_entropy

    def mistaken(hidden, *arguments, **keywords):
        if broken == "crash":
            raise RuntimeError("no such kernel\nand more")
        if broken == "loss":
            return real(hidden, *arguments, **keywords) * 1.0001
        return real(hidden + (hidden - hidden.detach()) * 1e-4, *arguments, **keywords)

    def only_float32(devices, alone, skipped):
        inputs = self_checks.CheckInputs.random(torch.float32, "cpu")
        yield "fp32", lambda: list(self_checks._losses(inputs, "here", "auto", 48, ("bias",)))

    monkeypatch.setattr(self_checks, "linear_cross_entropy", mistaken)
    monkeypatch.setattr(check_command, "parts", only_float32)
    code, out = run(capsys)
    assert code == 1
    assert "WRONG" in out
    if broken == "crash":
        assert "RuntimeError: no such kernel" in out
    else:
        assert ("loss" if broken == "loss" else "dX") in out


def test_ctrl_c_keeps_what_was_compared(tmp_path, monkeypatch, capsys):
    row = self_checks.Row("bias", "here", "dX", 1e-9, 1e-9, 1e-8)

    def interrupt():
        raise KeyboardInterrupt

    path = tmp_path / "new" / "check.json"
    monkeypatch.setattr(check_command, "parts", lambda *_: [("one", lambda: [row]), ("two", interrupt)])
    with pytest.raises(SystemExit) as ending:
        main(["check", "--json", str(path)])
    printed = capsys.readouterr()
    assert ending.value.code == 130
    assert "1 comparisons" in printed.out and "ended early" in printed.out
    assert "made the folder" in printed.err and f"wrote {path}" in printed.err
    found = json.loads(path.read_text())
    assert (found["complete"], found["passed"], len(found["results"])) == (False, False, 1)
    assert found["results"][0]["relative_error"] == 1e-9


def test_bf16_sums_over_chunks_would_be_found():
    """A head's gradient whose chunks are added in bf16: 0.5 % off, where 0.2 % is the plain loss's own."""
    inputs = self_checks.CheckInputs.random(torch.bfloat16, "cpu", tokens=400)
    options = self_checks.ChunkOptions(chunk_size=4, accumulate_dtype=torch.bfloat16, gradients="forward")
    rows = list(self_checks._loss("bias", "", inputs, self_checks.OPTIONS["bias"], options))
    assert [row.quantity for row in rows if row.wrong] == ["dW", "db"]


@pytest.mark.parametrize(
    ("ours", "others"),
    [
        ("policy gradient", "policy gradient, CISPO"),
        ("policy gradient, CISPO", "policy gradient, REINFORCE"),
        ("top-k divergence", "top-k divergence, rest dropped"),
        ("top-k divergence, renormalized", "top-k divergence"),
        ("KL divergence over a draft vocabulary", "KL divergence from logits that exist"),
        ("log-probabilities of several ids", "log-probabilities on a support"),
        ("preference of one answer over another", "temperatures"),
    ],
)
def test_another_formula_is_found(ours, others):
    """Each kind of an objective has a check that tells it from the others."""
    inputs = self_checks.CheckInputs.random(torch.float32, "cpu")
    case = objective_checks.CASES[ours]._replace(formula=objective_checks.CASES[others].formula)
    rows = list(objective_checks._rows(ours, "", inputs, case, {}))
    assert [row.quantity for row in rows if row.wrong] == ["loss", "dX", "dW"]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes():
    rows = process_checks.sharded_rows(90.0)
    others = set(objective_checks.CASES)
    parts = {f"sharded vocabulary, {kind} gradient" for kind in ("partial", "sequence")}
    heads = {"sharded vocabulary", "sharded head, own tokens", "token-weighted mean"}
    assert {row.case for row in rows} == {*heads, *parts, *others}
    ways = [len(objective_checks.CASES[name].ways) for names in process_checks._OBJECTIVES.values() for name in names]
    assert len(rows) == 2 * (2 * (2 * (4 + 3) + 2 + 2) + 3 * sum(ways))  # of two ranks and two dtypes
    assert not [row for row in rows if row.wrong]


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        process_checks._run(_fails, 1, 60.0)


def _fails(rank):
    yield 1 / 0
