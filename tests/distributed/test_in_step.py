"""A rank that fails alone in a call: all ranks fail, by name, and are in step afterwards."""

import collections
import re

import pytest
import torch

from chunked_ce import devices
from chunked_ce.engine import in_step
from chunked_ce.parallel import meeting, vocab
from chunked_ce.parallel.collectives import Collectives
from tests.distributed import out_of_step
from tests.distributed.launch import run
from tests.distributed.threads import run_threads
from tests.distributed.vocab_failures import BAD_TARGETS, ODD_ONE, RANKS, Call, Scene, run_all, scenes


@pytest.fixture(scope="module")
def failures():
    return run(run_all, RANKS)


@pytest.mark.parametrize("scene", scenes(), ids=str)
def test_out_of_memory_on_one_rank(failures, scene):
    for rank, of_rank in enumerate(failures):
        found = of_rank[scene]
        assert found is not None
        if rank == ODD_ONE:
            assert found == ("OutOfMemoryError", "a simulated one")
        else:
            assert found == (
                "RuntimeError",
                f"vocab: rank {ODD_ONE} of the group failed in this call, and all ranks with it: "
                "OutOfMemoryError: a simulated one",
            )


@pytest.mark.parametrize(("function", "input_grad"), BAD_TARGETS)
def test_a_bad_target_on_one_rank(failures, function, input_grad):
    for rank, of_rank in enumerate(failures):
        found = of_rank["bad target", function, input_grad]
        assert found.type == ("IndexError" if rank == ODD_ONE else "RuntimeError")
        assert "is 1000000, allowed are [0, 11)" in found.message
        assert rank == ODD_ONE or f"rank {ODD_ONE} of the group failed in this call" in found.message


@pytest.mark.parametrize("scene", out_of_step.scenes(), ids=str)
def test_different_calls(failures, scene):
    """All ranks have the same error, which names what each of them does, and the next call works."""
    (found,) = {of_rank[scene] for of_rank in failures}
    assert found.type in ("RuntimeError", "ValueError")
    assert re.match(r"(chunked_ce: )?ranks of the vocabulary group (are in different calls|disagree on)", found.message)
    assert all(f"rank {rank} " in found.message for rank in range(RANKS))


FUNCTIONS = ("forward", "backward", "logprobs", "logits", "mixture", "mixture-backward")
SCENES = [Scene(function, at, "") for function in FUNCTIONS for at in ("complete", "partial", "sequence")]


@pytest.mark.parametrize("ignored", ["auto", "mask", "as on an accelerator"])
def test_steps_are_the_collectives_of_a_call(ignored, monkeypatch):
    """Those that a rank goes through once it has failed are those that the others issue, in their order."""
    if ignored == "as on an accelerator":
        monkeypatch.setattr(devices, "reads_at_once", lambda device: False)
        ignored = "auto"
    found, expected = (collections.defaultdict(list) for _ in range(2))
    start, together, meet, end = Collectives._start, in_step._together, meeting.meet, meeting.end
    meetings, ends = collections.Counter(), collections.Counter()

    def recording(self, what, collective, *tensors, result):
        part = tensors[-1]
        found[torch.distributed.get_rank()].append((what, tuple(part.shape), part.dtype))
        return start(self, what, collective, *tensors, result=result)

    def listing(steps, *arguments, **keywords):
        expected[torch.distributed.get_rank()] += [(step.what, tuple(step.shape), step.dtype) for step in steps()]
        return together(steps, *arguments, **keywords)

    def meeting_others(*arguments, **keywords):
        meetings[torch.distributed.get_rank()] += 1
        return meet(*arguments, **keywords)

    def ending(*arguments):
        ends[torch.distributed.get_rank()] += 1
        return end(*arguments)

    def calls(rank: int, world_size: int) -> None:
        for scene in SCENES:
            before = meetings[rank], ends[rank]
            Call.of(scene._replace(ignored=ignored), rank).run()
            reduces = scene.input_grad == "sequence" or (
                scene.input_grad == "complete" and scene.function not in ("forward", "mixture")
            )
            backward = reduces and scene.function in ("backward", "logprobs", "mixture-backward")
            # Of the first call, which is compared, and of a forward and a backward with collectives.
            assert (meetings[rank] - before[0], ends[rank] - before[1]) == (2 + backward, 1 + backward)

    monkeypatch.setattr(Collectives, "_start", recording)
    for module in (meeting, vocab):
        monkeypatch.setattr(module, "meet", meeting_others)
    monkeypatch.setattr(meeting, "end", ending)
    monkeypatch.setattr(in_step, "_together", listing)
    run_threads(calls, RANKS)
    assert sorted(found) == list(range(RANKS))
    for rank in range(RANKS):
        assert len(found[rank]) > 50
        assert found[rank] == expected[rank]
