import json

import pytest
import torch
from common import next_lines, policy_report
from common.grpo import advantages, draw
from common.text_data import IGNORED

from tests.examples.commands import EXAMPLES, run

TINY = ["--steps=2", "--lines=3", "--group=2", "--warm-up=2", "--width=16", "--depth=1", "--heads=2"]
FIELDS = {"step", "reward", "losses", "clipped", "kl", "entropy", "tokens", "answers", "peak_memory_bytes"}


@pytest.fixture(scope="module")
def task():
    return next_lines.NextLines(3)


@pytest.mark.thorough
def test_a_tiny_run(tmp_path):
    """Both trainings see the same answers and have the same losses; the report and the plot are there."""
    printed = run(EXAMPLES / "policy.py", *TINY, "--out", tmp_path / "out", log=tmp_path / "log")
    runs = {}
    for kind in ("chunked", "full"):
        lines = (tmp_path / "out" / f"{kind}.jsonl").read_text().splitlines()
        runs[kind] = [json.loads(line) for line in lines]
        assert [record["step"] for record in runs[kind]] == [1, 2] and runs[kind][0].keys() >= FIELDS
        assert f"{kind}  step   2/2  reward 0." in printed
    for ours, theirs in zip(*runs.values(), strict=True):
        assert ours["answers"] == theirs["answers"] and ours["tokens"] == theirs["tokens"]
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-6)
        assert len(ours["losses"]) == 2
        for name in ("clipped", "kl", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6)
    report = (tmp_path / "out" / "report.txt").read_text()
    assert report in printed and "answers in which a rounding changed a word: 0 of 12" in report
    assert (tmp_path / "out" / "policy.png").read_bytes().startswith(b"\x89PNG")


def test_rewards(task):
    """The share of the right answer before the first mistake."""
    lines, right = torch.arange(3), task.answers
    assert task.rewards(lines, right).tolist() == [1, 1, 1]
    length = int((right[0] != IGNORED).sum())
    for mistake in range(length):
        answers = right.clone()
        answers[0, mistake] = 5
        assert task.rewards(lines, answers).tolist() == pytest.approx([mistake / length, 1, 1])
    longer = right.clone()
    longer[0, length - 1 :] = 5  # without an end
    assert task.rewards(lines, longer)[0] == pytest.approx((length - 1) / length)


def test_lines(task, tmp_path):
    assert len(task) == 3 and task.prompts.shape == (3, 16) and task.answers.shape == (3, 12)
    assert (task.answers == task.end).sum() == 3
    text = tmp_path / "text.txt"
    text.write_text("one\n\n  two\nthree\n")
    prompts = next_lines.NextLines(2, text).prompts
    assert len(prompts) == 2
    with pytest.raises(ValueError, match="the text has 3 lines that are not empty, too few for 3 prompts"):
        next_lines.NextLines(3, text)


def test_examples_are_right_as_often_as_asked(task):
    for right, expected in ((1.0, 1.0), (0.5, 0.5 + 0.5 / 3), (0.0, 1 / 3)):
        prompts, answers = task.examples(2000, right, torch.Generator().manual_seed(0))
        lines = torch.arange(3).repeat(2000)
        assert torch.equal(prompts, task.prompts[lines])
        assert (answers == task.answers[lines]).all(1).double().mean().item() == pytest.approx(expected, abs=0.02)


def test_words_are_drawn_by_their_probabilities():
    logits = torch.randn(1, 7)
    chances = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    words = torch.cat([draw(logits.expand(1000, 7), part.unsqueeze(1)) for part in chances.split(1000)])
    torch.testing.assert_close(words.bincount(minlength=7) / 100_000, logits.softmax(-1)[0], atol=2e-5, rtol=0)


def test_advantages():
    found = advantages(torch.tensor([1.0, 0.0, 0.5, 0.5, 0.25, 0.75]), group=2)
    torch.testing.assert_close(found, torch.tensor([1, -1, 0, 0, -1, 1]) * 0.5**0.5, atol=1e-3, rtol=0)


def records(rewards, losses, mebibytes=100, seconds=1.0, **others):
    common = {"peak_memory_bytes": mebibytes * 2**20, "tokens": 70, "answers": [[1], [2]]} | others
    common |= {"sampling_seconds": 0.5, "training_seconds": seconds}
    return [{"reward": reward, "losses": [0.0, loss]} | common for reward, loss in zip(rewards, losses, strict=True)]


def test_table():
    chunked = policy_report.Run(records([0.25, 0.5, 0.75], [-0.01, -0.02, -0.03]))
    full = policy_report.Run(records([0.25, 0.5, 0.5], [-0.01, -0.021, -0.05], 400, 2.0, other_answers=1))
    lines = policy_report.table(chunked, full).splitlines()
    rows = [line.split() for line in lines]
    assert ["3", "0.750", "0.500", "-0.03000", "-0.05000", "2.0e-02"] in rows
    assert "largest difference of a loss: 2.0e-02" in lines
    assert "answers in which a rounding changed a word: 3 of 6" in lines
    assert ["peak", "memory,", "MiB", "100", "400", "0.25"] in rows
    assert ["scores", "and", "training,", "s", "per", "step", "1.00", "2.00", "0.50"] in rows
