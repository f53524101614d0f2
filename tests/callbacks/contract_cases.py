"""The configurations and checks of the contract tests, for tests of callbacks on every method."""

from method_cases import CASES, random_weights, trainer
from test_contract_resume import differences
from test_contract_skipping import Synchronisations

__all__ = ["CASES", "Synchronisations", "differences", "random_weights", "trainer"]
