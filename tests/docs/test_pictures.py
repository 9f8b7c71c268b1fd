"""The committed pictures are those that docs/pictures.py draws."""

import importlib.util
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
_spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
pictures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pictures)
WIDTH_OF_A_LETTER = 0.52  # of the size of the font, on average, in the widest one that a browser takes by itself


@pytest.mark.parametrize("draw", pictures.PICTURES, ids=lambda draw: draw.__name__)
def test_committed_picture_is_the_drawn_one(draw):
    picture = draw()
    assert (DOCS / "pictures" / f"{picture.name}.svg").read_text("utf-8") == picture.svg()


@pytest.mark.parametrize("draw", pictures.PICTURES, ids=lambda draw: draw.__name__)
def test_text_stays_within_the_picture(draw):
    picture = draw()
    texts = [element for element in ElementTree.fromstring(picture.svg()).iter() if element.tag.endswith("text")]
    assert texts
    for text in texts:
        bold = 1.15 if text.get("font-weight") else 1.0
        wide = bold * WIDTH_OF_A_LETTER * float(text.get("font-size")) * len(text.text)
        share = {"start": 0.0, "middle": 0.5, "end": 1.0}[text.get("text-anchor", "start")]
        left = float(text.get("x")) - share * wide
        assert left >= 0, text.text
        assert left + wide <= picture.width, text.text
        assert 0 < float(text.get("y")) <= picture.height


def test_no_picture_is_left_over():
    assert {path.stem for path in (DOCS / "pictures").glob("*.svg")} == {draw().name for draw in pictures.PICTURES}


def test_pictures_have_the_colour_of_the_page():
    for draw in pictures.PICTURES:
        text = draw().svg()
        assert "currentColor" in text
        assert "prefers-color-scheme: dark" in text
        assert "white" not in text
