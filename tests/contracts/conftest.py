"""Parametrises every contract test over the cases of all methods; pairs that are not ``sampled`` are ``slow``."""

from __future__ import annotations

import logging

import pytest
from method_cases import CASES, Case
from sampling_of_cases import sampled, slow

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

_TURNS: dict[str, int] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    own = any("case" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "case" in metafunc.fixturenames and not own:
        sparse = metafunc.definition.get_closest_marker("sparse")
        turn = _TURNS.setdefault(metafunc.definition.name, len(_TURNS))
        chosen = sampled(CASES, turn, *(sparse.args if sparse else ()))
        params = [pytest.param(case, id=f"{case.method.__name__}-{case.name}") for case in CASES]
        metafunc.parametrize("case", [p if p.values[0].name in chosen else slow(p) for p in params])


@pytest.fixture
def build(case: Case, tmp_path):
    """Builds the case's method with its networks."""
    return lambda **overrides: case.build(tmp_path, **overrides)
