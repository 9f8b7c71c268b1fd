"""``chunked-ce bench --loss sharded``: its losses on two ranks, its processes, and its rows in every output."""

import json
import multiprocessing
import os
import signal

import pytest
import torch
import torch.distributed as dist

from benchmarks.report import markdown
from chunked_ce.cli import bench_run, main, memory, processes, worker
from chunked_ce.cli.implementations import DEVICE, LOSSES, PRODUCTS, loss_of, select
from chunked_ce.cli.memory_models import predicted
from chunked_ce.cli.sharded_losses import OWN, SAME, SHARDED_LOSSES, RankInputs
from chunked_ce.cli.synthetic_inputs import LossInputs
from chunked_ce.cli.worker import Task, Worker
from chunked_ce.sharded.costs import bytes_sent_gathered
from tests.distributed.launch import run as run_ranks

FULL = "full logits, gathered head"
TOKENS, HIDDEN, VOCAB = 7, 5, 13  # which two ranks cannot share evenly
pytestmark = pytest.mark.skipif(
    DEVICE != "cpu" or not dist.is_gloo_available(), reason="its processes are a CPU's, over gloo"
)


def values_and_gradients(rank, world_size):
    """Of each loss: value, dX and dW of this rank, and those of the formula on the whole head."""
    whole = LossInputs.random(TOKENS, HIDDEN, VOCAB, torch.float64)
    own, same = RankInputs.of(whole)
    found = {}
    for name, loss in SHARDED_LOSSES.items():
        inputs = same if loss.same_tokens else own
        value = loss_of(name, 3 if loss.takes_chunk else None)(*inputs)
        gradients = torch.autograd.grad(value, inputs[:2])
        parts = [whole] if loss.same_tokens else [LossInputs(*part) for part in parts_of(whole, world_size)]
        losses = [torch.nn.functional.cross_entropy(x @ whole.weight.t(), y) for x, _, y in parts]
        mine = 0 if loss.same_tokens else rank
        hidden_grad = torch.autograd.grad(losses[mine], parts[mine].hidden, retain_graph=True)[0]
        weight_grad = torch.autograd.grad(sum(losses) / len(losses), whole.weight)[0]
        rows = weight_grad.tensor_split([-(-VOCAB // world_size)])[rank]
        found[name] = (value.detach(), *gradients), (losses[mine].detach(), hidden_grad, rows)
    return found


def parts_of(whole, world_size):
    hidden, target = (tensor.tensor_split(world_size) for tensor in (whole.hidden, whole.target))
    return [(x, whole.weight, y) for x, y in zip(hidden, target, strict=True)]


def test_losses_are_those_of_the_whole_head():
    for found in run_ranks(values_and_gradients, 2):
        assert found.keys() == SHARDED_LOSSES.keys()
        for ours, formula in found.values():
            for mine, exact in zip(ours, formula, strict=True):
                # In float64, but for the loss and logits of full logits.
                torch.testing.assert_close(mine, exact, rtol=1e-6, atol=1e-7, check_dtype=False)


def test_two_ranks_measured_and_one_killed():
    """Ranks serve one task after another; when one is killed, the other is not left behind."""
    task = Task(FULL, "fp32", 8, 8, 64, "cpu", rounds=2, ranks=2)
    with Worker("cpu", 2) as running:
        messages = list(running.run(task, timeout=900))
        kinds = [kind for kind, _ in messages]
        peak = ["memory"] * (memory.why_not_measured("cpu") is None)
        assert kinds == [*peak, "sent", "control", "round", "round", "control", "shares", "done"]
        assert dict(messages)["sent"] == bytes_sent_gathered(64, 8, 2, itemsize=4)
        ending = None
        for kind, content in running.run(task._replace(implementation=OWN, rounds=10**9), timeout=900):
            if kind == "round":
                os.kill(running.processes[1].pid, signal.SIGKILL)
            ending = kind, content
        assert ending == ("failed", "out of memory (killed) (rank 1)")
        assert not any(process.is_alive() for process in running.processes)


def test_ranks_that_are_late_all_end():
    task = Task(OWN, "fp32", 8, 8, 64, "cpu", ranks=2)
    with Worker("cpu", 2) as running:
        assert list(running.run(task, timeout=0.01)) == [("failed", "not done after 0.01 s")]
        assert not any(process.is_alive() for process in running.processes)


class Ended:
    exitcode = 1

    def join(self, *_):
        pass

    kill = join


@pytest.mark.parametrize("others", ["failed", "ended"])
def test_the_first_failure_is_the_cause(others):
    """Rank 0 lost its connection to rank 1, and says so first."""
    group = processes.Processes(None, 0)
    ends = [multiprocessing.Pipe() for _ in range(2)]
    group._pipes, group._processes = [end for end, _ in ends], [Ended(), Ended()]
    ends[0][1].send(("failed", (2.0, "connection closed")))
    ends[1][1].send(("round", 1.0))
    if others == "failed":
        ends[1][1].send(("failed", (1.0, "out of memory")))
    ends[1][1].close()
    open(os.path.join(group._folder, "1.log"), "w").close()
    reason = "out of memory" if others == "failed" else "ended with exit code 1"
    with group:
        assert list(group.messages(10.0)) == [(1, ("failed", reason))]


class Fake:
    """Instead of processes: what rank 0 would say."""

    def __init__(self, device, ranks=None):
        self.ranks = ranks

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, task, timeout):
        if isinstance(task, worker.Preparation):
            assert self.ranks is None and not task.errors
            yield "prepared", (task.task, {"loss": 1.0, "entropy": 1.0})
            return
        assert self.ranks == task.ranks == 3
        yield "memory", 2**20 * len(task.implementation)
        yield "sent", 3 * 2**19
        for seconds in (3.0, 1.0, 2.0):
            yield "round", (seconds, 1.0)
        yield "done", None


def run(arguments, capsys):
    with pytest.raises(SystemExit) as ending:
        main(["bench", *map(str, arguments)])
    return ending.value.code, capsys.readouterr()


def test_every_output_has_the_ranks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_run, "Worker", Fake)
    files = {name: tmp_path / f"bench.{name}" for name in ("json", "png", "html")}
    written = ("--json", files["json"], "--plot", files["png"], "--html", files["html"])
    shape = ("--loss", "sharded", "--ranks", 3, "--tokens", 64, "--hidden", 8, "--vocab", 90, "--dtype", "fp32")
    code, printed = run((*shape, *written), capsys)
    assert code == 0
    document = json.loads(files["json"].read_text())
    rows = {row["implementation"]: row for row in document["results"]}
    assert list(rows) == [PRODUCTS, *SHARDED_LOSSES]
    assert all(row["ranks"] == 3 and row["sent_mib"] == 1.5 and row["ratio"] == 2.0 for row in rows.values())
    text = files["html"].read_text()
    for output in (printed.out, text):
        assert "sent MiB" in output and "dX error" not in output
        assert "3 ranks" in output and "N/3 on each" in " ".join(output.split())
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert "fp32, 3 ranks: MiB" in markdown(document)
    code, printed = run(("--compare", files["json"], files["json"]), capsys)
    assert code == 0 and "none of 4 regressed" in printed.out and "3 ranks" in printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", 2], "--ranks needs --loss sharded, the loss was cross-entropy"),
        (["--loss", "sharded", "--no-errors"], "--no-errors has no effect with --loss sharded"),
        (["--loss", "sharded", "--ranks", 4, "--tokens", 3], "--ranks must be at most the tokens"),
        (["--loss", "sharded", "--ranks", 0], "must be an integer >= 1, was '0'"),
        (["--loss", "sharded", "--only", "forward"], "must name some of own, same, gathered, gathered-full"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    code, printed = run(arguments, capsys)
    assert code == 2 and message in printed.err


def test_those_that_take_a_chunk_and_those_with_a_law():
    names, missing = select(kind="sharded", chunk_only=True)
    assert set(LOSSES) > set(missing) == {FULL} and names[0] == PRODUCTS
    sizes, keywords = (1024, 4096, 64), {"dtype": torch.float32, "device": "cpu"}
    two, four = (predicted(SAME, *sizes, ranks=ranks, **keywords).peak for ranks in (2, 4))
    assert two > four
    two, four = (predicted(OWN, *sizes, ranks=ranks, **keywords).peak for ranks in (2, 4))
    assert two > four
    assert predicted(OWN, *sizes, ranks=2, ignored=0.5, **keywords) is None
    assert predicted(FULL, *sizes, ranks=2, **keywords) is None
