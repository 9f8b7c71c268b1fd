"""The run of benchmarks/gpu.py on a CPU and a tiny shape, its processes, what it claims, and the model beside it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu, roofline
from benchmarks.device.jobs import Job, Processes
from benchmarks.device.losses import OURS, Case
from benchmarks.device.profile import rows_of
from benchmarks.device.timing import SHAPES, Shape
from benchmarks.device.verdict import Rates, claims, markdown
from chunked_ce.cli.implementations import BACKWARD, CCE, DEVICE, FILTERED, FORWARD, FULL, QUACK
from chunked_ce.plan import Plan, Settings

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="its sizes are for a CPU")
SHAPE = Shape(48, 16, 301)


def test_the_gpu_run_on_a_tiny_shape(tmp_path, capsys):
    """Every section runs; what needs a GPU is left out with a reason, and nothing fails."""
    sections = [name for name in gpu.SECTIONS if name != "tests"]
    given = ["--out", tmp_path, "--shape", *SHAPE, "--peers", "full", "quack", "--only", *sections]
    assert gpu.main(list(map(str, given))) == 0
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(row["section"] for row in rows)) == ["where", *sections]
    assert [row for row in rows if "error" in row or row.get("ok") is False] == []
    whole = [(row["what"], row["item"]) for row in rows if row["section"] in ("losses", "peers") and "ms" in row]
    items = [str(Case(SHAPE)), str(Case(SHAPE, halved=True))]
    assert whole == [(name, item) for names in (OURS, (FULL,)) for item in items for name in names]
    compared = [row for row in rows if "weight_grad_relative_error" in row and row["section"] == "losses"]
    assert {row["what"] for row in compared} == {FORWARD, BACKWARD, FILTERED}
    assert all(0 < row["weight_grad_relative_error"] < 1e-2 for row in compared)
    assert all({"tflops", "of_floor"} <= row.keys() for row in rows if "operations" in row)
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["rows"] == rows
    held = {claim["text"]: claim["holds"] for claim in document["claims"]}
    assert held["what the code relies on"] is held["every way is as exact as the plain loss"] is True
    assert held["exact, forward way: at most CCE's memory"] is None
    assert f"peers, {QUACK}: it runs on CUDA only" in capsys.readouterr().out


def test_no_time_left(tmp_path, capsys):
    assert gpu.main(["--seconds", "0", "--only", "ceilings", "losses", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [row.get("skipped") for row in rows[1:]] == ["left out: the time was up"] * 2
    assert "not measured: exact: at most 1.1 of the floor" in capsys.readouterr().out


INTERPRETED = """
from benchmarks.device import filter_kernels, kernels, sweeps
from benchmarks.device.timing import Shape
from chunked_ce.rows import triton_rows

kernels.row_kernels = lambda *arguments: triton_rows
sweeps._BLOCKS, shape = (1024,), Shape(4, 8, 301)
rows = [*kernels._row_kernels(shape), *filter_kernels._passes(shape), *sweeps._blocks(shape)]
assert len(rows) == 9 + 4 + 2 and all("ms" in row for row in rows), rows
"""


def test_the_kernels_that_it_calls():
    """Triton's own, which a CPU runs in Triton's interpreter only."""
    pytest.importorskip("triton")
    command = [sys.executable, "-c", INTERPRETED]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr


def misbehave(item):
    """A job of the kind that ``item`` says."""
    yield {"what": "before"}
    if item == "raises":
        raise ValueError("as it should\nand more")
    if item == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "exits":
        os.write(2, b"the reason\n")
        os._exit(3)
    if item == "hangs":
        time.sleep(600)


def told(rows):
    return [(row["item"], row.get("error", row.get("what"))) for row in rows]


def test_an_item_that_fails_leaves_the_others(tmp_path):
    job = Job("all", misbehave, ("raises", "dies", "well", "exits", "well"))
    with Processes(tmp_path / "log", "forkserver") as processes:
        rows = told(processes.rows(job, 300))
    reasons = {"raises": "ValueError: as it should", "dies": "ended by signal 9"}
    reasons["exits"] = "ended with exit code 3 the reason"
    expected = [(item, text) for item in job.items for text in ("before", *filter(None, [reasons.get(item)]))]
    assert rows == expected


def test_processes_that_start_as_on_a_gpu(tmp_path):
    with Processes(tmp_path / "log") as processes:
        rows = told(processes.rows(Job("all", misbehave, ("dies", "well")), 300))
    assert rows == [("dies", "before"), ("dies", "ended by signal 9"), ("well", "before")]


def test_a_job_that_hangs(tmp_path):
    with Processes(tmp_path / "log", "forkserver") as processes:
        rows = told(processes.rows(Job("slow", misbehave, ("hangs", "well", "well")), 2))
        assert told(processes.rows(Job("next", misbehave, ("well",)), 300)) == [("well", "before")]
    late = [("well", "left out: 2 s had passed")] * 2
    assert rows in (
        [("hangs", "before"), ("hangs", "not done after 2 s"), *late],
        [("hangs", "not done after 2 s"), *late],
    )


def whole(name, ms, peak, item, section="losses", exact=True, floor=10.0):
    row = {"section": section, "job": "", "what": name, "item": item, "ms": ms, "peak_mib": peak, "exact": exact}
    return row | {"of_floor": ms / floor}


@pytest.mark.parametrize(
    ("forward", "filtered", "peak", "expected"),
    [
        (10.9, 4.7, 90, [True, True, True, True, True, True]),
        (11.1, 4.9, 110, [False, True, False, True, False, True]),
        (13.0, 5.6, 90, [False, False, False, False, True, True]),
    ],
)
def test_claims(forward, filtered, peak, expected):
    """The limit of the filtered loss is 0.48 here, and 0.6 where D is about 2,000."""
    shape = Shape(8192, 4096, 128256)
    rows = [
        whole(FORWARD, forward, peak, str(shape)),
        whole(BACKWARD, 15.0, 40, str(shape)),
        whole(FILTERED, filtered, 200, str(shape), exact=False),
        whole(FULL, 12.0, 900, str(shape), "peers"),
        whole(CCE, 5.5, 100, str(shape), "peers", exact=False),
    ]
    found = claims(rows, [shape])
    assert [claim.holds for claim in found[2:]] == expected
    assert [claim.holds for claim in found[:2]] == [None, None]
    narrow = [row | {"item": str(shape._replace(hidden=2048))} for row in rows]
    assert claims(narrow, [shape._replace(hidden=2048)])[4].holds is True
    unmeasured = claims(rows, [shape, Shape(1, 2, 3)])[2:]
    assert [claim.holds for claim in unmeasured] == [None if holds else False for holds in expected]
    assert f"| {FORWARD} | {forward:g} ms = {forward / 10:.2f}, {peak} MiB |" in markdown(rows)


def test_a_wrong_result_is_no_success():
    rows = [{"section": "correctness", "job": "bf16", "what": "forward", "ok": True}]
    assert claims(rows, [])[1].holds is True
    for wrong in ({"what": "bias", "ok": False}, {"error": "ended by signal 6"}):
        assert claims([*rows, {"section": "correctness", "job": "bf16"} | wrong], [])[1].holds is False


def test_rates_are_shares_of_the_device():
    rates = Rates()
    assert rates.derived({"what": "dX", "ms": 1.0, "operations": 10**9}) == {"tflops": 1.0}
    assert rates.derived({"what": "bf16 product, burst", "ms": 1.0, "operations": 2 * 10**9})["of_floor"] == 1.0
    assert rates.derived({"what": "dX", "ms": 1.0, "operations": 10**9}) == {"tflops": 1.0, "of_floor": 2.0}
    assert rates.derived({"what": "copy", "ms": 1.0, "bytes": 4 * 10**9}) == {"tbs": 4.0, "of_copy": 1.0}
    assert rates.derived({"what": "statistics", "ms": 2.0, "bytes": 4 * 10**9}) == {"tbs": 2.0, "of_copy": 0.5}
    assert rates.derived({"what": "statistics", "skipped": "why"}) == {}


def test_counters_of_launches():
    """ncu writes a line for each metric of a launch, between lines of its own."""
    text = """==PROF== Connected
"ID","Kernel Name","Grid Size","Metric Name","Metric Unit","Metric Value"
"0","statistics_kernel","(4096, 1, 1)","gpu__time_duration.sum","ns","1,234"
"0","statistics_kernel","(4096, 1, 1)","launch__registers_per_thread","","40"
"1","gradients_kernel","(8, 1, 1)","gpu__time_duration.sum","ns","5"
"""
    assert rows_of(text) == [
        {"what": "statistics_kernel", "grid": "(4096, 1, 1)", "ns": 1234.0, "registers": 40.0},
        {"what": "gradients_kernel", "grid": "(8, 1, 1)", "ns": 5.0},
    ]
    assert rows_of("") == []


@pytest.mark.parametrize("card", roofline.CARDS.values(), ids=roofline.CARDS)
def test_the_model(card):
    """No way is faster than its operations and bytes allow, and chunks are the plan's."""
    for shape in SHAPES:
        n, d, v = shape
        floor = shape.floor / card.burst
        forward, backward, filtered = (sum(way(card, shape).values()) for way in roofline.WAYS.values())
        once = 2 * n * v / card.copy  # reading or writing all logits
        assert forward > floor + 2 * once and backward > 4 / 3 * floor + 3 * once
        assert floor / 3 + 3 * once < filtered < forward
        settings = Settings(torch.bfloat16, device_type="cuda")
        planned = Plan.by_tokens(n, n, v, d, settings, head_dtype=settings.compute_dtype).tokens
        assert roofline.chunk_tokens(shape) == min(n, planned)


def test_the_models_table(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["roofline", "--shape", "8192", "4096", "128256", "--burst", "400", "--copy", "2"])
    roofline.main()
    printed = capsys.readouterr().out
    assert "nothing measured" in printed and "this card" in printed
    floor = 6 * 8192 * 4096 * 128256 / 400e12
    assert f"8192x4096x128256  {1e3 * floor:.1f}" in printed.replace("   ", "  ")
