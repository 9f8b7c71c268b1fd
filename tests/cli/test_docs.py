"""The commands of docs/benchmarks.md: all of them parse, and what they name exists."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from chunked_ce.cli.arguments import parser

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command):
    program, *arguments = shlex.split(command)
    if program.endswith("chunked-ce"):
        assert parser().parse_args(arguments).command in ("plan", "bench", "check")
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    else:
        assert [program, arguments[0]] == ["python", "-m"]
        assert importlib.util.find_spec(arguments[1]) is not None


def test_columns_are_explained():
    from chunked_ce.cli.bench import COLUMNS

    assert all(column in TEXT for column in COLUMNS)
