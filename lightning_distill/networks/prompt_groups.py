"""Groups of prompts: whose embeddings lie near each other, by k-means."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["centres", "group_of", "k_means", "prompt_features", "read_centres"]

#: name of the tensor in a file of centres
CENTRES = "centres"


def prompt_features(cond: Mapping[str, Any]) -> Tensor:
    """One direction per prompt, (B, D), float32, of length 1.

    That of the pooled embedding where there is one (``pooled_projections``, ``text_embeds``), else of the mean of
    ``encoder_hidden_states`` over the tokens that the mask leaves.

    Args:
        cond: conditions of a denoiser or arguments of its network, ``added_cond_kwargs`` included.

    Raises:
        ValueError: there is no embedding among them.
    """
    cond = {**cond, **(cond.get("added_cond_kwargs") or {})}
    for key in ("pooled_projections", "text_embeds"):
        if isinstance(pooled := cond.get(key), Tensor):
            return torch.nn.functional.normalize(pooled.float(), dim=-1)
    tokens = cond.get("encoder_hidden_states")
    if not isinstance(tokens, Tensor):
        raise ValueError(
            f"prompts are grouped by their embeddings, and there is none among {', '.join(cond) or 'the conditions'}; "
            "give encoder_hidden_states, pooled_projections or text_embeds."
        )
    mask = cond.get("encoder_attention_mask")
    weight = torch.ones_like(tokens[..., :1]) if mask is None else mask[..., None].to(tokens)
    mean = (weight * tokens).float().sum(-2) / weight.float().sum(-2).clamp_min(1.0)
    return torch.nn.functional.normalize(mean, dim=-1)


def group_of(features: Tensor, centres: Tensor) -> Tensor:
    """Number of the nearest centre, (B,).

    Args:
        features: (B, D).
        centres: (K, D).
    """
    return torch.cdist(features, centres.to(features)).argmin(1)


def k_means(features: Tensor, count: int, seed: int = 0, iterations: int = 50) -> Tensor:
    """Centres of Lloyd's algorithm, (count, D), float32; they begin at points that are far apart (k-means++).

    Args:
        features: points, (N, D).
        count: number of groups, at most that of different points.
        seed: of the start.
        iterations: at most.

    Raises:
        ValueError: there are fewer different points than groups.
    """
    features = features.float()
    different = len(features.unique(dim=0))
    if not 1 <= count <= different:
        raise ValueError(f"{count} groups of {different} different prompts: give 1 to {different}.")
    generator = torch.Generator().manual_seed(seed)
    found = features[torch.randint(len(features), (1,), generator=generator)]
    while len(found) < count:
        apart = torch.cdist(features, found).min(1).values.square()
        found = torch.cat([found, features[torch.multinomial(apart, 1, generator=generator)]])
    for _ in range(iterations):
        owner = group_of(features, found)
        means = torch.stack([features[owner == k].mean(0) if (owner == k).any() else found[k] for k in range(count)])
        if torch.equal(means, found):
            break
        found = means
    return found


def centres(path: str, count: int, seed: int = 0, most: int = 20_000) -> Tensor:
    """Centres of the prompts of a store.

    Args:
        path: folder of ``lightning-distill cache``.
        count: number of groups.
        seed: of the start.
        most: prompts that are looked at, evenly over the store.

    Returns:
        (count, D).

    Raises:
        FileNotFoundError: there is no store.
        ValueError: it has no embeddings, or fewer different prompts than groups.
    """
    from lightning_distill.data.store import Store

    store = Store(path)
    keys = ("pooled_projections", "text_embeds", "encoder_hidden_states", "encoder_attention_mask")
    names = [name for name in keys if name in store.names]
    rows = torch.linspace(0, len(store) - 1, min(most, len(store))).long().unique()
    features = [prompt_features(store.gather(part, names)) for part in rows.split(256)]
    return k_means(torch.cat(features), count, seed)


def read_centres(path: str) -> Tensor:
    """Centres from a safetensors file with the tensor ``centres``, (K, D).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no centres.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a safetensors file with the tensor {CENTRES!r}.")
    found = load_file(file).get(CENTRES)
    if found is None or found.ndim != 2:
        raise ValueError(f"{path} has no tensor {CENTRES!r} of shape (groups, width).")
    return found
