"""Labels and shapes of the data against those of the network, before anything is trained."""

import pytest
import torch
from diffusers import UNet2DModel
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from small_problems import mlp, ready

from lightning_distill.batch import Batch
from lightning_distill.methods import DMD2
from lightning_distill.methods.guards import check_examples, check_trainer
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.processes import FlowMatching


def batch(labels=None, shape=(2,)):
    cond = {} if labels is None else {"class_labels": torch.tensor(labels)}
    return Batch(x0=torch.randn(2, *shape), cond=cond, size=2)


@pytest.mark.parametrize(("labels", "wrong"), [([0, 12], 12), ([3, 0], 3), ([-1, 0], -1)])
def test_labels_that_the_network_does_not_have(labels, wrong):
    with pytest.raises(
        ValueError, match=f"the class label {wrong}; ResidualMLP has the classes 0 to 2, and 3 for none"
    ):
        check_examples(mlp(classes=3), batch(labels), (2,))


def test_labels_that_it_has(recwarn):
    check_examples(mlp(classes=3), batch([0, 2]), (2,))
    check_examples(mlp(), batch(), (2,))
    assert not recwarn.list


def test_missing_labels_and_other_shapes_are_told():
    with pytest.warns(UserWarning, match="knows 3 classes and the batches have no class_labels"):
        check_examples(mlp(classes=3), batch(), (2,))
    with pytest.warns(UserWarning, match=r"samples of shape \(4,\), and the student is sampled in the shape \(2,\)"):
        check_examples(mlp(), batch(shape=(4,)), (2,))


def test_a_null_class_without_a_row():
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        num_class_embeds=3,
    )
    teacher = Denoiser(network, FlowMatching(), "flow_prediction", null_class=9)
    with pytest.raises(ValueError, match="null_class=9, and UNet2DModel has num_class_embeds=3"):
        ready(DMD2(teacher))


def test_averages_of_lightning_are_told():
    callback = StochasticWeightAveraging(swa_lrs=0.1)
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    with pytest.warns(UserWarning, match=r"StochasticWeightAveraging averages every network.*model.init_args.ema"):
        check_trainer(Trainer(callbacks=[callback], **quiet))
