"""The launches of the gradient filter compiled to machine code of NVIDIA GPUs, as in `test_triton_compiles.py`."""

import re

import pytest
import torch

pytest.importorskip("triton")

from chunked_ce.rows import triton_filter
from chunked_ce.rows.torch_filter import padded
from tests.engine.test_triton_compiles import DTYPES, launches, toolchain  # noqa: F401

ON = torch.zeros((), dtype=torch.int32)


def compact(dtype, *, n=40, vocab=4096, width=512, gradients=None):
    gradients = torch.zeros(n, vocab, dtype=dtype) if gradients is None else gradients
    triton_filter.compact_at(gradients, torch.zeros(vocab, dtype=torch.int32), ON, 4, width)


def tail_columns(dtype, *, n=40, num_tails=4):
    triton_filter.tail_columns_(torch.zeros(n, 512, dtype=dtype), torch.zeros(n, num_tails), ON, 8.0)


def summed_tail(dtype, *, vocab=4096, num_tails=4):
    triton_filter.summed_tail(torch.zeros(vocab, num_tails), torch.zeros(vocab, 128, dtype=dtype), ON)


def head_rows(dtype, *, vocab=4096, count=100, num_tails=4):
    place, tail = torch.zeros(vocab, dtype=torch.int32), torch.zeros(num_tails, 128)
    width = padded(count + 3 * num_tails)
    triton_filter.head_rows(torch.zeros(vocab, 128, dtype=dtype), place, tail, count, width, 8.0)


def finished(dtype, *, vocab=4096, chunks=1, factor=True, total=None):
    triton_filter.finished(
        torch.zeros(vocab, 128, dtype=dtype),
        total,
        torch.zeros(100, 128),
        torch.zeros(chunks, vocab, dtype=torch.int32),
        torch.zeros(vocab, 4 * chunks),
        torch.zeros(4 * chunks, 128),
        torch.ones(()) if factor else None,
    )


LAUNCHES = compact, tail_columns, summed_tail, head_rows, finished
WIDE_LOADS, WIDE_STORES = (compact, summed_tail, head_rows), (head_rows, finished)


def assert_runs_well(launch, program):
    """Machine code without spilled registers and atomics, 128-bit accesses to long rows."""
    text = program.asm["ptx"]
    assert len(program.asm["cubin"]) > 1000
    assert not re.search(r"\b(atom|red)\.", text)
    assert ".local" not in text
    assert launch not in WIDE_LOADS or re.search(r"ld\.global[\w.:]*\.v4|cp\.async\.cg", text)  # of 16 bytes each
    assert launch not in WIDE_STORES or re.search(r"st\.global[\w.:]*\.v[24]", text)


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: launch.__name__)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_launches(launch, capability):
    for dtype in DTYPES if capability == 90 else (torch.bfloat16,):
        with launches(capability) as programs:
            launch(dtype)
        (program,) = programs
        assert program.metadata.target.arch == capability
        assert_runs_well(launch, program)


def test_variants():
    """Five tails with label smoothing; a sum that exists, of either dtype; no upstream gradient."""
    with launches() as programs:
        tail_columns(torch.bfloat16, num_tails=5)
        summed_tail(torch.bfloat16, num_tails=5)
        head_rows(torch.bfloat16, num_tails=5)
        finished(torch.bfloat16, total=torch.zeros(4096, 128))
        finished(torch.bfloat16, total=torch.zeros(4096, 128, dtype=torch.bfloat16), factor=False)
    assert len(programs.distinct()) == 5
    assert all(program.asm["cubin"] for program in programs)


def test_chunks_share_a_program():
    """Neither the tokens of a chunk, nor the columns that it keeps, nor the number of chunks compiles anything anew."""
    with launches() as programs:
        for n, width, count, chunks in ((1, 64, 0, 1), (16, 128, 1, 2), (1000, 1024, 52, 16)):
            compact(torch.bfloat16, n=n, width=width)
            tail_columns(torch.bfloat16, n=n)
            head_rows(torch.bfloat16, count=count)
            finished(torch.bfloat16, chunks=chunks)
    assert len(programs) == 12 and len(programs.distinct()) == 4


def test_offsets_are_64_bit():
    row = torch.empty(1, 4096, dtype=torch.bfloat16).as_strided((1, 4096), (2**31 + 16, 1))
    with launches() as programs:
        compact(torch.bfloat16)
        compact(torch.bfloat16, gradients=row)
    assert re.search(r"arith\.extsi %row_stride : i32 to i64", programs[0].asm["ttir"])
    assert "%row_stride: i64" in programs[1].asm["ttir"]
    for program in programs:
        assert not re.search(r"arith\.muli .*row_stride.* : i32", program.asm["ttir"])
