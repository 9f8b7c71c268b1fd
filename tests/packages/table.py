"""Writes the table of docs/trainers.md from what the tests of this folder measured: python -m tests.packages.table"""

from pathlib import Path

from tests.packages.trainings import recorded

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
BEGIN, END = "<!-- tests/packages/results.json -->\n", "<!-- end -->\n"
COLUMNS = {
    "package": "package",
    "trainer": "trainer",
    "setting": "setting",
    "by": "this library by",
    "ours": "largest tensor",
    "plain": "without",
}  # the last two in units of N V


def table() -> str:
    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS)]
    lines += [[_cell(row[name]) for name in COLUMNS] for row in recorded()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.3f}"


def main() -> None:
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1], "utf-8")


if __name__ == "__main__":
    main()
