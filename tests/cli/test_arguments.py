"""The command line itself: wrong arguments, a missing extra."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from chunked_ce.cli import main, needed_packages
from chunked_ce.cli.arguments import parser


def ended(arguments, capsys):
    """Exit code, output and error output."""
    with pytest.raises(SystemExit) as ending:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return ending.value.code, printed.out, printed.err


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        ([], "plan | bench | check"),
        (["train"], "bench"),
        (["plan"], "--hidden and --vocab"),
        (["plan", "--model", "llama3-8b"], "llama-3-8b"),
        (["plan", "--model", "gpt2", "--tokens", "0"], "integer >= 1"),
        (["plan", "--model", "gpt2", "--memory", "much"], "80GiB"),
        (["plan", "--model", "gpt2", "--zero", "4"], "3"),
        (["plan", "--model", "gpt2", "--tp", "0"], "integer >= 1"),
        (["plan", "--model", "gpt2", "--config", "config.json"], "use one of them"),
        (["plan", "--config", "/nowhere/config.json"], "readable JSON"),
        (["plan", "--model", "gpt2", "--frozen-head", "--frozen-input"], "at most one"),
        (["bench", "--sweep", "words=1,2"], "tokens, hidden, vocab, chunk"),
        (["bench", "--sweep", "vocab=1,x"], "integers >= 1"),
        (["bench", "--only", "liger", "nobody"], "forward"),
        (["bench", "--ignored", "1"], "[0, 1)"),
        (["bench", "--plot", "plot.doc"], ".png"),
        (["bench", "--json", "/proc/nowhere/file"], "can be written"),
        (["bench", "--tensors", "/nowhere/file.pt"], "dict of tensors"),
        (["check", "--device", "tpu"], "cuda"),
    ],
    ids=" ".join,
)
def test_one_line_says_what_is_allowed(arguments, allowed, capsys):
    code, out, error = ended(arguments, capsys)
    assert code == 2
    assert not out
    assert error.count("\n") == 1
    assert allowed in error


def test_help(capsys):
    code, out, _ = ended(["bench", "--help"], capsys)
    assert code == 0
    assert "--sweep" in out


def test_missing_extra(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else real(name))
    code, _, error = ended(["plan", "--model", "gpt2"], capsys)
    assert code == 1
    assert error.count("\n") == 1
    assert "chunked_ce[cli]" in error


def run_without(missing, *commands):
    """``chunked-ce`` with each of ``commands``, the last one's exit code, where ``missing`` cannot be imported."""
    code = f"""
import contextlib, sys
sys.modules.update(dict.fromkeys({missing!r}))
from chunked_ce.cli import main, needed_packages
from chunked_ce.cli.arguments import parser
*others, last = {[list(map(str, command)) for command in commands]!r}
for arguments in others:
    try:
        main(arguments)
    except SystemExit as ending:
        print("ended", ending.code)
main(last)
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)


def test_a_plan_needs_no_plots():
    done = run_without(["matplotlib", "psutil"], ["plan", "--model", "gpt2", "--tp", "1"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Fits: ")


def test_plots_name_what_they_need(tmp_path):
    files = {"--plot": tmp_path / "out.png", "--html": tmp_path / "out.html"}
    done = run_without(["matplotlib"], *(["bench", "--only", "forward", *plot] for plot in files.items()))
    assert (done.returncode, done.stdout) == (1, "ended 1\n")
    assert done.stderr == "chunked-ce needs matplotlib (plots): pip install 'chunked_ce[cli]'\n" * 2
    assert not any(file.exists() for file in files.values())


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        ("plan --model gpt2", ["rich"]),
        ("plan --model gpt2 --device cpu", ["rich", "psutil"]),
        ("plan --model gpt2 --device cpu --budget 1G", ["rich"]),
        ("bench", ["rich", "psutil"]),
        ("bench --plot a.png", ["rich", "matplotlib", "psutil"]),
        ("bench --html a.html", ["rich", "matplotlib", "psutil"]),
        ("check", ["rich", "psutil"]),
    ],
)
def test_needed_packages(arguments, needed):
    assert needed_packages(parser().parse_args(arguments.split())) == needed


@pytest.mark.thorough
def test_bench_without_plots(tmp_path):
    sizes = {"--tokens": 8, "--hidden": 4, "--vocab": 16, "--rounds": 1, "--only": "forward", "--dtype": "fp32"}
    shape = [argument for pair in sizes.items() for argument in pair] + ["--no-errors", "--json"]
    done = run_without(["matplotlib"], ["bench", *shape, tmp_path / "bench.json"])
    assert done.returncode == 0, done.stderr


def test_as_a_module():
    command = [sys.executable, "-m", "chunked_ce", "plan", "--model", "gpt2", "--tp", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    assert json.loads(done.stdout)["request"]["vocab"] == 50257


def test_the_script_is_declared():
    text = (Path(__file__).parents[2] / "setup.cfg").read_text()
    assert "chunked-ce = chunked_ce_command:main" in text
    assert "py_modules = chunked_ce_command" in text
