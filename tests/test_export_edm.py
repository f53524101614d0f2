"""Students of EDM's network in stock ConsistencyModelPipeline."""

import json

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, DDPMPipeline, EDMEulerScheduler
from recipe_stand_ins import edm

from lightning_distill.export import export_denoiser, export_pipeline, verify_export
from lightning_distill.generation import draw_noise, generate
from lightning_distill.networks.specs import PretrainedDenoiser
from lightning_distill.processes import EDM
from lightning_distill.times import few_step_times

LABELS = torch.tensor([3, 0, 999])


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    ConsistencyModelPipeline(edm().network, CMStochasticIterativeScheduler()).save_pretrained(folder)
    return PretrainedDenoiser(str(folder)).build()


def samples(student, times, seed=5):
    generator = torch.Generator().manual_seed(seed)
    noise = draw_noise((3, *student.sample_shape), generator)
    return generate(student, noise, {"class_labels": LABELS}, times, "renoise", generator=generator)


@pytest.mark.parametrize(
    "times",
    [[80.0], [2.5], few_step_times(EDM(), 2), few_step_times(EDM(), 4), [80.0, 1.526], [80.0, 24.4, 5.84, 0.9]],
    ids=["1", "sid", "2", "4", "given-2", "given-4"],
)
def test_exported_students_make_the_same_images(tmp_path, student, times):
    folder = export_denoiser(student, times, "renoise", tmp_path / "out")
    expected = samples(student, times)
    assert float(expected.abs().max()) > 0.05
    assert verify_export(folder, expected, seed=5, class_labels=LABELS) < 1e-5
    with pytest.raises(ValueError, match="makes other images"):
        verify_export(folder, samples(student, [t * 0.9 for t in times]), seed=5, class_labels=LABELS)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "ConsistencyModelPipeline"
    assert index["scheduler"] == ["diffusers", "CMStochasticIterativeScheduler"]
    # the export is itself a folder of EDM's network, at the levels of the student
    again = PretrainedDenoiser(str(folder)).build()
    assert again.process.sigma_max == pytest.approx(times[0])


def test_what_the_pipeline_cannot_do_is_refused(tmp_path, student):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"fresh noise in every step.*sampler='renoise'"):
        export_denoiser(student, [80.0, 2.5], "ode", out)
    with pytest.raises(ValueError, match=r"lie on no grid of the stock CMStoch.*few_step_times\(EDM\(\), 3\)"):
        export_denoiser(student, [80.0, 3.14159265, 0.57721566], "renoise", out)
    with pytest.raises(ValueError, match=r"starts from 1 x noise at sigma = 80"):
        export_pipeline(
            student.network, student.network_process, "v_prediction", [80.0], "renoise", out, start_scale=1.0
        )
    for kind, message in (("epsilon", r"told 0\.25 ln sigma.*export_weights"), ("v_prediction", "has the other sign")):
        folder = tmp_path / kind
        DDPMPipeline(edm().network, EDMEulerScheduler(prediction_type=kind)).save_pretrained(folder)
        with pytest.raises(ValueError, match=message):
            export_denoiser(PretrainedDenoiser(str(folder)).build(), [80.0], "renoise", out)
    assert not out.exists()
