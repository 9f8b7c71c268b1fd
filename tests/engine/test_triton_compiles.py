"""The kernels compiled ahead of time to machine code of NVIDIA GPUs, which needs no GPU."""

import itertools
import re

import pytest
import torch

triton = pytest.importorskip("triton")

from chunked_ce.engine import triton_kernels as kernels  # noqa: E402
from chunked_ce.engine.kernels import INTERPRETED  # noqa: E402

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
ROWS = ("row_maximum", "row_log_sum", "log_sum_slope", "target_slope")
OPTIONAL = ("class_weight", "row_mean", "weighted_slope", "mean_slope")
ALIGNED = ("products", "out", "source", "row_stride", "out_row_stride", "vocab_size", "size")


def compiled(kernel, dtype, capability, *, warps=8, **given):
    """The kernel for aligned tensors in ``dtype``, as a launch on a GPU would compile it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"products": TYPES[dtype], "out": TYPES[dtype], "source": TYPES[dtype], "target": "*i64", "here": "*u8"}
    types |= dict.fromkeys((*ROWS, "found", "factor", "largest_of_column", "total_of_column"), "*fp32")
    types |= dict.fromkeys((*OPTIONAL, "here", "softcap"), None) | {"scale": "fp32"}
    types |= {"column_stride": 1, "out_column_stride": 1, "BLOCK": 4096} | given
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        kind = types.get(name, "i32")
        signature[name] = kind if isinstance(kind, str) else "constexpr"
        if not isinstance(kind, str):
            constants[(place,)] = kind
        elif name in ALIGNED:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


@pytest.fixture(autouse=True)
def toolchain(monkeypatch, tmp_path):
    if INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    try:
        from triton import knobs

        assert knobs.nvidia.ptxas.path
    except Exception as error:
        pytest.skip(f"Triton comes without NVIDIA's assembler here: {error}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def assert_runs_well(program, *, loads, stores):
    """Machine code, 128-bit accesses to aligned rows, no atomics."""
    assert len(program.asm["cubin"]) > 1000
    text = program.asm["ptx"]
    assert bool(re.search(r"ld\.global[\w.:]*\.v4", text)) == loads
    assert bool(re.search(r"st\.global[\w.:]*\.v4", text)) == stores
    assert not re.search(r"\b(atom|red)\.", text)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, "fp32"])
def test_statistics(dtype, softcap):
    plain = {"softcap": softcap, "SHARD": False, "WEIGHTED": False, "MEAN": False, "CORRECT": False}
    assert_runs_well(compiled(kernels.statistics_kernel, dtype, 90, **plain), loads=True, stores=False)


def test_statistics_with_everything():
    given = {"class_weight": "*fp32", "WEIGHTED": True, "MEAN": True, "CORRECT": True, "softcap": "fp32"}
    for shard in ({"SHARD": False}, {"SHARD": True, "here": "*u8"}):
        assert_runs_well(
            compiled(kernels.statistics_kernel, torch.bfloat16, 80, **given, **shard), loads=True, stores=False
        )


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gradients(dtype):
    for softcap, optional in itertools.product((None, "fp32"), (None, "*fp32")):
        given = dict.fromkeys(OPTIONAL, optional)
        program = compiled(kernels.gradients_kernel, dtype, 90, softcap=softcap, **given)
        assert_runs_well(program, loads=True, stores=True)


def test_gradients_and_columns():
    given = {"ROWS": 32, "BLOCK": 128, "warps": 4} | dict.fromkeys(OPTIONAL, "*fp32")
    for dtype in (torch.bfloat16, torch.float32):
        program = compiled(kernels.gradients_and_columns_kernel, dtype, 90, softcap="fp32", **given)
        assert_runs_well(program, loads=True, stores=True)


def test_scale():
    for in_place in (False, True):
        assert_runs_well(compiled(kernels.scale_kernel, torch.float32, 90, IN_PLACE=in_place), loads=True, stores=True)


@pytest.mark.parametrize("capability", [80, 100])
def test_other_devices(capability):
    assert compiled(kernels.gradients_kernel, torch.bfloat16, capability).asm["cubin"]


def test_the_smallest_shapes():
    """A number that is 1 is a constant of the kernel, and None an argument that is not there."""
    ones = dict.fromkeys(("vocab_size", "row_stride", "out_row_stride", "size"), 1) | {"BLOCK": 128, "warps": 1}
    plain = {"SHARD": False, "WEIGHTED": True, "MEAN": True, "CORRECT": True}
    assert compiled(kernels.statistics_kernel, torch.bfloat16, 90, **plain, **ones).asm["cubin"]
    assert compiled(kernels.gradients_kernel, torch.bfloat16, 90, **ones).asm["cubin"]
    assert compiled(kernels.gradients_and_columns_kernel, torch.bfloat16, 90, ROWS=32, **ones).asm["cubin"]
    assert compiled(kernels.scale_kernel, torch.bfloat16, 90, IN_PLACE=True, **ones).asm["cubin"]


def test_strides_beyond_31_bits():
    wide = {"row_stride": "i64", "out_row_stride": "i64"}
    plain = {"SHARD": False, "WEIGHTED": False, "MEAN": False, "CORRECT": False}
    assert compiled(kernels.statistics_kernel, torch.bfloat16, 90, row_stride="i64", **plain).asm["cubin"]
    assert compiled(kernels.gradients_kernel, torch.bfloat16, 90, **wide).asm["cubin"]


def test_offsets_are_64_bit():
    """A row number times a stride is formed in 64 bits before it meets the pointer."""
    program = compiled(kernels.gradients_kernel, torch.bfloat16, 90)
    text = program.asm["ttir"]
    for stride in ("row_stride", "out_row_stride"):
        wide = re.search(rf"(%\S+) = arith\.extsi %{stride} : i32 to i64", text)
        assert wide and re.search(rf"arith\.muli %\S+, {wide[1]} : i64", text)
        assert not re.search(rf"arith\.muli .*%{stride}\b.* : i32", text)
