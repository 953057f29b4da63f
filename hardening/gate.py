"""The whole graph as one torch module: uint8 pictures in; embedding, confidence and score out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.branches import BRANCHES, TRIPWIRE, embed
from hardening.detectors import Detector
from hardening.detectors.consistency import BLUR, ZOOM
from hardening.encoders import Encoder

BLUR_SIGMA = 0.7
"""Pixels of the input. Wide enough to take a perturbation's finest part, narrow enough to leave the picture."""


ZOOM_MARGIN = 1 / 16
"""Share of the side that a zoom cuts off at each edge."""


class Views(nn.Module):
    """The encoders, and what the detectors want to see of each: its features, or those of a blurred or zoomed image.

    `height` and `width` are those of the images.
    """

    kernel: Tensor
    zoom_rows: Tensor
    zoom_columns: Tensor

    def __init__(self, encoders: Mapping[str, Encoder], height: int, width: int) -> None:
        super().__init__()
        self.register_buffer("zoom_rows", _zoom_weights(height))
        self.register_buffer("zoom_columns", _zoom_weights(width).T.contiguous())
        self.encoders = nn.ModuleDict(dict(encoders))
        x = torch.arange(-2, 3, dtype=torch.float32)
        weights = torch.exp(-(x**2) / (2 * BLUR_SIGMA**2))
        weights = weights / weights.sum()
        self.register_buffer("kernel", torch.outer(weights, weights).expand(3, 1, 5, 5).contiguous())

    def blur(self, images: Tensor) -> Tensor:
        """Gaussian blur of images [N, 3, H, W], edges reflected."""
        return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), self.kernel, groups=3)

    def zoom(self, images: Tensor) -> Tensor:
        """The middle of images [N, 3, H, W], stretched to their size. As two products, which every host computes alike."""
        return self.zoom_rows @ images @ self.zoom_columns

    def forward(self, images: Tensor, views: Iterable[str]) -> dict[str, Tensor]:
        """Images [N, 3, H, W] in [0, 1] -> features [N, d] by view."""
        seen = {"": images, BLUR: self.blur(images), ZOOM: self.zoom(images)}
        split = {view: view.partition("@") for view in views}
        return {view: self.encoders[name](seen[at + how]) for view, (name, at, how) in split.items()}


def _zoom_weights(size: int) -> Tensor:
    """[size, size]: what bilinear interpolation of the middle takes from each row."""
    margin = max(1, round(ZOOM_MARGIN * size))
    rows = torch.eye(size)[None, :, margin : size - margin]
    return F.interpolate(rows, size=size, mode="linear", align_corners=False)[0].T.contiguous()


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
