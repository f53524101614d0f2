"""What tells one object from another in the keys of kept figures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lightning_distill.evaluation.teacher import baseline_key
from lightning_distill.guidance import Guidance
from lightning_distill.metrics import ModuleExtractor
from lightning_distill.metrics.contents import content
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.processes import EDM, TrigFlow, VariancePreserving


class Mode(Enum):
    NEAREST, LINEAR = "nearest", "linear"


@dataclass
class Resize:
    size: int
    mode: Mode = Mode.NEAREST


class Picture(nn.Module):
    """An extractor with a setting of every kind."""

    num_features = 4

    def __init__(self, **settings) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 4, 3, stride=settings.pop("stride", 1))
        with torch.no_grad():
            self.layer.weight.fill_(settings.pop("weight", 1.0))
            self.layer.bias.zero_()
        self.register_buffer("centre", torch.tensor(settings.pop("centre", 0.5)), persistent=False)
        self.transforms = [Resize(settings.pop("size", 8), settings.pop("mode", Mode.NEAREST)), nn.ReLU()]
        self.mean = settings.pop("mean", np.zeros(3))
        self.norm = settings.pop("norm", partial(torch.sub, other=1))
        self.names = settings.pop("names", {"a"})
        assert not settings

    def forward(self, images):
        return self.layer(images).mean((2, 3))


CHANGES: dict[str, dict[str, Callable[[], object]]] = {
    "stride": {"stride": lambda: 2},
    "weight": {"weight": lambda: 2.0},
    "buffer_that_is_not_saved": {"centre": lambda: 0.4},
    "setting_of_a_part": {"size": lambda: 16},
    "choice_of_a_part": {"mode": lambda: Mode.LINEAR},
    "array": {"mean": lambda: np.array([0.0, 0.0, 0.1])},
    "bound_argument": {"norm": lambda: partial(torch.sub, other=2)},
    "function": {"norm": lambda: partial(torch.add, other=1)},
    "set": {"names": lambda: {"b"}},
}


@pytest.mark.parametrize("name", CHANGES)
def test_extractors_are_told_apart_by_weights_and_settings(name):
    settings = {key: make() for key, make in CHANGES[name].items()}
    assert ModuleExtractor(Picture(**settings)).key != ModuleExtractor(Picture()).key


def test_equal_extractors_have_one_key():
    first, second = ModuleExtractor(Picture()), ModuleExtractor(Picture())
    second.build()(torch.zeros(2, 1, 8, 8))  # frozen and in evaluation mode
    assert first.key == second.key


def test_objects_within_each_other_end():
    inner = Resize(1)
    inner.size = inner
    assert content(inner) == content(inner)
    assert content(Resize(3)) != content(Resize(4))


@pytest.mark.long
def test_other_processes_find_the_same(capsys):
    code = (
        "import torch; from lightning_distill.metrics.contents import content;"
        "from lightning_distill.networks.families import family_of;"
        "print(repr(content((family_of(torch.nn.Linear(2, 2)), {'b', 'a', 'c'}, lambda x: x, object()))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    exec(code, {"__name__": "__main__"})
    assert done.stdout == capsys.readouterr().out != ""
    assert "0x" not in done.stdout


# ------------------------------------------------------------------------------------------------ of teachers
class Told(nn.Module):
    def forward(self, x, t, emb=None):
        return x


def called(process=None, sampling_guidance=None, jumps=False, **settings):
    denoiser = Denoiser(Told(), process or EDM(), "v_prediction", **settings)
    denoiser.sampling_guidance, denoiser.jumps = sampling_guidance, jumps
    return denoiser


#: how teachers of the same weights may be called
CALLED = {
    "plainly": {},
    "null_condition_1": {"null_cond": {"emb": torch.zeros(1, 2)}},
    "null_condition_2": {"null_cond": {"emb": torch.ones(1, 2)}},
    "null_number": {"null_cond": {"emb": 1.0}},
    "null_class_5": {"null_class": 5},
    "null_class_6": {"null_class": 6},
    "told_3.5": {"guidance": 3.5},
    "told_7": {"guidance": 7.0},
    "sigma_data": {"sigma_data": 0.5, "data_scale": 1.0},
    "inner_process_1": {"network_process": TrigFlow()},
    "inner_process_0.5": {"network_process": TrigFlow(), "sigma_data": 0.5},
    "data_scale": {"network_process": TrigFlow(), "sigma_data": 0.5, "data_scale": 1.0},
    "own_guidance_2": {"sampling_guidance": Guidance(2.0)},
    "own_guidance_3": {"sampling_guidance": Guidance(3.0)},
    "jumps": {"jumps": True},
    "sigma_max": {"process": EDM(sigma_max=70.0)},
}


def test_the_key_of_a_teachers_row_knows_how_the_teacher_is_called():
    def keys():
        return {name: baseline_key("f", called(**how), 8, 3.0, 10, 0, "w", (2,)) for name, how in CALLED.items()}

    first = keys()
    assert keys() == first
    assert len(set(first.values())) == len(CALLED)
    table = torch.linspace(0.99, 0.01, 2000)
    tables = [table, table.clone(), table.clone()]
    tables[2][700] += 1e-4
    given = [called(VariancePreserving.from_alphas_cumprod(t)) for t in tables]
    found = [baseline_key("f", teacher, 8, 3.0, 10, 0, "w", (2,)) for teacher in given]
    assert found[0] == found[1] != found[2]
