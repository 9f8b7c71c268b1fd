"""The kernels of the one-pass way compiled to machine code of NVIDIA GPUs, and the product that takes exponentials:
accesses, registers, no spills."""

import re
import subprocess

import pytest
import torch

triton = pytest.importorskip("triton")

from chunked_ce.rows import triton_exponentials as kernels  # noqa: E402
from chunked_ce.rows import triton_product  # noqa: E402
from chunked_ce.rows.exponentials import ScaledExponentials  # noqa: E402
from chunked_ce.rows.statistics import NOTHING, Logits, PerRow  # noqa: E402
from tests.engine.test_triton_compiles import launches, toolchain  # noqa: E402, F401

CAPABILITIES = (80, 90, 100)
OLDEST_TRITON = triton.__version__.startswith("3.6.")  # which spills 16 numbers of the product on sm_90


def resources(program, tmp_path):
    """Registers of a thread, and bytes of its memory that hold what registers do not."""
    file = tmp_path / "program.cubin"
    file.write_bytes(program.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said).groups()
    return int(registers), int(stack) + int(local)


def exponentiate(vocab, dtype=torch.bfloat16, *, n=3, per_row=NOTHING, width=None):
    products = torch.zeros(n, width or vocab, dtype=dtype)[:, :vocab]
    out = products if dtype == torch.bfloat16 else torch.zeros_like(products, dtype=torch.bfloat16)
    kernels.exponentials(products, torch.zeros(n, dtype=torch.int64), Logits(0.7), out, per_row=per_row)


def add(*, n=3, vocab=512, width=256, total=torch.float32):
    values, x = torch.zeros(n, vocab, dtype=torch.bfloat16), torch.zeros(n, width, dtype=torch.bfloat16)
    ones = torch.ones(n)
    scaled = ScaledExponentials(values, torch.zeros(n, dtype=torch.int64), ones, ones, ones.bfloat16())
    kernels.add_targets_(torch.zeros(vocab, width, dtype=total), scaled, x, x)
    kernels.add_columns_(torch.zeros(vocab), scaled)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_registers(capability, tmp_path):
    with launches(capability) as programs:
        exponentiate(128256)
        exponentiate(128256, torch.float32)
        exponentiate(128256, per_row=PerRow(torch.ones(3)))
        exponentiate(50257, width=50272)
        add()
        add(total=torch.bfloat16)
    assert [program.metadata.target.arch for program in programs] == [capability] * 8
    for program in programs:
        registers, spilled = resources(program, tmp_path)
        assert registers <= 80 and spilled == 0
        text = program.asm["ptx"]
        assert not re.search(r"\b(atom|red)\.", text)


@pytest.mark.parametrize("vocab", [50257, 128256, 300])
def test_wide_accesses_whatever_the_vocabulary(vocab):
    """Rows begin at multiples of 16; only the last block of a row, of which some columns are masked, may be narrow."""
    with launches() as programs:
        exponentiate(vocab, width=vocab + -vocab % 16)
    text = programs[0].asm["ptx"]
    assert len(re.findall(r"ld\.global[\w.:]*\.v4", text)) >= 2 and re.search(r"st\.global[\w.:]*\.v4", text)


def test_other_sizes():
    """A number that is 1 is a constant of the kernel; rows may begin anywhere."""
    with launches() as programs:
        for vocab in (1, 17, 5000):
            exponentiate(vocab, n=1)
            add(n=1, vocab=vocab, width=max(1, vocab // 16))
    assert all(program.asm["cubin"] for program in programs)


def test_chunks_share_a_program():
    with launches() as programs:
        for n in (2, 16, 1000):
            exponentiate(512, n=n)
            add(n=n)
    assert len(programs) == 9 and len(programs.distinct()) == 3


@pytest.mark.parametrize("terms", ["all terms", pytest.param("plain", marks=pytest.mark.thorough)])
@pytest.mark.parametrize(("capability", "multiply"), [(90, "wgmma.mma_async"), (100, "tcgen05.mma")])
def test_the_product(capability, multiply, terms, tmp_path):
    """Tensor cores fed by TMA, no spills, and no more shared memory than a multiprocessor gives to a program."""
    n, hidden, vocab = 256, 2304, 1024
    x, weight = torch.zeros(n, hidden, dtype=torch.bfloat16), torch.zeros(vocab, hidden, dtype=torch.bfloat16)
    column, out = torch.zeros(n, dtype=torch.int64), torch.zeros(n, vocab, dtype=torch.bfloat16)
    bias, per_row = torch.zeros(vocab, dtype=torch.bfloat16), PerRow(torch.ones(n))
    if terms == "plain":
        bias, per_row = None, NOTHING
    with launches(capability) as programs:
        triton_product.product_exponentials(x, weight, bias, column, Logits(), out, per_row=per_row)
    named = [program for program in programs if program.metadata.name in ("product_kernel", "repeat_kernel")]
    assert len(named) == 2
    for program in programs:
        assert resources(program, tmp_path)[1] <= (64 if OLDEST_TRITON else 0)
        assert not re.search(r"\b(atom|red)\.", program.asm["ptx"])
    for program in named:
        text = program.asm["ptx"]
        assert multiply in text and text.count("cp.async.bulk.tensor") >= 3
        assert program.metadata.shared <= 227 * 1024


def test_chunks_share_a_product():
    weight = torch.zeros(512, 64, dtype=torch.bfloat16)
    with launches() as programs:
        for n in (2, 16, 1000):
            x, out = torch.zeros(n, 64, dtype=torch.bfloat16), torch.zeros(n, 512, dtype=torch.bfloat16)
            column = torch.zeros(n, dtype=torch.int64)
            triton_product.product_exponentials(x, weight, None, column, Logits(), out, per_row=NOTHING)
    assert len(programs) == 15 and len(programs.distinct()) == 4
