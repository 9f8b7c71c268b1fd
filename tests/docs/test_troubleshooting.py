"""The messages on the page are those of the package, and each of its warnings is there."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.docs import pages

PAGE = pages.DOCS / "troubleshooting.md"
FILLED_IN = "\0"  # where a message has a value
FRAGMENTS = re.findall(r"^### `([^`]+)`$", PAGE.read_text("utf-8"), flags=re.MULTILINE)
TREES = {path: ast.parse(path.read_text("utf-8")) for path in sorted((pages.ROOT / "chunked_ce").rglob("*.py"))}


def _text(node: ast.expr, constants: dict[str, str]) -> str:
    """A message, its pieces joined; names of the module's own constants are replaced by what they are."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part, constants) for part in parts)
        case ast.FormattedValue(value=ast.Name(id=name)) | ast.Name(id=name):
            return constants.get(name, FILLED_IN)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left, constants) + _text(right, constants)
        case _:
            return FILLED_IN


def _constants(tree: ast.Module) -> dict[str, str]:
    assigned = [one for one in tree.body if isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Name)]
    return {one.targets[0].id: _text(one.value, {}) for one in assigned}


def _messages() -> Iterator[str]:
    """All strings of the package that are no docstrings: some messages are joined of pieces."""
    for tree in TREES.values():
        constants = _constants(tree)
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp) and id(node) not in docstrings:
                yield _text(node, constants)


MESSAGES = sorted({message for message in _messages() if message.count(" ") > 1})


def _pattern(fragment: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, fragment.split("…"))), flags=re.DOTALL)


def test_the_package_has_each_message():
    assert [fragment for fragment in FRAGMENTS if not any(map(_pattern(fragment).search, MESSAGES))] == []


def test_no_two_entries_are_the_same():
    assert len(set(FRAGMENTS)) == len(FRAGMENTS) >= 60


def _warnings() -> Iterator[tuple[Path, str]]:
    """Where the package warns, and what: by `warnings.warn`, perhaps later, or once per head by `Record.tell`."""
    for path, tree in TREES.items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            match ast.unparse(call.func):
                case "warnings.warn":
                    message = call.args[0]
                case name if name.endswith(".tell"):
                    message = call.args[1]
                case "threading.Timer" if "warnings.warn" in ast.unparse(call):
                    message = call.args[2].elts[0]
                case _:
                    continue
            known = _constants(tree) | _assigned_before(tree, call)
            yield path.relative_to(pages.ROOT), _text(message, known)


def _assigned_before(tree: ast.Module, call: ast.Call) -> dict[str, str]:
    """Strings that the function around a call assigns to a name."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    around = [one for one in functions if any(node is call for node in ast.walk(one))]
    assigned = [node for one in around for node in ast.walk(one) if isinstance(node, ast.Assign)]
    return {one.targets[0].id: _text(one.value, {}) for one in assigned if isinstance(one.targets[0], ast.Name)}


def test_each_warning_is_on_the_page():
    """Only `Record.tell` passes on a message that it was given."""
    found = list(_warnings())
    assert len(found) >= 14
    assert [path.as_posix() for path, text in found if text == FILLED_IN] == ["chunked_ce/lazy/activity.py"]
    texts = [text for _, text in found if text != FILLED_IN]
    assert [text for text in texts if not any(_pattern(fragment).search(text) for fragment in FRAGMENTS)] == []
