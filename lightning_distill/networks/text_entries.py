"""What ``encode_prompt`` of each pipeline class returns, as one small declarative entry each.

An entry is found by the names in the class hierarchy of a pipeline. A pipeline of one's own is registered with

    register(TextEntry("MyPipeline", ("encoder_hidden_states", "null encoder_hidden_states")))
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MASK", "POOLED", "TEXT_ENTRIES", "TOKENS", "TextEntry", "register"]

TOKENS, MASK = "encoder_hidden_states", "encoder_attention_mask"
POOLED, SDXL_POOLED = "pooled_projections", "text_embeds"


@dataclass(frozen=True)
class TextEntry:
    """What ``encode_prompt`` of one pipeline class returns.

    Attributes:
        pipeline: class name.
        outputs: condition that each returned value is, in order; ``null KEY`` for its unconditional counterpart, and
            an empty string for what the network's family makes itself.
        ragged: prompts come out at lengths of their own (or of their batch); they are padded with zeros, which a mask
            hides, to the pipeline's maximal length.
        sizes: conditions that follow from the size of the picture: ``time_ids`` (SDXL), or ``resolution`` and
            ``aspect_ratio`` (PixArt-alpha at 1024 pixels).
        longest: tokens per prompt above which the pipeline refuses to sample; None where it does not look.
    """

    pipeline: str
    outputs: tuple[str, ...]
    ragged: bool = False
    sizes: tuple[str, ...] = ()
    longest: int | None = None


TEXT_ENTRIES: dict[str, TextEntry] = {}


def register(entry: TextEntry) -> TextEntry:
    """Add or replace the entry of one pipeline class."""
    TEXT_ENTRIES[entry.pipeline] = entry
    return entry


_WITH_NULL = (TOKENS, f"null {TOKENS}")
_MASKED_WITH_NULL = (TOKENS, MASK, f"null {TOKENS}", f"null {MASK}")
_POOLED_WITH_NULL = (TOKENS, f"null {TOKENS}", POOLED, f"null {POOLED}")
for _entry in (
    TextEntry("StableDiffusionPipeline", _WITH_NULL),
    TextEntry("LatentConsistencyModelPipeline", _WITH_NULL),
    TextEntry(
        "StableDiffusionXLPipeline",
        (TOKENS, f"null {TOKENS}", SDXL_POOLED, f"null {SDXL_POOLED}"),
        sizes=("time_ids",),
    ),
    TextEntry("PixArtAlphaPipeline", _MASKED_WITH_NULL, sizes=("resolution", "aspect_ratio")),
    TextEntry("PixArtSigmaPipeline", _MASKED_WITH_NULL),
    TextEntry("StableDiffusion3Pipeline", _POOLED_WITH_NULL, longest=512),
    TextEntry("FluxPipeline", (TOKENS, POOLED, ""), longest=512),
    TextEntry("Flux2Pipeline", (TOKENS, "")),
    TextEntry("Flux2KleinPipeline", (TOKENS, "")),
    TextEntry("SanaPipeline", _MASKED_WITH_NULL),
    TextEntry("SanaSprintPipeline", (TOKENS, MASK)),
    TextEntry("QwenImagePipeline", (TOKENS, MASK), ragged=True, longest=1024),
    TextEntry("Lumina2Pipeline", _MASKED_WITH_NULL, longest=512),
    TextEntry("ZImagePipeline", _WITH_NULL, ragged=True),
    TextEntry("WanPipeline", _WITH_NULL),
    TextEntry("AnyFlowPipeline", _WITH_NULL),
    TextEntry("CogVideoXPipeline", _WITH_NULL),
    TextEntry("LTXPipeline", _MASKED_WITH_NULL),
    TextEntry("HunyuanVideoPipeline", (TOKENS, POOLED, MASK)),
):
    register(_entry)
