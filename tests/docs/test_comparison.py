"""The README's figures are those of the committed results."""

import importlib.util
from pathlib import Path

import pytest

from chunked_ce.cli.documents import read_document

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("comparison", ROOT / "docs" / "comparison.py")
comparison = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(comparison)
README = comparison.README.read_text("utf-8")


def test_readme_is_up_to_date():
    assert comparison.written(README) == README


def test_every_measured_implementation_has_a_row():
    """But the products, and what is measured only to choose between options of one implementation."""
    left_out = {"three products", "chunked_ce, filtered", "torch, automatic"}
    measured = {
        result["implementation"]
        for name in (comparison.SWEEP, comparison.RATIOS, comparison.PACKAGES)
        for result in read_document(comparison.RESULTS / name)["results"]
    }
    assert measured - left_out <= {row.implementation for row in comparison.ROWS}


def test_readme_without_a_place_is_refused():
    with pytest.raises(ValueError, match="one place for headline, has 0"):
        comparison.written("no markers")


def test_readme_is_a_front_door():
    assert len(README.splitlines()) < 150
