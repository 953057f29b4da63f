"""An encoder with a linear head, as the baselines train it: a classifier of the job's own classes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.attacks.pgd import pgd
from hardening.encoders import Encoder, as_input, features
from hardening.finetune import first_head

Split = tuple[NDArray[np.uint8], NDArray[np.int64]]
_VALIDATION_IMAGES = 256
_VALIDATION_STEPS = 5


class LinearHead(nn.Module):
    """Features [N, d] -> logits [N, C]: linear, on features brought to a common scale first."""

    centre: Tensor
    scale: Tensor

    def __init__(self, found: Tensor, labels: NDArray[np.int64]) -> None:
        """Fitted to features [N, d] and labels 0..C-1 [N], so that training does not start from noise."""
        super().__init__()
        centre, scale = found.mean(dim=0), found.std(dim=0)
        self.register_buffer("centre", centre)
        self.register_buffer("scale", scale.clamp_min(0.1 * scale.mean()).clamp_min(1e-6))
        self.linear = first_head((found - self.centre) / self.scale, labels, labelled=True)

    def forward(self, found: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.linear((found - self.centre) / self.scale)
        return logits


class Classifier(nn.Module):
    """Images [N, 3, H, W] in [0, 1] -> logits [N, C]; the normalisation is the encoder's."""

    def __init__(self, encoder: Encoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.head(self.encoder(images))
        return logits


def with_head(encoder: Encoder, train: Split, device: str) -> Classifier:
    """`encoder` itself, on `device`, with a head fitted to its features of the training images."""
    encoder.to(device)
    return Classifier(encoder, LinearHead(features(encoder, train[0], device=device), train[1]).to(device))


def attack(
    classifier: Classifier,
    images: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    epsilon: float,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """PGD within `epsilon`/255 against the classifier in eval mode; `loss` maps logits [N, C] to what is maximised, [N].

    Training mode is as before afterwards.
    """
    mode = [(module, module.training) for module in classifier.modules()]
    classifier.eval()
    size = epsilon / 255
    adversarial = pgd(
        images,
        lambda x: loss(classifier(x)),
        epsilon=size,
        steps=steps,
        step_size=size * min(1.25, 2.5 / steps),
        generator=generator,
    )
    for module, training in mode:
        module.training = training
    return adversarial


def attack_labels(
    classifier: Classifier, images: Tensor, labels: Tensor, *, epsilon: float, steps: int, generator: torch.Generator
) -> Tensor:
    """`attack` with the cross-entropy."""

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none")

    return attack(classifier, images, loss, epsilon=epsilon, steps=steps, generator=generator)


def validate(
    classifier: Classifier, split: Split, *, epsilon: float, batch_size: int, generator: torch.Generator, device: str
) -> dict[str, float]:
    """Clean and attacked accuracy, and their mean, by which the epoch is chosen; on a part of a large split."""
    classifier.eval()
    every = max(1, len(split[0]) // _VALIDATION_IMAGES)
    images, labels = split[0][::every], split[1][::every]
    right: dict[str, list[Tensor]] = {"clean_acc": [], "robust_acc": []}
    for start in range(0, len(images), batch_size):
        x = as_input(images[start : start + batch_size], device)
        y = torch.as_tensor(labels[start : start + batch_size], device=device)
        attacked = attack_labels(classifier, x, y, epsilon=epsilon, steps=_VALIDATION_STEPS, generator=generator)
        with torch.no_grad():
            right["clean_acc"].append(classifier(x).argmax(1) == y)
            right["robust_acc"].append(classifier(attacked).argmax(1) == y)
    found = {name: torch.cat(parts).float().mean().item() for name, parts in right.items()}
    return {**found, "selection": (found["clean_acc"] + found["robust_acc"]) / 2}
