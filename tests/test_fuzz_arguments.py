"""Wrong calls of every public name, one by one and at random: `tests.fuzz_arguments`."""

import itertools

from tests.fuzz_arguments import every_wrong_value, random_calls


def test_every_wrong_value_is_refused_by_name():
    outcomes = list(every_wrong_value(seed=0))
    assert len(outcomes) > 3000
    assert [str(failure) for failure in outcomes if failure] == []


def test_random_calls():
    """A wrong argument among right ones, and calls in which all is right."""
    outcomes = itertools.islice(random_calls(seed=0), 5000)
    assert [str(failure) for failure in outcomes if failure] == []
