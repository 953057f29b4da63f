from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from hardening.branches import BMP, BRANCHES, EARLY, LAYOUT, MPAE, TRIPWIRE, embed
from hardening.calibrate import Calibrated
from hardening.detectors.consistency import BLUR, MIRROR, MOVE, ZOOM
from hardening.encoders import as_input
from hardening.gate import BLUR_SIGMA, Gate, Views, needs_tripwire
from tests.support.patterns import patterns


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.from_numpy(patterns(2, seed=3)[0])


def test_pictures_in_embedding_confidence_and_score_out(toy_calibrated: Calibrated, pixels: torch.Tensor) -> None:
    embedding, confidence, score = toy_calibrated.gate(pixels)
    assert (embedding.shape, confidence.shape, score.shape) == ((8, 408), (8, 4), (8,))
    assert torch.allclose(embedding.norm(dim=1), torch.ones(8), atol=1e-5)


def test_it_is_its_parts(toy_calibrated: Calibrated, pixels: torch.Tensor) -> None:
    gate = toy_calibrated.gate
    x = as_input(pixels.numpy())
    features = {}
    for how, seen in (
        ("", x),
        (BLUR, gate.views.blur(x)),
        (ZOOM, gate.views.zoom(x)),
        (MOVE, gate.views.move(x)),
        (MIRROR, x.flip(3)),
    ):
        for name in (*BRANCHES, TRIPWIRE):
            read = gate.views.encoders[name].readout(seen)
            features |= {name + part + how: value for part, value in read.items()}
    embedding, confidence, score = gate(pixels)
    expected = []
    for name in BRANCHES:
        layout = gate.get_submodule(f"layout_{name}")(features[name + LAYOUT])
        centred = {
            part: features[name + part] - gate.get_buffer(f"centre_{name}{part}".replace(".", "_")) for part in ("", EARLY)
        }
        expected.append({**centred, LAYOUT: layout})
    assert torch.allclose(embedding, embed(expected), atol=1e-5)
    expected_confidence, expected_score = gate.detector(features)
    assert torch.allclose(confidence, expected_confidence, atol=1e-4)
    assert torch.allclose(score, expected_score, atol=1e-3)


def test_the_tripwire_is_watched_and_not_returned(toy_calibrated: Calibrated, pixels: torch.Tensor) -> None:
    gate = toy_calibrated.gate
    assert needs_tripwire(gate.detector)
    assert set(gate.views.encoders) == {*MPAE, BMP, TRIPWIRE}
    x = as_input(pixels.numpy())
    features = gate.views(x, gate.wanted)
    before = gate.embedding(features)
    features[TRIPWIRE] = torch.zeros_like(features[TRIPWIRE])
    assert torch.equal(gate.embedding(features), before)


def test_neighbours_in_a_batch_do_not_change_an_answer(toy_calibrated: Calibrated, pixels: torch.Tensor) -> None:
    together = toy_calibrated.gate(pixels)
    noise = torch.randint(0, 256, pixels.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noise[3] = pixels[3]
    by_itself, with_others = toy_calibrated.gate(pixels[3:4]), toy_calibrated.gate(noise)
    for whole, alone, among, tolerance in zip(together, by_itself, with_others, (1e-5, 1e-3, 1e-3), strict=True):
        assert torch.allclose(whole[3], alone[0], rtol=0, atol=tolerance)
        assert torch.allclose(whole[3], among[3], rtol=0, atol=tolerance)


def test_the_blur_is_gaussian_and_keeps_flat_pictures(toy_calibrated: Calibrated) -> None:
    views = toy_calibrated.gate.views
    assert torch.allclose(views.blur(torch.full((1, 3, 9, 9), 0.3)), torch.full((1, 3, 9, 9), 0.3), atol=1e-6)
    point = torch.zeros(1, 3, 9, 9)
    point[:, :, 4, 4] = 1
    spread = views.blur(point)[0, 0]
    assert spread.sum().item() == pytest.approx(1, abs=1e-5)
    y = torch.arange(9.0) - 4
    # Cut off at two pixels, the spread is a little less than sigma.
    assert ((spread.sum(1) * y**2).sum() ** 0.5).item() == pytest.approx(BLUR_SIGMA, rel=0.05)
    picture = patterns(1, 32)[0][0]
    by_pillow = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(BLUR_SIGMA)), dtype=float)
    ours = views.blur(as_input(picture[None]))[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(ours - by_pillow)[2:-2, 2:-2].mean() < 2


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 48)])
def test_the_zoom_is_the_stretched_middle(height: int, width: int) -> None:
    views, images = Views({}, height, width), torch.rand(2, 3, height, width)
    middle = images[:, :, height // 16 : -(height // 16), width // 16 : -(width // 16)]
    expected = torch.nn.functional.interpolate(middle, size=(height, width), mode="bilinear", align_corners=False)
    assert torch.allclose(views.zoom(images), expected, atol=1e-5)
    assert not torch.allclose(views.zoom(images), images, atol=1e-2)


@pytest.mark.parametrize(("height", "width", "down", "right"), [(32, 48, 1, 1), (64, 128, 3, 5), (224, 100, 9, 5)])
def test_a_moved_picture_is_itself_further_down_and_right(height: int, width: int, down: int, right: int) -> None:
    images = torch.rand(2, 3, height, width)
    moved = Views({}, height, width).move(images)
    assert torch.equal(moved[:, :, down:, right:], images[:, :, : height - down, : width - right])
    padded = torch.nn.functional.pad(images, (right, 0, down, 0), mode="reflect")
    assert torch.equal(moved, padded[:, :, :height, :width])


def test_views_that_no_detector_wants_are_not_computed(toy_calibrated: Calibrated) -> None:
    gate = toy_calibrated.gate
    assert set(gate.wanted) == {
        *(f"{name}{part}" for name in BRANCHES for part in ("", EARLY, LAYOUT)),
        *(f"{TRIPWIRE}{part}{how}" for part in ("", EARLY) for how in ("", BLUR)),
        *(f"{BMP}{part}{BLUR}" for part in ("", EARLY)),
        TRIPWIRE + ZOOM,
        *(f"{TRIPWIRE}{part}{how}" for part in ("", EARLY) for how in (MOVE, MIRROR)),
    }
    assert len(gate.wanted) == len(set(gate.wanted))
    assert isinstance(gate, Gate)
