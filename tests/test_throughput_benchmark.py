"""benchmarks/throughput.py: its options reach the networks, limits are judged, and what cannot run is told at once."""

from __future__ import annotations

import importlib.util
import json

import pytest
import real_sizes
import throughput
import torch
from real_sizes import Size

from lightning_distill.guidance import check_guidance
from lightning_distill.networks.quantisation import QuantisedLinear
from lightning_distill.networks.roles import Copy, Lora

SDXL = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 64,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 6,
}


@pytest.fixture
def small(monkeypatch):
    """A small network under the name of SDXL."""
    size = Size("UNet2DConditionModel", SDXL, (4, 8, 8), real_sizes._SD_VP, "epsilon")
    monkeypatch.setitem(real_sizes.SIZES, "sdxl", size)
    return size


@pytest.fixture
def written(monkeypatch, tmp_path):
    """What would be written, by name."""
    content = {}

    def write(what, figures):
        content[what] = json.loads(json.dumps(figures))["rows"]

    monkeypatch.setattr(throughput, "RESULTS", tmp_path)
    monkeypatch.setattr(throughput, "write_result", write)
    return content


def test_defaults_are_what_they_were():
    args = throughput.options([])
    assert (args.networks, args.device, args.batch, args.limits) == (["small_unet"], "cpu", 16, False)
    assert (args.guidance, args.optimizer, args.quantize) == (1.0, "adamw", "none")
    assert [way["weights"] for way in throughput.ways(args)] == ["lora", "lora", "full", "full"]
    assert throughput.options(["sdxl", "--device", "cuda"]).batch == 1


def test_without_a_gpu_the_limits_are_refused_before_anything_is_built(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(throughput, "measure", lambda *_: pytest.fail("something was measured"))
    monkeypatch.setattr(throughput, "build", lambda *_: pytest.fail("something was built"))
    with pytest.raises(SystemExit, match=r"^throughput\.py --limits measures SDXL on a GPU, [^.]*\.$") as stopped:
        throughput.main(["--limits"])
    assert isinstance(stopped.value.code, str)  # which the interpreter prints, and exits with 1


def test_what_needs_torchao_says_so_at_once(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else find(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for words in (["--optimizer", "adamw8bit"], ["--quantize", "nf4"], ["--limits"]):
        with pytest.raises(SystemExit, match="needs torchao; install it with"):
            throughput.options(words)


def test_bad_words_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for words, message in (
        (["--quantize", "int4"], "invalid choice: 'int4'"),
        (["--optimizer", "sgd"], "invalid choice: 'sgd'"),
        (["--limits", "flux"], "--limits measures sdxl, so leave out flux"),
        (["nothing"], "unknown network nothing"),
    ):
        with pytest.raises(SystemExit) as stopped:
            throughput.options(words)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_guidance_optimizer_and_quantised_weights_reach_the_module(small, monkeypatch):
    """The teacher is guided, its blocks are handed over to be quantised, and the optimizer is the 8-bit one."""
    made = []

    class Recorded(torch.optim.AdamW):
        def __init__(self, parameters, lr):
            super().__init__(parameters, lr=lr)
            made.append(self)

    monkeypatch.setattr(throughput, "AdamW8bit", Recorded)
    monkeypatch.setattr(throughput, "require_torchao", lambda what: None)
    monkeypatch.setattr(throughput, "check_quantisation", lambda kind: None)
    quantised = []
    monkeypatch.setattr(real_sizes, "quantise", lambda network, kind, blocks: quantised.append((kind, tuple(blocks))))
    way = throughput.LIMITS[0].way
    args = throughput.options(["sdxl", "--guidance", "7", "--optimizer", "adamw8bit", "--quantize", "int8"])
    module = throughput.method(small, way, args)
    assert module.guidance.scale == 7.0
    assert quantised == [("int8", tuple(module.teacher.family.blocks))]
    module.configure_optimizers()
    assert len(made) == 2
    assert all(optimizer.param_groups[0]["lr"] == throughput.LEARNING_RATE for optimizer in made)
    plain = throughput.method(small, way, throughput.options(["sdxl"]))
    assert plain.guidance.scale == 1.0
    assert len(quantised) == 1
    assert all(type(entry["optimizer"]) is torch.optim.AdamW for entry in plain.configure_optimizers())


def test_int8_weights_of_a_tiny_network(small):
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao, which stores weights in 8 bits, is not installed")
    args = throughput.options(["sdxl", "--guidance", "7", "--quantize", "int8", "--batch", "2"])
    module = throughput.method(small, throughput.LIMITS[1].way, args)
    assert any(isinstance(layer, QuantisedLinear) for layer in module.teacher.network.modules())
    row = throughput.measure("sdxl", throughput.LIMITS[1].way, args)
    assert row["quantize"] == "int8"
    assert row["updates_per_second"] > 0


def test_states_in_8_bits_of_a_tiny_network(small):
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao, whose optimizers keep states in 8 bits, is not installed")
    way = throughput.LIMITS[2].way
    rows = [
        throughput.measure("sdxl", way, throughput.options(["sdxl", "--batch", "2", "--optimizer", optimizer]))
        for optimizer in ("adamw", "adamw8bit")
    ]
    assert rows[1]["floor_bytes"] < 0.8 * rows[0]["floor_bytes"]


def test_every_size_can_be_guided(monkeypatch, small):
    """Zeros stand for conditions that have no unconditional value of their own; classes keep theirs."""
    settings = {"sd3": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "pos_embed_max_size": 8,
                        "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16},
                "wan13": {"num_layers": 1, "num_attention_heads": 1, "ffn_dim": 8, "text_dim": 16},
                "small_unet": {}, "sdxl": {}}  # fmt: skip
    for name, changes in settings.items():
        size = real_sizes.SIZES[name]
        size = Size(size.name, {**size.config, **changes}, size.shape, size.process, size.prediction_type)
        denoiser = real_sizes.build(size)
        check_guidance(denoiser, throughput.Guidance(7.0))
    assert real_sizes.build(real_sizes.SIZES["small_unet"]).num_classes == 10


@pytest.mark.slow
def test_a_guided_row_is_measured(small, written, capsys):
    words = ["sdxl", "--guidance", "3", "--batch", "2", "--weights", "lora", "--checkpointing", "on", "--rank", "2"]
    assert throughput.main([*words, "--blocks", "1", "--block", "1", "--ratio", "1"]) == 0
    (row,) = written["throughput_cpu"]
    assert (row["guidance"], row["optimizer"], row["quantize"], row["what"]) == (
        3.0,
        "adamw",
        "none",
        "lora checkpointing",
    )
    assert row["updates_per_second"] > 0
    assert row["forwards"]["teacher"] == 1  # both branches in one pass
    assert "reserved_bytes" not in row


# ------------------------------------------------------------------------------------------------ limits
def test_the_rows_of_the_limits():
    """Four steps, batch 1, bfloat16, recomputed activations, guidance 7; one row for each of the three cards."""
    args = throughput.options(["sdxl", "--rank", "8"])
    rows = [(limit.apply(args), limit.way) for limit in throughput.LIMITS]
    for at, way in rows:
        assert (at.device, at.dtype, at.batch, at.steps, at.guidance, at.rank) == ("cuda", "bfloat16", 1, 4, 7.0, 8)
        assert way["checkpointing"]
        assert not way["gan"]
    found = [(way["weights"], at.optimizer, at.quantize) for at, way in rows]
    assert found == [("lora", "adamw", "none"), ("lora", "adamw", "int8"), ("full", "adamw8bit", "none")]
    assert [(limit.gigabytes, limit.goal) for limit in throughput.LIMITS] == [(24, False), (16, True), (80, False)]
    assert real_sizes.SIZES["sdxl"].shape == (4, 128, 128)


def test_the_networks_of_the_limits(small, monkeypatch):
    """The same settings on a small network: one frozen bfloat16 backbone, trained weights in float32."""
    monkeypatch.setattr(throughput, "AdamW8bit", torch.optim.AdamW)
    args = throughput.options(["sdxl", "--rank", "2"])
    for limit in (throughput.LIMITS[0], throughput.LIMITS[2]):
        at = limit.apply(args)
        at.device = "cpu"
        module = throughput.method(small, limit.way, at)
        shared = module.student.network is module.teacher.network
        assert shared == (limit.weights == "lora")
        assert isinstance(module._student_role, Lora if shared else Copy)
        assert module.activation_checkpointing
        frozen = [p for p in module.teacher.parameters() if not p.requires_grad]
        assert {p.dtype for p in frozen} >= {torch.bfloat16}
        trained = [p for role in ("student", "fake_score") for p in module.role_parameters(role)]
        assert {p.dtype for p in trained} == {torch.float32}


@pytest.mark.sparse(3)
@pytest.mark.parametrize(
    ("peaks", "status", "words"),
    [
        ((20e9, 15e9, 60e9), 0, ["PASS", "PASS", "PASS"]),
        ((24e9, 16.1e9, 80e9), 0, ["PASS", "MISS", "PASS"]),
        ((24.1e9, 12e9, None), 1, ["FAIL", "PASS", "FAIL"]),
    ],
)
def test_limits_are_judged(monkeypatch, written, capsys, tmp_path, peaks, status, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(throughput, "require_torchao", lambda what: None)
    left = iter(peaks)

    def measure(name, way, args):
        assert args.device == "cuda"
        peak = next(left)
        row = {"network": name, "what": way["weights"]}
        return row | ({"out_of_memory": True} if peak is None else {"peak_bytes": int(peak)})

    monkeypatch.setattr(throughput, "measure", measure)
    earlier = [{"network": "sdxl", "what": "kept"}, {"network": "sdxl", "what": "old", "limit": "LoRA"}]
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "throughput_gpu.json").write_text(json.dumps({"rows": earlier}))
    assert throughput.main(["--limits"]) == status
    rows = written["throughput_gpu"]
    assert [row["what"] for row in rows] == ["kept", "lora", "lora", "full"]
    assert [row["within_limit"] for row in rows[1:]] == [word == "PASS" for word in words]
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:4] in ("PASS", "MISS", "FAIL")]
    assert [line[:4] for line in lines] == words
    assert "LoRA, 8-bit frozen weights" in lines[1]
    assert "goal 16 GB" in lines[1]
    assert ("out of memory" in lines[2]) == (peaks[2] is None)


def test_an_ordinary_run_keeps_the_rows_of_the_limits():
    rows = [{"network": "sdxl", "limit": "LoRA"}, {"network": "sdxl"}, {"network": "sd3"}]
    assert throughput.kept(rows, throughput.options(["sdxl"])) == [rows[0], rows[2]]
