"""The scripts in benchmarks/: the GPU run, on a CPU and a tiny shape, and what it says of its claims."""

import json

import pytest

from benchmarks import gpu
from chunked_ce.cli.implementations import BACKWARD, FILTERED, FORWARD, FULL, PRODUCTS, why_not

SHAPE = ["--shape", "64", "32", "500", "--rounds", "1", "--no-tests"]


def test_the_gpu_run_on_a_tiny_shape(tmp_path, capsys):
    """Products and forward way are measured; nothing is claimed of what was not."""
    path = tmp_path / "gpu.json"
    assert gpu.main([*SHAPE, "--only", "forward", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [(row["contestant"], row["status"]) for row in found["results"]] == [(PRODUCTS, "ok"), (FORWARD, "ok")]
    assert found["data"][0]["entropy"] == pytest.approx(4.6, abs=0.1)
    assert found["results"][1]["weight_grad_error"] < 2e-2
    assert set(map(type, found["claims"].values())) <= {bool, type(None)}
    assert found["claims"]["filtered: at most 0.6 times the three products"] is None
    assert "not measured: filtered" in capsys.readouterr().out


def test_no_time_left(capsys):
    with pytest.raises(SystemExit, match="inputs"):
        gpu.main([*SHAPE, "--only", "forward", "--minutes", "0"])


@pytest.mark.parametrize(
    ("ratio", "peak", "filtered", "expected"),
    [
        (1.1, 100, 0.5, [True, True, True, True, True]),
        (1.2, 300, 0.7, [False, False, True, False, False]),
        (2.5, 100, 0.6, [False, True, False, True, True]),
    ],
)
def test_claims(ratio, peak, filtered, expected):
    sizes = {"tokens": 1, "hidden": 1, "vocab": 1}
    rows = [
        {"contestant": PRODUCTS, "exact": True, "ratio": 1.0, "peak_mib": 900},
        {"contestant": FORWARD, "exact": True, "ratio": ratio, "peak_mib": peak},
        {"contestant": BACKWARD, "exact": True, "ratio": 1.5, "peak_mib": 350},
        {"contestant": FILTERED, "exact": False, "ratio": filtered, "peak_mib": 100},
        {"contestant": FULL, "exact": True, "ratio": 1.3, "peak_mib": 250},
        {"contestant": "cut-cross-entropy", "exact": False, "ratio": 0.65, "peak_mib": 50},
    ]
    found = gpu.claims([row | sizes for row in rows])
    assert list(found.values()) == expected
    assert why_not(FULL) is None


def test_a_shape_that_failed_is_not_a_success():
    sizes = {"tokens": 1, "hidden": 1}
    rows = [
        {"contestant": FORWARD, "exact": True, "ratio": 1.0, "vocab": 1},
        {"contestant": FORWARD, "exact": True, "status": "out of memory", "vocab": 2},
    ]
    assert set(gpu.claims([row | sizes for row in rows]).values()) == {None}
