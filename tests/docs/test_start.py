"""The quickstarts run as they stand, and print what their pages say."""

import contextlib
import io
import os
import re
import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.distributed import launch
from tests.docs import pages

FOLDER = pages.DOCS / "start"
ONE_PROCESS = [page for page in sorted(FOLDER.glob("*.md")) if pages.blocks(page, "python")]
TWO_PROCESSES = [FOLDER / f"{name}.md" for name in ("tensor_parallel", "pipelines", "fsdp", "deepspeed")]


def _expected(page: Path) -> list[str]:
    text = page.read_text("utf-8").split("## Expected output")[1]
    return re.search(r"```text\n(.*?)```", text, flags=re.DOTALL)[1].splitlines()


def check(page: Path, printed: str) -> None:
    """What the page says is printed, in this order, among other lines. Numbers may differ with the machine."""
    lines = iter(printed.splitlines())
    for line in _expected(page):
        assert any(_is_like(line, other) for other in lines), f"{page.name}: no {line!r} in\n{printed}"


def _is_like(line: str, other: str) -> bool:
    number = r"-?\d+(?:\.\d+)?"
    numbers = [list(map(float, re.findall(number, text))) for text in (line, other)]
    return re.sub(number, "#", line) == re.sub(number, "#", other) and numbers[0] == pytest.approx(numbers[1], abs=0.02)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", ONE_PROCESS, ids=lambda page: page.name)
def test_in_one_process(page, capfd):
    pages.run(page)
    check(page, capfd.readouterr().out)


def _scripts(rank: int, world_size: int, scripts: list[str], ports: list[int]) -> list[str]:
    """Runs each script as torchrun does, and returns what they print."""
    dist.destroy_process_group()
    printed = []
    for script, port in zip(scripts, ports, strict=True):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(script, "train.py", "exec"), {"__name__": "__main__"})
        printed.append(out.getvalue())
    dist.init_process_group("gloo")
    return printed


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.mark.thorough
def test_in_two_processes():
    scripts = [pages.blocks(page, "py")[0] for page in TWO_PROCESSES]
    ranks = launch.run(_scripts, 2, scripts, _free_ports(len(scripts)))
    for page, *printed in zip(TWO_PROCESSES, *ranks, strict=True):
        check(page, "".join(printed))
