"""A small network that is trained to see perturbations: an adversary detection network (Metzen et al., ICLR 2017).

It learns on local images alone: clean and honestly changed ones on the one side, on the other the same images attacked here,
by PGD on the features of the tripwire and of each branch, and by universal perturbations of the tripwire. Each is drawn at a
strength between `WEAKEST` and `STRONGEST`, so that no threshold of it is tuned to one budget. It never sees a label, nor a
class of the task, nor the images that calibrate it; which pictures it takes for attacked is decided by its p-value among
clean ones (`hardening.detectors.sentinel`).

Metzen et al. read the classifier's own feature maps. Those belong to a network that everybody has; this one is trained
apart from it, from random weights, so that who lacks the bundle has to guess it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.attacks.features import apply_universal, pgd_features, uap_features
from hardening.branches import SENTINEL, TRIPWIRE
from hardening.encoders import Encoder, as_input
from hardening.files import load_tensors, save_tensors
from hardening.finetune import cosine
from hardening.honest import changed_at_random
from hardening.progress import Bars
from hardening.recipe import Sentinel
from hardening.training import run_epochs, seed_everything

WEAKEST, STRONGEST = 2.0, 10.0
"""L-infinity, in 1/255."""
_PGD_STEPS = 6
_CHUNK = 28
"""Images that are attacked with one epsilon, on one encoder."""
_UNIVERSAL, _UNIVERSAL_IMAGES, _UNIVERSAL_EPOCHS, _UNIVERSAL_EPSILON = 8, 320, 2, 8.0
_UNIVERSAL_SHARE = 0.4
"""Of the attacked images of a batch; the others are PGD's."""
_STORED_SHARE = 0.2
"""Of the attacked images, those that are honestly changed afterwards, as a file's way through an app does."""
_CHANGED_SHARE, _SIGNS_SHARE = 0.5, 0.08
"""Of the unattacked images, those that are honestly changed, and those under random signs: noise is no attack."""
_SHIFT = 1 / 16
"""Share of the side by which crops differ."""


class SentinelNetwork(nn.Sequential):
    """Images [N, 3, H, W] -> one logit each, [N, 1]; positive = perturbed. Five convolutions, half or a quarter of the
    resolution in most of them: perturbations are fine, and a pooled network would not see them."""

    num_features = 1

    def __init__(self, width: int, height_and_width: tuple[int, int]) -> None:
        second = 2 if min(height_and_width) >= 96 else 1
        planes = [
            (3, width, 1),
            (width, 2 * width, 2),
            (2 * width, 2 * width, second),
            (2 * width, 4 * width, 2),
            (4 * width, 4 * width, 1),
        ]
        layers: list[nn.Module] = []
        for inputs, outputs, stride in planes:
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 1))


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
    attacked, universal = _attacks(watched, images, seed, folder / f"{SENTINEL}.attacks.pt", device, bars)
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
                bad = _perturbed(images, attacked, universal, ones[start : start + size], rng)
                good = _unattacked(images[zeros[start : start + size]], rng)
                x = as_input(_cropped(np.concatenate([bad, good]), rng), device)
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
    return encoder.cpu().eval()


def _attacks(
    watched: Mapping[str, Encoder], images: NDArray[np.uint8], seed: int, file: Path, device: str, bars: Bars
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Each image after PGD [N, H, W, 3], every second chunk of them on the tripwire; and universal perturbations
    [U, H, W, 3] in 1/255. Kept in `file`."""
    if not file.exists():
        rng = np.random.default_rng((seed, len(images)))
        others = [name for name in watched if name != TRIPWIRE]
        attacked = np.empty_like(images)
        with torch.no_grad():
            moved = {name: encoder.to(device).eval().requires_grad_(False) for name, encoder in watched.items()}
        with bars.task(f"{SENTINEL}: attacks", len(images)) as task:
            for number, start in enumerate(range(0, len(images), _CHUNK)):
                name = TRIPWIRE if number % 2 == 0 else others[number // 2 % len(others)]
                attacked[start : start + _CHUNK] = pgd_features(
                    moved[name],
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
                moved[TRIPWIRE],
                images[rng.permutation(len(images))[:_UNIVERSAL_IMAGES]],
                epsilon=_UNIVERSAL_EPSILON,
                epochs=_UNIVERSAL_EPOCHS,
                seed=int(rng.integers(2**31)),
                device=device,
                bars=bars,
            )
            for _ in range(_UNIVERSAL)
        ]
        save_tensors(file, {"pgd": torch.from_numpy(attacked), "universal": torch.from_numpy(np.stack(universal))})
        for encoder in watched.values():
            encoder.cpu()
    kept: dict[str, Tensor] = load_tensors(file)
    return kept["pgd"].numpy(), kept["universal"].numpy()


def _perturbed(
    images: NDArray[np.uint8],
    attacked: NDArray[np.uint8],
    universal: NDArray[np.float32],
    chosen: NDArray[np.int64],
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    result = attacked[chosen]
    every = rng.random(len(chosen)) < _UNIVERSAL_SHARE
    for row in np.flatnonzero(every):
        delta = universal[rng.integers(len(universal))] * (rng.uniform(WEAKEST, STRONGEST) / _UNIVERSAL_EPSILON)
        result[row] = apply_universal(images[chosen[row]][None], delta)[0]
    return _changed(result, _STORED_SHARE, rng)


def _unattacked(images: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    result = _changed(images, _CHANGED_SHARE, rng)
    for row in np.flatnonzero(rng.random(len(images)) < _SIGNS_SHARE):
        signs = rng.choice((-1, 1), images.shape[1:]) * rng.uniform(WEAKEST, STRONGEST)
        result[row] = apply_universal(images[row][None], signs.astype(np.float32))[0]
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


def _cropped(images: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """All of them mirrored or not, and shifted alike: a universal perturbation is not to be known by its place."""
    if rng.random() < 0.5:
        images = images[:, :, ::-1]
    height, width = (math.ceil(side * _SHIFT) for side in images.shape[1:3])
    top, left = rng.integers(0, height + 1), rng.integers(0, width + 1)
    return np.ascontiguousarray(images[:, top : images.shape[1] - height + top, left : images.shape[2] - width + left])
