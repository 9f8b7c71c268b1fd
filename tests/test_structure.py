"""The package's modules depend downwards only, and its functions take few arguments."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "chunked_ce"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}

MOST_PARAMETERS = 12
PUBLIC = {
    "linear_cross_entropy",
    "cross_entropy",
    "linear_logprobs",
    "linear_divergence",
    "linear_loss",
    "linear_statistics",
    "logits_loss",
    "predict_memory",
    "LinearCrossEntropyLoss.__init__",
    "LigerFusedLinearGRPOLoss.__init__",
    "LigerFusedLinearGRPOLoss.forward",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
}


def imports(name: str, source: str) -> set[str]:
    """The modules of the package that the source of module ``name`` imports, wherever the imports stand."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = absolute(name, node)
            # A name is that of a module, or of something that the module ``origin`` defines.
            names = {f"{origin}.{alias.name}" for alias in node.names}
            found |= names if names <= MODULES.keys() else names | {origin}
    return found & MODULES.keys()


def absolute(name: str, node: ast.ImportFrom) -> str:
    """The module that ``from ... import`` names in the module ``name``."""
    package = name.split(".") if MODULES[name].stem == "__init__" else name.split(".")[:-1]
    base = package[: len(package) + 1 - node.level] if node.level else []
    return ".".join([*base, *([node.module] if node.module else [])])


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The modules that import one another, directly or through others, in groups."""
    reached = {name: reachable(graph, name) for name in graph}
    groups = {tuple(sorted(one for one in reached[name] if name in reached[one])) for name in graph}
    return sorted(list(group) for group in groups if group)


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """The modules behind the imports of ``start``: itself only if there is a way back."""
    found, ahead = set(), [*graph[start]]
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead += graph[name]
    return found


def functions(name: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """All functions of a module with their qualified names."""
    pending = [("", ast.parse(MODULES[name].read_text()))]
    while pending:
        prefix, node = pending.pop()
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            pending.append((f"{prefix}{child.name}." if named else prefix, child))
            if named and not isinstance(child, ast.ClassDef):
                yield f"{prefix}{child.name}", child


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    taken = function.args
    names = [one.arg for one in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs, taken.vararg, taken.kwarg) if one]
    return len([name for name in names if name not in ("self", "cls")])


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith(("jit", "triton.jit")) for decorator in function.decorator_list)


def test_no_two_modules_import_each_other():
    graph = {name: imports(name, path.read_text()) for name, path in MODULES.items()}
    assert len(graph) > 50 and sum(map(len, graph.values())) > 100
    assert not circles(graph)


def test_rooms_depend_downwards_only():
    """Folders, and files that are in none, have an order too."""

    def room(name: str) -> str:
        return ".".join(name.split(".")[:2])

    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        above = graph.setdefault(room(name), set())
        above |= {room(imported) for imported in imports(name, path.read_text())} - {room(name)}
    assert {"chunked_ce.rows", "chunked_ce.engine", "chunked_ce.parallel", "chunked_ce.plan"} <= graph.keys()
    assert not circles(graph)


def test_functions_take_few_parameters():
    found = {
        f"{module}.{name}": num_parameters(function)
        for module in MODULES
        for name, function in functions(module)
        if name not in PUBLIC and not is_kernel(function) and num_parameters(function) > MOST_PARAMETERS
    }
    assert not found


def test_imports_are_found_wherever_they_stand():
    source = """
import torch, chunked_ce.checks as checks
from chunked_ce.lazy import shapes
from . import values
from ..options import ChunkOptions
if TYPE_CHECKING:
    from chunked_ce import lm_head, LMHead
def function():
    import chunked_ce.plan
"""
    names = {"", ".checks", ".lazy.shapes", ".lazy.values", ".options", ".lm_head", ".plan"}
    assert imports("chunked_ce.lazy.consume", source) == {f"chunked_ce{name}" for name in names}


def test_a_circle_is_found():
    graph = {"a": {"b", "d"}, "b": {"c"}, "c": {"a"}, "d": {"e"}, "e": set(), "f": {"f"}}
    assert circles(graph) == [["a", "b", "c"], ["f"]]
