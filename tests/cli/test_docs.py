"""docs/benchmarks.md explains what `bench` prints, and says which command makes which figures.

Its commands are tested with those of all pages.
"""

import re
from pathlib import Path

from chunked_ce.cli.implementations import LOSSES
from chunked_ce.cli.other_losses import OTHER_LOSSES
from chunked_ce.cli.tables import COLUMNS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
TEXT = PAGE.read_text(encoding="utf-8")
FIGURES = TEXT.split("## Which command makes which figures")[1].split("\n## ")[0]


def test_columns_and_keys_are_explained():
    assert all(column in TEXT for column in COLUMNS)
    assert all(f"`{loss.key}`" in TEXT for loss in LOSSES.values() if loss.kind not in OTHER_LOSSES)
    assert all(f"`{kind}`" in TEXT for kind in OTHER_LOSSES)


def made_by_make_bench():
    recipe = re.search(r"^bench: .*?\n\n", (ROOT / "Makefile").read_text(), flags=re.DOTALL | re.MULTILINE)[0]
    return set(re.findall(r"\$\(RESULTS\)/(\w+\.json)", recipe))


def test_every_result_has_its_command():
    """What is committed, what the page lists and what `make bench` makes are the same files."""
    listed = set(re.findall(r"`(\w+\.json)`", FIGURES))
    committed = {path.name for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert made_by_make_bench() == listed
    assert committed <= listed


def test_pages_show_the_results_that_the_page_says():
    """By the file's name, or by the table or picture that is made of it."""
    for row in re.findall(r"^\| (`.*?) \| .*? \| (.*?) \|$", FIGURES, flags=re.MULTILINE):
        names = re.findall(r"`(?:docs/)?([\w.]+)`", row[0])
        if not (ROOT / "benchmarks" / "results" / names[0]).exists():  # not measured yet
            continue
        for place in re.findall(r"\(([\w/.]+)\)|(this page)", row[1]):
            page = PAGE if place[1] else PAGE.parent / place[0]
            text = page.read_text(encoding="utf-8")
            text = text.replace(FIGURES, "") if page == PAGE else text
            stem = names[0].removesuffix(".json")
            assert any(name in text for name in (*names, f"benchmarks.{stem}")), (page.name, names)
