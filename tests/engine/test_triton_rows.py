"""The Triton kernels in Triton's interpreter, which has to be switched on before triton is imported."""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def interpreted(file):
    """What pytest says of ``file`` in a process of its own."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", file]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize(("file", "least"), [("kernel_cases.py", 45)])
def test_in_the_interpreter(file, least):
    said = interpreted(os.path.join(os.path.dirname(__file__), file))
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) >= least, said
    assert "skipped" not in said, said
