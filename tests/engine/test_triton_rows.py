"""The Triton kernels in Triton's interpreter, which has to be switched on before triton is imported."""

import collections
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chunked_ce import ChunkOptions, cross_entropy, linear_logprobs
from chunked_ce.plan import predict_memory
from chunked_ce.rows import backend as kernels
from chunked_ce.rows import torch_rows as rows
from tests.cases import problem

pytest.importorskip("triton")


FOLDER = Path(__file__).parent


def interpreted(files, chosen="not thorough"):
    """How many of the ``chosen`` tests of each of ``files`` pass, in one process for all of them."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    options = ["-q", "-x", "-rps", "-p", "no:cacheprovider", "-W", "ignore", "-o", "timeout=0", "-m", chosen]
    command = [sys.executable, "-m", "pytest", *options, *(str(FOLDER / file) for file in files)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    passed = re.compile(r"^PASSED \S*/(\w+\.py)::.*\n", flags=re.MULTILINE)
    said = passed.sub("", result.stdout)[-8000:] + result.stderr[-2000:]
    assert result.returncode == 0 and "skipped" not in said, said
    return collections.Counter(passed.findall(result.stdout))


@pytest.mark.timeout(2000)
def test_in_the_interpreter():
    least = {
        "kernel_cases.py": 45,
        "backend_cases.py": 50,
        "filter_cases.py": 55,
        "exponential_cases.py": 30,
        "product_cases.py": 14,
    }
    passed = interpreted(least)
    assert all(passed[file] >= number for file, number in least.items()), passed


@pytest.mark.thorough
@pytest.mark.timeout(2000)
def test_more_in_the_interpreter():
    files = {"kernel_cases.py", "backend_cases.py", "filter_cases.py"}
    assert interpreted(files, "thorough").keys() == files


@pytest.mark.parametrize(("dtype", "reason"), [(torch.float32, "not on 'cpu'"), (torch.float64, "torch.float64")])
def test_where_triton_cannot_run(dtype, reason):
    case = problem(4, 3, 5, dtype=dtype)
    options = ChunkOptions(backend="triton")
    for call in (
        lambda: case.loss(options=options),
        lambda: linear_logprobs(case.hidden, case.head, case.target, options=options),
        lambda: cross_entropy(case.hidden, case.target.clamp(max=2), options=options),
    ):
        with pytest.raises(ValueError, match=rf"options\.backend='triton' cannot run here: .*{reason}"):
            call()
    assert case.loss(options=ChunkOptions(backend="auto")).isfinite()


def test_where_triton_cannot_run_compiled():
    case = problem(4, 3, 5)
    step = torch.compile(lambda: case.loss(options=ChunkOptions(backend="triton")), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"options\.backend='triton' cannot run here"):
        step()


def test_a_broken_installation(monkeypatch):
    """What importing triton raises is the reason given; "auto" falls back to torch."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(kernels, "_import_error", kernels._import_error.__wrapped__)
    device = torch.device("cuda")
    assert "cannot be imported" in kernels.why_not_triton(device, torch.float32)
    assert kernels.row_kernels("auto", device, torch.float32) is rows


def test_auto_on_cuda():
    """auto takes Triton for the dtypes that it has."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert kernels.row_kernels("auto", torch.device("cuda"), dtype).__name__.endswith("triton_rows")
        assert kernels.row_kernels("torch", torch.device("cuda"), dtype) is rows
    assert kernels.row_kernels("auto", torch.device("cuda"), torch.float64) is rows
    assert kernels.row_kernels("auto", torch.device("cpu"), torch.float32) is rows


def test_memory_law():
    """On CUDA nothing of a row but its statistics is kept, and no product waits to be added to a sum."""
    shape = {"num_tokens": 8192, "vocab_size": 131072, "hidden_size": 512, "dtype": torch.bfloat16}
    options = ChunkOptions(chunk_size=512)
    law = predict_memory(**shape, options=options, device_type="cuda").forward
    assert law["rows"] == law["products"] == 0
    in_torch = predict_memory(**shape, options=ChunkOptions(512, backend="torch"), device_type="cuda").forward
    assert in_torch == law | {"rows": in_torch["rows"]} and in_torch["rows"] > 0
