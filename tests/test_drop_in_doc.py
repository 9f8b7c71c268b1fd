"""The Python in docs/drop_in.md runs, and its lists are those of the code."""

import re
import warnings
from pathlib import Path

import pytest
import torch

DOC = (Path(__file__).parents[1] / "docs" / "drop_in.md").read_text()


def test_its_python_runs():
    pytest.importorskip("transformers")
    names = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "LazyLogits")
        for block in re.findall(r"^```python\n(.*?)^```", DOC, re.DOTALL | re.MULTILINE):
            exec(compile(block, "docs/drop_in.md", "exec"), names)
    assert repr(names["logits"]) in DOC
    printed = str(names["LMHead"].report(names["model"])).splitlines()
    assert "".join(f"    {line}\n" for line in printed) in DOC


def test_what_it_calls_followed_is():
    from chunked_ce.lazy.follow import is_followed

    rows = [line for line in DOC.splitlines() if line.startswith(("| followed", "| taken from the hidden"))]
    named = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)}
    assert len(named) > 30
    for name in named:
        assert any(is_followed(getattr(space, name, None)) for space in (torch, torch.Tensor, torch.nn.functional)), (
            name
        )
