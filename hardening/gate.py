"""The whole graph as one torch module: uint8 pictures in; embedding, confidence and score out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.branches import BRANCHES, TRIPWIRE, embed
from hardening.detectors import Detector
from hardening.detectors.consistency import BLUR
from hardening.encoders import Encoder

BLUR_SIGMA = 0.7
"""Pixels of the input. Wide enough to take a perturbation's finest part, narrow enough to leave the picture."""


class Views(nn.Module):
    """The encoders, and what the detectors want to see of each: its features, or those of a blurred image."""

    kernel: Tensor

    def __init__(self, encoders: Mapping[str, Encoder]) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(dict(encoders))
        x = torch.arange(-2, 3, dtype=torch.float32)
        weights = torch.exp(-(x**2) / (2 * BLUR_SIGMA**2))
        weights = weights / weights.sum()
        self.register_buffer("kernel", torch.outer(weights, weights).expand(3, 1, 5, 5).contiguous())

    def blur(self, images: Tensor) -> Tensor:
        """Gaussian blur of images [N, 3, H, W], edges reflected."""
        return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), self.kernel, groups=3)

    def forward(self, images: Tensor, views: Iterable[str]) -> dict[str, Tensor]:
        """Images [N, 3, H, W] in [0, 1] -> features [N, d] by view."""
        blurred = self.blur(images)
        return {view: self.encoders[view.removesuffix(BLUR)](blurred if view.endswith(BLUR) else images) for view in views}


class Gate(nn.Module):
    """What a bundle's `model.onnx` computes; see design: inputs and outputs are a contract."""

    def __init__(self, views: Views, centres: Mapping[str, Tensor], detector: Detector) -> None:
        super().__init__()
        self.views, self.detector = views, detector
        for name in BRANCHES:
            self.register_buffer(f"centre_{name}", centres[name])
        self.wanted = tuple(dict.fromkeys((*BRANCHES, *detector.views)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 [N, H, W, 3] RGB -> embedding [N, D] unit length, confidence [N, B], score [N]."""
        pixels = images.permute(0, 3, 1, 2).float() / 255
        features = self.views(pixels, self.wanted)
        confidence, score = self.detector(features)
        return self.embedding(features), confidence, score

    def embedding(self, features: Mapping[str, Tensor]) -> Tensor:
        """Features by view -> embedding [N, D]."""
        centres = [getattr(self, f"centre_{name}") for name in BRANCHES]
        return embed([features[name] for name in BRANCHES], centres)


def needs_tripwire(detector: Detector) -> bool:
    """Whether the undefended victim is part of the graph."""
    return any(view.startswith(TRIPWIRE) for view in detector.views)
