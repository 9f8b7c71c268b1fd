"""What the compiler is told does what torch's own decorators do."""

import pytest
import torch

from chunked_ce.tracing import assume_constant, not_compiled, run_as_written

DISABLE = pytest.mark.parametrize("decorator", [not_compiled, torch.compiler.disable])
CONSTANT = pytest.mark.parametrize("decorator", [assume_constant, torch.compiler.assume_constant_result])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def plus_one(x):
    return x + 1


def between_products(decorator):
    """A function with a decorated one in its midst, and whether the compiler traced that, call by call."""
    traced = []

    @decorator
    def recorded(x):
        traced.append(torch.compiler.is_compiling())
        return plus_one(x)

    return lambda x: recorded(x * 2) * 3, traced


def compiler_attributes(function):
    """The attributes that the compiler reads, a wrapper's own identity told apart from any other number."""
    found = {name: value for name, value in vars(function).items() if "dynamo" in name and value is not None}
    wrapper = found.pop("_torchdynamo_wrapper_id", None)
    return found, wrapper == id(function)


def test_not_compiled_marks_a_function_as_torch_does():
    ours, theirs = not_compiled(plus_one), torch.compiler.disable(plus_one)
    assert compiler_attributes(ours) == compiler_attributes(theirs)
    assert ours.__name__ == theirs.__name__ and ours.__wrapped__ is theirs.__wrapped__ is plus_one


@DISABLE
def test_a_function_that_is_not_compiled_breaks_the_graph(decorator):
    (function, traced), graphs = between_products(decorator), []

    def backend(graph, inputs):
        graphs.append([node.name for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    compiled = torch.compile(function, backend=backend)
    for n in range(2, 12):  # more calls than times that the compiler compiles one function
        assert torch.equal(compiled(torch.ones(n)), torch.full((n,), 9.0))
    assert traced == [False] * 10
    assert graphs == [["mul"]] * 4  # before and after it, for one size and for any


@DISABLE
def test_a_function_that_is_not_compiled_is_an_error_in_a_full_graph(decorator):
    function, _ = between_products(decorator)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        torch.compile(function, backend="eager", fullgraph=True)(torch.ones(2))


def test_a_function_that_runs_as_written_is_traced_as_part_of_a_graph_only():
    traced = []

    @run_as_written
    def recorded(x):
        traced.append(torch.compiler.is_compiling())
        return plus_one(x)

    in_a_graph = torch.compile(lambda x: recorded(x) * 3, backend="eager", fullgraph=True)
    assert torch.equal(in_a_graph(torch.ones(2)), torch.full((2,), 6.0))
    assert torch.equal(torch.compile(recorded, backend="eager")(torch.ones(2)), torch.full((2,), 2.0))
    assert traced == [True, False]


@CONSTANT
def test_a_constant_result_is_taken_once(decorator):
    calls = []

    def size(n):
        calls.append(torch.compiler.is_compiling())
        return n + len(calls)

    marked = decorator(size)
    assert marked is size and vars(marked) == {"_dynamo_marked_constant": True}
    compiled = torch.compile(lambda x: x * marked(3), backend="eager", fullgraph=True)
    assert [compiled(torch.ones(2)).tolist() for _ in range(2)] == [[4.0, 4.0]] * 2
    assert len(calls) == 1
