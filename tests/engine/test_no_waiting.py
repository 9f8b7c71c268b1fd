"""On an accelerator the host never waits for a number, once it knows which tokens count: checked without one.

Tensors on the meta device, which hold no data, take the ways of an accelerator, and raise where a value, a boolean or a
shape that depends on data is asked of them. Copies between host and device raise on top. The targets are on the host,
or the call has the places of the tokens that count, or masks the others; `test_ignored_tokens.py` shows the one wait
where they are not. `test_cuda.py` asks a real device.
"""

from types import SimpleNamespace

import pytest
import torch
import torch._dynamo  # first: it keeps the functions of torch that it finds, which a test below replaces
from torch.utils._python_dispatch import TorchDispatchMode

from chunked_ce import cross_entropy, devices, linear_cross_entropy, linear_logprobs
from chunked_ce.engine import loss_operator, sweep
from chunked_ce.engine.call import Call
from chunked_ce.engine.counted_tokens import Places
from chunked_ce.engine.specification import Specification
from chunked_ce.objectives import CrossEntropy
from chunked_ce.plan import Settings
from chunked_ce.rows.statistics import Logits, RowStatistics, names_of
from tests.cases import REDUCTIONS_AND_WAYS, chunks

N, D, V = 24, 8, 40
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("torch", "triton")
ODD = torch.arange(1, N, 2)  # the tokens that are ignored


class Transfers(TorchDispatchMode):
    """Raises where a tensor is copied between host and device and the host waits for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
            device = kwargs.get("device") or args[0].device
            waits = torch.device(device).type != source.device.type and not kwargs.get("non_blocking")
            assert not waits, f"{func} from {source.device} to {device}"
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def on_meta(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # torch has no autocast for it
    addmm = torch.addmm

    def with_out_dtype(total, *factors, out=None, **wide):  # which torch 2.11 has not for it
        return torch.mm(*factors, out=out, **wide) if wide else addmm(total, *factors, out=out)

    monkeypatch.setattr(torch, "addmm", with_out_dtype)
    with Transfers():
        yield


def tensors(dtype, *, trained=False, device="meta"):
    def new(*shape):
        return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=trained)

    target = torch.zeros(N, dtype=torch.int64).index_fill_(0, ODD, -100)
    return new(N, D), new(V, D), new(V), target.to(device, non_blocking=True)


def test_what_is_noticed():
    value = torch.zeros(3, device="meta")
    for wait in (
        lambda: bool(value[0] == 1),
        lambda: value.sum().item(),
        lambda: value[value > 0],
        lambda: value.nonzero(),
        lambda: value.cpu(),
        lambda: torch.zeros(()).to("meta"),
    ):
        with pytest.raises((RuntimeError, AssertionError, NotImplementedError)):
            wait()


@pytest.mark.parametrize("targets", ["meta", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_linear_cross_entropy(reduction, way, dtype, targets):
    hidden, head, bias, target = tensors(dtype, trained=True, device=targets)
    weights = {"weight": torch.empty(V, device="meta"), "token_weight": torch.empty(N, device="meta")}
    maths = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.5, "reduction": reduction}
    for number in (None, 7, torch.ones((), device="meta")):
        value, _ = linear_cross_entropy(
            hidden,
            head,
            target,
            linear_bias=bias,
            num_tokens=number,
            options=chunks(5, way),
            return_stats=True,
            **maths,
            **weights,
        )
        value.sum().backward()
    assert [x.grad.device.type for x in (hidden, head, bias)] == ["meta"] * 3


@pytest.mark.parametrize("targets", ["meta", "cpu"])
def test_cross_entropy_and_logprobs(targets):
    hidden, head, _, target = tensors(torch.bfloat16, trained=True, device=targets)
    scores = torch.empty(N, V, device="meta", requires_grad=True)
    cross_entropy(scores, target, label_smoothing=0.1, num_tokens=7).backward()
    torch.stack(linear_logprobs(hidden, head, target, return_entropy=True)).sum().backward()
    assert scores.grad is not None and head.grad is not None


@pytest.fixture
def launches(monkeypatch):
    """Kernels that are launched but do nothing, and sums in the product."""
    pytest.importorskip("triton")
    from chunked_ce.rows import backend, triton_filter, triton_rows

    class Launches(list):
        def kernel(self, name):
            return Kernel(name)

    seen = Launches()

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **keywords: seen.append(self.name)

    for module in (triton_rows, triton_filter):
        names = [name for name in vars(module.kernels) if name.endswith("_kernel")]
        monkeypatch.setattr(module, "kernels", SimpleNamespace(**{name: Kernel(name) for name in names}))
    monkeypatch.setattr(backend, "why_not_triton", lambda device, dtype: None)
    monkeypatch.setattr(devices, "adds_in_product", lambda device_type, total, factor: total != factor)
    return seen


@pytest.mark.parametrize("ignored", ["drop", "mask", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_chunk_loops(dtype, backend, ignored, launches):
    """What the operators run: operators themselves are opaque to fake tensors."""
    hidden, weight, bias, target = tensors(dtype)
    names = names_of(("weighted", "mean", "correct"))
    settings = Settings(dtype, chunk_size=5, backend=backend, ignored=ignored)
    parts = "hidden", "weight", "bias"
    whole = Specification("head", names, Logits(0.5, 3.0), settings, parts=parts, needed=(True,) * 3)
    forward = whole._replace(objective=CrossEntropy(0.1, 0.1))
    call = Call((hidden, weight, bias), torch.empty(V, device="meta"), target, -100, forward)
    places = Places.at(torch.arange(0, N, 2), target.device)
    coefficient = torch.empty(N, dtype=torch.float64, device="meta")
    call = call.with_per_token({"_coefficient": coefficient})
    call = call.with_places(places) if ignored == "drop" else call
    loss, grads, _, _ = sweep.loss_and_gradients(call)
    assert loss.shape == () and [g.dtype for g in grads] == [torch.float32] * 3
    call = call.with_per_token({}, objective=None)
    known = sweep.statistics(call)
    slopes = RowStatistics(None, *(torch.empty(N, device="meta") for _ in range(4)))
    grads = sweep.gradients(call, known, slopes)
    assert all(grad.device.type == "meta" for grad in grads)
    scores = torch.empty(N, V, dtype=dtype, device="meta")
    call = call._replace(tensors=(scores,)).with_per_token({}, source="logits", parts=("logits",), needed=())
    known = sweep.statistics(call)
    assert sweep.gradients(call, known, slopes)[0].shape == scores.shape
    assert (set(launches) >= {"statistics_kernel", "gradients_kernel"}) == (backend == "triton")


ROWS = ["statistics_kernel", "gradients_and_columns_kernel"]
CHOSEN = ["compact_kernel", "tail_columns_kernel", "tail_rows_kernel", "wait"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("numbers", "after"),
    [((3, 0, 1), ["head_rows_kernel"]), ((0, 1, 1), []), ((3, 0, 0), [])],
    ids=["filtered", "dense", "dense for one token"],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_filter_waits_once_per_chunk(smoothing, numbers, after, dtype, launches, monkeypatch):
    """The one wait is for a chunk's numbers, while the device multiplies the head by the tail: what comes before it is
    launched without them."""

    def wait():
        launches.append("wait")
        return torch.tensor(numbers)

    monkeypatch.setattr(devices, "start_reading", lambda values: wait)
    settings = Settings(dtype, chunk_size=5, backend="triton", gradient_filter=1e-3, ignored="mask")
    names = names_of(("weighted",) if smoothing else ())
    whole = Specification("head", names, Logits(), settings, parts=("hidden", "weight", "bias"), needed=(True,) * 3)
    hidden, weight, bias, target = tensors(dtype)
    call = Call((hidden, weight, bias), None, target, -100, whole._replace(objective=CrossEntropy(smoothing)))
    coefficient = torch.empty(N, dtype=torch.float64, device="meta")
    _, (_, head, _), _, _ = sweep.loss_and_gradients(call.with_per_token({"_coefficient": coefficient}))
    scaled = ["scale_kernel"] * launches.count("scale_kernel")
    of_sums = "scale_kernel", "finish_kernel"  # of fp16, and of more rows than half of so small a vocabulary
    found = [name for name in launches if name not in of_sums]
    chunk = ROWS + CHOSEN + after
    assert found == chunk * 5
    assert (dtype == torch.float16) == bool(scaled)
    launches.clear()
    gradient = loss_operator._rescaled(head, torch.ones((), device="meta"), dtype, "triton")
    assert (gradient.shape, gradient.dtype) == ((V, D), dtype)
    assert launches == (["finish_kernel"] if after or smoothing else ["scale_kernel"])


def test_one_pass(launches, monkeypatch):
    """The one-pass way of a single chunk in bf16 and of several, with a bias: it launches its own kernels."""
    from chunked_ce.rows import triton_exponentials

    names = "exponentials_kernel", "targets_kernel", "columns_kernel"
    for name in names:
        monkeypatch.setattr(triton_exponentials, name, launches.kernel(name))
    hidden, weight, bias, target = tensors(torch.bfloat16)
    coefficient = torch.empty(N, dtype=torch.float64, device="meta")
    for size in (N, 5):
        settings = Settings(torch.bfloat16, chunk_size=size, backend="triton", ignored="mask")
        needed = {"parts": ("hidden", "weight", "bias"), "needed": (True,) * 3, "objective": CrossEntropy()}
        whole = Specification("head", names_of(()), Logits(0.5), settings, **needed)
        call = Call((hidden, weight, bias), None, target, -100, whole)
        launches.clear()
        _, grads, _, _ = sweep.loss_and_gradients(call.with_per_token({"_coefficient": coefficient}))
        assert grads[1].dtype == (torch.bfloat16 if size == N else torch.float32)
        assert launches == list(names) * -(-N // size)


def test_saved_gradients(launches):
    """The kernel that scales a gradient gets the factor from the device."""
    total, ratio = torch.empty(V, D, device="meta"), torch.empty((), device="meta")
    for backend in BACKENDS:
        assert loss_operator._rescaled(total, ratio, torch.bfloat16, backend).dtype == torch.bfloat16
    assert launches == ["scale_kernel"]
