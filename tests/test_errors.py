"""Bad input: an error before any work that names the argument, what it was and what is allowed."""

import dataclasses
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from chunked_ce import (
    ChunkOptions,
    LinearCrossEntropyLoss,
    cross_entropy,
    linear_cross_entropy,
    linear_logprobs,
)
from tests.cases import REDUCTIONS, REDUCTIONS_AND_WAYS, WAYS, chunks

N, D, V = 6, 4, 9
GOOD = {
    "input": torch.randn(N, D),
    "linear_weight": torch.randn(V, D),
    "target": torch.arange(N),
}
GOOD_LOGITS = torch.randn(N, V)
Refusal = (ValueError, TypeError)


def call(**changes):
    arguments = GOOD | changes
    tensors = [arguments.pop(name) for name in GOOD]
    return linear_cross_entropy(*tensors, **arguments)


def logits_call(**changes):
    arguments = {"logits": torch.randn(N, V), "target": GOOD["target"]} | changes
    return cross_entropy(arguments.pop("logits"), arguments.pop("target"), **arguments)


def logprobs_call(**changes):
    arguments = GOOD | changes
    tensors = [arguments.pop(name) for name in GOOD]
    return linear_logprobs(*tensors, **arguments)


# Each row: the argument, a wrong value, and what the message must mention besides the argument's name.
TENSORS = [
    ("input", torch.randn(N, D + 1), r"5.*4|4.*5"),
    ("input", torch.randn(N + 1, D), r"7.*6|6.*7"),
    ("input", torch.randn(()), r""),
    ("input", torch.randn(2, 3, D), r""),
    ("input", torch.ones(N, D, dtype=torch.int64), r"int64"),
    ("input", torch.ones(N, D, dtype=torch.complex64), r"complex"),
    ("input", [[0.0] * D] * N, r"list"),
    ("input", None, r"None"),
    ("linear_weight", torch.randn(V, D + 1), r"5.*4|4.*5"),
    ("linear_weight", torch.randn(D, V), r"9.*4|4.*9"),
    ("linear_weight", torch.randn(D), r""),
    ("linear_weight", torch.randn(1, V, D), r""),
    ("linear_weight", torch.ones(V, D, dtype=torch.int64), r"int64"),
    ("linear_weight", torch.nn.Linear(D, V), r"Linear"),
    ("linear_weight", None, r"None"),
    ("target", torch.arange(N).float(), r"float32"),
    ("target", torch.ones(N, dtype=torch.bool), r"bool"),
    ("target", torch.arange(N).to(torch.uint8), r"uint8"),
    ("target", torch.arange(N).to(torch.int16), r"int16"),
    ("target", torch.arange(N - 1), r"5"),
    ("target", torch.arange(N)[:, None], r"6, 1"),
    ("target", torch.tensor(0), r""),
    ("target", torch.rand(N, V), r"Teacher\(logits="),
    ("target", [0] * N, r"list"),
    ("target", None, r"None"),
    ("linear_bias", torch.randn(V + 1), r"10.*9|9.*10"),
    ("linear_bias", torch.randn(1, V), r""),
    ("linear_bias", torch.randn(()), r""),
    ("linear_bias", torch.ones(V, dtype=torch.int64), r"int64"),
    ("linear_bias", 0.5, r"0\.5|float"),
    ("weight", torch.ones(V - 1), r"8.*9|9.*8"),
    ("weight", torch.ones(N, V), r""),
    ("weight", torch.ones(()), r""),
    ("weight", [1.0] * V, r"list"),
    ("token_weight", torch.ones(N + 1), r"7.*6|6.*7"),
    ("token_weight", torch.ones(N, 1), r""),
    ("token_weight", torch.ones(()), r""),
    ("token_weight", 0.5, r"0\.5|float"),
]
KEYWORDS = [
    ("reduction", "median", "median"),
    ("reduction", None, "None"),
    ("reduction", "", "mean"),
    ("label_smoothing", -0.1, r"-0\.1"),
    ("label_smoothing", 1.1, r"1\.1"),
    ("label_smoothing", float("nan"), "nan"),
    ("label_smoothing", "0.1", r"0\.1"),
    ("label_smoothing", None, "None"),
    ("z_loss", -1e-4, r"-0\.0001"),
    ("z_loss", float("nan"), "nan"),
    ("z_loss", "small", "small|str"),
    ("z_loss", None, "None"),
    ("softcap", 0, "0"),
    ("softcap", 0.0, r"0\.0"),
    ("softcap", -30.0, r"-30"),
    ("softcap", float("nan"), "nan"),
    ("softcap", "30", "30"),
    ("logit_scale", "1", "1"),
    ("logit_scale", None, "None"),
    ("logit_scale", float("nan"), "nan"),
    ("ignore_index", 0.5, r"0\.5"),
    ("ignore_index", "pad", "pad"),
    ("num_tokens", -1, "-1"),
    ("num_tokens", -0.5, r"-0\.5"),
    ("num_tokens", float("nan"), "nan"),
    ("num_tokens", "all", "all"),
    ("num_tokens", torch.ones(2), "2"),
    ("num_tokens", 1e39, r"1e\+39"),
    ("num_tokens", 1e-50, "1e-50"),
    ("num_tokens", 10**400, "1000"),
    ("num_tokens", Fraction(7, 2), "Fraction"),
    ("num_tokens", Decimal(7), "Decimal"),
    ("num_tokens", torch.tensor(-3.0), r"-3\.0"),
    ("num_tokens", torch.tensor(-3), "-3"),
    ("num_tokens", torch.tensor(torch.nan), "nan"),
    ("num_tokens", torch.tensor(torch.inf), "inf"),
    ("num_tokens", torch.tensor(1e39, dtype=torch.float64), r"1e\+39"),
    ("num_tokens", torch.tensor(True), "bool"),
    ("num_tokens", torch.tensor(3.0, requires_grad=True), "detach"),
    ("softcap", 10**400, "1000"),
    ("ignore_index", 2**63, "9223372036854775808"),
    ("ignore_index", -(2**63) - 1, "-9223372036854775809"),
    ("options", {"chunk_size": 4}, "dict|chunk_size"),
    ("options", 4, "4|int"),
]
OPTIONS = [
    ("chunk_size", 0, "0"),
    ("chunk_size", -5, "-5"),
    ("chunk_size", 2.5, r"2\.5"),
    ("chunk_size", "large", "large"),
    ("chunk_size", None, "None"),
    ("memory_budget", -1, "-1"),
    ("memory_budget", 0, "0"),
    ("memory_budget", "1GB", "1GB"),
    ("memory_budget", 2**64, "18446744073709551616"),
    ("chunk_size", 2**64, "18446744073709551616"),
    ("chunk_size", np.ones(2), "ndarray"),
    ("chunk_size", torch.ones(2), "tensor"),
    ("gradients", np.array(["forward", "backward"]), "ndarray"),
    ("gradient_filter", np.ones(2), "ndarray"),
    ("gradients", "sideways", "sideways"),
    ("gradients", None, "None"),
    ("gradients", True, "True"),
    ("accumulate_dtype", torch.int32, "int32"),
    ("accumulate_dtype", "float32", "float32"),
    ("backend", "abacus", "abacus"),
    ("backend", None, "None"),
]


def names(table):
    return [f"{name}-{i}" for i, (name, *_) in enumerate(table)]


def refused(function, name, changes, mention):
    with pytest.raises(Refusal) as caught:
        function(**changes)
    message = str(caught.value)
    assert re.search(rf"\b{name}\b", message), message
    assert re.search(mention, message), message
    assert len(message) < 400


@pytest.mark.parametrize(("name", "value", "mention"), TENSORS, ids=names(TENSORS))
def test_wrong_tensor(name, value, mention):
    # A shape that does not fit may be told from either side.
    either = {
        "input": "(input|target|linear_weight)",
        "linear_weight": "(linear_weight|input)",
        "target": "target",
    }
    refused(call, either.get(name, name), {name: value}, mention)


@pytest.mark.parametrize(("name", "value", "mention"), KEYWORDS, ids=names(KEYWORDS))
def test_wrong_keyword(name, value, mention):
    refused(call, name, {name: value}, mention)
    refused(logits_call, name, {name: value}, mention)
    if name in ("softcap", "logit_scale", "ignore_index", "options"):
        refused(logprobs_call, name, {name: value}, mention)


@pytest.mark.parametrize(("name", "value", "mention"), KEYWORDS, ids=names(KEYWORDS))
def test_wrong_keyword_of_the_module(name, value, mention):
    per_call = name == "num_tokens"

    def function(**keywords):
        module = LinearCrossEntropyLoss() if per_call else LinearCrossEntropyLoss(**keywords)
        return module(*GOOD.values(), **(keywords if per_call else {}))

    refused(function, name, {name: value}, mention)


@pytest.mark.parametrize(("name", "value", "mention"), OPTIONS, ids=names(OPTIONS))
def test_wrong_option(name, value, mention):
    """Made or used: one of the two refuses."""
    refused(lambda **keywords: call(options=ChunkOptions(**keywords)), name, {name: value}, mention)


@pytest.mark.parametrize("name", ["target", "weight", "token_weight"])
def test_wrong_tensor_beside_logits(name):
    wrong = {"target": torch.arange(N + 1), "weight": torch.ones(V + 1), "token_weight": torch.ones(N + 1)}
    refused(logits_call, name, {name: wrong[name]}, r"7|10")


@pytest.mark.parametrize(
    "logits", [torch.ones(N, V, dtype=torch.int64), torch.randn(()), [[0.0]], None, torch.randn(N, 0)]
)
def test_wrong_logits(logits):
    refused(logits_call, "logits", {"logits": logits}, "")


def put_away(head: torch.nn.Parameter, how: str) -> None:
    if how == "ds_id":  # as ZeRO-3 does at the end of a block that gathers a parameter
        head.ds_id, head.data = 0, torch.empty(0)
    elif how == "_fsdp_flattened":
        head._fsdp_flattened, head.data = True, torch.empty(3)
    else:
        head.untyped_storage().resize_(0)


ENGINES = {"ds_id": "ZeRO-3.*partitioned by DeepSpeed.*GatheredParameters", "_fsdp_flattened": "FSDP", "memory": "FSDP"}


@pytest.mark.parametrize("how", ENGINES)
@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_head_that_is_put_away_before_the_backward(reduction, way, how):
    """The backward says where the head went, and names no target."""
    head = torch.nn.Parameter(torch.randn(V, D))
    hidden = torch.randn(N, D, requires_grad=True)
    target = torch.randint(V, (N,))
    options = ChunkOptions(gradients=way)
    loss = linear_cross_entropy(hidden, head, target, reduction=reduction, options=options).sum()
    put_away(head, how)
    if way == "forward" and how == "memory":
        return loss.backward()  # reads nothing of the head
    with pytest.raises(RuntimeError, match=rf"(?s)linear_weight had shape \({V}, {D}\) in the forward.*{ENGINES[how]}"):
        loss.backward()


def test_head_that_is_frozen_and_put_away_is_not_missed_where_nothing_reads_it():
    head, hidden = torch.nn.Parameter(torch.randn(V, D), requires_grad=False), torch.randn(N, D, requires_grad=True)
    target = torch.randint(V, (N,))
    expected = torch.nn.functional.cross_entropy(hidden @ head.t(), target)
    (exact,) = torch.autograd.grad(expected, hidden)
    for way in ("forward", "backward"):
        loss = linear_cross_entropy(hidden, head, target, options=ChunkOptions(gradients=way))
        values = head.data
        put_away(head, "ds_id")
        if way == "backward":
            with pytest.raises(RuntimeError, match="ZeRO-3"):
                loss.backward()
        else:
            torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], exact)
        del head.ds_id
        head.data = values


@pytest.mark.parametrize("how", ENGINES)
@pytest.mark.parametrize("function", [call, logprobs_call])
def test_head_that_is_put_away_before_the_loss(function, how):
    head = torch.nn.Parameter(torch.randn(V, D))
    put_away(head, how)
    other = "FSDP" if how == "ds_id" else "ZeRO-3"
    with pytest.raises(ValueError, match=f"(?s)linear_weight must be .*{ENGINES[how]}") as error:
        function(linear_weight=head)
    assert other not in str(error.value)


@pytest.mark.parametrize("head", [torch.empty(0), torch.empty(0, D), torch.nn.Parameter(torch.empty(0))])
def test_partitioned_head(head):
    """peers 12: a ZeRO-3 parameter outside its module's forward has size 0: say so."""
    with pytest.raises(ValueError, match=r"(?s)linear_weight.*ZeRO-3"):
        call(linear_weight=head)
    with pytest.raises(ValueError, match=r"(?s)linear_weight.*ZeRO-3"):
        logprobs_call(linear_weight=head)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_forward_with_none(reduction):
    """Per-token upstream gradients are not known in the forward."""
    options = chunks(2, "forward")
    if reduction == "none":
        refused(call, "gradients", {"reduction": reduction, "options": options}, "none")
    else:
        call(reduction=reduction, options=options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoothing", 0),
        ("label_smoothing", 1),
        ("z_loss", 0),
        ("z_loss", 1),
        ("softcap", 30),
        ("logit_scale", 2),
        ("num_tokens", 0),
        ("num_tokens", 12),
        ("num_tokens", 12.5),
        ("num_tokens", torch.tensor(12)),
        ("ignore_index", 2),
        ("options", None),
        ("options", ChunkOptions()),
        ("options", ChunkOptions(chunk_size=1)),
        ("options", ChunkOptions(chunk_size="auto", gradients="auto", backend="auto")),
        ("weight", torch.ones(V)),
        ("linear_bias", torch.ones(V)),
        ("vocab", None),
    ],
)
def test_allowed_bounds(name, value):
    assert call(**{name: value}).isfinite()


@pytest.mark.parametrize("way", WAYS)
def test_numbers_of_numpy_are_those_of_python(way):
    options = ChunkOptions(chunk_size=np.int64(2), memory_budget=np.int32(64), gradients=way)
    assert options == ChunkOptions(chunk_size=2, memory_budget=64, gradients=way)
    numbers = {
        "num_tokens": 3,
        "ignore_index": 2,
        "label_smoothing": 0.5,
        "z_loss": 0.25,
        "softcap": 2,
        "logit_scale": 3,
    }
    kinds = {"num_tokens": np.int64, "ignore_index": np.int32, "label_smoothing": np.float32}
    strange = {name: kinds.get(name, np.float64)(value) for name, value in numbers.items()}
    assert torch.equal(call(options=options, **strange), call(options=options, **numbers))
    assert torch.equal(
        logits_call(**strange | {"logits": GOOD_LOGITS}), logits_call(**numbers | {"logits": GOOD_LOGITS})
    )


def test_num_tokens_in_the_range_of_the_loss():
    """A denominator that float32 cannot hold is right in float64."""
    double = {name: value.double() if value.is_floating_point() else value for name, value in GOOD.items()}
    for number in (1e39, torch.tensor(1e39, dtype=torch.float64)):
        found = call(**double, num_tokens=number)
        torch.testing.assert_close(found, call(**double, reduction="sum") / 1e39, rtol=1e-12, atol=0)


def test_num_tokens_of_a_transform_is_checked_too():
    def losses(numbers):
        return torch.func.vmap(lambda number: call(num_tokens=number))(numbers)

    torch.testing.assert_close(losses(torch.tensor([1.0, 2.0])), torch.stack([call(num_tokens=1), call(num_tokens=2)]))
    with pytest.raises(ValueError, match=r"num_tokens must be finite and >= 0.*-2\.0"):
        losses(torch.tensor([1.0, -2.0]))


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf])
def test_num_tokens_on_a_device_is_asserted_there(value):
    """In compiled code as on an accelerator: no host reads the number, but nobody gets a loss of it."""
    fast = torch.compile(lambda number: call(num_tokens=number), fullgraph=True, backend="aot_eager")
    assert fast(torch.tensor(3.0)).isfinite()
    with pytest.raises(RuntimeError, match="num_tokens must be finite and >= 0"):
        fast(torch.tensor(value))


@pytest.mark.parametrize("value", ["no", 1, 0, None, np.bool_(True)])
def test_what_is_returned_is_asked_for_by_a_flag(value):
    for function, name in ((call, "return_stats"), (logits_call, "return_stats"), (logprobs_call, "return_entropy")):
        refused(function, name, {name: value}, "True or False")
    refused(lambda **keywords: LinearCrossEntropyLoss(**keywords), "return_stats", {"return_stats": value}, "True or")


@pytest.mark.parametrize("name", ["weigth", "bias", "size_average"])
def test_unknown_keyword(name):
    for function in (call, logits_call, logprobs_call):
        with pytest.raises(TypeError, match=name):
            function(**{name: None})
    with pytest.raises(TypeError, match=name):
        LinearCrossEntropyLoss(**{name: None})(*GOOD.values())


def test_options_are_frozen():
    options = ChunkOptions(chunk_size=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.chunk_size = 5
    assert dataclasses.replace(options, chunk_size=5) == ChunkOptions(chunk_size=5)
    assert hash(options) == hash(ChunkOptions(chunk_size=4))


def test_defaults_of_the_options():
    options = ChunkOptions()
    assert (options.chunk_size, options.gradients, options.backend) == ("auto", "auto", "auto")
    assert options.accumulate_dtype == torch.float32
    assert options.gradient_filter is None
    assert options.ignored == "auto"


def test_positions_of_the_options():
    """The contract's order."""
    options = ChunkOptions("auto", None, "auto", torch.float32, torch.float32, "mask", None, "torch")
    assert options == ChunkOptions(logits_dtype=torch.float32, ignored="mask", backend="torch")


# --- targets out of range ---


@pytest.mark.parametrize(("reduction", "way"), [*REDUCTIONS_AND_WAYS, *((r, "auto") for r in REDUCTIONS)])
@pytest.mark.parametrize("value", [V, V + 1, -1, -2, -101, 10**12, -(10**12)])
@pytest.mark.parametrize("position", [0, 3, N - 1])
def test_target_out_of_range(position, value, reduction, way):
    """peers 5: Liger returns a finite loss for a target outside the vocabulary."""
    target = torch.arange(N)
    target[position] = value
    message = rf"\b{position}\b.*(?<!\d){value}\b|(?<!\d){value}\b.*\b{position}\b"
    with pytest.raises(IndexError, match=message):
        call(target=target, reduction=reduction, options=chunks(2, way))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("value", [V, -1, 10**12])
@pytest.mark.parametrize("function", [call, logits_call, logprobs_call])
def test_target_out_of_range_in_every_function(function, value, trained):
    """peers 5: with a gradient wanted or not."""
    target = torch.arange(N)
    target[4] = value
    name = "logits" if function is logits_call else "input"
    tensor = torch.randn(N, V if name == "logits" else D, requires_grad=trained)
    with pytest.raises(IndexError, match=rf"\b4\b.*{value}|{value}.*\b4\b"):
        function(**{name: tensor, "target": target})


@pytest.mark.parametrize("way", WAYS)
def test_default_ignore_index_is_out_of_range_once_another_is_chosen(way):
    """peers 5: -100 under `ignore_index=0` is a mistake of the caller's."""
    target = torch.tensor([0, 1, -100, 2, 0, 0])
    with pytest.raises(IndexError, match=r"-100"):
        call(target=target, ignore_index=0, options=chunks(2, way))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacrev])
def test_target_out_of_range_under_a_transform(transform):
    """peers 5: whatever path a transform takes, it never gives a finite number."""
    target = torch.arange(N)
    target[4] = V
    x = torch.randn(2, N, D) if transform is torch.func.vmap else GOOD["input"]
    with pytest.raises((IndexError, RuntimeError)):
        transform(lambda hidden: call(input=hidden, target=target))(x)


@pytest.mark.parametrize("name", ["weight", "token_weight"])
def test_weights_are_constants_or_differentiated(name):
    """A weight that wants a gradient gets it, or is refused: never left without one in silence."""
    weights = torch.ones(V if name == "weight" else N, requires_grad=True)
    try:
        value = call(reduction="sum", **{name: weights})
    except Refusal as error:
        assert name in str(error)
    else:
        assert torch.autograd.grad(value, weights)[0].any()


def test_target_out_of_range_of_a_batch():
    target = torch.zeros(2, 3, dtype=torch.int32)
    target[1, 2] = 77
    with pytest.raises(IndexError, match="77") as caught:
        call(input=torch.randn(2, 3, D), target=target)
    assert re.search(r"\b5\b|1, 2", str(caught.value))


def test_target_out_of_range_of_one_token():
    with pytest.raises(IndexError, match="77"):
        call(input=torch.randn(D), target=torch.tensor(77))


def test_target_out_of_range_among_ignored():
    """The position is the caller's, not the one among the tokens that count."""
    target = torch.full((N,), -100)
    target[4] = 50
    with pytest.raises(IndexError, match=r"\b4\b.*50|50.*\b4\b"):
        call(target=target)


def test_the_function_works_after_an_error():
    expected = call()
    for changes in ({"target": torch.full((N,), V)}, {"softcap": -1.0}, {"target": None}):
        with pytest.raises((*Refusal, IndexError)):
            call(**changes)
    assert torch.equal(call(), expected)
