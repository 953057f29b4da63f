"""The whole graph as one torch module: uint8 pictures in; embedding, confidence and score out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.branches import BRANCHES, LAYOUT, PARTS, TRIPWIRE, embed, linear
from hardening.compact import round_weights
from hardening.detectors import Detector
from hardening.detectors.consistency import BLUR, MIRROR, MOVE, ZOOM
from hardening.encoders import Encoder

BLUR_SIGMA = 0.7
"""Pixels of the input. Wide enough to take a perturbation's finest part, narrow enough to leave the picture."""
LAYOUT_COMPONENTS = 128
EMBEDDED = tuple(name + part for name in BRANCHES for part in PARTS)
"""The views that the embedding is made of."""
ZOOM_MARGIN = 1 / 16
"""Share of the side that a zoom cuts off at each edge."""
MOVE_SHARE = 1 / 25
"""Share of the side by which a picture is moved. Odd in pixels, so that no stride of a network takes it back."""


class Views(nn.Module):
    """The encoders, and what the gate and its detector want to see of each: its features or another part of its readout, of
    the image or of a blurred, zoomed, moved or mirrored one: `bmp`, `bmp.early`, `bmp@blur`, `bmp.early@blur`. Parts that an
    encoder does not have are left out.

    `height` and `width` are those of the images.
    """

    kernel: Tensor
    zoom_rows: Tensor
    zoom_columns: Tensor
    move_rows: Tensor
    move_columns: Tensor
    mirror_columns: Tensor

    def __init__(self, encoders: Mapping[str, Encoder], height: int, width: int) -> None:
        super().__init__()
        self.register_buffer("zoom_rows", _zoom_weights(height))
        self.register_buffer("zoom_columns", _zoom_weights(width).T.contiguous())
        self.register_buffer("move_rows", _move_weights(height))
        self.register_buffer("move_columns", _move_weights(width).T.contiguous())
        self.register_buffer("mirror_columns", torch.eye(width).flip(0))
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

    def move(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] a few pixels further down and to the right, edges reflected."""
        return self.move_rows @ images @ self.move_columns

    def mirror(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W], left and right exchanged."""
        return images @ self.mirror_columns

    def forward(self, images: Tensor, views: Iterable[str]) -> dict[str, Tensor]:
        """Images [N, 3, H, W] in [0, 1] -> values [N, d] by view."""
        seen = {
            "": images,
            BLUR: self.blur(images),
            ZOOM: self.zoom(images),
            MOVE: self.move(images),
            MIRROR: self.mirror(images),
        }
        wanted, found = set(views), {}
        split = {view: view.partition("@") for view in wanted}
        for name, how in sorted({(side.partition(".")[0], at + rest) for side, at, rest in split.values()}):
            encoder = self.encoders[name]
            assert isinstance(encoder, Encoder)
            for part, value in encoder.readout(seen[how]).items():
                if name + part + how in wanted:
                    found[name + part + how] = value
        return found


def _zoom_weights(size: int) -> Tensor:
    """[size, size]: what bilinear interpolation of the middle takes from each row."""
    margin = max(1, round(ZOOM_MARGIN * size))
    rows = torch.eye(size)[None, :, margin : size - margin]
    return F.interpolate(rows, size=size, mode="linear", align_corners=False)[0].T.contiguous()


def _move_weights(size: int) -> Tensor:
    """[size, size]: which row each row is taken from."""
    pixels = 2 * int(size * MOVE_SHARE / 2) + 1
    return torch.eye(size)[(torch.arange(size) - pixels).abs()]


class Gate(nn.Module):
    """What a bundle's `model.onnx` computes; its inputs and outputs are a contract (`model_store.session.OUTPUTS`).

    `clean` are values [N, d] by view of clean images that no encoder was tuned on: their means are the embedding's centres,
    and their leading principal components are kept of each branch's layout.
    """

    def __init__(self, views: Views, clean: Mapping[str, Tensor], detector: Detector) -> None:
        super().__init__()
        self.views, self.detector = views, detector
        self.parts = {name: [part for part in PARTS if name + part in clean] for name in BRANCHES}
        for name, parts in self.parts.items():
            for part in parts:
                if part == LAYOUT:
                    self.add_module(f"layout_{name}", _leading(clean[name + part]))
                else:
                    self.register_buffer(_centre(name, part), clean[name + part].mean(dim=0))
        self.wanted = tuple(dict.fromkeys((*EMBEDDED, *detector.views)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 [N, H, W, 3] RGB -> embedding [N, D] unit length, confidence [N, B], score [N]."""
        pixels = images.permute(0, 3, 1, 2).float() / 255
        values = self.views(pixels, self.wanted)
        confidence, score = self.detector(values)
        return self.embedding(values), confidence, score

    def embedding(self, values: Mapping[str, Tensor]) -> Tensor:
        """Values by view -> embedding [N, D]."""
        return embed([{part: self._centred(name, part, values) for part in parts} for name, parts in self.parts.items()])

    def dims(self) -> dict[str, tuple[int, ...]]:
        """By branch: the columns that each of its parts fills in the embedding."""
        return {name: tuple(self._dim(name, part) for part in parts) for name, parts in self.parts.items()}

    def _dim(self, name: str, part: str) -> int:
        fitted = f"layout_{name}.bias" if part == LAYOUT else _centre(name, part)
        return len(self.get_parameter(fitted) if part == LAYOUT else self.get_buffer(fitted))

    def _centred(self, name: str, part: str, values: Mapping[str, Tensor]) -> Tensor:
        value = values[name + part]
        if part == LAYOUT:
            reduced: Tensor = self.get_submodule(f"layout_{name}")(value)
            return reduced
        centred: Tensor = value - getattr(self, _centre(name, part))
        return centred


def _centre(name: str, part: str) -> str:
    return f"centre_{name}{part}".replace(".", "_")


def _leading(values: Tensor) -> nn.Linear:
    """Values [N, d] less their mean, in their leading principal components."""
    pca = PCA(min(LAYOUT_COMPONENTS, values.shape[1], len(values)), svd_solver="full").fit(values.numpy().astype(np.float64))
    layer = linear(pca.components_, np.zeros(len(pca.components_)))
    round_weights(layer)
    layer.bias = nn.Parameter(-layer(torch.tensor(pca.mean_, dtype=torch.float32)), requires_grad=False)
    return layer


def needs_tripwire(detector: Detector) -> bool:
    """Whether the undefended victim is part of the graph."""
    return any(view.startswith(TRIPWIRE) for view in detector.views)
