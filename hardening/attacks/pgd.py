"""Projected gradient descent in the L-infinity ball (Madry et al. 2018), for whatever loss the caller maximises."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def pgd(
    images: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    epsilon: float,
    steps: int,
    step_size: float,
    generator: torch.Generator,
) -> Tensor:
    """Adversarial versions [N, 3, H, W] in [0, 1] of `images`, at most `epsilon` away in every value.

    `loss` maps images to one value per image, [N], and is maximised. The start is random: the published code of ZePAD and
    Gen-AF has none, and the gradient of a cosine distance to the start itself is zero. Only gradients with respect to the
    images are taken (in the published code they also leaked into the weights' gradients).
    """
    noise = torch.rand(images.shape, generator=_beside(images, generator), device=images.device) * 2 - 1
    adversarial = (images + epsilon * noise).clamp(0, 1)
    for _ in range(steps):
        adversarial = adversarial.detach().requires_grad_()
        # A sum, not a mean: an image's gradient must not depend on the size of its batch.
        (gradient,) = torch.autograd.grad(loss(adversarial).sum(), adversarial)
        stepped = adversarial.detach() + step_size * gradient.sign()
        adversarial = torch.minimum(torch.maximum(stepped, images - epsilon), images + epsilon).clamp(0, 1)
    return adversarial.detach()


def _beside(images: Tensor, generator: torch.Generator) -> torch.Generator:
    """A generator on the images' device, seeded by the next draw of one on the CPU: drawing there and copying is slow."""
    if images.device == generator.device:
        return generator
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(images.device).manual_seed(seed)
