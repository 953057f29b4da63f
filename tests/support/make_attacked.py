"""How `photos/attacked/*.png` were made: PGD on the features of EfficientNet-Lite0, the default bundle's public victim.

    .venv-dev/bin/python -m tests.support.make_attacked

eps 10/255, 40 steps, at the bundle's 128 x 128 pixels; PNG, because JPEG would take off part of the perturbation.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from hardening.attacks.features import pgd_features
from hardening.encoders import build
from hardening.progress import Bars
from hardening.recipe import load_recipe
from model_store.pixels import decode_file

HERE = Path(__file__).parent


def main() -> None:
    """Attack every CC0 photograph and write it beside the others."""
    recipe = load_recipe(HERE.parent.parent / "recipes" / "photos.yaml")
    photos = sorted((HERE / "photos").glob("*.jpg"))
    images = np.stack([decode_file(photo, recipe.pixels) for photo in photos])
    victim = build(recipe.victim, recipe.seed)
    attacked = pgd_features(victim, images, epsilon=10, steps=40, restarts=1, seed=0, device="cpu", bars=Bars())
    target = HERE / "photos" / "attacked"
    target.mkdir(exist_ok=True)
    for photo, image in zip(photos, attacked, strict=True):
        Image.fromarray(image).save(target / f"{photo.stem}.png")


if __name__ == "__main__":
    main()
