"""Every launch compiled to machine code of NVIDIA GPUs, which needs no GPU: only the launch itself is left out."""

import ast
import contextlib
import itertools
import re
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from chunked_ce import devices  # noqa: E402
from chunked_ce.rows import triton_rows  # noqa: E402
from chunked_ce.rows.backend import INTERPRETED  # noqa: E402
from chunked_ce.rows.columns import ColumnSums  # noqa: E402
from chunked_ce.rows.statistics import Logits, RowStatistics, names_of  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW_DTYPES = [*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.thorough)]
CAPABILITY = 90
LOGITS = (Logits(0.7), Logits(1.0, 30.0))
PLAIN, ALL = names_of(()), names_of(("weighted", "mean", "correct"))


class Programs(list):
    """The programs of the launches, in their order."""

    def distinct(self):
        return {id(program) for program in self}


class Device:
    """What Triton asks of the device it compiles for."""

    def __init__(self, capability):
        self._target = triton.backends.compiler.GPUTarget("cuda", capability, 32)

    def get_current_device(self):
        return self._target.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self._target


@pytest.fixture(autouse=True)
def toolchain(monkeypatch, tmp_path):
    if INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    try:
        assert triton.knobs.nvidia.ptxas.path
    except Exception as error:
        pytest.skip(f"Triton comes without NVIDIA's assembler here: {error}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@contextlib.contextmanager
def launches(capability=CAPABILITY):
    """Kernels are compiled as for a launch on such a GPU, and not launched."""
    driver, run, programs = triton.runtime.driver, triton.runtime.jit.JITFunction.run, Programs()

    def compile_only(self, *args, **keywords):
        programs.append(run(self, *args, **keywords | {"warmup": True}))
        return programs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(driver), "active", Device(capability))
        patch.setattr(triton.runtime.jit.JITFunction, "run", compile_only)
        yield programs


def test_no_kernel_loops_on_a_condition():
    """Triton 3.6, the oldest that is taken, fails to compile ``while`` over a tensor of sums."""
    files = [*Path(triton_rows.__file__).parent.glob("triton_*.py")]
    assert len(files) >= 5
    for file in files:
        assert not any(isinstance(node, ast.While) for node in ast.walk(ast.parse(file.read_text()))), file.name


def find(dtype, logits=LOGITS[0], wanted=PLAIN, *, n=3, vocab=512, weighted=False, shard=False, products=None):
    """A launch of the kernel for statistics."""
    products = torch.zeros(n, vocab, dtype=dtype) if products is None else products
    target = torch.zeros(n, dtype=torch.int64)
    class_weight = torch.ones(vocab) if weighted else None
    if shard:
        triton_rows.shard_statistics(products, target, class_weight, logits, wanted, 0)
    else:
        triton_rows.statistics(products, target, class_weight, logits, wanted, overwrite=False)


def differentiate(dtype, logits=LOGITS[0], *, n=3, vocab=512, everything=False, columns=None, products=None, rows=None):
    """A launch of a kernel for gradients."""
    products = torch.zeros(n, vocab, dtype=dtype) if products is None else products
    rows = slice(None) if rows is None else rows
    parts = torch.zeros(9, n + (rows.start or 0)).unbind()
    slopes = RowStatistics(None, *(parts[:4] if everything else parts[:2]))
    known = RowStatistics(*parts[4:7], mean=parts[7])
    triton_rows.logit_gradients(
        products,
        torch.zeros(len(parts[0]), dtype=torch.int64)[rows],
        torch.ones(vocab) if everything else None,
        logits,
        slopes.at(rows),
        known.at(rows),
        products,
        columns,
    )


def logits_for(dtype):
    return LOGITS if dtype == torch.bfloat16 else LOGITS[1:]


def assert_runs_well(programs, *, stores):
    """Machine code, 128-bit accesses to rows that begin at multiples of 16, no atomics."""
    assert programs
    for program in programs:
        assert len(program.asm["cubin"]) > 1000
        text = program.asm["ptx"]
        assert re.search(r"ld\.global[\w.:]*\.v4", text)
        assert bool(re.search(r"st\.global[\w.:]*\.v4", text)) == stores
        assert not re.search(r"\b(atom|red)\.", text)


@pytest.mark.parametrize("dtype", FEW_DTYPES, ids=str)
def test_statistics(dtype):
    with launches() as programs:
        for logits in logits_for(dtype):
            find(dtype, logits)
            find(dtype, logits, ALL, weighted=True)
            find(dtype, logits, ALL, weighted=True, shard=True)
    assert len(programs) == len(programs.distinct())
    assert_runs_well(programs, stores=False)


@pytest.mark.parametrize("dtype", FEW_DTYPES, ids=str)
def test_gradients(dtype):
    with launches() as programs:
        for logits, everything in itertools.product(logits_for(dtype), (False, True)):
            differentiate(dtype, logits, everything=everything)
            columns = ColumnSums(512, torch.float32, torch.device("cpu"))
            differentiate(dtype, logits, everything=everything, columns=columns)
    assert len(programs) == len(programs.distinct())
    assert_runs_well(programs, stores=True)


def test_scale():
    source, factor = torch.zeros(64, 64), torch.ones(())
    with launches() as programs:
        triton_rows.scale_into(source, factor, source)
        triton_rows.scale_into(source, factor, torch.empty_like(source))
        triton_rows.scale_into(source, factor, torch.empty_like(source, dtype=torch.bfloat16))
    assert len(programs.distinct()) == 3
    assert_runs_well(programs, stores=True)


@pytest.mark.parametrize("capability", [80, 100])
def test_other_devices(capability):
    with launches(capability) as programs:
        find(torch.bfloat16)
        differentiate(torch.bfloat16)
    assert [program.metadata.target.arch for program in programs] == [capability] * 2
    assert_runs_well(programs[:1], stores=False)
    assert_runs_well(programs[1:], stores=True)


@pytest.mark.parametrize("vocab", [1, 17, pytest.param(300, marks=pytest.mark.thorough), 5000])
def test_other_vocabularies(vocab):
    """A number that is 1 is a constant of the kernel; rows may begin anywhere."""
    with launches() as programs:
        find(torch.bfloat16, wanted=ALL, n=1, vocab=vocab)
        differentiate(torch.bfloat16, n=1, vocab=vocab, everything=True)
        columns = ColumnSums(vocab, torch.float32, torch.device("cpu"))
        differentiate(torch.bfloat16, n=1, vocab=vocab, everything=True, columns=columns)
    assert all(program.asm["cubin"] for program in programs) and len(programs) == 3


def test_chunks_share_a_program():
    """Neither the number of tokens nor the place of the first one compiles anything anew."""
    with launches() as programs:
        for n, first in ((1, 0), (2, 5), (16, 16), (1000, 1)):
            find(torch.bfloat16, n=n)
            differentiate(torch.bfloat16, n=n, rows=slice(first, first + n))
    assert len(programs) == 8 and len(programs.distinct()) == 2


def padded(vocab):
    """Rows as the library's own: they begin at multiples of 16 elements."""
    return torch.zeros(3, devices.padded_row(vocab), dtype=torch.bfloat16)[:, :vocab]


def launch_each(logits, vocab=65536):
    """Statistics, gradients, and gradients with column sums."""
    with launches() as programs:
        find(torch.bfloat16, logits, vocab=vocab, products=padded(vocab))
        differentiate(torch.bfloat16, logits, vocab=vocab, products=padded(vocab))
        columns = ColumnSums(vocab, torch.float32, torch.device("cpu"))
        differentiate(torch.bfloat16, logits, vocab=vocab, products=padded(vocab), columns=columns)
    return [program.asm["ptx"] for program in programs]


def test_vocabularies_of_any_size():
    """Padded rows of a vocabulary that is no multiple of 16 are accessed 16 bytes at a time."""
    statistics, *gradients = launch_each(Logits(), vocab=50257)
    assert len(re.findall(r"ld\.global[\w.:]*\.b16", statistics)) == 1  # the target's logit
    for text in (statistics, *gradients):
        assert re.search(r"ld\.global[\w.:]*\.v4\.b32", text)
    for text in gradients:
        assert re.search(r"st\.global[\w.:]*\.v4\.b32", text)
        assert not re.search(r"(ld|st)\.global[\w.:]*\.b16", text)


@pytest.mark.parametrize(("softcap", "each"), [(None, 1), (30.0, 3)])
def test_few_slow_instructions(softcap, each):
    """A logit costs an exponential, with a softcap two and a reciprocal, and no division.

    The statistics have two loops, and some instructions are a row's or a group's.
    """
    copies = {"statistics": 2 * 16, "gradients": 16, "columns": 32}  # logits per thread
    for logits in (Logits(1.0, softcap), Logits(0.7, softcap)):
        for (kernel, per_thread), text in zip(copies.items(), launch_each(logits), strict=True):
            slow = len(re.findall(r"\b(ex2|lg2|rcp|tanh|sqrt|rsqrt|sin|cos)\.", text))
            assert each * per_thread <= slow <= (each + 0.3) * per_thread, kernel
            assert not re.search(r"\bdiv\.[\w.]*f32", text), kernel


def test_a_scale_of_1_is_no_multiplication():
    for without, scaled in zip(launch_each(Logits()), launch_each(Logits(0.7)), strict=True):
        fewer = len(re.findall(r"\bmul\.f32", scaled)) - len(re.findall(r"\bmul\.f32", without))
        fused = len(re.findall(r"\bfma\.rn\.f32", scaled)) - len(re.findall(r"\bfma\.rn\.f32", without))
        assert fewer + fused >= 16


def test_offsets_are_64_bit():
    """A row's number times a stride is formed in 64 bits, also where the stride alone needs them."""
    row = torch.empty(1, 512, dtype=torch.bfloat16).as_strided((1, 512), (2**31 + 16, 1))
    with launches() as programs:
        find(torch.bfloat16)
        differentiate(torch.bfloat16)
        find(torch.bfloat16, products=row, n=1)
        differentiate(torch.bfloat16, products=row, n=1)
    for program in programs[:2]:
        text = program.asm["ttir"]
        wide = re.search(r"(%\S+) = arith\.extsi %row_stride : i32 to i64", text)
        assert wide and re.search(rf"arith\.muli %\S+, {wide[1]} : i64", text)
    for program in programs[2:]:
        text = program.asm["ttir"]
        assert "%row_stride: i64" in text and re.search(r"arith\.muli %\S+, %row_stride : i64", text)
    for program in programs:
        assert not re.search(r"arith\.muli .*row_stride.* : i32", program.asm["ttir"])
