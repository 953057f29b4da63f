"""Small labelled image folders that need no download: the handwritten digits that scikit-learn ships."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def write_digits(root: Path, *, train: int, test: int, classes: int = 10) -> Path:
    """Write `train/<digit>/*.png` and `test/<digit>/*.png`, 32 x 32 grey, that many images a class; returns `root`."""
    digits = load_digits()
    for label in range(classes):
        chosen = np.flatnonzero(digits.target == label)[: train + test]
        for number, index in enumerate(chosen):
            folder = root / ("train" if number < train else "test") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray((digits.images[index] / 16 * 255).astype(np.uint8))
            picture.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return root
