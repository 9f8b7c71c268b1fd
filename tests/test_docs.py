"""What README, CONTRIBUTING and docs/ show runs as it stands."""

import importlib.util
import json
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.report import markdown
from chunked_ce.cli import main as command_line
from chunked_ce.cli.arguments import parser

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FOLDERS = ("chunked_ce", "tests", "benchmarks", "docs", "examples")
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
START = sorted((ROOT / "docs" / "start").glob("*.md"))
# By tests/test_drop_in_doc.py, by the notebook's own test, and by tests/docs/test_start.py.
RUN_ELSEWHERE = {"docs/drop_in.md", "docs/notebook.md", *(f"docs/start/{page.name}" for page in START)}
READERS_OWN = "train.py"  # what the reader calls the code of a page


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


COMMANDS = {
    f"{name(page)}: {line}": line
    for page in PAGES
    for block in blocks(page, "sh")
    for line in block.splitlines()
    if line and not line.startswith("#")
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if name(page) not in RUN_ELSEWHERE and blocks(page, "python")], ids=name
)
def test_python_runs(page):
    """The blocks marked ``python``, in order and in one namespace; those marked ``py`` need several processes."""
    namespace: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


def test_there_is_something_to_run():
    assert blocks(README, "python")
    assert len(COMMANDS) > 20
    assert TABLES
    assert PLANS


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
        options = text + "".join(path.read_text() for path in (ROOT / "examples" / "common").glob("*.py"))
        assert all(option[2:].replace("-", "_") in options.replace("-", "_") for option in own)


PLAN = r"```sh\nchunked-ce (plan [^\n]*)\n```\n\n```text\n(.*?)```"
PLANS = re.findall(PLAN, README.read_text("utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize(("arguments", "printed"), PLANS, ids=[arguments for arguments, _ in PLANS])
def test_plans_say_so(arguments, printed, capsys):
    """The README shows the first lines of what the command prints."""
    pytest.importorskip("rich")
    with pytest.raises(SystemExit):
        command_line(shlex.split(arguments))
    assert capsys.readouterr().out.startswith(printed)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_prose_is_at_most_100_columns_wide(page):
    """Tables, pictures and fenced blocks may be wider."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert [line for line in prose.splitlines() if len(line) > 100 and not line.startswith(("|", "!["))] == []


def test_links_and_pictures_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_names_exist(page):
    """Python files, by their path or by its end, folders, and dotted names within the package."""
    text = page.read_text(encoding="utf-8")
    files = [path.as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    for file in set(re.findall(r"[\w/]+\.py\b", text)) - {READERS_OWN}:
        assert any(known.endswith(f"/{file}") for known in files), file
    for folder in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w/]*)`", text):
        assert (ROOT / folder).is_dir(), folder
    for dotted in re.findall(r"\bchunked_ce(?:\.\w+)+", text):
        # torchtitan.py needs torchtitan, which is not here.
        found = importlib.util.find_spec(dotted) if dotted.endswith(".torchtitan") else pkgutil.resolve_name(dotted)
        assert found is not None


TABLES = {
    f"{name(page)}: {file}": (file, table)
    for page in PAGES
    for file, table in re.findall(
        r"<!-- (benchmarks/results/\S+\.json) -->\n(.*?)\n<!-- end -->", page.read_text("utf-8"), flags=re.DOTALL
    )
}


@pytest.mark.parametrize(("file", "table"), TABLES.values(), ids=TABLES)
def test_tables_are_those_of_the_results(file, table):
    """What stands between the markers is what `benchmarks.report` makes of the file that they name."""
    assert table.strip() == markdown(json.loads((ROOT / file).read_text())).strip()


def test_the_table_of_trainers_is_that_of_its_results():
    pytest.importorskip("transformers")
    from tests.packages import table

    assert table.PAGE.read_text("utf-8").split(table.BEGIN)[1].split(table.END)[0] == table.table()
