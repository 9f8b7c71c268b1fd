"""docs/models.md says of each class of Transformers what the tests find."""

import re
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.families.classes import examine_all, names
from tests.families.configurations import VOCAB, WIDTH
from tests.families.exceptions import BATCH, LENGTH
from tests.families.page import counts_of, rows_of
from tests.families.steps import (
    COMPUTED,
    HEADLESS_STATE,
    LAZY,
    PAST,
    REFUSED,
    UNBUILT,
    WRONG,
    batch_for,
    examine,
    loss_of,
    most_rows,
    new_model,
)
from tests.integrations.training import training_step

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
# One for each kind of model, and one for each state.
SAMPLE = {
    "LlamaForCausalLM": LAZY,
    "T5ForConditionalGeneration": LAZY,
    "BertForMaskedLM": LAZY,
    "FSMTForConditionalGeneration": LAZY,
    "DiaForConditionalGeneration": COMPUTED,
    "MobileBertForMaskedLM": PAST,
    "MusicgenForCausalLM": REFUSED,
    "ElectraForPreTraining": HEADLESS_STATE,
}


def test_the_numbers_of_the_page_are_those_of_its_rows():
    rows, counts = Counter(rows_of(PAGE).values()), counts_of(PAGE)
    assert rows == counts
    total, tried = map(int, re.search(r"(\d+) classes, of which (\d+) were built", PAGE).groups())
    assert (total, tried) == (rows.total(), rows.total() - rows[UNBUILT] - rows[HEADLESS_STATE])
    assert tried >= 380 and not rows[WRONG]


def test_the_page_names_the_classes():
    assert rows_of(PAGE).keys() == set(names())


@pytest.mark.parametrize("name", SAMPLE)
def test_a_class(name):
    finding = examine(name)
    assert finding.state == SAMPLE[name] == rows_of(PAGE)[name], finding


def test_logits_that_exist_are_seen():
    """Else no class would be lazy for a reason."""
    model = new_model("LlamaForCausalLM")
    batch = batch_for(model)
    assert (
        most_rows(VOCAB, lambda: training_step(model, lambda model: loss_of(model, batch)))
        == BATCH * LENGTH
        > 2 * WIDTH
    )


def test_a_class_that_is_not_there():
    assert examine("NoSuchForCausalLM").state == UNBUILT


@pytest.mark.thorough
@pytest.mark.timeout(3000)
def test_all_classes():
    found = {finding.name: finding for finding in examine_all(names(), processes=2)}
    page = rows_of(PAGE)
    assert {name: one for name, one in found.items() if one.state != page[name]} == {}
