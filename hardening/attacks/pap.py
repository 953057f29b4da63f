"""PAP: one perturbation that inflates an encoder's low-level activations (Ban and Dong, NeurIPS 2022, section 3).

Low layers change least in fine-tuning, so what confuses them confuses the fine-tuned encoder too. With a(x) the output of a
low convolution, the perturbation delta maximises, in an L-infinity ball:

    base  mean a1(x + delta)^2
    fuse  mean a1(x + delta)^2 + mean a2(x + delta)^2
    ugs   mean a1(n + delta)^2 + 0.01 mean a1(x + delta)^2, n Gaussian noise of a random colour and contrast

Changed from the published code: images are in [0, 1] and clipped there, since an attack has to be a picture; a1 and a2 are
convolutions (the first, and the one at a quarter of the depth) instead of named ResNet or ViT blocks, which fits any encoder
that has some; the step of 2e-4 is longer where few iterations would not get across the ball; of ugs' two slips, the hook
registered twice and the last real image left out, neither is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hardening.encoders import as_input
from hardening.progress import Bars
from model_store.errors import TwogateError

_BATCH = 16
_STEP = 2e-4
_NOISES, _COLOUR_LIFE, _REAL_WEIGHT = 8, 20, 0.01


class NoConvolutions(TwogateError):
    """The encoder has no convolution whose output could be attacked."""


def pap(
    encoder: nn.Module,
    surrogate: NDArray[np.uint8],
    *,
    variant: Literal["base", "fuse", "ugs"],
    epsilon: float,
    iterations: int,
    seed: int,
    device: str,
    bars: Bars,
) -> NDArray[np.float32]:
    """One perturbation [H, W, 3] for all images, from the attacker's own images [M, H, W, 3]; in units of 1/255.

    An iteration takes 16 images; `ugs` changes its noise's colour every 20, and so wants a thousand or more. NoConvolutions
    where the encoder has none.
    """
    layers = convolutions(encoder)
    chosen = [layers[0]]
    if variant == "fuse":
        chosen.append(layers[min(max(1, len(layers) // 4), len(layers) - 1)])
    generator = torch.Generator().manual_seed(seed)
    shape = (_NOISES, 3, *surrogate.shape[1:3])
    colour = (torch.empty(0), torch.empty(0))

    def energy(x: Tensor) -> Tensor:
        return torch.stack([a.square().mean() for a in activations(encoder, chosen, x.clamp(0, 1))]).sum()

    def objective(x: Tensor, delta: Tensor, iteration: int) -> Tensor:
        nonlocal colour
        if variant != "ugs":
            return energy(x + delta)
        if iteration % _COLOUR_LIFE == 0:
            mean, deviation = torch.rand((2, 1, 3, 1, 1), generator=generator)
            colour = (0.4 + 0.2 * mean, 0.05 + 0.05 * deviation)
        noise = (colour[0] + colour[1] * torch.randn(shape, generator=generator)).to(device)
        return energy(noise + delta) + _REAL_WEIGHT * energy(x + delta)

    return ascend(
        f"attack: PAP ({variant})",
        surrogate,
        objective,
        epsilon=epsilon,
        iterations=iterations,
        generator=generator,
        device=device,
        bars=bars,
    )


def ascend(
    description: str,
    surrogate: NDArray[np.uint8],
    objective: Callable[[Tensor, Tensor, int], Tensor],
    *,
    epsilon: float,
    iterations: int,
    generator: torch.Generator,
    device: str,
    bars: Bars,
) -> NDArray[np.float32]:
    """Sign gradient ascent on one perturbation [H, W, 3], in units of 1/255, from a random start in the ball.

    `objective` maps images [N, 3, H, W] in [0, 1], the perturbation [1, 3, H, W] in the same scale and the iteration's number
    to one value.
    """
    size = epsilon / 255
    step = max(_STEP, 2.5 * size / max(iterations, 1))
    start = torch.rand((1, 3, *surrogate.shape[1:3]), generator=generator) * 2 - 1
    delta = (size * start).to(device)
    batches = _batches(len(surrogate), generator)
    with bars.task(description, iterations) as task:
        for iteration in range(iterations):
            x = as_input(surrogate[next(batches)], device)
            delta.requires_grad_()
            (gradient,) = torch.autograd.grad(objective(x, delta, iteration), delta)
            delta = (delta.detach() + step * gradient.sign()).clamp(-size, size)
            task.advance()
    found = delta[0].permute(1, 2, 0).cpu().numpy() * 255
    return np.asarray(found.clip(-epsilon, epsilon), dtype=np.float32)


def convolutions(encoder: nn.Module) -> list[nn.Conv2d]:
    """The encoder's convolutions in the order of its modules; NoConvolutions where there are none."""
    found = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    if not found:
        raise NoConvolutions(f"{type(encoder).__name__} has no convolutions, whose outputs this attack is made on")
    return found


def activations(encoder: nn.Module, layers: list[nn.Conv2d], images: Tensor) -> list[Tensor]:
    """The outputs of `layers` on images [N, 3, H, W]; what the encoder does behind the last of them is not computed."""
    seen: dict[nn.Module, Tensor] = {}
    with _recording(layers, seen), suppress(_AllSeen):
        encoder(images)
    return [seen[layer] for layer in layers]


class _AllSeen(Exception):
    """Leaves the encoder's forward pass early."""


@contextmanager
def _recording(layers: list[nn.Conv2d], seen: dict[nn.Module, Tensor]) -> Iterator[None]:
    wanted = len(set(layers))

    def record(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        seen[layer] = output
        if len(seen) == wanted:
            raise _AllSeen

    handles = [layer.register_forward_hook(record) for layer in dict.fromkeys(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _batches(count: int, generator: torch.Generator) -> Iterator[NDArray[np.int64]]:
    """Indices of 16 images, without end; each image once before any comes again."""
    while True:
        order = torch.randperm(count, generator=generator).numpy()
        for start in range(0, count, _BATCH):
            yield order[start : start + _BATCH]
