"""PGD on features (after Madry et al. 2018) with a target: an image is made to look like another one to the encoder.

Maximises cos(f(x + delta), f(target)) in an L-infinity ball around each image, with f the undefended public encoder. The
cosine instead of a distance between features: it is what an embedding is compared by. Own baseline, no published code.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.attacks.features import to_uint8
from hardening.attacks.pgd import pgd
from hardening.encoders import as_input
from hardening.progress import Bars

_BATCH = 32


def targeted_features(
    encoder: nn.Module,
    images: NDArray[np.uint8],
    targets: NDArray[np.uint8],
    *,
    epsilon: float,
    steps: int,
    restarts: int,
    seed: int,
    device: str,
    bars: Bars,
) -> NDArray[np.uint8]:
    """Drive each image [N, H, W, 3] to the features of its target [N, H, W, 3]; the nearest of `restarts` starts is kept.

    `epsilon` in 1/255; the step is 2.5 epsilon / steps. Returns uint8 images, each value at most `epsilon` away.
    """
    if images.shape != targets.shape:
        raise ValueError(f"each image needs one target of its size: {images.shape} against {targets.shape}")
    generator = torch.Generator().manual_seed(seed)
    size = epsilon / 255
    result = np.empty_like(images)
    with bars.task("attack: targeted PGD on features", len(images)) as task:
        for start in range(0, len(images), _BATCH):
            x = as_input(images[start : start + _BATCH], device)
            with torch.no_grad():
                goal = encoder(as_input(targets[start : start + _BATCH], device))

            def likeness(z: Tensor, goal: Tensor = goal) -> Tensor:
                return F.cosine_similarity(encoder(z), goal)

            best, nearest = x, torch.full((len(x),), -2.0, device=device)
            for _ in range(restarts):
                z = pgd(x, likeness, epsilon=size, steps=steps, step_size=2.5 * size / steps, generator=generator)
                with torch.no_grad():
                    found = likeness(z)
                best = torch.where((found > nearest)[:, None, None, None], z, best)
                nearest = torch.maximum(found, nearest)
            result[start : start + len(x)] = to_uint8(best)
            task.advance(len(x))
    return result
