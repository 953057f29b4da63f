"""Labelled pictures that a tiny network learns in seconds, and that an attack breaks as easily.

The class is written into each picture twice: large, as the quadrant that a bright blob lies in, and fine, as a faint
texture. A network trained on clean pictures leans on the texture, which a small perturbation erases; one trained
adversarially has to look at the blob.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from hardening.architectures import CifarResNet
from hardening.encoders import Encoder, as_input

CLASSES = 4
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def patterns(per_class: int, size: int = 16, *, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pictures [4 * per_class, size, size, 3] and their labels, classes in turn."""
    rng = np.random.default_rng(seed)
    labels = np.tile(np.arange(CLASSES), per_class)
    y, x = np.mgrid[0:size, 0:size]
    pictures = np.empty((len(labels), size, size, 3))
    for number, label in enumerate(labels):
        row, column = (np.array([label // 2, label % 2]) + 0.5) * size / 2 + rng.normal(0, size / 16, 2)
        blob = np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * (size / 6) ** 2))
        texture = [(x + y) % 2, x % 2, y % 2, (x // 2 + y // 2) % 2][label] - 0.5
        colour = rng.uniform(0.2, 0.5, 3)
        noise = rng.normal(0, 0.05, (size, size, 3))
        pictures[number] = colour + 0.3 * blob[..., None] + 0.08 * texture[..., None] + noise
    return (pictures.clip(0, 1) * 255).round().astype(np.uint8), labels.astype(np.int64)


def untrained_encoder(*, seed: int = 0, width: int = 8) -> Encoder:
    """A tiny network with random weights, in eval mode: [N, 3, H, W] -> [N, 4 * width]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(CifarResNet(1, width), MEAN, STD).eval()


def trained_encoder(*, seed: int = 0, epochs: int = 6) -> Encoder:
    """The same, trained on clean patterns; a second."""
    images, labels = patterns(64, seed=1000 + seed)
    with torch.random.fork_rng(devices=[]):
        encoder = untrained_encoder(seed=seed).train()
        torch.manual_seed(seed)
        head = torch.nn.Linear(encoder.dim, CLASSES)
        optimiser = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=5e-3)
        for _ in range(epochs):
            for chosen in torch.randperm(len(images)).split(32):  # type: ignore[no-untyped-call]
                loss = F.cross_entropy(
                    head(encoder(as_input(images[chosen.numpy()]))), torch.as_tensor(labels[chosen.numpy()])
                )
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
    return encoder.requires_grad_(True).eval()


def write_pictures(folder: Path, images: NDArray[np.uint8], prefix: str = "") -> list[Path]:
    """Write pictures as PNG, which keeps every value; returns their paths in order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{prefix}{number:04}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths


def write_patterns(root: Path, *, train: int, test: int = 0, size: int = 16, seed: int = 0) -> Path:
    """Write `train/<class>/*.png` and `test/<class>/*.png`, that many images a class; returns `root`."""
    for group, count in (("train", train), ("test", test)):
        images, labels = patterns(count, size, seed=seed + (group == "test"))
        for label in range(CLASSES) if count else ():
            write_pictures(root / group / f"class{label}", images[labels == label])
    return root
