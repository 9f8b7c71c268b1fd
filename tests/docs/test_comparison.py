"""The README's figures are those of the committed results."""

import importlib.util
import json
from pathlib import Path

import pytest

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
        result["contestant"]
        for name in (comparison.SWEEP, comparison.RATIOS, comparison.PACKAGES)
        for result in json.loads((comparison.RESULTS / name).read_text("utf-8"))["results"]
    }
    assert measured - left_out <= {row.contestant for row in comparison.ROWS}


def test_readme_without_a_place_is_refused():
    with pytest.raises(ValueError, match="one place for headline, has 0"):
        comparison.written("no markers")


def test_readme_is_a_front_door():
    assert len(README.splitlines()) < 150
