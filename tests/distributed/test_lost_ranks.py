"""A rank that is lost in a call, or leaves it: the others fail with the name of the collective, and end as they should.

`python -m benchmarks.faults` shows every phase.
"""

import pytest

from benchmarks import faults
from tests.distributed.lost_ranks import ODD_ONE, RANKS, Scene, lose

OTHERS = [rank for rank in range(RANKS) if rank != ODD_ONE]
KILLED = [
    Scene("killed", "own", "hidden states"),
    Scene("killed", "own", "upstream gradients"),
    Scene("killed", "same", "the comparison of calls"),
]


def check_seen(scene, seen):
    for rank in OTHERS:
        assert seen[rank].type == "CollectiveError"
        assert seen[rank].message.startswith("chunked_ce: the ")
        assert "over the vocabulary group failed" in seen[rank].message
        assert seen[rank].exit_code == 0  # not that of an abort
        # A collective that the lost rank had started before fails first.
        assert scene.collective in seen[rank].message or scene.collective == "row statistics"


def test_a_killed_rank():
    """The others do not wait for the group's timeout."""
    patience = 300.0
    for scene, seen in lose(KILLED, patience).items():
        check_seen(scene, seen)
        assert all(seen[rank].seconds < patience / 2 for rank in OTHERS)


def test_a_stopped_rank_and_one_that_makes_a_call_less():
    """The others wait for the group's timeout."""
    patience = 3.0
    stopped, less = Scene("stopped", "own", "hidden states", "backward"), Scene("a call less", "own")
    seen = lose([stopped, less], patience)
    check_seen(stopped, seen[stopped])
    assert all(seen[stopped][rank].seconds >= patience - 0.5 for rank in OTHERS)
    check_seen(less, seen[less])
    assert "the comparison of calls" in seen[less][OTHERS[0]].message
    assert seen[less][ODD_ONE].exit_code == 0


@pytest.mark.thorough
@pytest.mark.parametrize("scene", [scene for scene in faults.scenes() if scene.collective], ids=str)
def test_every_phase(scene):
    check_seen(scene, lose([scene], 4.0)[scene])
