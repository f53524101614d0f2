"""Shared test settings: offline, one thread, fixed seed."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["LIGHTNING_DISTILL_CACHE"] = tempfile.mkdtemp(prefix="cache_")  # not the user's

import pytest
import torch
from old_torch import skip_what_old_torch_cannot
from sampling_of_cases import mark_the_rest

torch.set_num_threads(1)
atexit.register(shutil.rmtree, os.environ["LIGHTNING_DISTILL_CACHE"], ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # before slow tests are deselected
def pytest_collection_modifyitems(items):
    mark_the_rest(items)
    skip_what_old_torch_cannot(items)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_process_group(request):
    """Strategies leave their process group behind, which the next test would take for its own."""
    yield
    if torch.distributed.is_initialized() and "test_role_fsdp2" not in request.node.nodeid:
        torch.distributed.destroy_process_group()
