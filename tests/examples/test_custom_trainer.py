import re

import pytest

from tests.examples.commands import EXAMPLES, TORCHRUN, run

SCRIPT = EXAMPLES / "custom_trainer.py"
TINY = ["--steps=8", "--width=16", "--depth=1", "--context=32"]
TOLERANCE = 1.5e-4  # losses are printed to four digits; a mean of means is off by 3e-3


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d{4})$", printed, re.MULTILINE)]


def test_is_short():
    assert len(SCRIPT.read_text().splitlines()) < 60


@pytest.mark.thorough
def test_learns_and_two_ranks_train_as_one_process_does(tmp_path):
    alone = losses(run(SCRIPT, *TINY, "--batch=8", "--micro-batches=1", log=tmp_path / "alone"))
    ranks = losses(run(*TORCHRUN, SCRIPT, *TINY, "--batch=2", "--micro-batches=2", log=tmp_path / "ranks"))
    assert len(alone) == len(ranks) == 8
    assert alone[-1] < alone[0] - 0.05
    assert ranks == pytest.approx(alone, abs=TOLERANCE, rel=0)
