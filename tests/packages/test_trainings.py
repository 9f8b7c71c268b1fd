"""The harness itself: another loss is not the same, and whole logits are not small."""

import pytest

from chunked_ce import LMHead
from tests.packages import trainings as t

Trainer, TrainingArguments = t.transformers.Trainer, t.transformers.TrainingArguments
TOKENS = 4 * 64


def build(wrapped, folder, **keywords):
    model = t.new_model()
    if wrapped:
        LMHead.wrap(model, options=t.OPTIONS, **keywords)
    ids = t.new_tokenizer()(t.passages(12, length=64), padding="max_length", max_length=64)["input_ids"]
    rows = [{"input_ids": row, "labels": [token or -100 for token in row]} for row in ids]
    return Trainer(model, TrainingArguments(str(folder), **t.ARGUMENTS), train_dataset=rows)


def test_the_same_training_is_the_same_and_small(tmp_path):
    ours, plain = t.compare(build, tmp_path, TOKENS)
    assert len(ours.losses) == t.STEPS and len(ours.logs) == t.STEPS
    assert plain.largest >= TOKENS * t.VOCAB * 4, "the plain training has the logits"
    with pytest.raises(AssertionError, match="of N V"):
        t.assert_small(plain, TOKENS)
    with pytest.raises(AssertionError, match="says nothing"):
        t.assert_small(ours, TOKENS, plain=ours)


@pytest.mark.parametrize("keywords", [{"z_loss": 1e-4}, {"logit_scale": 1.0001}])
def test_another_loss_is_not_the_same(tmp_path, keywords):
    plain = t.outcome(build, False, tmp_path / "plain")
    other = t.outcome(lambda wrapped, folder: build(wrapped, folder, **keywords), True, tmp_path / "ours")
    with pytest.raises(AssertionError, match="loss 0"):
        t.assert_same(other, plain)
    with pytest.raises(AssertionError, match="is off by"):
        t.assert_same(other._replace(losses=plain.losses), plain)
    with pytest.raises(AssertionError, match=r"log 0"):
        t.assert_same(plain._replace(logs=other.logs), plain)
    with pytest.raises(AssertionError, match="hardly moves"):
        still = plain._replace(parameters=plain.before)
        t.assert_same(still, still)


def test_rows_are_kept_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(t, "RESULTS", tmp_path / "results.json")
    small, large = (t.Outcome([], {}, {}, [], size * t.VOCAB * 4, []) for size in (10, 100))
    first, second = t.Row("B", "trainer", "", "wrap"), t.Row("A", "trainer", "", "wrap")
    t.record(large, large, 100, first)
    t.record(small, large, 100, second)
    t.record(small, large, 100, first)
    assert t.recorded() == [row._asdict() | {"ours": 0.1, "plain": 1.0} for row in (second, first)]
