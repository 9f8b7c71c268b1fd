"""``chunked-ce bench``: real processes on a tiny shape, and what becomes of failures, interrupts and files."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess

import pytest
import torch

from benchmarks.report import markdown
from chunked_ce import ChunkOptions
from chunked_ce.cli import bench_command, main, memory, plots, worker
from chunked_ce.cli.implementations import DEVICE, FORWARD, FULL, LOSSES, PRODUCTS, select, why_not
from chunked_ce.cli.other_losses import OTHER_LOSSES
from chunked_ce.cli.page import page
from chunked_ce.cli.synthetic_inputs import LossInputs
from chunked_ce.cli.worker import Task, Worker

NOT_MEASURED = memory.why_not_measured("cpu")
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="its sizes are for a CPU")


def run(arguments, capsys):
    with pytest.raises(SystemExit) as ending:
        main(["bench", *map(str, arguments)])
    return ending.value.code, capsys.readouterr()


@pytest.mark.skipif(NOT_MEASURED is not None, reason=NOT_MEASURED or "")
def test_measured_and_out_of_memory(tmp_path, capsys):
    """A limit that the chunked loss keeps to and full logits do not; errors are the roundings of the dtype."""
    files = {name: tmp_path / "new" / f"bench.{name}" for name in ("json", "png", "html")}
    written = ("--json", files["json"], "--plot", files["png"], "--html", files["html"])
    shape = ("--tokens", 2048, "--hidden", 32, "--vocab", 4096, "--chunk", 256, "--dtype", "bf16", "--ignored", 0.25)
    limits = ("--rounds", 2, "--only", "forward", "full", "--memory-limit", "40MiB")
    code, printed = run((*shape, *limits, *written), capsys)
    assert code == 0
    found = json.loads(files["json"].read_text())
    rows = {row["contestant"]: row for row in found["results"]}
    assert list(rows) == [PRODUCTS, FORWARD, FULL]
    assert rows[FULL]["status"] == "out of memory" and "ratio" not in rows[FULL]
    ours = rows[FORWARD]
    assert ours["status"] == "ok" and ours["rounds"] == 2
    assert 0 < ours["ratio_least"] <= ours["ratio"] <= ours["ratio_most"]
    assert 0 < ours["peak_mib"] < 40
    assert 1e-5 < ours["hidden_grad_error"] < 2e-2 and 1e-5 < ours["weight_grad_error"] < 2e-2
    assert found["data"][0]["loss"] == pytest.approx(8.3, abs=0.5)  # log 4096
    assert found["conditions"]["versions"]["torch"] == torch.__version__
    assert "out of memory" in printed.out and "forward" in printed.out
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert "out of memory" in files["html"].read_text()
    assert "| full logits | out of memory | - |" in markdown(found)


def test_a_process_that_is_killed_or_late():
    task = Task(FORWARD, "fp32", 8, 8, 32, "cpu", rounds=10**9)
    with Worker("cpu") as running:
        for kind, _ in running.run(task, timeout=900):
            if kind == "round":
                os.kill(running._process.pid, signal.SIGKILL)
                break
        ending = list(running.run(task, timeout=900))
    assert ending[-1] == ("failed", "out of memory (killed)")
    with Worker("cpu") as running:
        ending = list(running.run(task, timeout=0.01))
    assert ending == [("failed", "not done after 0.01 s")]


class Fake:
    """Instead of a process: what it would say, until Ctrl-C in the second round of full logits."""

    def __init__(self, device):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, task, timeout):
        if isinstance(task, worker.Preparation):
            yield "prepared", (task.task, {"loss": 1.0, "entropy": 1.0})
            return
        yield "memory", task.vocab * 2**20
        for seconds in (3.0, 1.0, 2.0):
            yield "round", (seconds, 1.0)
            if task.implementation == FULL and task.vocab == 200:
                raise KeyboardInterrupt
        yield "done", None


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_command, "Worker", Fake)
    path = tmp_path / "bench.json"
    sweep = ("--sweep", "vocab=100,200,300", "--tokens", 64, "--dtype", "fp32", "--only", "forward", "full")
    code, printed = run((*sweep, "--json", path, "--html", tmp_path / "bench.html"), capsys)
    assert code == 130
    assert "interrupted" in printed.err
    rows = json.loads(path.read_text())["results"]
    assert [(row["contestant"], row["vocab"], row["status"], row["rounds"]) for row in rows] == [
        (PRODUCTS, 100, "ok", 3),
        (FORWARD, 100, "ok", 3),
        (FULL, 100, "ok", 3),
        (PRODUCTS, 200, "ok", 3),
        (FORWARD, 200, "ok", 3),
        (FULL, 200, "interrupted", 1),
    ]
    assert rows[1]["seconds"] == 2.0 and rows[1]["ratio_most"] == 3.0 and rows[1]["peak_mib"] == 100.0


def swept():
    """A document of two vocabularies and two dtypes, in which full logits run out of memory."""
    results = []
    for dtype in ("fp32", "bf16"):
        for vocab in (1000, 2000):
            for at, name in enumerate((PRODUCTS, FORWARD, FULL)):
                row = {"contestant": name, "dtype": dtype, "tokens": 64, "hidden": 32, "vocab": vocab, "chunk": None}
                row |= {"ignored": 0.0, "status": "ok", "exact": True, "predicted_mib": None, "rounds": 1}
                times = {"seconds": 0.1 * (at + 1), "ratio": at + 1.0, "ratio_least": at + 1.0, "ratio_most": at + 1.0}
                failed = name == FULL and vocab == 2000
                results.append(row | ({"status": "out of memory"} if failed else times | {"peak_mib": 10.0 * (at + 1)}))
    conditions = {"date": "2026-01-01 00:00 UTC", "device": "a <device>", "threads": 2, "load_average": 0.1}
    return {
        "conditions": conditions | {"versions": {"torch": "2.0"}},
        "limits": {"memory_mib": 1000},
        "left_out": {"liger": "it runs on CUDA only"},
        "data": [{"case": "N=64", "kind": "random", "loss": 1.0, "entropy": 1.0}],
        "results": results,
    }


def test_plot_of_a_sweep():
    axes = plots.figure(swept()).axes
    assert len(axes) == 4
    memory_axis, time_axis = axes[:2]
    lines = {line.get_label(): line for line in memory_axis.lines}
    assert list(lines[FORWARD].get_xdata()) == [1000, 2000]
    assert list(lines[FULL].get_xdata()) == [1000]
    crosses = [line for line in memory_axis.lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[2000]]
    assert crosses[0].get_ydata()[0] == pytest.approx(1000 / 1024)
    assert (
        list({line.get_label(): line for line in time_axis.lines}["limit: three products alone"].get_ydata())
        == [0.1] * 2
    )


def test_page_loads_nothing():
    text = page(swept())
    assert "a &lt;device&gt;" in text and "it runs on CUDA only" in text
    assert text.count("<tr") == 4 * 4
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == 1 and sources[0].startswith("data:image/svg+xml;base64,")
    assert "<script" not in text and "@import" not in text


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "firefox"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no chromium, google-chrome or firefox is installed")
def test_page_in_a_browser(tmp_path):
    path, picture = tmp_path / "bench.html", tmp_path / "page.png"
    path.write_text(page(swept()), encoding="utf-8")
    options = ["--headless", f"--screenshot={picture}"]
    if "firefox" not in BROWSER:
        options += ["--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    subprocess.run([BROWSER, *options, path.as_uri()], timeout=900, check=True, capture_output=True)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000


def test_everyone_says_why_not():
    for name in LOSSES:
        reason = why_not(name, "cpu")
        assert reason is None or (reason and "\n" not in reason)
    assert why_not("liger", "cpu") == "it runs on CUDA only"
    assert len({implementation.key for implementation in LOSSES.values()}) == len(LOSSES)


def test_chunk_sizes_are_for_those_that_take_one():
    names, missing = select(chunk_only=True)
    assert FORWARD in names and FULL in missing


@pytest.mark.parametrize("kind", OTHER_LOSSES)
def test_other_losses_are_those_of_full_logits(kind):
    """Values and gradients of what ``bench --loss`` compares."""
    inputs = LossInputs.random(20, 8, 90, torch.float32, ignored=0.2)
    found = []
    ours = functools.partial(OTHER_LOSSES[kind].ours, options=ChunkOptions(chunk_size=7))
    for loss in (ours, OTHER_LOSSES[kind].full):
        value = loss(*inputs)
        found.append((value.detach(), *torch.autograd.grad(value.sum(), inputs[:2])))
    for ours, full in zip(*found, strict=True):
        torch.testing.assert_close(ours, full, rtol=1e-4, atol=1e-6)
    names, _ = select(kind=kind)
    assert names == [f"{'four' if OTHER_LOSSES[kind].products == 4 else 'three'} products", *names[1:]]
    assert len(names) == 3
