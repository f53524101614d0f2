"""What differs between model classes, as one small declarative entry each.

A ``Family`` says how a network wants to be called; ``Denoiser`` does everything else. The entry of a network is found
by the names in its class hierarchy, so a subclass inherits the entry of its parent, nothing of diffusers is imported,
and a class that the installed diffusers lacks costs nothing. A user's own class is registered with the same few lines:

    register(Family("MyTransformer", cond_keys=("tokens",), blocks=("layers",), time_scale=1 / 1000))

Conditions have one name each, whatever the class calls its argument, so that cached embeddings fit several models:
``class_labels``; ``encoder_hidden_states`` (B, L, D), the text tokens; ``encoder_attention_mask`` (B, L), 1 for tokens
that count; ``pooled_projections`` (B, D); SDXL's ``text_embeds`` (B, D) and ``time_ids`` (B, 6); PixArt-alpha's
``resolution`` (B, 2) and ``aspect_ratio`` (B, 1). Everything that follows from the shape of the sample (position ids,
rotary embeddings, frame counts) is made by the entry.
"""

from lightning_distill.networks.families import images, labelled, packed, videos
from lightning_distill.networks.families.base import FAMILIES, PLAIN, Family, example_cond, family_of, register

__all__ = [
    "FAMILIES",
    "PLAIN",
    "Family",
    "example_cond",
    "family_of",
    "images",
    "labelled",
    "packed",
    "register",
    "videos",
]
