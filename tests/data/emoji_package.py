"""A small stand-in for the npm package emoji-datasource-google."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = ("red", "blue", "green", "yellow")
THINGS = ("cat", "dog", "house", "tree", "car", "boat", "bird", "sun")


def package(folder: Path, count: int = 30) -> Path:
    """As the npm package lies: emoji.json and img/google/64/*.png, with transparency."""
    pictures = folder / "img" / "google" / "64"
    pictures.mkdir(parents=True)
    generator = np.random.default_rng(0)
    entries = []

    def picture(name: str) -> str:
        pixels = np.zeros((64, 64, 4), np.uint8)
        pixels[16:48, 16:48] = (*generator.integers(0, 256, 3), 255)
        Image.fromarray(pixels, "RGBA").save(pictures / name)
        return name

    for i in range(count):
        entry = {
            "name": f"{COLOURS[i % 4]} {THINGS[i % 8]} {i}".upper(),
            "short_name": f"e{i}",
            "image": picture(f"{i}.png"),
        }
        entry["has_img_google"] = True
        if i % 5 == 0:
            tones = {"1F3FB": f"{i}-light.png", "1F3FB-1F3FF": f"{i}-two.png"}
            entry["skin_variations"] = {
                tone: {"image": picture(name), "has_img_google": True} for tone, name in tones.items()
            }
        entries.append(entry)
    entries.append({"name": None, "short_name": "apple_logo-new", "image": picture("x.png"), "has_img_google": True})
    entries.append({"name": "ONLY ELSEWHERE", "short_name": "no", "image": "no.png", "has_img_google": False})
    (folder / "emoji.json").write_text(json.dumps(entries))
    return folder
