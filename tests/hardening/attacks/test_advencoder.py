from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from hardening.attacks.advencoder import Patch, TooFewImages, _high_pass, _loss, _within, apply_patch, pat, per
from hardening.attacks.features import apply_universal
from hardening.encoders import Encoder, features
from model_store.errors import TwogateError
from tests.hardening.conftest import QuietBars
from tests.support.patterns import patterns

Images = NDArray[np.uint8]
Delta = NDArray[np.float32]


@pytest.fixture(scope="module")
def images() -> Images:
    return patterns(10, seed=3)[0]


@pytest.fixture(scope="module")
def surrogate() -> Images:
    return patterns(16, seed=9)[0]


def perturbation(encoder: nn.Module, surrogate: Images, epochs: int = 3, *, epsilon: float = 8, seed: int = 0) -> Delta:
    return per(encoder, surrogate, epsilon=epsilon, epochs=epochs, seed=seed, device="cpu", bars=QuietBars())


def patch(encoder: nn.Module, surrogate: Images, epochs: int = 3, *, seed: int = 0) -> Patch:
    return pat(encoder, surrogate, epochs=epochs, seed=seed, device="cpu", bars=QuietBars())


def shift(encoder: Encoder, images: Images, attacked: Images) -> float:
    return float(1 - F.cosine_similarity(features(encoder, images), features(encoder, attacked)).mean())


def plain(height: int, width: int) -> Images:
    return np.random.default_rng(0).integers(0, 256, (4, height, width, 3), np.uint8)


@pytest.mark.parametrize("epsilon", [2, 10])
def test_per_is_one_perturbation_within_the_budget(
    toy_encoder: Encoder, surrogate: Images, images: Images, epsilon: float
) -> None:
    delta = perturbation(toy_encoder, surrogate, 1, epsilon=epsilon)
    assert delta.dtype == np.float32
    assert delta.shape == images.shape[1:]
    assert np.abs(delta).max() == epsilon
    assert np.abs(apply_universal(images, delta).astype(int) - images).max() == epsilon


def test_per_moves_features_further_than_noise(toy_encoder: Encoder, surrogate: Images, images: Images) -> None:
    signs = [np.random.default_rng(seed).choice([-8.0, 8.0], size=(16, 16, 3)).astype(np.float32) for seed in range(5)]
    by_noise = max(shift(toy_encoder, images, apply_universal(images, delta)) for delta in signs)
    delta = perturbation(toy_encoder, surrogate)
    assert shift(toy_encoder, images, apply_universal(images, delta)) > 10 * by_noise


def test_pat_moves_features_further_than_random_pixels(toy_encoder: Encoder) -> None:
    images = patterns(5, 32, seed=3)[0]
    found = patch(toy_encoder, patterns(8, 32, seed=9)[0], 6)
    by_noise = []
    for seed in range(5):
        pixels = np.random.default_rng(seed).choice(np.array([0, 255], np.uint8), size=found.pixels.shape)
        by_noise.append(shift(toy_encoder, images, apply_patch(images, Patch(pixels, found.mask))))
    assert shift(toy_encoder, images, apply_patch(images, found)) > 2 * max(by_noise)


def test_more_epochs_are_never_much_weaker(toy_encoder: Encoder, surrogate: Images, images: Images) -> None:
    by_per = [
        shift(toy_encoder, images, apply_universal(images, perturbation(toy_encoder, surrogate, epochs)))
        for epochs in (0, 2, 8)
    ]
    by_pat = [shift(toy_encoder, images, apply_patch(images, patch(toy_encoder, surrogate, epochs))) for epochs in (0, 2, 8)]
    for moved in (by_per, by_pat):
        assert all(later >= 0.95 * earlier for earlier, later in itertools.pairwise(moved))
        assert moved[2] > 5 * moved[0]


def test_what_left_the_budget_can_come_back() -> None:
    values, inside = [-2.0, -2.0, 0.5, 0.5, 2.0, 2.0], [-1.0, -1.0, 0.5, 0.5, 1.0, 1.0]
    made = torch.tensor(values, requires_grad=True)
    kept = _within(made, 1)
    assert torch.equal(kept.detach(), torch.tensor(inside))
    # A step goes against the gradient: the first of each pair would go down, the second up.
    (gradient,) = torch.autograd.grad(kept, made, torch.tensor([1.0, -1.0] * 3))
    assert gradient.tolist() == [0, -1, 1, -1, 1, 0]
    assert not _within(made.detach(), 1).requires_grad


def test_both_are_seeded(toy_encoder: Encoder, surrogate: Images) -> None:
    first, again, other = (perturbation(toy_encoder, surrogate, 1, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    torch.manual_seed(7)  # the answer does not hang on the global generator, and leaves it as it was
    one, same, another = (patch(toy_encoder, surrogate, 1, seed=seed).pixels for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != another).any()


def test_both_leave_the_encoder_alone(toy_encoder: Encoder, surrogate: Images) -> None:
    before = {name: value.clone() for name, value in toy_encoder.state_dict().items()}
    perturbation(toy_encoder, surrogate, 1)
    patch(toy_encoder, surrogate, 1)
    assert all(p.grad is None for p in toy_encoder.parameters())
    assert all(torch.equal(before[name], value) for name, value in toy_encoder.state_dict().items())


def test_a_patch_touches_only_its_mask(toy_encoder: Encoder, surrogate: Images, images: Images) -> None:
    found = patch(toy_encoder, surrogate, 1)
    patched = apply_patch(images, found)
    assert patched.dtype == found.pixels.dtype == np.uint8
    assert found.mask.dtype == np.bool_
    np.testing.assert_array_equal(patched[:, ~found.mask], images[:, ~found.mask])
    for picture in patched:
        np.testing.assert_array_equal(picture[found.mask], found.pixels[found.mask])
    assert not found.pixels[~found.mask].any()


def mean_colour() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())


def test_the_mask_is_the_published_one_and_grows_with_the_picture() -> None:
    mask = patch(mean_colour(), plain(64, 64), 0).mask
    rows, columns = np.nonzero(mask)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (39, 49, 39, 49)
    for height, width in ((16, 16), (32, 48), (40, 24)):
        mask = patch(mean_colour(), plain(height, width), 0).mask
        rows, columns = np.nonzero(mask)
        side = int((0.03 * height * width) ** 0.5)
        assert mask.sum() == side**2
        assert rows.min() >= height / 2
        assert columns.min() >= width / 2
        assert (height - 1 - rows.max(), width - 1 - columns.max()) == (height * 14 // 64, width * 14 // 64)


@pytest.mark.parametrize(("height", "width", "epochs"), [(8, 8, 1), (20, 30, 1), (33, 40, 0), (70, 30, 0)])
def test_pictures_of_any_size(height: int, width: int, epochs: int) -> None:
    delta = perturbation(mean_colour(), plain(height, width), epochs)
    assert delta.shape == (height, width, 3)
    assert np.abs(delta).max() == 8
    # All of it was made, to the last row and column.
    assert delta[-1].any()
    assert delta[:, -1].any()


def test_the_high_pass_keeps_what_is_finer_than_eight_waves_in_64_pixels() -> None:
    along = torch.arange(64) / 64
    for waves, kept in ((0, False), (3, False), (8, False), (9, True), (20, True), (32, True)):
        wave = torch.cos(2 * torch.pi * waves * along).expand(1, 3, 64, 64)
        for picture in (wave, wave.transpose(2, 3)):
            expected = picture if kept else torch.zeros_like(picture)
            assert torch.allclose(_high_pass(picture), expected, atol=1e-4)
    # Twice the size, twice the radius.
    coarse = torch.cos(2 * torch.pi * 16 * torch.arange(128) / 128).expand(1, 3, 128, 128)
    assert _high_pass(coarse).abs().max() < 1e-4


def test_the_loss_by_hand() -> None:
    """AdvEncoder, section 3: 5 L_adv + L_q + L_hfc, for two images."""
    rng = np.random.default_rng(0)
    x, attacked = rng.random((2, 2, 3, 64, 64))
    clean, features = np.array([[[1.0, 0.0], [0.6, 0.8]], [[3.0, 4.0], [0.0, 2.0]]])
    cosines = np.array([[0.6, 0.0], [0.36 + 0.64, 0.8]])
    keys = np.exp(cosines / 0.1)
    contrast = -np.log(np.diag(keys) / keys.sum(axis=1)).mean()

    def fine(pictures: NDArray[np.float64]) -> NDArray[np.float64]:
        spectrum = np.fft.fftshift(np.fft.fft2(pictures), axes=(2, 3))
        down, right = np.mgrid[-32:32, -32:32]
        spectrum[:, :, down**2 + right**2 <= 8**2] = 0
        return np.asarray(np.fft.ifft2(np.fft.ifftshift(spectrum, axes=(2, 3))).real)

    expected = 5 * -contrast + np.mean((attacked - x) ** 2) - np.mean((fine(attacked) - fine(x)) ** 2)
    found = _loss(*(torch.from_numpy(array) for array in (x, attacked, clean, features)))
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert contrast == pytest.approx((np.log1p(np.exp(-6)) + np.log1p(np.exp(2))) / 2)


def test_one_image_is_too_few(toy_encoder: Encoder, surrogate: Images) -> None:
    for attack in (perturbation, patch):
        with pytest.raises(TooFewImages, match="two or more, not 1") as caught:
            attack(toy_encoder, surrogate[:1])
        assert isinstance(caught.value, TwogateError)


def test_a_patch_fits_pictures_of_its_size_only(images: Images) -> None:
    small = Patch(np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), np.bool_))
    with pytest.raises(ValueError, match="does not fit"):
        apply_patch(images, small)
