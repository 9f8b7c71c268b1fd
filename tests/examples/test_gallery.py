"""Every example says what it shows, is short, and has its place on the page, whose pictures are of its runs."""

import ast
import json
import os
import re
import runpy
import shlex

import pytest

from tests.examples import gallery
from tests.examples.commands import EXAMPLES

SCRIPTS = gallery.scripts()
PAGE = gallery.PAGE.read_text("utf-8")


@pytest.fixture
def helped(monkeypatch, capsys):
    """What an example prints for --help, in this process."""
    before = dict(os.environ)  # an example sets DS_ACCELERATOR where there is no GPU

    def helped(name: str) -> str:
        if name.startswith("trl_"):
            pytest.importorskip("trl")
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        assert ended.value.code == 0
        return capsys.readouterr().out

    yield helped
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("name", [script.stem for script in SCRIPTS])
def test_help(helped, name):
    """It describes the example, its time included, and knows the options of all commands that are shown."""
    text = (EXAMPLES / f"{name}.py").read_text("utf-8")
    printed = helped(name)
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring in printed
    commands = re.findall(rf"^ +(.*examples/{name}\.py.*)$", docstring, re.MULTILINE)
    for command in [*commands, *gallery.COMMANDS.get(name, {}).values()]:
        arguments = shlex.split(command)
        script = arguments.index(f"examples/{name}.py")
        for option in filter(lambda argument: argument.startswith("--"), arguments[script + 1 :]):
            assert re.search(rf"^  {option}\b", printed, re.MULTILINE), option
    options = printed.split("options:")[1]
    assert re.findall(r"^  (--[\w-]+(?: [A-Z]+)?)\n(?!    )", options, re.MULTILINE) == [], "options without help"


def test_examples_and_their_parts_are_short():
    for path in [*SCRIPTS, *(EXAMPLES / "common").glob("*.py")]:
        assert len(path.read_text("utf-8").splitlines()) < 150, path.name


def test_the_table_is_that_of_the_docstrings():
    found = PAGE.split(gallery.BEGIN)[1].split(gallery.END)[0]
    assert found == gallery.table(), "python -m tests.examples.gallery --draw writes it anew"


@pytest.mark.parametrize("name", [script.stem for script in SCRIPTS])
def test_each_example_has_a_section_with_a_picture(name):
    section = PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]
    path = re.search(r"!\[[^\]]+\]\(([^)]+\.png)\)", section)[1]
    picture = gallery.PAGE.parent / path
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture == gallery.PICTURES / f"{name}.png" or name in gallery.OTHER_PICTURES
    assert f"`examples/{name}.py`" in section


def test_pictures_are_of_the_commands_that_the_page_names():
    runs = gallery.read_runs()
    assert runs.keys() == gallery.COMMANDS.keys()
    assert {script.stem for script in SCRIPTS} == runs.keys() | gallery.OTHER_PICTURES
    for name, run in runs.items():
        assert run["commands"] == list(gallery.COMMANDS[name].values())
        for kind in run["runs"].values():
            assert kind["losses"] or kind["peak"]


def test_figures_of_printed_lines(tmp_path):
    printed = """\
step    1  loss 11.877866  gradient 3.8      677 tokens/s
step    2  loss 11.5  gradient 3.8      677 tokens/s
rank 0: data 0, tensor 0, head rows       0 to  65,536, training took   230 MiB at its peak
rank 1: data 0, tensor 1, head rows  65,536 to 131,072, training took 1,228 MiB at its peak
"""
    assert gallery.read_lines("a", printed) == {"a": {"losses": [11.877866, 11.5], "peak": 1228}}
    heads = "".join(
        f"rank {rank}, {head} head: 9 rows, loss 2.5, the step took {peak} MiB at its peak\n"
        for rank, head, peak in ((0, "  whole", 30), (0, "sharded", 15), (1, "  whole", 31))
    )
    found = gallery.read_lines("2 ranks", heads)
    assert found == {"2 ranks, whole": {"losses": [], "peak": 31}, "2 ranks, sharded": {"losses": [], "peak": 15}}
    assert gallery.read_lines("a", "step   1  loss 2.0\n") == {"a": {"losses": [2.0], "peak": 0}}


def test_figures_of_files(tmp_path):
    for name, loss in (("teacher", 9.0), ("kl-full", 2.0), ("kl-chunked", 1.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"loss": loss, "peak_memory_bytes": 2**21}) + "\n")
    found = gallery.read_files("", tmp_path)
    assert list(found) == ["kl-full", "kl-chunked"]
    assert found["kl-chunked"] == {"losses": [1.0], "peak": 2.0}
    gallery.draw(found, tmp_path / "both.png")
    gallery.draw({"a": {"losses": [1.0, 2.0], "peak": 0}}, tmp_path / "losses.png")
    for picture in ("both", "losses"):
        assert (tmp_path / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
