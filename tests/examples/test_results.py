"""An example's folder after a run that ends, one that fails, and one that Ctrl-C ends."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from common.launch import run_ranks
from common.results import Results

from tests.examples.commands import EXAMPLES

EXAMPLE = """
import sys
sys.path.insert(0, {examples!r})
from pathlib import Path
from common.launch import run_function, run_ranks
from common.results import Results

def wait(folder):
    (folder / "metrics.jsonl").write_text("1\\n")
    import time
    time.sleep(60)

if __name__ == "__main__":
    results = Results(Path({out!r}))
    with results.kept_at_interrupt():
        results.start()
        {call}
"""
CALLS = {
    "ranks": "run_ranks(Path({rank!r}), [results.unfinished], 2)",
    "function": "run_function(wait, results.unfinished)",
}
RANK = """
import os, sys, time
open(os.path.join(sys.argv[1], "rank" + os.environ["RANK"]), "w").write(str(os.getpid()))
time.sleep(60)
"""


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_files_move_at_the_end_in_place_of_earlier_ones(tmp_path, capsys):
    out = tmp_path / "new" / "out"
    (tmp_path / "kept").touch()
    for steps in (3, 2):
        results = Results(out)
        results.start()
        checkpoint = results.unfinished / "run" / f"step{steps}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_text("")
        (results.unfinished / "report.txt").write_text(f"{steps} steps")
        assert (out / "report.txt").exists() == (steps == 2)
        results.finish()
        (out / "somebody's").touch()
    assert (out / "report.txt").read_text() == "2 steps"
    assert files(out) == ["report.txt", "run/step2/weights", "somebody's"]
    assert capsys.readouterr().out == f"Made the folder {out}\n"


def test_an_error_leaves_the_files_and_says_where(tmp_path, capsys):
    results = Results(tmp_path)
    (tmp_path / "report.txt").write_text("earlier")
    with pytest.raises(ZeroDivisionError), results.kept_at_interrupt():
        results.start()
        (results.unfinished / "report.txt").write_text("half")
        print(1 / 0)
    said = capsys.readouterr().err
    assert said == f"The files so far are in {tmp_path}/unfinished; {tmp_path} has those of the last complete run.\n"
    assert (tmp_path / "report.txt").read_text() == "earlier"


@contextlib.contextmanager
def running(kind: str, folder: Path, written: list[str]) -> Iterator[subprocess.Popen]:
    """The example as a group of processes, once it has written these files to ``folder / "out" / "unfinished"``."""
    script, rank = folder / "example.py", folder / "rank.py"
    rank.write_text(RANK)
    call = CALLS[kind].format(rank=str(rank))
    script.write_text(EXAMPLE.format(examples=str(EXAMPLES), out=str(folder / "out"), call=call))
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True, **output)
    paths = [folder / "out" / "unfinished" / name for name in written]
    try:
        wait_until(lambda: all(path.exists() and path.stat().st_size for path in paths))
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_ended(group: int) -> bool:
    """Whether no process of a group runs any more; the process that spawned functions share ends a little later."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return all(process.status() == psutil.STATUS_ZOMBIE for process in psutil.process_iter() if is_in(process, group))


def is_in(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group
    except ProcessLookupError:
        return False


@pytest.mark.parametrize(("kind", "written"), [("ranks", ["rank0", "rank1"]), ("function", ["metrics.jsonl"])])
def test_an_interrupt_ends_all_processes_without_a_traceback(tmp_path, kind, written):
    """A real SIGINT, to all processes of the group as a terminal sends it."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.txt").write_text("earlier")
    with running(kind, tmp_path, written) as process:
        os.killpg(process.pid, signal.SIGINT)
        printed = process.communicate(timeout=60)[0]
        wait_until(lambda: has_ended(process.pid))
    assert process.returncode == 130
    left = f"The files so far are in {out}/unfinished; {out} has those of the last complete run."
    assert printed == f"\nexample: interrupted. {left}\n"
    assert files(out) == ["report.txt", *(f"unfinished/{name}" for name in written)]


def test_sigterm_ends_the_ranks_too(tmp_path):
    with running("ranks", tmp_path, ["rank0", "rank1"]) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
        assert has_ended(process.pid)


def test_a_rank_that_fails_ends_the_others(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text("import os, sys, time\nsys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)")
    started = time.monotonic()
    assert run_ranks(script, [], 2) == 3
    assert time.monotonic() < started + 30


def test_ranks_see_the_variables_of_torchrun(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys\n"
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR')\n"
        "open(sys.argv[1] + os.environ['RANK'], 'w').write(' '.join(os.environ[name] for name in names))"
    )
    assert run_ranks(script, [tmp_path / "rank"], 2) == 0
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["0 0 2 2 127.0.0.1", "1 1 2 2 127.0.0.1"]
