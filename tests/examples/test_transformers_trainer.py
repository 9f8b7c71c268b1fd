"""Transformers' Trainer, with the line that makes the logits lazy and without: the same losses."""

import re

import pytest

from tests.examples.commands import EXAMPLES, TINY, TORCHRUN, run

pytest.importorskip("transformers")

SCRIPT = EXAMPLES / "transformers_trainer.py"
STEPS = 3


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^step +\d+  loss (\d+\.\d{4})$", printed, re.MULTILINE)]


def test_one_line_and_short():
    source = SCRIPT.read_text()
    assert len(source.splitlines()) < 150
    assert re.findall(r"LMHead\..*", source) == ["LMHead.wrap(model)  # the only line of chunked_ce"]


@pytest.mark.thorough
def test_the_losses_of_the_plain_model(tmp_path, text):
    """Ours on two ranks, the plain one's on a single rank that accumulates twice as many batches."""
    tiny = [*TINY, f"--steps={STEPS}", "--text", text]
    alone = [*TORCHRUN, "--nproc_per_node=1"]
    ours = run(*TORCHRUN, SCRIPT, *tiny, "--accumulate=2", log=tmp_path / "ours")
    plain = run(*alone, SCRIPT, *tiny, "--accumulate=4", "--plain", log=tmp_path / "plain")
    assert len(losses(ours)) == STEPS
    assert losses(ours) == pytest.approx(losses(plain), abs=1.5e-4, rel=0)  # four digits are printed
    for printed in (ours, plain):
        assert re.search(r"^\d+\.\d\d s per step, training took [1-9][\d,]* MiB at its peak$", printed, re.MULTILINE)


def test_bad_options_are_told_in_one_line(monkeypatch, capsys):
    import transformers_trainer

    monkeypatch.setattr("sys.argv", ["transformers_trainer.py", "--width=6"])
    with pytest.raises(SystemExit) as ended:
        transformers_trainer.parse_options()
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(
        "--width must be a multiple of twice --heads, got 6 and 4 (--help lists the options)\n"
    )
