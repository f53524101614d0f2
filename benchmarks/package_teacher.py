"""Put a trained teacher into the zoo: weights in bfloat16, its scheduler, and a card with measured figures.

    python benchmarks/package_teacher.py RUN_DIR fashion

The figures are those of the shipped (rounded) weights: distances at 1, 2, 4, 8 and 50 Euler steps on the uniform grid,
without guidance, with fixed noise. The card also says whether the teacher passes the gate: FD(50) <= 1.05 FD(8), and
FD(50) <= 10 times the distance of as many real images.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lightning_distill import checkpoints
from lightning_distill.evaluation.evaluator import Evaluator
from lightning_distill.evaluation.runner import EvaluationRunner
from lightning_distill.metrics.extractors import ZooClassifier
from lightning_distill.metrics.reference import load_reference
from lightning_distill.networks.denoiser import Denoiser
from lightning_distill.networks.specs import ZooDenoiser
from lightning_distill.processes import FlowMatching, VariancePreserving
from lightning_distill.times import few_step_times
from lightning_distill.zoo import zoo_path


def write_weights(denoiser: Denoiser, folder: Path, card: dict[str, Any]) -> None:
    """Weights (and for diffusers networks a loadable pipeline) in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    network, process = denoiser.network, denoiser.process
    if hasattr(network, "save_pretrained"):
        from diffusers import ConsistencyModelPipeline, FlowMapEulerDiscreteScheduler, LCMScheduler

        if isinstance(process, VariancePreserving):
            scheduler = LCMScheduler(
                beta_schedule=process.beta_schedule,
                beta_start=process.beta_start,
                beta_end=process.beta_end,
                rescale_betas_zero_snr=process.zero_terminal_snr,
                prediction_type=denoiser.prediction_type,
                clip_sample=False,
                original_inference_steps=50,
            )
        else:
            assert isinstance(process, FlowMatching)
            scheduler = FlowMapEulerDiscreteScheduler(shift=process.shift)
        pipeline = ConsistencyModelPipeline(unet=network.to(torch.bfloat16), scheduler=scheduler)
        pipeline.save_pretrained(folder, safe_serialization=True)
    else:
        save_file({k: v.to(torch.bfloat16) for k, v in network.state_dict().items()}, folder / "model.safetensors")
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")


def measure(name: str, samples: int, seed: int) -> dict[str, Any]:
    """Figures of a zoo teacher at several numbers of Euler steps, in both extractors of its data set, in float32."""
    teacher = ZooDenoiser(name).build()
    extractors = [ZooClassifier(name), ZooClassifier(f"{name}/judge", "judge")]
    references = {e.name: load_reference(e.data) for e in extractors}
    evaluator = Evaluator(extractors, references, half="held_out")
    runner = EvaluationRunner(evaluator, samples, seed)
    assert teacher.sample_shape is not None
    by_steps: dict[str, dict[str, float]] = {}
    for steps in (1, 2, 4, 8, 50):
        times = few_step_times(teacher.process, steps)
        row, seconds = runner.measure(teacher, times, "ode", teacher.sample_shape)
        row.pop("samples_per_second")
        by_steps[str(steps)] = {key: round(value, 4) for key, value in row.items()}
        print(steps, by_steps[str(steps)], f"{seconds:.0f} s", flush=True)
    gates = {}
    for extractor in extractors:
        fd = {k: v[extractor.frechet_name] for k, v in by_steps.items()}
        floor = references[extractor.name].info["fd_floors"]["held_out_vs_train"]
        gates[extractor.name] = {
            "fd_real_floor": floor,
            "fd50_over_fd8": round(fd["50"] / fd["8"], 3),
            "fd50_over_floor": round(fd["50"] / floor, 2),
            "passed": bool(fd["50"] <= 1.05 * fd["8"] and fd["50"] <= 10 * floor),
        }
    return {
        "by_steps": by_steps,
        "samples": samples,
        "noise_seed": seed,
        "half": "held_out",
        "guidance_scale": 1.0,
        "solver": "euler (DDIM), uniform grid",
        "gate": gates,
    }


def package(denoiser: Denoiser, name: str, training: dict[str, Any], samples: int = 5000, seed: int = 1234) -> dict:
    """Write the zoo entry ``name`` and its card; returns the card."""
    folder = zoo_path(name)
    card: dict[str, Any] = {
        "name": name,
        "sigma_data": denoiser.sigma_data,
        "null_class": denoiser.null_class,
        "training": training,
        "parameters": sum(p.numel() for p in denoiser.network.parameters()),
        "licence": "apache-2.0",
    }
    if "network" in training:
        card |= {k: training.pop(k) for k in ("network", "process", "prediction_type") if k in training}
        card["weights"] = "model.safetensors"
    write_weights(denoiser, folder, card)
    shipped = ZooDenoiser(name).build()
    card["sha256"] = checkpoints.fingerprint(shipped.network.state_dict().values())
    card["figures"] = measure(name, samples, seed)
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    return card


def main() -> None:
    """Package the first average of a TeacherTraining run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", help="run of TeacherTraining, or - to measure the shipped weights again")
    parser.add_argument("name")
    parser.add_argument("--samples", type=int, default=5000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.run_dir == "-":
        file = zoo_path(args.name) / "card.json"
        card = {**json.loads(file.read_text()), "figures": measure(args.name, args.samples, 1234)}
        file.write_text(json.dumps(card, indent=2) + "\n")
        return

    from lightning_distill.commands.run_folder import find_checkpoint, find_run, load_run, read_config

    run = find_run(args.run_dir)
    config = read_config(run)
    training = {
        "config": {key: config[key] for key in ("model", "data")},
        "updates": checkpoints.read_checkpoint(find_checkpoint(run))["global_step"],
        "seed": config.get("seed_everything"),
    }
    network = load_run(run).sampling_network()
    if not hasattr(network.network, "save_pretrained"):
        spec = config["model"]["init_args"]["network"]["init_args"]
        training |= {key: spec[key] for key in ("network", "process", "prediction_type")}
    print(package(network, args.name, training, args.samples)["figures"])


if __name__ == "__main__":
    main()
