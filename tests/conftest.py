"""Shared test settings: offline, one thread, fixed seed."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_process_group(request):
    """Strategies leave their process group behind, which the next test would take for its own."""
    yield
    if torch.distributed.is_initialized() and "test_role_fsdp2" not in request.node.nodeid:
        torch.distributed.destroy_process_group()
