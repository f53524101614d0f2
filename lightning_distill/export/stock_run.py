"""One call of a stock pipeline, described by files: needs diffusers and nothing of this package.

``verify_export`` imports it; ``lightning-distill export`` runs it as a script in a fresh process:

    python stock_run.py job.json tensors.safetensors
"""

import inspect
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers.utils import logging
from safetensors.torch import load_file

__all__ = ["difference", "quiet", "run"]


@contextmanager
def quiet() -> Iterator[None]:
    """Without diffusers' progress bars and remarks on components that are left out."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def run(job: dict[str, Any], tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Load a pipeline folder and call it.

    Args:
        job: ``folder``; ``keep``, the components to load; ``call``; ``seed``; ``generator``, whether the call takes
            one; ``dtype``; ``output_type``; for LoRA files ``lora`` and ``scheduler`` (class and folder); ``rounded``,
            the dtype that the weights are brought to before ``dtype``, None for none.
        tensors: ``input.<argument>`` or ``input.<argument>.<row>`` of the call.

    Returns:
        images in [0, 1] or latents, float32.
    """
    with open(f"{job['folder']}/model_index.json") as file:
        index = json.load(file)
    components = {key: value for key, value in index.items() if isinstance(value, list) and key[0] != "_"}
    given = {key: None for key, value in components.items() if key not in job["keep"] or value[0] is None}
    required = inspect.signature(getattr(diffusers, index["_class_name"]).__init__).parameters
    given |= {key: None for key, p in required.items() if p.default is p.empty and key not in {"self", *components}}
    with quiet():
        if "lora" in job:
            name, folder = job["scheduler"]
            given["scheduler"] = getattr(diffusers, name).from_pretrained(folder)
        dtype = getattr(torch, job["dtype"])
        loaded = getattr(torch, job.get("rounded") or job["dtype"])
        pipe = diffusers.DiffusionPipeline.from_pretrained(job["folder"], torch_dtype=loaded, **given)
        if loaded != dtype:
            pipe.to(dtype)
        if "lora" in job:
            pipe.load_lora_weights(job["lora"][0], weight_name=job["lora"][1])
    pipe.set_progress_bar_config(disable=True)
    call = dict(job["call"])
    rows: dict[str, dict[int, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("input."):
            name, _, row = key.removeprefix("input.").partition(".")
            if row:
                rows.setdefault(name, {})[int(row)] = value
            else:
                call[name] = value
    call |= {name: [by_row[i] for i in sorted(by_row)] for name, by_row in rows.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job["seed"])
        generator = torch.Generator().manual_seed(job["seed"]) if job["generator"] else None
        if "latents" in call:  # they are the generator's first draw
            torch.randn(call["latents"].numel(), generator=generator)
        if generator is not None:
            call["generator"] = generator
        output = pipe(**call, output_type=job["output_type"])
    return torch.as_tensor(next(iter(output.values()))).float()


def difference(job: dict[str, Any], tensors: dict[str, torch.Tensor]) -> float:
    """Largest difference between a call and ``tensors["expected"]``, relative to the largest value above 1."""
    expected = tensors["expected"]
    made = run(job, tensors)
    if made.shape != expected.shape:
        raise ValueError(f"the pipeline returned {tuple(made.shape)}, expected {tuple(expected.shape)}.")
    return float((made - expected).abs().max() / expected.abs().max().clamp_min(1.0))


if __name__ == "__main__":
    with open(sys.argv[1]) as job_file:
        described = json.load(job_file)
    print(difference(described, load_file(sys.argv[2])))
    assert not any(name.startswith("lightning") for name in sys.modules)
