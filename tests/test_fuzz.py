"""Values and gradients of random calls: `tests.fuzz`."""

import pytest

from tests.fuzz import Ratios, check, draw

CASES = 2000  # `make fuzz` takes those that follow


@pytest.mark.parametrize("cases", [700, pytest.param(CASES, marks=pytest.mark.thorough)])
def test_random_cases(cases):
    """Each within the rule, and all of a kind together no worse than the plain loss on average."""
    ratios, failures = Ratios(), []
    for number in range(cases):
        case = draw(number)
        findings = check(case)
        ratios.add(case, findings)
        failures += [f"{finding} of {case}" for finding in findings if finding.fails]
    assert failures + ratios.failures() == []
    assert len(list(ratios)) >= 16, "too few kinds of results were compared"
