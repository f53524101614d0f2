"""Students for stock diffusers: pipelines, LoRA files, bare weights, and the check that they make the same samples."""

from lightning_distill.export.adapters import export_lora
from lightning_distill.export.check import probe_cond, verify_export
from lightning_distill.export.pipeline import export_denoiser, export_pipeline, export_weights

__all__ = [
    "export_denoiser",
    "export_lora",
    "export_pipeline",
    "export_weights",
    "probe_cond",
    "verify_export",
]
