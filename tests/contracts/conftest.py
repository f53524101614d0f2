"""Parametrises every contract test over the cases of all methods."""

from __future__ import annotations

import logging

import pytest
from method_cases import CASES, Case

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    own = any("case" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "case" in metafunc.fixturenames and not own:
        metafunc.parametrize("case", CASES, ids=lambda case: f"{case.method.__name__}-{case.name}")


@pytest.fixture
def build(case: Case, tmp_path):
    """Builds the case's method with its networks."""
    return lambda **overrides: case.build(tmp_path, **overrides)
