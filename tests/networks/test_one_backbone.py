"""Three networks and an average on one copy of the weights."""

from __future__ import annotations

import pytest
import torch
from family_runs import build
from tiny_pipelines import MAKERS

from lightning_distill.ema import ConstantEMA
from lightning_distill.guidance import Guidance
from lightning_distill.methods import DMD2
from lightning_distill.networks.lora import AdapterDenoiser
from lightning_distill.networks.merging import base_state_dict


def storages(module: torch.nn.Module) -> dict[int, int]:
    """Bytes of every piece of memory that parameters and buffers lie in, by its address."""
    tensors = [*module.parameters(), *module.buffers()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


@pytest.mark.parametrize("name", ["sdxl", "flux", "wan"])
def test_every_weight_of_the_backbone_is_in_memory_once(name, tmp_path):
    tiny = MAKERS[name]()
    averages = {"ema": [ConstantEMA(0.9)], "guidance": Guidance(2.0) if tiny.guidance is None else Guidance(1.0)}
    module = build(DMD2, tiny, tmp_path, lora=True, **averages)
    module.configure_model()
    roles = [module.teacher, module.student, module.fake_score, module.sampling_network("constant_0_9")]
    assert sum(isinstance(role, AdapterDenoiser) for role in roles) == 3
    original = {v.untyped_storage().data_ptr() for v in base_state_dict(module.teacher.network).values() if v.numel()}
    for role in roles:
        assert original <= storages(role.network).keys()
    adapters = [role.adapter_state_dict().values() for role in roles[1:]]
    own = sum(v.numel() * v.element_size() for values in adapters for v in values)
    backbone = sum(size for address, size in storages(module.teacher.network).items() if address in original)
    everything = storages(module)
    for role in roles:
        everything |= storages(role.network)
    assert sum(everything.values()) <= 1.1 * backbone + own  # unconditional embeddings and counters
    assert own < 0.9 * backbone
