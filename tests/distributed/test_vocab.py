"""The vocabulary sharded over real processes: values and gradients on every rank, against float64 on one process."""

import pytest

from tests.distributed.covering import every_pair, pairs
from tests.distributed.launch import run
from tests.distributed.vocab_cases import DIMENSIONS, MORE_ROUNDS, all_cases, cases, name
from tests.distributed.vocab_worker import SITUATIONS, run_all, run_cases

# Only a mean takes num_tokens.
IMPOSSIBLE = {
    (("call", (reduction, way)), ("num_tokens", 7))
    for reduction, way in (
        ("sum", "forward"),
        ("sum", "backward"),
        ("none", "backward"),
        ("sum", "auto"),
        ("none", "auto"),
    )
}
NAMED = {  # the situations that have a test of their own below
    "smoothing_is_over_the_whole_vocabulary",
    "ignored_label_costs_nothing",
    "every_rank_issues_the_same_collectives",
}


@pytest.fixture(scope="module")
def errors():
    return run(run_all, 4)


def assert_no_error(errors, name: str):
    found = [(rank, of_rank[name]) for rank, of_rank in enumerate(errors) if name in of_rank]
    assert found
    assert not any(error for _, error in found), "\n".join(f"rank {rank}: {error}" for rank, error in found if error)


@pytest.mark.parametrize("case", [f"{function}-{name(case)}" for function, case in all_cases()])
def test_equals_the_reference(errors, case):
    assert_no_error(errors, case)


@pytest.mark.thorough
def test_more_cases_equal_the_reference():
    errors = run(run_cases, 4, MORE_ROUNDS)
    for function, case in all_cases(MORE_ROUNDS):
        assert_no_error(errors, f"{function}-{name(case)}")


@pytest.mark.parametrize("situation", [name for name in SITUATIONS if name not in NAMED])
def test_situation(errors, situation):
    assert_no_error(errors, situation)


def test_label_smoothing_over_the_whole_vocabulary(errors):
    """peers 9: Megatron smooths with the mean over the rank's own words and divides by their number."""
    assert_no_error(errors, "smoothing_is_over_the_whole_vocabulary")


def test_ignored_label(errors):
    """peers 9: Megatron's loss of a label of -100 is 1.34; an ignored token costs nothing, smoothed or not."""
    assert_no_error(errors, "ignored_label_costs_nothing")


def test_chunk_counts_do_not_depend_on_the_rank(errors):
    """peers 11: ranks that count their chunks by their own shard hang, or leave a gradient out."""
    assert_no_error(errors, "every_rank_issues_the_same_collectives")


@pytest.mark.parametrize("function", DIMENSIONS)
def test_cases_cover_every_pair_of_options(function):
    """Each value of an option meets each value of every other one, but for what cannot be asked for."""
    met = set().union(*map(pairs, cases(function)))
    missing = every_pair(DIMENSIONS[function]) - met
    assert all(pair in IMPOSSIBLE or ("frozen", "head") in pair for pair in missing)
    assert ("frozen", "head") not in {option for pair in missing for option in pair} or function == "logits"
