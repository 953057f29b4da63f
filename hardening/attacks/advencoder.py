"""AdvEncoder: a generator of one perturbation or one patch for all images (Zhou et al., ICCV 2023, section 3).

PER is a perturbation in an L-infinity ball, PAT a patch of 3 % of the picture that may show
anything. Both come out of a DCGAN-like generator G fed with noise that never changes, trained against the undefended public
encoder f with

    5 L_adv + L_q + L_hfc,    L_adv = -InfoNCE(f(x), f(x')), T = 0.1;  L_q = MSE(x', x);  L_hfc = -MSE(Hi(x'), Hi(x))

where x' is the attacked picture and Hi keeps what is finer than 8 waves across 64 pixels. The weights are those of the
published code (the paper has the 5 on L_hfc).

Changed from the published code:
- Images are in [0, 1] and clipped there. The published PER does not clip, and its PAT clips to a range of normalised values,
  so a patch could hold colours that no picture has; neither survives being saved as a file.
- Any size: G's chain 4, 8, 16, ... ends at the first power of two that covers the picture, and is cut to it. Its widths are
  the published 1024, 512, 256, 128 at 64 pixels; a smaller picture leaves out the first of them, a larger one halves on.
- G mixes 32 noise maps, not as many as a batch has images (256), and batches are of 32: few surrogate images still give many
  steps, and a step is affordable without an accelerator.
- A patch is G's output around mid-grey, not around black, where half of it would be clipped away and learn nothing.
- The clamps to PER's budget and PAT's colours pass gradients that lead back inside. Plain ones have none outside: G leaves
  PER's budget within its first epoch, and would learn nothing more.
- The encoder gets no gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.encoders import as_input
from hardening.progress import Bars
from model_store.errors import TwogateError

_BATCH = 32
_MAPS, _NOISE = 32, 100
_WIDEST, _WIDTH = 1024, 128
_ADVERSARIAL_WEIGHT, _TEMPERATURE = 5, 0.1
_HIGH_PASS = 8 / 64  # waves a pixel, so that a radius of 8 at 64 pixels grows with the picture
_PATCH_AREA = 0.03


class TooFewImages(TwogateError):
    """The attacker's own images are too few to tell one from another."""


@dataclass(frozen=True)
class Patch:
    """What is pasted over every image: `pixels` [H, W, 3] where `mask` [H, W] is set."""

    pixels: NDArray[np.uint8]
    mask: NDArray[np.bool_]


def per(
    encoder: nn.Module,
    surrogate: NDArray[np.uint8],
    *,
    epsilon: float,
    epochs: int,
    seed: int,
    device: str,
    bars: Bars,
) -> NDArray[np.float32]:
    """AdvEncoder-PER: one perturbation [H, W, 3], from the attacker's own images [M, H, W, 3]; in units of 1/255.

    TooFewImages where M < 2.
    """
    size = epsilon / 255

    def attack(x: Tensor, made: Tensor) -> Tensor:
        return (x + _within(made, size)).clamp(0, 1)

    made = _train(encoder, surrogate, attack, "attack: AdvEncoder-PER", epochs=epochs, seed=seed, device=device, bars=bars)
    return np.asarray((made * 255).clip(-epsilon, epsilon), dtype=np.float32)


def pat(
    encoder: nn.Module,
    surrogate: NDArray[np.uint8],
    *,
    epochs: int,
    seed: int,
    device: str,
    bars: Bars,
) -> Patch:
    """AdvEncoder-PAT: one patch, lower right in the picture, from the attacker's own images [M, H, W, 3].

    TooFewImages where M < 2.
    """
    mask = _mask(*surrogate.shape[1:3])
    here = torch.from_numpy(mask).to(device)

    def attack(x: Tensor, made: Tensor) -> Tensor:
        return torch.where(here, _within(made, 0.5) + 0.5, x)

    made = _train(encoder, surrogate, attack, "attack: AdvEncoder-PAT", epochs=epochs, seed=seed, device=device, bars=bars)
    pixels = np.rint((made + 0.5).clip(0, 1) * 255).astype(np.uint8)
    return Patch(pixels * mask[..., None], mask)


def apply_patch(images: NDArray[np.uint8], patch: Patch) -> NDArray[np.uint8]:
    """Paste a patch over images [N, H, W, 3] of its size."""
    if images.shape[1:] != patch.pixels.shape:
        raise ValueError(f"a patch for pictures {patch.pixels.shape} does not fit pictures {images.shape[1:]}")
    return np.where(patch.mask[..., None], patch.pixels, images)


def _mask(height: int, width: int) -> NDArray[np.bool_]:
    """A square of 3 % of the area; at 64 pixels 11 wide, 14 from the lower and the right edge, elsewhere in proportion."""
    side = max(1, int(math.sqrt(_PATCH_AREA * height * width)))
    bottom, right = height - height * 14 // 64, width - width * 14 // 64
    mask = np.zeros((height, width), dtype=np.bool_)
    mask[bottom - side : bottom, right - side : right] = True
    return mask


def _train(
    encoder: nn.Module,
    surrogate: NDArray[np.uint8],
    attack: Callable[[Tensor, Tensor], Tensor],
    description: str,
    *,
    epochs: int,
    seed: int,
    device: str,
    bars: Bars,
) -> NDArray[np.float32]:
    """Train a generator and return its output [H, W, 3]; `attack` puts that, [1, 3, H, W], into images [N, 3, H, W]."""
    if len(surrogate) < 2:
        raise TooFewImages(f"AdvEncoder tells images from each other; it needs two or more, not {len(surrogate)}")
    generator = torch.Generator().manual_seed(seed)
    height, width = surrogate.shape[1:3]
    network = _Generator(height, width, generator).to(device)
    noise = torch.randn((_MAPS, _NOISE, 1, 1), generator=generator).to(device)
    parameters = list(network.parameters())
    optimiser = torch.optim.Adam(parameters, lr=2e-4, betas=(0.5, 0.999))
    with bars.task(description, epochs * len(surrogate)) as task:
        for _ in range(epochs):
            order = torch.randperm(len(surrogate), generator=generator).numpy()
            for start in range(0, len(order), _BATCH):
                x = as_input(surrogate[order[start : start + _BATCH]], device)
                with torch.no_grad():
                    clean = encoder(x)
                attacked = attack(x, network(noise))
                loss = _loss(x, attacked, clean, encoder(attacked))
                # Not `backward`, which would leave gradients in the encoder's weights too.
                for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    parameter.grad = gradient
                optimiser.step()
                task.advance(len(x))
    with torch.no_grad():
        made = network(noise)[0].permute(1, 2, 0).cpu().numpy()
    return np.asarray(made, dtype=np.float32)


def _loss(x: Tensor, attacked: Tensor, clean: Tensor, features: Tensor) -> Tensor:
    logits = F.normalize(clean, dim=1) @ F.normalize(features, dim=1).T / _TEMPERATURE
    contrast = F.cross_entropy(logits, torch.arange(len(x), device=x.device))
    change = attacked - x
    # Hi is linear: Hi(x') - Hi(x) = Hi(x' - x).
    return -_ADVERSARIAL_WEIGHT * contrast + change.square().mean() - _high_pass(change).square().mean()


def _within(made: Tensor, size: float) -> Tensor:
    """Clamp to [-size, size]; the gradient stops only where it would push further out."""
    kept = made + (made.clamp(-size, size) - made).detach()
    if kept.requires_grad:
        outside = torch.where(made.abs() > size, made.sign(), 0)
        kept.register_hook(lambda gradient: torch.where(gradient.sign() * outside < 0, 0, gradient))  # type: ignore[no-untyped-call]
    return kept


def _high_pass(images: Tensor) -> Tensor:
    """Images [N, 3, H, W] without what is coarser than `_HIGH_PASS` waves a pixel."""
    rows, columns = (torch.fft.fftfreq(length, device=images.device) for length in images.shape[2:])
    fine = rows[:, None].square() + columns.square() > _HIGH_PASS**2
    kept: Tensor = torch.fft.ifft2(torch.fft.fft2(images) * fine).real
    return kept


class _Generator(nn.Module):
    """Noise [32, 100, 1, 1] -> one picture [1, 3, H, W], without bounds; always in training mode, as published."""

    def __init__(self, height: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self._height, self._width = height, width
        doublings = max(1, math.ceil(math.log2(max(height, width) / 4)))
        widths = [min(_WIDEST, _WIDTH * 2 ** (doublings - 1)) >> level for level in range(doublings)]
        layers: list[nn.Module] = []
        before = _NOISE
        for level, channels in enumerate(widths):
            stride, padding = (1, 0) if level == 0 else (2, 1)
            layers += [nn.ConvTranspose2d(before, channels, 4, stride, padding), nn.BatchNorm2d(channels), nn.ReLU()]
            before = channels
        self.maps = nn.Sequential(*layers, nn.ConvTranspose2d(before, 3, 4, 2, 1), nn.Tanh())
        self.mix = nn.Conv2d(_MAPS, 1, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d | nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, noise: Tensor) -> Tensor:
        """See the class."""
        mixed: Tensor = self.mix(self.maps(noise).transpose(0, 1)).transpose(0, 1)
        return mixed[:, :, : self._height, : self._width]
