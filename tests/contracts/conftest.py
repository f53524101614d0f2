"""Parametrises every contract test over the cases of all methods."""

from __future__ import annotations

import logging

import pytest
from method_cases import CASES, Case

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=lambda case: f"{case.method.__name__}-{case.name}")


@pytest.fixture
def build(case: Case, tmp_path):
    """Builds the case's method with its networks."""
    return lambda **overrides: case.build(tmp_path, **overrides)
