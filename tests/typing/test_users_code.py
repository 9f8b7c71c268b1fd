"""mypy and pyright accept right uses of every public name, and find wrong ones, each line of them."""

import ast
import inspect
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from typing_extensions import get_overloads, get_type_hints

import chunked_ce
from chunked_ce import keywords, objectives, preference
from chunked_ce.functional import objective_losses, per_token, target_losses

FOLDER, ROOT = Path(__file__).parent, Path(__file__).parents[2]
RIGHT, WRONG = FOLDER / "right_uses.py", FOLDER / "wrong_uses.py"


def expected() -> dict[int, str]:
    """The error that each wrong line has for mypy, by its code."""
    lines = enumerate(WRONG.read_text().splitlines(), 1)
    return {number: found.group(1) for number, line in lines if (found := re.search(r"# wrong: ([\w-]+)$", line))}


@pytest.mark.timeout(600)
@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed")
def test_mypy():
    """With the cache of `make lint`, whose settings it has: without a cache it reads all of torch first."""
    run = [sys.executable, "-m", "mypy", "--no-error-summary", "--no-pretty", str(RIGHT), str(WRONG)]
    said = subprocess.run(run, cwd=ROOT, capture_output=True, text=True).stdout
    found = re.findall(r"^tests/typing/(\w+)\.py:(\d+): error: (.*?)(?:  \[([\w-]+)\])?$", said, flags=re.MULTILINE)
    assert [line for line in found if line[0] == RIGHT.stem] == []
    assert {int(number): code for name, number, _, code in found if name == WRONG.stem} == expected()


@pytest.mark.skipif(find_spec("pyright") is None, reason="pyright is not installed")
def test_pyright():
    run = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(RIGHT), str(WRONG)]
    said = json.loads(subprocess.run(run, cwd=ROOT, capture_output=True, text=True).stdout)
    found = [(Path(one["file"]).name, one["range"]["start"]["line"] + 1, one["message"])
             for one in said["generalDiagnostics"] if one["severity"] == "error"]  # fmt: skip
    assert [line for line in found if line[0] == RIGHT.name] == []
    assert {number for name, number, _ in found if name == WRONG.name} == expected().keys()


def test_right_uses_have_every_public_name():
    used = {node.id for node in ast.walk(ast.parse(RIGHT.read_text())) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(ast.parse(RIGHT.read_text())) if isinstance(node, ast.Attribute)}
    assert {*chunked_ce.__all__, *objectives.__all__, *preference.__all__} - used == set()


@pytest.mark.parametrize(
    ("function", "shared"),
    [
        (target_losses.linear_cross_entropy, keywords.LinearCrossEntropyKeywords),
        (target_losses.cross_entropy, keywords.CrossEntropyKeywords),
        (objective_losses.linear_loss, None),
        (objective_losses.logits_loss, None),
        (objective_losses.linear_divergence, keywords.DivergenceKeywords),
        (per_token.linear_logprobs, keywords.LogprobKeywords),
        (chunked_ce.LinearCrossEntropyLoss.__init__, keywords.LossModuleKeywords),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_overloads_have_the_parameters_of_the_function(function, shared):
    """A keyword that is added to one and not to the others would be an error of users' code."""
    taken, overloads = inspect.signature(function).parameters, get_overloads(function)
    assert len(overloads) >= 2
    for overload in overloads:
        parameters = inspect.signature(overload).parameters
        names = [name for name in parameters if name != "keywords"] + (
            [] if shared is None else [*get_type_hints(shared)]
        )
        assert sorted(names) == sorted(taken)
