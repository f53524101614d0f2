"""Every shipped configuration runs through the real command line, offline, and prints itself faithfully."""

import importlib
import json
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import tiny_text
import torch
import yaml
from emoji_package import package
from PIL import Image
from recipe_stand_ins import stand_in
from safetensors.torch import save_file
from sampling_of_cases import long, slow
from shipped import COMPLETE, FILES, load

from lightning_distill.cli import main, trainer_cli
from lightning_distill.configs import config_path
from lightning_distill.data.emoji import emoji_pictures
from lightning_distill.data.store import StoreWriter
from lightning_distill.networks.specs import ZooDenoiser, same_path

#: networks for pictures of 28 or 32 pixels
LARGE = [f for f in FILES if "fashion" in f or "emoji" in f]
SMALL = [f for f in FILES if f not in LARGE and f != "quickstart.yaml"]
#: a store of trajectories, the run of a teacher, a strategy beside a method, and training from data
ALWAYS = (
    *("method/knowledge_distillation_fashion.yaml", "method/yonos_digits.yaml"),
    *("strategy/role_fsdp2.yaml", "teacher/digits.yaml"),
)
#: words that fit a recipe to its tiny model
FITTING: list[str] = []
#: small stores by the command that makes them
STORES: dict[str, Path] = {}
TINY = ["--trainer.fast_dev_run=true", "--data.init_args.batch_size=4"]


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    """Tiny stand-ins for the data that configurations name, made once."""
    folder = tmp_path_factory.mktemp("stand_ins")
    generator = np.random.default_rng(0)
    # about the mean and the spread of Fashion-MNIST
    images = np.where(generator.random((64, 28, 28)) < 0.3645, 200, 0).astype(np.uint8)
    labels = (np.arange(64) % 10).astype(np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
        (folder / f"train-{name}-ubyte").write_bytes(header + array.tobytes())
    (folder / "images").mkdir()
    for index in range(16):
        picture = generator.integers(0, 256, (64, 64, 3)).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"images/{index}.png")
    save_file({"noise": torch.randn(16, 1, 8, 8), "x0": 0.5 * torch.randn(16, 1, 8, 8)}, folder / "pairs.safetensors")
    made = {"kind": "trajectories", "teacher": "", "cond": "none", "num_classes": None, "point_times": []}
    StoreWriter(folder / "trajectories", {**made, "shape": [1, 8, 8], "sigma_data": 0.5}, 16).write(
        0, {"noise": torch.randn(16, 1, 8, 8), "x0": 0.5 * torch.randn(16, 1, 8, 8)}
    )
    texts_and_latents(folder)
    return folder


@pytest.fixture(autouse=True)
def files(tmp_path, tmp_path_factory, stand_ins, monkeypatch, request):
    """The current folder holds the data and the runs that configurations name."""
    shutil.copytree(stand_ins, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_DISTILL_DATA", str(tmp_path))
    monkeypatch.setenv("LIGHTNING_DISTILL_CACHE", str(tmp_path / "cache"))
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    FITTING.clear()
    if name and name.startswith("recipe/"):
        FITTING.extend(stand_in(load(name)))
    if name and "class_path: SolvedPairs" in config_path(name).read_text():
        FITTING.append("--model.init_args.regression_pairs.init_args.num=8")
    if name and "class_path: VDOT" in config_path(name).read_text():
        FITTING.append("--model.init_args.group_size=4")  # of the four samples of these runs
    for role, spec in (("teacher", "RunDenoiser"), ("student", "FromCheckpoint")):
        if name and not name.startswith("recipe/") and f"class_path: {spec}" in config_path(name).read_text():
            run_before(load(name)["model"]["init_args"][role]["init_args"]["path"], tmp_path_factory)
    if name and "# Trajectories:" in config_path(name).read_text():
        link_store(config_path(name).read_text(), tmp_path_factory)


def run_before(path, folders):
    """One update of the configuration whose run another one names."""
    folder = next(f for f in ("teacher", "method") if f"{f}/{Path(path).name}.yaml" in FILES)
    before = config_path(f"{folder}/{Path(path).name}.yaml")
    if "# Trajectories:" in before.read_text():
        link_store(before.read_text(), folders)
    words = ["fit", "-c", str(before), "--data.init_args.batch_size=4", "--trainer.max_steps=1"]
    trainer_cli([*words, "--trainer.enable_progress_bar=false"])
    assert Path(path).is_dir(), "the run of the configuration of that name"


def link_store(text, folders):
    """A few records by the command that a configuration's comment names, made once."""
    command = re.search(r"# Trajectories: lightning-distill ((?:.*\\\n#)*.*)", text).group(1).replace("\\\n#", " ")
    if command not in STORES:
        STORES[command] = folders.mktemp("store") / "store"
        assert main([*command.split(), "--num=16", f"--out={STORES[command]}"]) == 0
    words = command.split()
    folder = Path(words[words.index("--out") + 1])
    folder.parent.mkdir(exist_ok=True)
    folder.symlink_to(STORES[command])


def texts_and_latents(folder):
    """Stores of embeddings and of latents, the emoji package and a text model."""
    package(folder / "package", count=8)
    tiny_text.bert(folder / "text_encoder")
    tokens = {"encoder_hidden_states": torch.randn(16, 5, tiny_text.WIDTH)}
    StoreWriter(folder / "store", {}, 16).write(0, tokens)
    StoreWriter(folder / "latents", {}, 16).write(0, {**tokens, "x0": torch.randn(16, 4, 8, 8)})
    captions = [{"prompt": picture.caption} for picture in emoji_pictures(folder / "package")]
    wide = {"encoder_hidden_states": torch.randn(len(captions), 4, 384)}
    for name in ("caches/emoji", "caches/emoji_train"):
        StoreWriter(folder / name, {}, len(captions)).write(0, wide, captions)
    save_file({"encoder_hidden_states": torch.randn(1, 4, 384)}, folder / "caches/emoji/null_cond.safetensors")


def added_to(name):
    """Command line of a partial configuration, together with the run it is added to."""
    kind = name.split("/")[0]
    if kind == "strategy":
        return ["-c", str(config_path("method/dmd2_ring4.yaml")), "-c", str(config_path(name)), "--trainer.devices=1"]
    assert kind == "data", f"configs/{kind} is a new folder: say here how its files are run"
    data = load(name)["data"]
    module, _, cls = data["class_path"].rpartition(".")
    source = getattr(importlib.import_module(module), cls)(**data["init_args"])
    shape, classes = getattr(source, "shape", (1, 32, 32)), source.num_classes or 0
    network = {"class_path": "ResidualMLP", "init_args": {"shape": list(shape), "width": 8, "depth": 1}}
    network["init_args"]["num_classes"] = classes
    if hasattr(source, "cond_keys"):  # conditioned on text
        shape = getattr(source, "shape", (4, 8, 8))
        network = {"class_path": "diffusers.UNet2DConditionModel", "init_args": text_unet(shape)}
    new = {
        "network": network,
        "process": "FlowMatching",
        "prediction_type": "flow_prediction",
        "sigma_data": getattr(source, "sigma_data", 1.0),
    }
    spec = {"class_path": "NewDenoiser", "init_args": new}
    model = {"class_path": "TeacherTraining", "init_args": {"network": spec}}
    if cls in ("Prior", "CachedConditions"):  # without data there is nothing to train a teacher on
        role = {"class_path": "Explicit", "init_args": {"spec": spec}}
        model = {"class_path": "DMD2", "init_args": {"teacher": spec, "student": role, "fake_score": role}}
    workers = ["--data.init_args.num_workers=0"] if "num_workers" in data["init_args"] else []
    Path("model.yaml").write_text(yaml.safe_dump({"trainer": {"accelerator": "cpu"}, "model": model}))
    return ["-c", str(config_path(name)), "-c", "model.yaml", *workers]


def text_unet(shape):
    """Settings of a small network that is conditioned on the stand-ins' embeddings."""
    blocks = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    sizes = {"sample_size": shape[-1], "in_channels": shape[0], "out_channels": shape[0], "block_out_channels": [8]}
    widths = {"cross_attention_dim": tiny_text.WIDTH, "attention_head_dim": 2, "norm_num_groups": 2}
    return {**blocks, **sizes, **widths, "layers_per_block": 1}


def words(name):
    return ["-c", str(config_path(name)), *FITTING] if name in COMPLETE else added_to(name)


def thinned(files, every):
    """CI runs one in so many, ``make test`` one in four of these."""

    def case(index, file):
        if file in ALWAYS or index % (4 * every) == 0:
            return file
        return slow(file) if index % every else long(file)

    return [case(*given) for given in enumerate(files)]


@pytest.mark.parametrize("name", [*thinned(SMALL, 7), *thinned(LARGE, 10), slow("quickstart.yaml")])
def test_runs(name):
    cli = trainer_cli(["fit", *words(name), *TINY, "--trainer.accelerator=cpu"])
    assert cli.trainer.global_step == 1


@pytest.mark.sparse(40, test=3)
@pytest.mark.parametrize("name", FILES)
def test_prints_itself(name, capsys):
    assert main(["fit", *words(name), "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["model"]["class_path"].startswith("lightning_distill.methods.")
    Path("printed.yaml").write_text(printed)
    assert main(["fit", "-c", "printed.yaml", "--print_config"]) == 0
    again = yaml.safe_load(capsys.readouterr().out)
    again["trainer"]["logger"]["init_args"]["name"] = yaml.safe_load(printed)["trainer"]["logger"]["init_args"]["name"]
    assert again == yaml.safe_load(printed)


def test_the_teacher_network_is_the_shipped_one():
    cli = trainer_cli(["fit", *words("teacher/fashion_vp.yaml"), *TINY, "--trainer.accelerator=cpu"])
    trained = cli.model.student
    shipped = ZooDenoiser("fashion").build()
    assert type(trained.network) is type(shipped.network)
    settings = [json.loads(d.network.to_json_string()) for d in (trained, shipped)]
    ours, theirs = ({k: v for k, v in config.items() if not k.startswith("_")} for config in settings)
    assert ours == theirs
    assert same_path(trained.process, shipped.process)
    assert trained.prediction_type == shipped.prediction_type
    assert (trained.sigma_data, trained.null_class) == (shipped.sigma_data, shipped.null_class)
