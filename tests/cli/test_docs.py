"""docs/benchmarks.md explains what `bench` prints. Its commands are tested with those of all pages."""

from pathlib import Path

from chunked_ce.cli.tables import COLUMNS

TEXT = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def test_columns_are_explained():
    assert all(column in TEXT for column in COLUMNS)
