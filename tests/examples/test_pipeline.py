"""A pipeline with its head whole or spread, on one, two and four processes: the same training."""

import re

import pytest

from tests.examples.commands import EXAMPLES, TORCHRUN, Command, run

SCRIPT = EXAMPLES / "pipeline.py"
TINY = ["--width=16", "--depth=4", "--heads=2", "--context=16", "--steps=3"]


def test_is_short():
    assert len(SCRIPT.read_text().splitlines()) < 150


@pytest.mark.thorough
def test_losses_depend_neither_on_the_stages_nor_on_the_head(tmp_path, text):
    losses, weights = {}, {}
    for stages, options in ((1, []), (2, []), (2, ["--spread-head"]), (4, ["--spread-head"])):
        torchrun = [*TORCHRUN[:-1], f"--nproc_per_node={stages}"]
        printed = run(*torchrun, SCRIPT, *TINY, "--text", text, *options, log=tmp_path / "log")
        case = (stages, *options)
        losses[case] = [float(loss) for loss in re.findall(r"^step +\d+  loss (\S+) ", printed, re.MULTILINE)]
        found = re.findall(r"^stage \d: weights +(\d+) MiB, training took +[1-9]\d* MiB", printed, re.MULTILINE)
        weights[case] = [int(mebibytes) for mebibytes in found]
    assert len(losses[1,]) == 3
    for case in losses:
        assert losses[case] == pytest.approx(losses[1,], rel=1e-6)
    # The weight of head and embedding takes 8 MiB.
    assert weights == {(1,): [8], (2,): [8, 8], (2, "--spread-head"): [4, 4], (4, "--spread-head"): [2, 2, 2, 2]}


@pytest.mark.thorough
def test_bad_options_end_every_process(tmp_path):
    log = tmp_path / "log"
    with Command(*TORCHRUN, SCRIPT, "--depth=3", log=log) as command:
        assert command.status() != 0
    said = [line for line in log.read_text().splitlines() if line.startswith("pipeline: ")]
    assert said == ["pipeline: --depth must be a multiple of the stages, got 3 and 2 (--help lists the options)"]
