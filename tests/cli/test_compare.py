"""``chunked-ce bench --compare``: regressions beyond the noise, by rows as `bench` writes them."""

import json

import pytest

from chunked_ce.cli import main
from chunked_ce.cli.compare import compare, conditions_that_differ

ROW = {
    "implementation": "chunked_ce",
    "dtype": "bf16",
    "tokens": 64,
    "hidden": 32,
    "vocab": 1000,
    "chunk": None,
    "ignored": 0.0,
    "status": "ok",
    "rounds": 5,
    "ratio": 1.2,
    "ratio_least": 1.1,
    "ratio_most": 1.3,
    "peak_mib": 100.0,
    "hidden_grad_relative_error": 1e-3,
    "weight_grad_relative_error": 1e-3,
}


def document(*rows, **conditions):
    where = {"device": "a device", "threads": 2, "versions": {"torch": "2.13.0"}} | conditions
    return {"conditions": where, "results": [ROW | row for row in rows]}


def times(median, spread=0.1):
    return {"ratio": median, "ratio_least": median - spread, "ratio_most": median + spread}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ({}, {}, ()),
        ({}, times(1.5), ("SLOWER",)),
        ({}, times(1.35), ()),  # rounds overlap
        (times(1.2, 0.01), times(1.24, 0.01), ()),  # 3 %
        (times(1.2, 0.01), times(1.3, 0.01), ("SLOWER",)),
        (times(1.2, 0.0) | {"rounds": 1}, times(1.3, 0.0), ()),  # one round has no spread
        (times(1.2, 0.0) | {"rounds": 1}, times(1.4, 0.0), ("SLOWER",)),
        (times(1.5), {}, ("faster",)),
        ({}, {"peak_mib": 106.0}, ("MORE MEMORY",)),
        ({}, {"peak_mib": 104.5}, ()),
        ({"peak_mib": 10.0}, {"peak_mib": 13.0}, ()),  # within what pages change
        ({}, {"peak_mib": 50.0}, ("less memory",)),
        ({}, {"peak_mib": None}, ()),
        ({}, {"weight_grad_relative_error": 2e-3}, ("LESS EXACT",)),
        ({}, times(1.5) | {"peak_mib": 50.0}, ("SLOWER", "less memory")),
        ({}, times(9.9) | {"busy": "control 2x"}, ("busy (new): the time is not counted",)),
        (
            {"busy": "control 2x"},
            times(9.9) | {"peak_mib": 200.0},
            ("MORE MEMORY", "busy (old): the time is not counted"),
        ),
        ({}, {"status": "out of memory"}, ("ok -> out of memory",)),
        ({"status": "out of memory"}, {}, ("out of memory -> ok",)),
        ({"status": "out of memory"}, {"status": "out of memory"}, ("out of memory",)),
    ],
)
def test_verdicts(old, new, words):
    rows, missing = compare(document(old), document(new))
    assert [row.verdict.words for row in rows] == [words]
    assert rows[0].verdict.regressed is any(word.isupper() or word.startswith("ok ->") for word in words)
    assert missing == []


def test_the_products_are_the_unit_and_cases_are_told_apart():
    old = document({"implementation": "three products"}, {}, {"vocab": 2000}, {"ignored": 0.5})
    new = document({"implementation": "three products"}, {"ignored": 0.5}, {"implementation": "trl"})
    rows, missing = compare(old, new)
    assert [row.case for row in rows] == ["N=64 D=32 V=1,000 bf16, 50% ignored"]
    assert missing == [
        "chunked_ce, N=64 D=32 V=1,000 bf16: only in the old file",
        "chunked_ce, N=64 D=32 V=2,000 bf16: only in the old file",
        "trl, N=64 D=32 V=1,000 bf16: only in the new file",
    ]


def test_other_machines_and_versions_are_named():
    old, new = document({}), document({}, device="another", versions={"torch": "2.14.0", "triton": "3.9"})
    assert conditions_that_differ(old, new) == {
        "device": ("a device", "another"),
        "torch": ("2.13.0", "2.14.0"),
        "triton": (None, "3.9"),
    }


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ending:
        main(["bench", "--compare", *map(str, arguments)])
    return ending.value.code, capsys.readouterr()


def test_the_command(tmp_path, capsys):
    """The old file has the names of an older version, and lacks what it did not write."""
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    row = {{"implementation": "contestant"}.get(name, name): value for name, value in ROW.items() if name != "status"}
    old.write_text(json.dumps(document() | {"results": [row]}))
    new.write_text(json.dumps(document(times(1.5), threads=4) | {"complete": False}))
    code, printed = run(capsys, old, new)
    assert code == 1
    assert "differs: threads: 2 -> 4" in printed.out and "SLOWER" in printed.out
    assert "the new measurement ended early" in printed.out
    assert "1 of 1 regressed" in printed.out
    code, printed = run(capsys, old, new, "--json")
    assert code == 1
    assert json.loads(printed.out)["results"][0]["time_to_old"] == pytest.approx(1.25)
    code, printed = run(capsys, new, old)
    assert code == 0 and "none of 1 regressed" in printed.out
    new.write_text(json.dumps(document(times(1.5) | {"busy": "control 2x"})))
    code, printed = run(capsys, old, new)
    assert code == 0 and "none of 1 regressed; the times of 1 are not counted" in printed.out


def test_options_of_a_measurement_are_refused(tmp_path, capsys):
    code, printed = run(capsys, tmp_path / "old.json", tmp_path / "new.json", "--tokens", 8, "--no-errors")
    assert code == 2 and "was given --tokens, --no-errors too" in printed.err


@pytest.mark.parametrize("text", [None, "no JSON", "[]", "{}", json.dumps(document({"vocab": 7}))])
def test_files_that_cannot_be_compared(text, tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(document({})))
    if text is not None:
        new.write_text(text)
    code, printed = run(capsys, old, new)
    assert code == 2 and printed.err.count("\n") == 1
    assert "new.json must be a file that chunked-ce bench --json wrote" in printed.err or "have none" in printed.err
