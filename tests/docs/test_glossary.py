"""The glossary is in order, and has no word that no page uses."""

import re

from tests.docs import pages

PAGE = pages.DOCS / "glossary.md"
TERMS = re.findall(r"^### (.+)$", PAGE.read_text("utf-8"), flags=re.MULTILINE)


def test_terms_are_in_order():
    assert len(TERMS) > 40
    assert sorted(TERMS, key=_spelled) == TERMS


def test_each_term_is_used_by_another_page():
    others = [page for page in pages.DOCS.rglob("*.md") if page != PAGE]
    text = " ".join(" ".join(page.read_text("utf-8").lower().replace("-", " ").split()) for page in others)
    unused = [term for term in TERMS if not re.search(rf"\b{_stem(term)}", text)]
    assert unused == []


def _spelled(term: str) -> str:
    return term.lower().replace("-", " ")


def _stem(term: str) -> str:
    """Also its plural, and hyphens or spaces."""
    return re.escape(_spelled(term)).removesuffix("y").removesuffix("s")
