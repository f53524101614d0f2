"""Prompts divided by their embeddings, and the experts for each group."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from tiny_pipelines import MAKERS

from lightning_distill.data.store import StoreWriter
from lightning_distill.methods import DMD2, MSD
from lightning_distill.networks.adversary import Adversary
from lightning_distill.networks.experts import Experts, PromptExperts
from lightning_distill.networks.prompt_groups import centres, group_of, k_means, prompt_features, read_centres
from lightning_distill.randomness import Draws


def clouds(n=60, spread=0.05):
    """Points around three directions, and which each belongs to."""
    directions = torch.eye(4)[:3]
    owner = torch.arange(n) % 3
    points = directions[owner] + spread * torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(points, dim=1), owner


@pytest.mark.parametrize("seed", range(5))
def test_k_means_finds_clouds(seed):
    points, owner = clouds()
    middles = k_means(points, 3, seed)
    found = group_of(points, middles)
    names = {int(found[i]): int(owner[i]) for i in range(3)}
    assert sorted(names.values()) == [0, 1, 2]
    assert [names[int(k)] for k in found] == owner.tolist()
    # the middle of a group is the mean of what it owns, and groups are a partition
    for k in range(3):
        torch.testing.assert_close(middles[k], points[found == k].mean(0))
    assert torch.equal(k_means(points, 3, seed), middles)


def test_as_many_groups_as_points_and_no_more():
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert sorted(k_means(points, 2).tolist()) == [[0.0, 1.0], [1.0, 0.0]]
    with pytest.raises(ValueError, match="3 groups of 2 different prompts: give 1 to 2"):
        k_means(points, 3)


def test_features_are_the_pooled_embedding_or_the_mean_of_seen_tokens():
    tokens = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    mean = torch.stack([tokens[0, :2].mean(0), tokens[1].mean(0)])
    unit = torch.nn.functional.normalize(mean, dim=1)
    torch.testing.assert_close(prompt_features({"encoder_hidden_states": tokens, "encoder_attention_mask": mask}), unit)
    pooled = torch.randn(2, 5)
    for cond in ({"pooled_projections": pooled}, {"added_cond_kwargs": {"text_embeds": pooled}}):
        found = prompt_features({"encoder_hidden_states": tokens, **cond})
        torch.testing.assert_close(found, torch.nn.functional.normalize(pooled, dim=1))
    with pytest.raises(ValueError, match="there is none among class_labels"):
        prompt_features({"class_labels": torch.arange(2)})


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "pixart_sigma"])
def test_each_prompt_goes_to_the_expert_of_its_group(name):
    tiny = MAKERS[name]()
    teacher, cond = tiny.denoiser(), tiny.cond(6)
    middles = k_means(prompt_features(cond), 2)
    owner = group_of(prompt_features(cond), middles)
    assert owner.unique().numel() == 2
    role = Experts(classes=[[0], [1]])
    role.classes, role.prompts, role._centres = None, "given", lambda _path: middles
    student = role.build(teacher, "student")
    x, t = torch.randn(6, *tiny.shape), torch.linspace(0.2, 0.9, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(student(x, t, cond).x0, teacher(x, t, cond).x0, rtol=1e-4, atol=1e-4)
        for parameter in student.network.experts[1].parameters():
            parameter.mul_(0.9)
        made, plain = student(x, t, cond).x0, teacher(x, t, cond).x0
    moved = (made - plain).flatten(1).abs().amax(1)
    assert (moved[owner == 1] > 1e-3).all()
    assert (moved[owner == 0] < 1e-3).all()


@pytest.fixture
def store(tmp_path):
    """Embeddings of six prompts for the tiny Stable Diffusion, in two groups."""
    cond = MAKERS["sd15"]().cond(6)
    rows = cond["encoder_hidden_states"]
    rows = rows[:1] * torch.tensor([1, -1, 1, 1, -1, 1.0])[:, None, None] + 0.01 * rows
    writer = StoreWriter(tmp_path / "store", {"kind": "cache"}, 6, 6)
    writer.write(0, {"encoder_hidden_states": rows})
    return str(tmp_path / "store"), rows


def test_multi_student_distillation_divides_the_prompts_of_a_store(store):
    path, rows = store
    tiny = MAKERS["sd15"]()
    module = MSD(tiny.denoiser(), prompts=path, count=2, shape=list(tiny.shape), fake_score_steps=1, ema=[])
    module.configure_model()
    for role in (module.student, module.fake_score):
        assert isinstance(role.network, PromptExperts)
    torch.testing.assert_close(module.student.network.centres, centres(path, 2))
    owner = group_of(prompt_features({"encoder_hidden_states": rows}), module.student.network.centres)
    assert owner.tolist() in ([0, 1, 0, 0, 1, 0], [1, 0, 1, 1, 0, 1])
    # prompts of one group train its expert alone
    from lightning_distill.batch import Batch

    own = owner == owner[0]
    module.draws = Draws(module.streams, 0, 0, "student0", 0)
    module.student_loss(Batch(cond={"encoder_hidden_states": rows[own]}, size=4)).losses["matching"].backward()
    trained = [any(p.grad is not None for p in expert.parameters()) for expert in module.student.network.experts]
    assert trained == [k == int(owner[0]) for k in range(2)]
    # the division is kept with the weights
    assert "student.network.centres" in module.state_dict()


def test_bad_input_is_named(store, tmp_path):
    path, _ = store
    tiny = MAKERS["sd15"]()
    with pytest.raises(ValueError, match="needs one of boundaries"):
        Experts(classes=[[0], [1]], prompts=path).check()
    with pytest.raises(ValueError, match="divides by classes or by prompts"):
        MSD(tiny.denoiser(), prompts=path, classes=[[0], [1]])
    with pytest.raises(ValueError, match="several fake scores, whose features cannot be read"):
        MSD(tiny.denoiser(), prompts=path, gan=Adversary(taps=["mid_block"]))
    with pytest.raises(ValueError, match="9 groups of 6 different prompts"):
        DMD2(tiny.denoiser(), student=Experts(prompts=path, count=9), shape=list(tiny.shape)).configure_model()
    with pytest.raises(FileNotFoundError, match="give a safetensors file with the tensor 'centres'"):
        read_centres(str(tmp_path / "nothing.safetensors"))
    save_file({"other": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"has no tensor 'centres' of shape \(groups, width\)"):
        read_centres(str(tmp_path / "other.safetensors"))
