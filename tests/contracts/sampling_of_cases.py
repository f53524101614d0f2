"""Which cases of the methods a contract sees by default.

Every contract sees every method, once or more, and in another of its cases from contract to contract, so that every
case is seen by some. What the base class does alone, a few methods show: such contracts are ``sparse``.
"""

from __future__ import annotations

from collections import Counter

from method_cases import CASES

#: there are at least so many contracts
CONTRACTS = 12


def sampled(turn: int, every: int = 1) -> set[str]:
    """Names of the cases that the contract number ``turn`` sees by default, of one method in ``every``."""
    numbers = Counter(case.method for case in CASES)
    place: Counter[type] = Counter()
    methods = list(numbers)
    chosen = set()
    for case in CASES:
        period = min(numbers[case.method], CONTRACTS)
        if turn % period == place[case.method] % period and methods.index(case.method) % every == turn % every:
            chosen.add(case.name)
        place[case.method] += 1
    return chosen
