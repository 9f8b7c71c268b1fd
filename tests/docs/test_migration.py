"""What the pages on other packages say of their arguments and of ours."""

import ast
import inspect
import pkgutil

import pytest

from tests.docs import pages
from tests.docs.peer_signatures import SIGNATURES, installed, recorded

PAGES = sorted((pages.DOCS / "migration").glob("*.md"))
TABLES = {
    table.header[0].strip("`"): table for page in PAGES for table in pages.tables(page) if pages.code(table.header[0])
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_recorded_parameters_are_those_of_the_installed_package(name):
    try:
        found = installed(name)
    except ImportError:
        pytest.skip(f"{name.split('.')[0]} is not installed")
    assert found == recorded(name)


def test_each_function_has_a_table():
    assert set(TABLES) == set(SIGNATURES)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_each_of_their_arguments_once(name):
    theirs = [ast.unparse(_call(code)[0]) for row in TABLES[name].rows for code in pages.code(row[0])]
    assert sorted(theirs) == sorted(recorded(name))


@pytest.mark.parametrize("name", TABLES)
def test_a_table_names_arguments_that_are_ours(name):
    ours = pages.code(TABLES[name].header[1])
    assert ours
    known = set().union(*(inspect.signature(pkgutil.resolve_name(function)).parameters for function in ours))
    for row in TABLES[name].rows:
        for code in pages.code(row[1]):
            _check_is_ours(code, known)


def _call(code: str) -> tuple[ast.expr, list[str]]:
    """What a cell writes as ``name``, ``name=value`` or ``Name(name=value)``: the name, and keywords."""
    (statement,) = ast.parse(code).body
    if isinstance(statement, ast.Assign):
        return statement.targets[0], []
    if isinstance(statement.value, ast.Call):
        return statement.value.func, [keyword.arg for keyword in statement.value.keywords]
    return statement.value, []


def _check_is_ours(code: str, known: set[str]) -> None:
    function, keywords = _call(code)
    name = ast.unparse(function)
    if name in known:
        assert not keywords, code
        return
    found = _resolved(name)
    assert found is not None, f"{code} is neither an argument nor a public name"
    assert set(keywords) <= set(inspect.signature(found).parameters) if keywords else True, code


def _resolved(name: str) -> object:
    for module in ("", "chunked_ce.", "chunked_ce.objectives.", "chunked_ce.preference."):
        try:
            return pkgutil.resolve_name(module + name)
        except (ImportError, AttributeError, ValueError):
            continue
    return None
