"""Attacks on an encoder's features: all that is needed is the public encoder, no task and no labels.

PGD on features for each image, and one universal perturbation for all (UAP). Both maximise
1 - cos(f(x + delta), f(x)) in an L-infinity ball, with f the undefended public encoder.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.attacks.pgd import pgd
from hardening.encoders import as_input
from hardening.progress import Bars

_BATCH = 32


def pgd_features(
    encoder: nn.Module,
    images: NDArray[np.uint8],
    *,
    epsilon: float,
    steps: int,
    restarts: int,
    seed: int,
    device: str,
    bars: Bars,
) -> NDArray[np.uint8]:
    """Attack each image [N, H, W, 3] on its own; the worst of `restarts` random starts is kept.

    `epsilon` in 1/255; the step is 2.5 epsilon / steps. Returns uint8 images, each value at most `epsilon` away.
    """
    generator = torch.Generator().manual_seed(seed)
    result = np.empty_like(images)
    with bars.task("attack: PGD on features", len(images)) as task:
        for start in range(0, len(images), _BATCH):
            x = as_input(images[start : start + _BATCH], device)
            with torch.no_grad():
                clean = encoder(x)

            def loss(z: Tensor, clean: Tensor = clean) -> Tensor:
                return 1 - F.cosine_similarity(encoder(z), clean)

            best, worst = x, torch.full((len(x),), -1.0, device=device)
            for _ in range(restarts):
                size = epsilon / 255
                z = pgd(x, loss, epsilon=size, steps=steps, step_size=2.5 * size / steps, generator=generator)
                with torch.no_grad():
                    distance = loss(z)
                best = torch.where((distance > worst)[:, None, None, None], z, best)
                worst = torch.maximum(distance, worst)
            result[start : start + len(x)] = to_uint8(best)
            task.advance(len(x))
    return result


def uap_features(
    encoder: nn.Module,
    surrogate: NDArray[np.uint8],
    *,
    epsilon: float,
    epochs: int,
    seed: int,
    device: str,
    bars: Bars,
) -> NDArray[np.float32]:
    """One perturbation [H, W, 3] for all images, from the attacker's own images [M, H, W, 3]; in units of 1/255.

    Sign gradient ascent with step epsilon / 10 from a random start.
    """
    generator = torch.Generator().manual_seed(seed)
    size = epsilon / 255
    shape = (1, 3, *surrogate.shape[1:3])
    delta = ((torch.rand(shape, generator=generator) * 2 - 1) * size).to(device)
    with bars.task("attack: universal perturbation", epochs * len(surrogate)) as task:
        for _ in range(epochs):
            order = torch.randperm(len(surrogate), generator=generator).numpy()
            for start in range(0, len(order), _BATCH):
                x = as_input(surrogate[order[start : start + _BATCH]], device)
                with torch.no_grad():
                    clean = encoder(x)
                delta.requires_grad_()
                distance = (1 - F.cosine_similarity(encoder((x + delta).clamp(0, 1)), clean)).sum()
                (gradient,) = torch.autograd.grad(distance, delta)
                delta = (delta.detach() + size / 10 * gradient.sign()).clamp(-size, size)
                task.advance(len(x))
    return np.asarray(delta[0].permute(1, 2, 0).cpu().numpy() * 255, dtype=np.float32)


def apply_universal(images: NDArray[np.uint8], delta: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Add a perturbation [H, W, 3] in units of 1/255 to images [N, H, W, 3]; clipped and rounded to 8 bits."""
    return np.asarray(np.clip(np.rint(images.astype(np.float32) + delta), 0, 255), dtype=np.uint8)


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """[N, 3, H, W] in [0, 1] -> uint8 [N, H, W, 3], as a file stores it."""
    return np.asarray((images * 255).round().clamp(0, 255).permute(0, 2, 3, 1).cpu().numpy(), dtype=np.uint8)
