"""What importing the library imports: nothing that takes long and not everybody has."""

import json
import subprocess
import sys

import pytest

from chunked_ce import functional

SCRIPT = """
import json, sys, torch
loaded = [[*sys.modules]]
import chunked_ce
loaded.append([*sys.modules])
import chunked_ce.integrations.deepspeed
loaded.append([*sys.modules])
print(json.dumps(loaded))
"""


@pytest.fixture(scope="module")
def loaded() -> list[set[str]]:
    """The names of all modules after torch, after the library and after its DeepSpeed integration."""
    printed = subprocess.check_output([sys.executable, "-c", SCRIPT], text=True, timeout=900)
    return [set(names) for names in json.loads(printed)]


def test_the_package_imports_no_compiler(loaded):
    with_torch, with_ours, _ = loaded
    assert ("torch._dynamo" in with_torch) == ("torch._dynamo" in with_ours)


def test_the_package_imports_nothing_of_the_command_line(loaded):
    assert not loaded[1] & {"rich", "matplotlib", "psutil", "chunked_ce.cli"}


def test_the_integration_does_not_import_deepspeed(loaded):
    assert "deepspeed" not in loaded[2]


FUNCTIONS = ["linear_cross_entropy", "linear_divergence", "linear_logprobs", "linear_loss", "linear_statistics"]


@pytest.mark.parametrize("name", ["LossStats", "PerToken", "cross_entropy", "logits_loss", *FUNCTIONS])
def test_the_functions_are_found_in_one_module(name):
    assert name in functional.__all__ and hasattr(functional, name)
