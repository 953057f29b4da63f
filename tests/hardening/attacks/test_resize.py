from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from hardening.attacks.resize import Resize, through_input_size, through_resize_rule
from hardening.encoders import Encoder, as_input
from model_store.pixels import PixelRule, decode
from tests.support.patterns import patterns
from tests.support.tiny_bundle import noisy_images

RULE = PixelRule(height=16, width=16)


def png(photo: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(480, 640), (641, 333), (16, 16), (16, 90), (9, 12)])
def test_it_is_the_services_own_resizing(height: int, width: int, resample: str) -> None:
    rule = PixelRule(height=32, width=24, resample=resample)  # type: ignore[arg-type]
    # Noise is the hardest: neighbouring pixels have nothing in common, and bicubic overshoots.
    photo = noisy_images(1, max(height, width), seed=3)[0][:height, :width]
    served = decode(png(photo), rule).astype(float)
    ours = Resize((height, width), (32, 24), resample)(as_input(photo[None]))[0].permute(1, 2, 0).numpy()
    assert ours.shape == served.shape
    # Two roundings of half a value; bicubic's negative weights make more of the first.
    assert np.abs(255 * ours - served).max() < (1.001 if resample == "bilinear" else 1.2)
    assert np.abs(255 * ours - served).mean() < 0.4


def test_it_has_gradients() -> None:
    photo = torch.rand(1, 3, 40, 30, dtype=torch.float32).requires_grad_()
    Resize((40, 30), (8, 8), "bilinear")(photo).sum().backward()  # type: ignore[no-untyped-call]
    assert photo.grad is not None
    # Each of the 3 x 64 outputs is a mean.
    assert photo.grad.sum().item() == pytest.approx(192, rel=1e-4)


def test_attacks_stay_within_the_budget_and_survive_the_resizing(toy_encoder: Encoder) -> None:
    photo = np.asarray(Image.fromarray(patterns(1)[0][1]).resize((150, 200), Image.Resampling.BICUBIC))
    moved = {}
    for attack in (through_input_size, through_resize_rule):
        attacked = attack(toy_encoder, photo, RULE, epsilon=8, steps=20, seed=0, device="cpu")
        assert (attacked.shape, attacked.dtype) == (photo.shape, np.uint8)
        assert 0 < np.abs(attacked.astype(int) - photo).max() <= 8
        seen = as_input(np.stack([decode(png(picture), RULE) for picture in (photo, attacked)]))
        with torch.no_grad():
            moved[attack] = 1 - torch.cosine_similarity(*toy_encoder(seen), dim=0).item()
    noise = np.random.default_rng(0).choice([-8, 8], photo.shape)
    noisy = np.clip(photo + noise, 0, 255).astype(np.uint8)
    with torch.no_grad():
        features = toy_encoder(as_input(np.stack([decode(png(picture), RULE) for picture in (photo, noisy)])))
    floor = 1 - torch.cosine_similarity(*features, dim=0).item()
    # Who knows the rule keeps all of the perturbation; of the other's, the resizing takes the fine part.
    assert moved[through_resize_rule] > moved[through_input_size] > floor


def test_the_same_seed_gives_the_same_picture(toy_encoder: Encoder) -> None:
    photo = patterns(1, 24)[0][0]

    def run(seed: int) -> NDArray[np.uint8]:
        return through_resize_rule(toy_encoder, photo, RULE, epsilon=8, steps=3, seed=seed, device="cpu")

    assert (run(1) == run(1)).all()
    assert (run(1) != run(2)).any()
