import json

import pytest
from common.run_directory import RunDirectory

SETTINGS = {"width": 128, "ranks": 2}


def test_refuses_to_overwrite_a_run(tmp_path):
    run = RunDirectory(tmp_path)
    run.check(SETTINGS, resume=False)
    run.check(SETTINGS, resume=True)
    run.start(SETTINGS, step=0)
    run.check(SETTINGS, resume=True)
    with pytest.raises(ValueError, match="already holds a run"):
        run.check(SETTINGS, resume=False)


def test_refuses_to_go_on_with_other_settings(tmp_path):
    run = RunDirectory(tmp_path)
    run.start(SETTINGS, step=0)
    with pytest.raises(ValueError, match="its ranks is 2, not 4"):
        run.check(SETTINGS | {"ranks": 4}, resume=True)


def test_drops_metrics_past_the_checkpoint(tmp_path):
    run = RunDirectory(tmp_path)
    run.start(SETTINGS, step=0)
    for step in (1, 2, 3):
        run.log({"step": step})
    run.start(SETTINGS, step=2)
    assert [json.loads(line) for line in run.metrics.read_text().splitlines()] == [{"step": 1}, {"step": 2}]
