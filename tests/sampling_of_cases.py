"""Which cases ``make test`` runs; CI runs the ``long`` ones too, and ``make matrix`` the ``slow`` ones, thus every one.

Of a test with ``@pytest.mark.sparse(n, test=m)``, CI runs every nth case, by its position, and ``make test`` every mth
of these, by default all (``mark_the_rest``).
Contracts are parametrised over all methods: a contract sees a share of the methods, another one from contract to
contract (``sampled``), so that every method meets several contracts and every case is met by some. Positions alone
decide, which are the same in every process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

#: there are at least so many contracts
CONTRACTS = 15
#: a contract sees one method in so many by default
METHODS = 5


def slow(case: Any) -> Any:
    """The case (a value or a ``pytest.param``) for ``parametrize``, marked slow."""
    given = case if hasattr(case, "marks") else pytest.param(case)
    return pytest.param(*given.values, marks=[*given.marks, pytest.mark.slow], id=given.id)


def long(*values: Any) -> Any:
    """The case of these values for ``parametrize``, marked long."""
    return pytest.param(*values, marks=pytest.mark.long)


def mark_the_rest(items: Iterable[pytest.Item]) -> None:
    """Keep every nth case of each test that is ``sparse(n)``; with stacked lists, let n share no factor with them."""
    place: Counter[tuple[str, str]] = Counter()
    for item in items:
        sparse = item.get_closest_marker("sparse")
        if sparse is None or "contracts" in item.path.parts:
            continue
        key = (str(item.path), getattr(item, "originalname", item.name))
        nth, other = divmod(place[key], sparse.args[0])
        if other:
            item.add_marker(pytest.mark.slow)
        elif nth % sparse.kwargs.get("test", 1):
            item.add_marker(pytest.mark.long)
        place[key] += 1


def sampled(cases: Sequence[Any], turn: int, every: int = METHODS) -> set[str]:
    """Names of the cases that the contract number ``turn`` sees by default, of one method in ``every``.

    Args:
        cases: all cases of all methods.
        turn: number of the contract, from 0.
        every: of so many methods one is seen.
    """
    numbers = Counter(case.method for case in cases)
    place: Counter[type] = Counter()
    methods = list(numbers)
    rounds = max(1, CONTRACTS // every)  # a method meets so many contracts at least
    chosen = set()
    for case in cases:
        period = min(numbers[case.method], rounds)
        if methods.index(case.method) % every == turn % every and (turn // every - place[case.method]) % period == 0:
            chosen.add(case.name)
        place[case.method] += 1
    return chosen
