"""What README, CONTRIBUTING and docs/ show runs as it stands."""

import importlib.util
import json
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.report import markdown
from chunked_ce.cli.arguments import parser

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FOLDERS = ("chunked_ce", "tests", "benchmarks", "examples")
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


COMMANDS = {
    f"{page.name}: {line}": line
    for page in PAGES
    for block in blocks(page, "sh")
    for line in block.splitlines()
    if line and not line.startswith("#")
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "drop_in.md" and blocks(page, "python")], ids=lambda page: page.name
)
def test_python_runs(page):
    """The blocks marked ``python``, in order and in one namespace; those marked ``py`` need several processes.

    `tests/test_drop_in_doc.py` has the page on models whose code is not changed.
    """
    namespace: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


def test_there_is_something_to_run():
    assert len(blocks(README, "python")) >= 3
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_commands_exist(command):
    """Scripts, modules, `make` targets and packages exist, and options are known."""
    program, *arguments = shlex.split(command, comments=True)
    if program.endswith("chunked-ce"):
        assert parser().parse_args(arguments).command in ("plan", "bench", "check")
    elif program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert arguments[0] in targets
    elif program == "pip":
        extras = re.search(r"\[options.extras_require\](.*)", (ROOT / "setup.cfg").read_text(), flags=re.DOTALL)[1]
        assert set(re.findall(r"\[(\w+)\]", command)) <= set(re.findall(r"^(\w+) =", extras, flags=re.MULTILINE))
    elif arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]) is not None
    else:
        assert program in ("python", "torchrun", "deepspeed")
        script = next(argument for argument in arguments if argument.endswith(".py"))
        text = (ROOT / script).read_text()
        own = [a.split("=")[0] for a in arguments[arguments.index(script) + 1 :] if a.startswith("--")]
        options = text + (ROOT / "examples" / "model.py").read_text()
        assert all(option[2:].replace("-", "_") in options.replace("-", "_") for option in own)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_is_at_most_100_columns_wide(page):
    """Tables and fenced blocks may be wider."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert [line for line in prose.splitlines() if len(line) > 100 and not line.startswith("|")] == []


def test_links_and_pictures_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_names_exist(page):
    """Python files, by their path or by its end, folders, and dotted names within the package."""
    text = page.read_text(encoding="utf-8")
    files = [path.as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    for name in re.findall(r"[\w/]+\.py\b", text):
        assert any(file.endswith(f"/{name}") for file in files), name
    for name in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w/]*)`", text):
        assert (ROOT / name).is_dir(), name
    for name in re.findall(r"\bchunked_ce(?:\.\w+)+", text):
        # torchtitan.py needs torchtitan, which is not here.
        found = importlib.util.find_spec(name) if name.endswith(".torchtitan") else pkgutil.resolve_name(name)
        assert found is not None


def test_the_table_is_that_of_the_results():
    """What stands between the markers is what `benchmarks.report` makes of the file that they name."""
    found = re.findall(
        r"<!-- (benchmarks/results/\S+\.json) -->\n(.*?)\n<!-- end -->", README.read_text(), flags=re.DOTALL
    )
    assert found
    for path, table in found:
        assert table.strip() == markdown(json.loads((ROOT / path).read_text())).strip()


def test_the_table_of_trainers_is_that_of_its_results():
    pytest.importorskip("transformers")
    from tests.packages import table

    assert table.PAGE.read_text("utf-8").split(table.BEGIN)[1].split(table.END)[0] == table.table()
