"""Work of others is noticed: by counted processor time and by a control task, given ones and those of a process."""

import subprocess
import sys

import pytest

from chunked_ce.cli import machine_load
from chunked_ce.cli.machine_load import CoreTimes, Watch, core_times, mark_busy, reasons, shares_now


def watched(before, after, own):
    times, clock = iter((CoreTimes(*before), CoreTimes(*after))), iter((1.0, 1.0 + own))
    return Watch(lambda: next(times), lambda: next(clock)).shares()


def test_own_time_is_not_that_of_others():
    assert watched((100, 50, 0), (104, 53, 1), own=3.0) == {"other_cpu_share": 0.0, "stolen_share": 0.25}
    assert watched((100, 50, 0), (104, 53, 0), own=1.0) == {"other_cpu_share": 0.5, "stolen_share": 0.0}
    assert watched((100, 50, 0), (104, 53, 0), own=3.2)["other_cpu_share"] == 0.0


def test_a_short_time_says_nothing():
    assert watched((100, 50, 0), (100.1, 50.1, 0), own=0.0) == {}
    assert Watch(lambda: None).shares() == {}


def test_reasons():
    assert reasons({"control_to_quickest": 1.1, "other_cpu_share": 0.1, "stolen_share": None}) == []
    everything = {"control_to_quickest": 19.5, "other_cpu_share": 0.6, "stolen_share": 0.2}
    assert reasons(everything) == ["control 20x", "others took 60%", "20% stolen"]


def test_a_later_quickest_marks_earlier_rows():
    """An even slowness shows only against a row that was measured when the machine was idle."""
    rows = [{"control_seconds": [0.04, 0.04]}]
    mark_busy(rows)
    assert rows[0]["busy"] is None
    rows.append({"control_seconds": [0.02, 0.021]})
    mark_busy(rows)
    assert [row["busy"] for row in rows] == ["control 2x", None]


def test_evenly_busy_from_start_to_end():
    """The control task never moved: what counts is the time that others took."""
    rows = [{"control_seconds": [0.04, 0.04], "other_cpu_share": 0.48}, {"status": "out of memory"}]
    mark_busy(rows)
    assert rows[0]["busy"] == "others took 48%"
    assert "busy" not in rows[1]


@pytest.mark.skipif(core_times() is None, reason="this system does not count the time of its cores")
def test_a_process_that_computes():
    process = subprocess.Popen([sys.executable, "-S", "-c", "print(flush=True)\nwhile True: pass"], stdout=-1)
    try:
        process.stdout.readline()
        shares = shares_now(1.0)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert reasons(shares), shares


def test_the_control_task():
    assert 0 < machine_load.control_seconds("cpu") < 60
