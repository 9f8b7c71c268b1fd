"""``chunked-ce bench``: real processes on a tiny shape, and what becomes of failures, interrupts and files."""

import functools
import json
import os
import re
import signal

import pytest
import torch

from benchmarks.report import markdown
from chunked_ce import ChunkOptions
from chunked_ce.cli import bench_run, main, memory, plots, worker
from chunked_ce.cli.implementations import DEVICE, FORWARD, FULL, LOSSES, PRODUCTS, select, why_not
from chunked_ce.cli.other_losses import OTHER_LOSSES
from chunked_ce.cli.page import page
from chunked_ce.cli.synthetic_inputs import LossInputs
from chunked_ce.cli.tables import cells
from chunked_ce.cli.worker import Task, Worker
from tests.browser import needs_browser, opened

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
    rows = {row["implementation"]: row for row in found["results"]}
    assert list(rows) == [PRODUCTS, FORWARD, FULL]
    assert rows[FULL]["status"] == "out of memory" and "ratio" not in rows[FULL]
    ours = rows[FORWARD]
    assert ours["status"] == "ok" and ours["rounds"] == 2
    assert 0 < ours["ratio_least"] <= ours["ratio"] <= ours["ratio_most"]
    assert 0 < ours["peak_mib"] < 40
    assert 1e-5 < ours["hidden_grad_relative_error"] < 2e-2 and 1e-5 < ours["weight_grad_relative_error"] < 2e-2
    assert found["data"][0]["loss_nats"] == pytest.approx(8.3, abs=0.5)  # log 4096
    assert found["conditions"]["versions"]["torch"] == torch.__version__
    assert "out of memory" in printed.out and FORWARD in printed.out and "made the folder" in printed.err
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert "out of memory" in files["html"].read_text()
    assert "| full logits | out of memory | - |" in markdown(found)


def test_a_process_that_is_killed_or_late():
    task = Task(FORWARD, "fp32", 8, 8, 32, "cpu", rounds=10**9)
    with Worker("cpu") as running:
        for kind, _ in running.run(task, timeout=900):
            if kind == "round":
                os.kill(running.processes[0].pid, signal.SIGKILL)
                break
        ending = list(running.run(task, timeout=900))
    assert ending[-1] == ("failed", "out of memory (killed)")
    with Worker("cpu") as running:
        ending = list(running.run(task, timeout=0.01))
    assert ending == [("failed", "not done after 0.01 s")]


class Fake:
    """Instead of a process: what it would say, until Ctrl-C in the second round of full logits."""

    def __init__(self, device, ranks=None):
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
    monkeypatch.setattr(bench_run, "Worker", Fake)
    path = tmp_path / "bench.json"
    sweep = ("--sweep", "vocab=100,200,300", "--tokens", 64, "--dtype", "fp32", "--only", "forward", "full")
    code, printed = run((*sweep, "--json", path, "--html", tmp_path / "bench.html"), capsys)
    assert code == 130
    assert f"ended early: 6 results; what was measured is printed and is in {path}" in printed.err
    found = json.loads(path.read_text())
    rows = found["results"]
    assert found["complete"] is False and [case["vocab"] for case in found["planned"]["cases"]] == [100, 200, 300]
    assert [(row["implementation"], row["vocab"], row["status"], row["rounds"]) for row in rows] == [
        (PRODUCTS, 100, "ok", 3),
        (FORWARD, 100, "ok", 3),
        (FULL, 100, "ok", 3),
        (PRODUCTS, 200, "ok", 3),
        (FORWARD, 200, "ok", 3),
        (FULL, 200, "interrupted", 1),
    ]
    assert rows[1]["seconds"] == 2.0 and rows[1]["ratio_most"] == 3.0 and rows[1]["peak_mib"] == 100.0


def test_a_crash_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    """A mistake of ours in the third result; the file was whole after each one before."""

    class Crashing(Fake):
        def run(self, task, timeout):
            if isinstance(task, Task) and (task.implementation, task.vocab) == (FULL, 100):
                found = json.loads(path.read_text())
                assert len(found["results"]) == 2 and found["complete"] is False
                raise ZeroDivisionError("a mistake")
            yield from super().run(task, timeout)

    monkeypatch.setattr(bench_run, "Worker", Crashing)
    path = tmp_path / "bench.json"
    arguments = ["bench", "--sweep", "vocab=100,200", "--tokens", "64", "--dtype", "fp32", "--only", "forward", "full"]
    with pytest.raises(ZeroDivisionError):
        main([*arguments, "--json", str(path)])
    found = json.loads(path.read_text())
    assert [row["implementation"] for row in found["results"]] == [PRODUCTS, FORWARD]
    assert found["complete"] is False and list(tmp_path.iterdir()) == [path]
    assert f"2 results; what was measured is printed and is in {path}" in capsys.readouterr().err


def test_arguments_that_are_wrong_leave_old_results(tmp_path, capsys):
    path = tmp_path / "bench.json"
    path.write_text("old")
    code, printed = run(("--json", path, "--plot", tmp_path / "plot.doc"), capsys)
    assert code == 2 and "--plot must end with" in printed.err
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def swept():
    """A document of two vocabularies and two dtypes, in which full logits run out of memory."""
    results = []
    for dtype in ("fp32", "bf16"):
        for vocab in (1000, 2000):
            for at, name in enumerate((PRODUCTS, FORWARD, FULL)):
                row = {
                    "implementation": name,
                    "dtype": dtype,
                    "tokens": 64,
                    "hidden": 32,
                    "vocab": vocab,
                    "chunk": None,
                }
                row |= {"ignored": 0.0, "status": "ok", "exact": True, "predicted_mib": None, "rounds": 1}
                times = {"seconds": 0.1 * (at + 1), "ratio": at + 1.0, "ratio_least": at + 1.0, "ratio_most": at + 1.0}
                failed = name == FULL and vocab == 2000
                results.append(row | ({"status": "out of memory"} if failed else times | {"peak_mib": 10.0 * (at + 1)}))
    conditions = {"date": "2026-01-01 00:00 UTC", "device": "a <device>", "threads": 2, "load_average": 0.1}
    return {
        "conditions": conditions | {"versions": {"torch": "2.0"}},
        "limits": {"memory_mib": 1000},
        "left_out": {"liger": "it runs on CUDA only"},
        "data": [{"case": "N=64", "kind": "random", "loss_nats": 1.0, "entropy_nats": 1.0}],
        "results": results,
    }


def interrupted():
    """The same, and what ended it left: full logits in bf16 without a time, and a vocabulary that was never begun."""
    document = swept()
    rows = [row for row in document["results"] if (row["dtype"], row["vocab"]) != ("bf16", 2000)]
    last = next(row for row in rows if (row["dtype"], row["implementation"]) == ("bf16", FULL))
    last["status"] = "interrupted"
    sizes = {"tokens": 64, "hidden": 32, "chunk": None, "ignored": 0.0}
    cases = [sizes | {"dtype": dtype, "vocab": vocab} for dtype in ("fp32", "bf16") for vocab in (1000, 2000, 3000)]
    return document | {
        "results": rows,
        "complete": False,
        "planned": {"implementations": [PRODUCTS, FORWARD, FULL], "cases": cases},
    }


def drawn(axes):
    """The points of each labelled line that have a value."""
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    return {name: [tuple(p) for p in line.get_xydata() if p[1] == p[1]] for name, line in lines.items()}


def marks(axes, marker):
    return [(*line.get_xdata(),) for line in axes.lines if line.get_marker() == marker and len(line.get_xdata()) == 1]


def test_plot_of_a_sweep():
    axes = plots.figure(swept()).axes
    assert len(axes) == 4
    memory_axis, time_axis = map(drawn, axes[:2])
    assert memory_axis[FORWARD] == [(1000, 20.0), (2000, 20.0)]
    assert memory_axis[FULL] == [(1000, 30.0)]
    assert memory_axis["three products alone"] == []
    assert time_axis["three products alone"] == [(1000, 0.1), (2000, 0.1)]
    assert marks(axes[0], "x") == marks(axes[1], "x") == [(2000,)]


def test_what_is_missing_is_marked():
    """An incomplete value is never drawn as one, and a size that was not reached has its place."""
    axes = plots.figure(interrupted()).axes
    bf16 = axes[3]
    assert drawn(bf16)[FULL] == []
    assert drawn(bf16)[FORWARD] == [(1000, 0.2)]
    assert sorted(marks(bf16, "D")) == [(1000,), (2000,), (2000,), (3000,), (3000,)]
    assert list(bf16.get_xticks()) == [1000, 2000, 3000]
    assert "not measured, or not to its end" in plots.legend(interrupted())
    assert "not measured, or not to its end" not in plots.legend(swept())
    assert "ended early: 9 of 18 results" in page(interrupted())


@pytest.mark.parametrize(("limit", "is_drawn"), [(50, True), (1000, False)])
def test_a_limit_far_above_does_not_squeeze_the_data(limit, is_drawn):
    document = swept() | {"limits": {"memory_mib": limit}}
    axes = plots.figure(document).axes[0]
    assert any(list(line.get_ydata()) == [limit, limit] for line in axes.lines) is is_drawn
    assert ("outside the picture" in axes.get_title()) is not is_drawn
    assert axes.get_ylim()[1] < 100


def test_one_set_of_names():
    """In the table, the pictures, their legend and the JSON."""
    document = swept()
    text, lines = page(document), drawn(plots.figure(document).axes[0])
    assert cells(document["results"][1])[0] == FORWARD
    for name in (FORWARD, FULL):
        assert f"<td>{name}</td>" in text and f"</svg>{name}</li>" in text and name in lines


def test_page_loads_nothing():
    document = swept() | {"command": "chunked-ce bench --sweep <vocab>"}
    document["results"][1]["busy"] = "control 1.5x"
    text = page(document)
    assert "a &lt;device&gt;" in text and "it runs on CUDA only" in text
    assert "chunked-ce bench --sweep &lt;vocab&gt;" in text
    assert text.count("<tr") == 4 * 4
    assert "busy: control 1.5x" in text and "end other programs" in text
    assert [link for link in re.findall(r'(?:src|href)="([^"]*)"', text) if not link.startswith("#")] == []
    assert "<script" not in text and "@import" not in text
    identifiers = re.findall(r'\bid="([^"]*)"', text)
    assert len(identifiers) == len(set(identifiers)) > 0
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(identifiers)


@needs_browser
def test_page_in_a_browser(tmp_path):
    """On a phone and on a desk, in the light and in the dark: nothing is cut, all is legible, nothing is loaded."""
    path = tmp_path / "bench.html"
    path.write_text(page(interrupted()), encoding="utf-8")
    colors = {}
    with opened(path.as_uri(), width=390) as (tab, asked):
        for scheme in ("light", "dark"):
            tab.emulate_media(color_scheme=scheme)
            for width in (390, 1200):
                tab.set_viewport_size({"width": width, "height": 800})
                assert tab.evaluate("document.documentElement.scrollWidth") == width
                assert tab.evaluate("document.querySelector('.scroll').scrollWidth") >= width - 100
            colors[scheme] = tab.evaluate(COLORS_OF_THE_PAGE)
    assert asked == [path.as_uri()]
    for scheme, dark in (("light", False), ("dark", True)):
        back, *shown = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in colors[scheme])
        assert (back < 150) is dark
        assert all(abs(back - color) > 200 for color in shown)


COLORS_OF_THE_PAGE = """() => [
    getComputedStyle(document.body).backgroundColor,
    getComputedStyle(document.body).color,
    getComputedStyle(document.querySelector('.panels text')).fill,
    getComputedStyle(document.querySelector('.panels use')).stroke,
    getComputedStyle(document.querySelector('.failed')).color,
]"""


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
