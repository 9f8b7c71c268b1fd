"""The vocabulary sharded over two ranks, or the sequences: the same training."""

import re
from math import log2

import pytest

from tests.examples.commands import EXAMPLES, TINY, TORCHRUN, Command, run

SCRIPT = EXAMPLES / "vocab_parallel.py"
WORDS, SEQUENCES, STEPS = 131_072, 4, 3

# Sums in fp32, over the words and over the tokens, in another order: each level of a tree of sums rounds once.
# Against that, a mean of two ranks' means changes the gradient's norm by 2e-3, a sum in its place by 1.
ROUNDING = (log2(WORDS) + log2(SEQUENCES * 32)) * 2**-24


def steps(printed: str) -> list[float]:
    """Loss and gradient norm of one step after another."""
    found = re.findall(r"^step +\d+  loss (\S+)  gradient (\S+) .* tokens/s$", printed, re.MULTILINE)
    return [float(number) for pair in found for number in pair]


def held(printed: str) -> list[tuple[int, int]]:
    """The rows of the head on each rank, each rank having told its peak memory."""
    found = re.findall(r"head rows +(\S+) to +(\S+), training took +[1-9]\d* MiB", printed)
    return [(int(start.replace(",", "")), int(stop.replace(",", ""))) for start, stop in found]


def test_is_short():
    assert len(SCRIPT.read_text().splitlines()) <= 130


@pytest.mark.thorough
def test_losses_do_not_depend_on_the_sharding(tmp_path, text):
    tiny = [*TINY, f"--steps={STEPS}", f"--batch={SEQUENCES}", "--text", text]
    data = run(*TORCHRUN, SCRIPT, *tiny, log=tmp_path / "data")
    tensor = run(*TORCHRUN, SCRIPT, *tiny, "--tensor-parallel=2", log=tmp_path / "tensor")

    assert len(steps(data)) == 2 * STEPS
    assert steps(tensor) == pytest.approx(steps(data), rel=ROUNDING, abs=5e-7)  # six digits are printed
    assert held(data) == [(0, WORDS)] * 2
    assert held(tensor) == [(0, WORDS // 2), (WORDS // 2, WORDS)]


def test_bad_options_end_every_rank(tmp_path):
    log = tmp_path / "log"
    with Command(*TORCHRUN, SCRIPT, "--tensor-parallel=3", log=log) as command:
        assert command.status() != 0
    printed = log.read_text()
    said = [line for line in printed.splitlines() if line.startswith("vocab_parallel: ")]
    refused = "ranks must be a multiple of --tensor-parallel, got 2 and 3"
    assert said == [f"vocab_parallel: {refused} (--help lists the options)"]
