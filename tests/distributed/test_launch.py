"""The launcher itself: what the ranks of a failing test leave behind."""

import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.distributed.launch import run


def fails_slowly(rank: int, world_size: int, folder: str):
    """Rank 1 fails at once; rank 0 sees it later than any fixed time that a launcher could wait."""
    if rank == 1:
        raise ValueError("the first failure")
    time.sleep(2.0)
    Path(folder, "seen").touch()
    dist.barrier()  # without rank 1


def test_ranks_that_see_a_failure_late_still_say_so(tmp_path):
    with pytest.raises(RuntimeError, match="fails_slowly failed") as failure:
        run(fails_slowly, 2, str(tmp_path))
    assert (tmp_path / "seen").exists()
    assert "rank 1 of 2 raised:" in str(failure.value) and "the first failure" in str(failure.value)
    assert "rank 0 of 2 raised:" in str(failure.value)
