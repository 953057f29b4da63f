"""Attacks on a photograph of any size, which a service resizes before it looks: perturbed in its own pixels.

Both maximise 1 - cos(f(resized attacked), f(resized clean)), with f the undefended public encoder, and differ in what the
attacker knows: `through_input_size` nothing of the resizing, `through_resize_rule` all of it. JPEG is in neither: a file that
is stored so loses part of the perturbation, and the attacker does not reckon with it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.attacks.features import to_uint8
from hardening.attacks.pgd import pgd
from hardening.encoders import as_input
from model_store.pixels import PixelRule

Shape = tuple[int, int]
"""Height, width."""


class Resize:
    """Pillow's resizing as two matrices, so that it has gradients; no cropping, the aspect ratio is not kept.

    As in Pillow, rows come first, and each pass is clipped. Pillow also rounds each pass to 8 bits, this not: the two are
    at most 1/255 apart (bicubic in the worst case 1.2/255; `tests/hardening/attacks/test_resize.py`).
    """

    def __init__(self, before: Shape, after: Shape, resample: str, device: str = "cpu") -> None:
        self._rows, self._columns = (_axis(n, m, resample).to(device) for n, m in zip(before, after, strict=True))

    def __call__(self, images: Tensor) -> Tensor:
        """[N, C, H, W] in [0, 1] -> [N, C, h, w] in [0, 1]."""
        return (self._rows @ (images @ self._columns.T).clamp(0, 1)).clamp(0, 1)


def through_input_size(
    encoder: nn.Module, photo: NDArray[np.uint8], rule: PixelRule, *, epsilon: float, steps: int, seed: int, device: str
) -> NDArray[np.uint8]:
    """PGD on the photograph at the encoder's input size; the perturbation is enlarged (bilinear) and added.

    The attacker who works at the encoder's size, as published attacks do. `photo` uint8 [H, W, 3]; `epsilon` in 1/255.
    Returns uint8 [H, W, 3], each value at most `epsilon` away.
    """
    small, size = (rule.height, rule.width), photo.shape[:2]
    x = as_input(photo[None], device)
    resized = Resize(size, small, rule.resample, device)(x)
    delta = _attacked(encoder, resized, nn.Identity(), epsilon, steps, seed) - resized
    attacked: NDArray[np.uint8] = to_uint8(x + F.interpolate(delta, size, mode="bilinear", antialias=True))[0]
    return attacked


def through_resize_rule(
    encoder: nn.Module, photo: NDArray[np.uint8], rule: PixelRule, *, epsilon: float, steps: int, seed: int, device: str
) -> NDArray[np.uint8]:
    """PGD in the photograph's own pixels, through the resizing of the pixel rule: the attacker who knows the rule.

    `photo` uint8 [H, W, 3]; `epsilon` in 1/255. Returns uint8 [H, W, 3], each value at most `epsilon` away. Takes memory for
    about twenty float32 copies of the photograph.
    """
    resize = Resize(photo.shape[:2], (rule.height, rule.width), rule.resample, device)
    x = as_input(photo[None], device)
    attacked: NDArray[np.uint8] = to_uint8(_attacked(encoder, x, resize, epsilon, steps, seed))[0]
    return attacked


def _attacked(
    encoder: nn.Module, x: Tensor, seen: Callable[[Tensor], Tensor], epsilon: float, steps: int, seed: int
) -> Tensor:
    """PGD on the features of what is `seen` of x [1, 3, H, W]; the step is 2.5 epsilon / steps."""
    with torch.no_grad():
        clean = encoder(seen(x))
    size = epsilon / 255
    return pgd(
        x,
        lambda z: 1 - F.cosine_similarity(encoder(seen(z)), clean),
        epsilon=size,
        steps=steps,
        step_size=2.5 * size / steps,
        generator=torch.Generator().manual_seed(seed),
    )


def _axis(before: int, after: int, resample: str) -> Tensor:
    """Pillow's own filter along one axis, [after, before]: what it makes of each unit vector."""
    units = Image.fromarray(np.eye(before, dtype=np.float32))
    resized = units.resize((after, before), Image.Resampling[resample.upper()])
    return torch.from_numpy(np.ascontiguousarray(np.asarray(resized).T))
