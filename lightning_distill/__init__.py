"""Distil diffusion and flow-matching models into 1-8 step generators with PyTorch Lightning."""

__version__ = "0.1.0"
