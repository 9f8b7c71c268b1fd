"""The examples for TRL, with the line that makes the losses chunked and without: the same numbers."""

import json
import re
from pathlib import Path

import pytest

from tests.examples.commands import EXAMPLES, run

for name in ("trl", "mistral_common"):
    pytest.importorskip(name)

TINY = ["--width=16", "--depth=1", "--heads=2", "--steps=2"]
CASES = {
    "trl_sft": ["--batch=2", "--context=24"],
    "trl_grpo": ["--lines=2", "--group=2", "--warm-up=1"],
}


@pytest.mark.parametrize("example", CASES)
def test_the_same_numbers(tmp_path, example):
    source = EXAMPLES / f"{example}.py"
    assert len(source.read_text().splitlines()) < 150
    assert re.findall(r"trl\.install.*", source.read_text()) == ["trl.install()  # the only line of chunked_ce"]
    text = tmp_path / "text.txt"
    text.write_text(Path(json.__file__).with_name("decoder.py").read_text())
    command = [source, *TINY, *CASES[example], "--text", text]
    ours, plain = (run(*command, *more, log=tmp_path / "log") for more in ([], ["--plain"]))
    found, expected = (re.findall(r"^step +\d+  .*$", printed, re.MULTILINE) for printed in (ours, plain))
    assert len(found) == 2 and found == expected
    for printed in (ours, plain):
        assert re.search(r"^\d+\.\d\d s per step, training took [1-9][\d,]* MiB at its peak$", printed, re.MULTILINE)
