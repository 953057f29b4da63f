"""A small network that is trained to see perturbations: an adversary detection network (Metzen et al., ICLR 2017).

It learns on local images alone: clean and honestly changed ones on the one side, on the other the same images attacked
here: by PGD on the features of the tripwire and of each branch, by universal perturbations and by patches of the tripwire.
Strengths are drawn between `WEAKEST` and `STRONGEST`, so that nothing is tuned to one budget. It never sees a label, nor the
images that calibrate it; which pictures it takes for attacked is decided by its p-value among clean ones
(`hardening.detectors.sentinel`).

In their paper the network reads the classifier's feature maps; here it stands apart, from random weights. Their dynamic
adversary training, against attacks that hide from it, was built, measured and taken out (`docs/tried.md`): who hides with a
margin gets through all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.attacks.features import apply_universal, pgd_features, to_uint8, uap_features
from hardening.branches import SENTINEL, TRIPWIRE
from hardening.encoders import Encoder, as_input
from hardening.files import load_tensors, save_tensors
from hardening.finetune import cosine
from hardening.progress import Bars
from hardening.recipe import Sentinel
from hardening.training import run_epochs, seed_everything
from model_store.honest import changed_at_random, noisy

WEAKEST, STRONGEST = 4.0, 10.0
"""L-infinity, in 1/255. To learn weaker attacks is to take slight noise for one."""
_PGD_STEPS = 6
_CHUNK = 28
"""Images that are attacked with one epsilon, on one encoder."""
_UNIVERSAL, _UNIVERSAL_IMAGES, _UNIVERSAL_EPOCHS, _UNIVERSAL_EPSILON = 8, 320, 2, 8.0
_PATCHES, _PATCH_AREA = 8, 0.03
_UNIVERSAL_SHARE, _PATCH_SHARE = 0.3, 0.15
"""Of the attacked images of a batch; the others are PGD's."""
_STORED_SHARE = 0.2
"""Of the attacked images, those that are honestly changed afterwards, as a file's way through an app does."""
_CHANGED_SHARE, _NOISE_SHARE = 0.7, 0.3
"""Of the unattacked images, those that are honestly changed, and those under noise, which is no attack."""
_STEP_SHARE, _STEP = 0.3, (1, 10)
"""Of that noise, the share that is a step up or down in each value, as a perturbation by signs is, and its size."""
_LIT_SHARE, _LIGHT = 0.3, (0.6, 1.4)
"""Of all images, those that are made lighter or darker, and by what factor."""
_RESIDUAL_GAIN = 8.0
_SHIFT = 1 / 16
"""Share of the side by which crops differ."""


class SentinelNetwork(nn.Module):
    """Images [N, 3, H, W] -> one logit each, [N, 1]; positive = perturbed. Five convolutions at half or a quarter of the
    resolution: perturbations are fine, and a network that pools early would not see them.

    Beside the image it gets, enlarged, what differs from the mean of the nine pixels around: there a perturbation is not
    hidden under the picture, as in the constrained first layers of steganalysis (Fridrich and Kodovsky 2012, SRM).
    """

    num_features = 1
    residual: Tensor

    def __init__(self, width: int, height_and_width: tuple[int, int]) -> None:
        super().__init__()
        middle = torch.zeros(3, 3)
        middle[1, 1] = 1
        kernels = torch.stack([middle, _RESIDUAL_GAIN * (middle - 1 / 9)])
        self.register_buffer("residual", torch.einsum("kxy,ci->kcixy", kernels, torch.eye(3)).reshape(6, 3, 3, 3))
        second = 2 if min(height_and_width) >= 96 else 1
        planes = [
            (6, width, 1),
            (width, 2 * width, 2),
            (2 * width, 2 * width, second),
            (2 * width, 4 * width, 2),
            (4 * width, 4 * width, 1),
        ]
        layers: list[nn.Module] = []
        for inputs, outputs, stride in planes:
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.last = nn.Linear(4 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        both = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.residual)
        logit: Tensor = self.last(self.layers(both).mean((2, 3)))
        return logit


def train_sentinel(
    watched: Mapping[str, Encoder],
    recipe: Sentinel,
    images: NDArray[np.uint8],
    *,
    seed: int,
    folder: Path,
    device: str,
    bars: Bars,
) -> Encoder:
    """Train one on images [N, H, W, 3] uint8, attacked on the encoders of `watched`, the tripwire among them.

    Returns it as an encoder of one feature, the logit, on the CPU in eval mode. Resumes from `folder`.
    """
    done, shape = folder / f"{SENTINEL}.pt", (images.shape[1], images.shape[2])
    seed_everything(seed, SENTINEL)
    encoder = Encoder(SentinelNetwork(recipe.width, shape), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    if done.exists():
        encoder.load_state_dict(load_tensors(done)["encoder"])
        return encoder.eval()
    for other in watched.values():
        other.to(device).eval().requires_grad_(False)
    made = _attacks(watched, images, seed, folder / f"{SENTINEL}.attacks.pt", device, bars)
    encoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    size = recipe.batch_size // 2
    per_epoch = max(1, len(images) // size)
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=recipe.learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: cosine(step, recipe.epochs * per_epoch))

    with bars.task(SENTINEL, recipe.epochs * len(images)) as task:

        def epoch(number: int, generator: torch.Generator) -> dict[str, float]:
            encoder.train()
            rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
            # Two orders: what tells the halves of a batch apart must not be the pictures.
            ones, zeros = rng.permutation(len(images)), rng.permutation(len(images))
            losses, right = [], []
            for start in range(0, per_epoch * size, size):
                place = _placement(images, rng)
                bad = _perturbed(images, made, ones[start : start + size], rng)
                good = _unattacked(images[zeros[start : start + size]], rng)
                x = place(as_input(_lit(np.concatenate([bad, good]), rng), device))
                y = (torch.arange(len(x), device=device) < len(bad)).float()
                logits = encoder(x)[:, 0]
                loss = F.binary_cross_entropy_with_logits(logits, y)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
                losses.append(loss.item())
                right.append(((logits > 0) == (y > 0)).float().mean().item())
                task.advance(len(bad), f"epoch {number + 1}/{recipe.epochs} loss {losses[-1]:.2f}")
            record = {"loss": float(np.mean(losses)), "told_apart": float(np.mean(right))}
            bars.say(f"{SENTINEL} epoch {number + 1}/{recipe.epochs}: " + " ".join(f"{k} {v:.4g}" for k, v in record.items()))
            return record

        parts = {"encoder": encoder, "optimiser": optimiser, "schedule": schedule}
        history = run_epochs(SENTINEL, recipe.epochs, seed, folder / f"{SENTINEL}.checkpoint.pt", parts, epoch)
    save_tensors(done, {"encoder": encoder.state_dict(), "history": history})
    for left in ("checkpoint", "attacks"):
        (folder / f"{SENTINEL}.{left}.pt").unlink(missing_ok=True)
    for other in watched.values():
        other.cpu()
    return encoder.cpu().eval()


@dataclass(frozen=True)
class _Made:
    """Attacks made before the first epoch: each image after PGD [N, H, W, 3], every second chunk of them on the tripwire;
    universal perturbations [U, H, W, 3] in 1/255; square patches [P, h, h, 3].
    """

    pgd: NDArray[np.uint8]
    universal: NDArray[np.float32]
    patches: NDArray[np.uint8]


def _attacks(
    watched: Mapping[str, Encoder],
    images: NDArray[np.uint8],
    seed: int,
    file: Path,
    device: str,
    bars: Bars,
) -> _Made:
    """Made once, and kept in `file`."""
    if not file.exists():
        rng = np.random.default_rng((seed, len(images)))
        others = [name for name in watched if name != TRIPWIRE]
        attacked = np.array(images)
        with bars.task(f"{SENTINEL}: attacks", len(images)) as task:
            for number, start in enumerate(range(0, len(images), _CHUNK)):
                name = TRIPWIRE if number % 2 == 0 else others[number // 2 % len(others)]
                attacked[start : start + _CHUNK] = pgd_features(
                    watched[name],
                    images[start : start + _CHUNK],
                    epsilon=rng.uniform(WEAKEST, STRONGEST),
                    steps=_PGD_STEPS,
                    restarts=1,
                    seed=int(rng.integers(2**31)),
                    device=device,
                    bars=bars,
                )
                task.advance(min(_CHUNK, len(images) - start))
        universal = [
            uap_features(
                watched[TRIPWIRE],
                images[rng.permutation(len(images))[:_UNIVERSAL_IMAGES]],
                epsilon=_UNIVERSAL_EPSILON,
                epochs=_UNIVERSAL_EPOCHS,
                seed=int(rng.integers(2**31)),
                device=device,
                bars=bars,
            )
            for _ in range(_UNIVERSAL)
        ]
        patches = [
            _patch(watched[TRIPWIRE], images[rng.permutation(len(images))[:_UNIVERSAL_IMAGES]], rng, device)
            for _ in range(_PATCHES)
        ]
        arrays = {"pgd": attacked, "universal": np.stack(universal), "patches": np.stack(patches)}
        save_tensors(file, {name: torch.from_numpy(array) for name, array in arrays.items()})
    kept: dict[str, Tensor] = load_tensors(file)
    return _Made(**{name: tensor.numpy() for name, tensor in kept.items()})


def _patch(victim: Encoder, images: NDArray[np.uint8], rng: np.random.Generator, device: str) -> NDArray[np.uint8]:
    """A square [h, h, 3] that moves the victim's features wherever it is put, from images [M, H, W, 3]: sign ascent."""
    height, width = images.shape[1:3]
    side = max(2, round(math.sqrt(_PATCH_AREA * height * width)))
    pixels = torch.from_numpy(rng.random((3, side, side), dtype=np.float32)).to(device)
    for _ in range(_UNIVERSAL_EPOCHS):
        for start in range(0, len(images), _CHUNK):
            x = as_input(images[start : start + _CHUNK], device)
            top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
            pixels.requires_grad_()
            frame = (left, width - side - left, top, height - side - top)
            mask = F.pad(torch.ones_like(pixels), frame)
            distance = 1 - F.cosine_similarity(victim(x * (1 - mask) + F.pad(pixels, frame)), victim(x))
            (gradient,) = torch.autograd.grad(distance.sum(), pixels)
            pixels = (pixels.detach() + 0.05 * gradient.sign()).clamp(0, 1)
    patch: NDArray[np.uint8] = to_uint8(pixels[None])[0]
    return patch


def _perturbed(
    images: NDArray[np.uint8], made: _Made, chosen: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Images [n, H, W, 3] of those `chosen`, attacked."""
    result = made.pgd[chosen]
    kind = rng.random(len(chosen))
    for row in np.flatnonzero(kind < _UNIVERSAL_SHARE + _PATCH_SHARE):
        image = images[chosen[row]]
        if kind[row] < _UNIVERSAL_SHARE:
            strength = rng.uniform(WEAKEST, STRONGEST) / _UNIVERSAL_EPSILON
            delta = made.universal[rng.integers(len(made.universal))] * np.float32(strength)
            result[row] = apply_universal(image[None], delta)[0]
        else:
            patch = made.patches[rng.integers(len(made.patches))]
            top, left = (
                int(rng.integers(there - here + 1)) for there, here in zip(image.shape, patch.shape[:2], strict=False)
            )
            result[row] = image
            result[row, top : top + len(patch), left : left + len(patch)] = patch
    return _changed(result, _STORED_SHARE, rng)


def _unattacked(images: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    result = _changed(images, _CHANGED_SHARE, rng)
    for row in np.flatnonzero(rng.random(len(images)) < _NOISE_SHARE):
        if rng.random() < _STEP_SHARE:
            steps = rng.uniform(*_STEP) * rng.choice((-1, 1), images.shape[1:])
            result[row] = apply_universal(images[row][None], steps.astype(np.float32))[0]
        else:
            result[row] = np.asarray(noisy(Image.fromarray(images[row]), rng))
    return result


def _changed(images: NDArray[np.uint8], share: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A copy, a share of which is honestly changed."""
    result = np.array(images)
    rows = np.flatnonzero(rng.random(len(images)) < share)
    if len(rows):
        # In an order of their own: the kinds of changes come in turn.
        rows = rng.permutation(rows)
        result[rows] = changed_at_random(images[rows], int(rng.integers(2**31)))
    return result


def _placement(images: NDArray[np.uint8], rng: np.random.Generator) -> Callable[[Tensor], Tensor]:
    """What all images [n, 3, H, W] of a batch go through, attacked or not: mirrored or not, and shifted alike. A universal
    perturbation is not to be known by its place."""
    height, width = images.shape[1:3]
    down, right = (math.ceil(side * _SHIFT) for side in (height, width))
    mirrored = rng.random() < 0.5
    top, left = int(rng.integers(0, 2 * down + 1)), int(rng.integers(0, 2 * right + 1))

    def place(x: Tensor) -> Tensor:
        moved = F.pad(x.flip(3) if mirrored else x, (right, right, down, down), mode="reflect")
        return moved[:, :, top : top + height, left : left + width]

    return place


def _lit(images: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Some lighter or darker, attacked or not: what is cut off at white is no attack."""
    result = np.array(images)
    for row in np.flatnonzero(rng.random(len(result)) < _LIT_SHARE):
        result[row] = np.clip(np.rint(result[row] * rng.uniform(*_LIGHT)), 0, 255)
    return result
