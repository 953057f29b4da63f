"""SSP: one perturbation that distorts an encoder's middle (self-supervised perturbation, Naseer et al., CVPR 2020).

As PAP's published code has it as a baseline: with a(x) the output of the encoder's middle convolution, the
perturbation maximises MSE(a(x + delta)^2, a(x)^2) in an L-infinity ball, one delta for all images.

Changed from that code: images are in [0, 1] and clipped there, since an attack has to be a picture; the middle is counted in
convolutions, not in ResNet layers or ViT blocks, which fits any encoder that has some; the step is PAP's here.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.attacks.pap import activations, ascend, convolutions
from hardening.progress import Bars


def ssp(
    encoder: nn.Module,
    surrogate: NDArray[np.uint8],
    *,
    epsilon: float,
    iterations: int,
    seed: int,
    device: str,
    bars: Bars,
) -> NDArray[np.float32]:
    """One perturbation [H, W, 3] for all images, from the attacker's own images [M, H, W, 3]; in units of 1/255.

    An iteration takes 16 images. NoConvolutions where the encoder has none.
    """
    layers = convolutions(encoder)
    middle = [layers[len(layers) // 2]]

    def objective(x: Tensor, delta: Tensor, _: int) -> Tensor:
        with torch.no_grad():
            (clean,) = activations(encoder, middle, x)
        (attacked,) = activations(encoder, middle, (x + delta).clamp(0, 1))
        return F.mse_loss(attacked.square(), clean.square())

    return ascend(
        "attack: SSP",
        surrogate,
        objective,
        epsilon=epsilon,
        iterations=iterations,
        generator=torch.Generator().manual_seed(seed),
        device=device,
        bars=bars,
    )
