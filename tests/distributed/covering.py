"""Few cases that together hold every pair of values of any two dimensions."""

import itertools
import random
from collections.abc import Callable

Case = dict[str, object]
TRIES = 50  # random cases of which the best one is kept


def covering(dimensions: dict[str, tuple], allowed: Callable[[Case], bool], seed: int) -> list[Case]:
    """Random cases until every pair of values that `allowed` lets in is in one of them."""
    generator = random.Random(seed)
    missing, cases = every_pair(dimensions), []
    while missing:
        pair = generator.choice(sorted(missing, key=repr))
        drawn = [{name: generator.choice(values) for name, values in dimensions.items()} for _ in range(TRIES)]
        drawn = [case for case in ({**case, **dict(pair)} for case in drawn) if allowed(case)]
        if drawn:
            cases.append(max(drawn, key=lambda case: len(missing & pairs(case))))
            missing -= pairs(cases[-1])
        missing.discard(pair)
    return cases


def pairs(case: Case) -> set[tuple]:
    return set(itertools.combinations(case.items(), 2))


def every_pair(dimensions: dict[str, tuple]) -> set[tuple]:
    values = [[(name, value) for value in values] for name, values in dimensions.items()]
    return {pair for first, second in itertools.combinations(values, 2) for pair in itertools.product(first, second)}
