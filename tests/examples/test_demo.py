import os

import demo
import pytest
from common import comparison

from tests.examples.commands import EXAMPLES, run


def metrics(loss: float, seconds: float, mebibytes: int) -> list[dict]:
    record = {"tokens": 100, "seconds": seconds, "peak_memory_bytes": mebibytes * 2**20}
    warm_up = [record | {"loss": loss, "seconds": 9.0}] * comparison.WARM_UP
    return [*warm_up, record | {"loss": loss - 1.0}, record | {"loss": loss - 2.0}]


def test_table_and_plot(tmp_path):
    pair = comparison.Pair(comparison.Run(metrics(11.5, 1.0, 300)), comparison.Run(metrics(11.5078125, 2.5, 3000)))
    lines = [line.split() for line in pair.table().splitlines()]
    assert ["5", "9.5000", "9.5078", "-7.8e-03"] in lines
    assert ["largest", "difference", "of", "a", "loss:", "7.8e-03"] in lines
    assert ["peak", "memory,", "MiB", "300", "3,000", "0.10"] in lines
    assert ["time", "per", "step,", "s", "1.00", "2.50", "0.40"] in lines
    assert ["tokens", "per", "second", "100", "40", "2.50"] in lines
    for pairs in ({"Loss": pair}, {"KL": pair, "Top-K": pair}):
        path = tmp_path / f"{len(pairs)}.png"
        comparison.plot(pairs, path)
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("precision", "enabled"), [("bf16", True), ("fp32", False)])
def test_configuration(precision, enabled):
    config = comparison.ds_config(precision, micro_batch=2)
    assert config["bf16"]["enabled"] is enabled
    assert config["train_micro_batch_size_per_gpu"] == 2
    explanation = demo.explanation(config, ranks=2, steps=24)
    assert f"24 steps on 2 ranks (CPU, {len(os.sched_getaffinity(0))} cores), {precision}, ZeRO 2" in explanation
    assert "1,024 tokens; its logits over 131,072 words fill 512 MiB" in explanation


def test_peak_memory(tmp_path):
    """In a process of its own: what other tests have freed may be resident still, and is then not counted again."""
    code = """
import torch
from common.peak_memory import PeakMemory
memory = PeakMemory()
block = torch.ones(2**26, device="cuda" if memory.cuda else "cpu")  # 256 MiB
del block
print(memory.bytes())
"""
    script = tmp_path / "peak.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(EXAMPLES)!r}){code}")
    # Linux counts resident pages per processor and adds them up now and then.
    assert 255 * 2**20 <= int(run(script, log=tmp_path / "log").split()[-1]) < 300 * 2**20
