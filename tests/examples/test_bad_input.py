"""Bad input ends the examples with one line and a nonzero status, whatever the rank."""

import functools
import importlib
import os

import pytest

from tests.examples.commands import EXAMPLES, TORCHRUN, Command


@pytest.fixture
def refuse(tmp_path, text, monkeypatch, capsys):
    before = dict(os.environ)  # an example sets DS_ACCELERATOR where there is no GPU

    def refuse(program: str, *arguments: object) -> str:
        command = [f"{program}.py", "--out", tmp_path / "out", "--text", text, *arguments]
        monkeypatch.setattr("sys.argv", [str(argument) for argument in command])
        monkeypatch.setenv("RANK", "0")  # distill.py starts its ranks itself, unless it is one
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(program).main()
        assert stop.value.code == 2
        line = capsys.readouterr().err
        assert line.startswith(f"{program}: ") and line.count("\n") == 1
        return line

    yield refuse
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def refusal(refuse):
    return functools.partial(refuse, "train_deepspeed")


def test_options(refusal):
    assert "--optimise" in refusal("--optimise")
    assert "invalid choice: 'half'" in refusal("--loss", "half")
    assert "--shard-head needs --loss chunked" in refusal("--shard-head", "--loss", "full")
    assert "--steps must be at least 1, got 0" in refusal("--steps", 0)
    assert "--save-every must be at least 0, got -1" in refusal("--save-every", -1)
    assert "depth must be at least 1, got 0" in refusal("--depth", 0)
    assert "width must be a multiple of heads, got width 10 and heads 4" in refusal("--width", 10)


def test_files(refusal, tmp_path, text):
    assert "nowhere.txt: No such file" in refusal("--text", "nowhere.txt")
    assert f"{tmp_path}: Is a directory" in refusal("--text", text, tmp_path)
    assert "nowhere.json: No such file" in refusal("--deepspeed-config", "nowhere.json")
    assert f"{text} is not JSON" in refusal("--deepspeed-config", text)

    short, binary, array = (tmp_path / name for name in ("short.txt", "binary", "array.json"))
    short.write_text("Too little.")
    binary.write_bytes(b"\xff\xfe\x00")
    array.write_text("[]")
    assert f"{array} must hold a JSON object, got list" in refusal("--deepspeed-config", array)
    assert "tokens, too few for a context of 512" in refusal("--text", short)
    assert f"{binary} is not UTF-8 text" in refusal("--text", binary)


def test_distillation(refuse, tmp_path):
    def refusal(*arguments: object) -> str:
        return refuse("distill", *arguments)

    assert "--steps must be at least 4, got 3" in refusal("--steps", 3)
    assert "--teacher-steps must be at least 1, got 0" in refusal("--teacher-steps", 0)
    assert "--beta must be in [0, 1], got 1.5" in refusal("--beta", 1.5)
    assert "--top-k must be at most 131072, got 131073" in refusal("--top-k", 131073)
    assert "invalid choice: 'none'" in refusal("--tail", "none")
    assert "student: width must be a multiple of heads, got width 10 and heads 4" in refusal("--student-width", 10)
    assert "teacher: width must be at least 1, got 0" in refusal("--teacher-width", 0)
    assert "nowhere.txt: No such file" in refusal("--text", "nowhere.txt")
    (tmp_path / "short.txt").write_text("Too little.")
    assert "tokens, too few for a context of 512" in refusal("--text", tmp_path / "short.txt")


@pytest.fixture
def policy_refusal(tmp_path, monkeypatch, capsys):
    import policy

    def refusal(*arguments: object) -> str:
        command = ["policy.py", "--out", tmp_path / "out", *arguments]
        monkeypatch.setattr("sys.argv", [str(argument) for argument in command])
        with pytest.raises(SystemExit) as stop:
            policy.main()
        assert stop.value.code == 2
        line = capsys.readouterr().err
        assert line.startswith("policy: ") and line.count("\n") == 1
        return line

    return refusal


def test_policy(policy_refusal, tmp_path):
    assert "--optimise" in policy_refusal("--optimise")
    assert "argument --steps: invalid int value: 'many'" in policy_refusal("--steps", "many")
    assert "steps must be at least 1, got 0" in policy_refusal("--steps", 0)
    assert "group must be at least 2, got 1" in policy_refusal("--group", 1)
    assert "learning_rate must be more than 0, got 0.0" in policy_refusal("--learning-rate", 0)
    assert "clip_low must be in [0, 1), was 1.5" in policy_refusal("--clip-low", 1.5)
    assert "entropy must be finite and >= 0, was nan" in policy_refusal("--entropy", "nan")
    assert "width must be a multiple of heads, got width 10 and heads 4" in policy_refusal("--width", 10)
    assert "the text has 20 lines that are not empty, too few for 20 prompts" in policy_refusal("--lines", 20)
    assert "nowhere.txt: No such file" in policy_refusal("--text", "nowhere.txt")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    assert f"{binary} is not UTF-8 text" in policy_refusal("--text", binary)
    assert f"{binary}: File exists" in policy_refusal("--out", binary)


@pytest.mark.parametrize(
    ("option", "refused"),
    [
        ("--text=nowhere.txt", "nowhere.txt: No such file or directory"),
        pytest.param(
            "--deepspeed-config={config}",
            "{config}: Either train_batch_size or train_micro_batch_size_per_gpu",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_every_rank_ends(tmp_path, text, option, refused):
    log, config = tmp_path / "log", tmp_path / "config.json"
    config.write_text("{}")
    arguments = ["--out", tmp_path / "out", "--text", text, "--context=32", option.format(config=config)]
    with Command(*TORCHRUN, EXAMPLES / "train_deepspeed.py", *arguments, log=log) as command:
        assert command.status() != 0
    lines = [line for line in log.read_text().splitlines() if line.startswith("train_deepspeed: ")]
    assert len(lines) == 1
    assert lines[0].startswith("train_deepspeed: " + refused.format(config=config))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
