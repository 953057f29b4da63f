from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from hardening.attacks.features import pgd_features
from hardening.branches import BMP, MPAE, SENTINEL, TRIPWIRE
from hardening.calibrate import assemble, calibrate
from hardening.data import Dataset
from hardening.encoders import Encoder, features
from hardening.export import check_parity, export
from hardening.recipe import Sentinel
from hardening.sentinel import STRONGEST, _Made, _perturbed, _pgd_now, train_sentinel
from tests.hardening.conftest import Interrupted, InterruptingBars, QuietBars
from tests.support.patterns import trained_encoder

RECIPE = Sentinel(epochs=200, batch_size=32, width=8)


def watched(toy: Encoder) -> dict[str, Encoder]:
    return {
        TRIPWIRE: copy.deepcopy(toy),
        MPAE[0]: trained_encoder(seed=1),
        MPAE[1]: trained_encoder(seed=2),
        BMP: trained_encoder(seed=3),
    }


def trained(toy: Encoder, images: NDArray[np.uint8], folder: Path, bars: QuietBars, recipe: Sentinel = RECIPE) -> Encoder:
    return train_sentinel(watched(toy), recipe, images, seed=0, folder=folder, device="cpu", bars=bars)


@pytest.fixture(scope="module")
def sentinel(trained_toy: Encoder, toy_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return trained(trained_toy, toy_dataset.take("local")[0], tmp_path_factory.mktemp("sentinel"), QuietBars())


def test_it_sees_an_attack_on_pictures_that_it_does_not_know(
    sentinel: Encoder, toy_encoder: Encoder, toy_dataset: Dataset, bars: QuietBars
) -> None:
    images, _ = toy_dataset.take("test")
    attacked = pgd_features(toy_encoder, images, epsilon=8, steps=10, restarts=1, seed=9, device="cpu", bars=bars)
    logits = torch.cat([features(sentinel, attacked), features(sentinel, images)])[:, 0]
    truth = np.repeat([1, 0], len(images))
    assert roc_auc_score(truth, logits.numpy()) > 0.75
    noise = np.random.default_rng(0).choice([-8, 8], images.shape)
    noisy = np.clip(images + noise, 0, 255).astype(np.uint8)
    assert features(sentinel, noisy).median() < features(sentinel, attacked).median()


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_training_that_was_stopped_ends_as_one_that_was_not(
    dynamic: bool, toy_encoder: Encoder, toy_dataset: Dataset, tmp_path: Path, bars: QuietBars
) -> None:
    images, recipe = toy_dataset.take("local")[0], Sentinel(epochs=3, batch_size=32, width=4, dynamic=dynamic)
    whole = trained(toy_encoder, images, tmp_path / "whole", bars, recipe)
    with pytest.raises(Interrupted):
        trained(toy_encoder, images, tmp_path / "parts", InterruptingBars(58 if dynamic else 66), recipe)
    assert (tmp_path / "parts" / f"{SENTINEL}.checkpoint.pt").exists(), "stopped in the middle of the epochs"
    again = trained(toy_encoder, images, tmp_path / "parts", bars, recipe)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert sorted(file.name for file in (tmp_path / "parts").iterdir()) == [f"{SENTINEL}.pt"]
    loaded = trained(toy_encoder, images, tmp_path / "parts", InterruptingBars(0), recipe)
    assert torch.equal(features(loaded, images), features(again, images))


def test_a_bundle_with_one_answers_in_onnx_as_in_torch(
    sentinel: Encoder, toy_encoder: Encoder, toy_dataset: Dataset, bars: QuietBars
) -> None:
    tuned = {"victim": trained_encoder(seed=1), "auxiliary": trained_encoder(seed=2), "bmp": trained_encoder(seed=3)}
    sample = toy_dataset.images[toy_dataset.splits["fit"][:8]]
    views = assemble(copy.deepcopy(toy_encoder), tuned, sample, copy.deepcopy(sentinel))
    gate = calibrate(views, toy_dataset, "sentinel", "cpu", bars).gate
    model = export(gate, sample[:2])
    assert check_parity(gate, model, toy_dataset.take("test")[0][:7])
    assert gate.detector.branches[-1] == SENTINEL


def test_what_is_called_attacked_is_attacked() -> None:
    """Where PGD is made anew, the rows that wait for it are told apart from those that have a perturbation already."""
    rng = np.random.default_rng(0)
    images = rng.integers(60, 190, (200, 16, 16, 3), dtype=np.uint8)
    universal = rng.choice((-8, 8), (2, 16, 16, 3)).astype(np.float32)
    made = _Made(images, universal, rng.integers(0, 256, (2, 3, 3, 3), dtype=np.uint8))
    chosen = np.arange(200)
    found, waiting = _perturbed(images, made, chosen, rng)
    assert 80 < len(waiting) < 160
    others = np.setdiff1d(chosen, waiting)
    assert (found[others] != images[others]).any(axis=(1, 2, 3)).all()


def test_an_attack_that_hides_is_quieter_and_still_moves_the_branches(
    sentinel: Encoder, toy_encoder: Encoder, toy_dataset: Dataset
) -> None:
    images, _ = toy_dataset.take("test")
    encoders, seen = watched(toy_encoder), copy.deepcopy(sentinel)

    def attacked(hiding: float) -> list[NDArray[np.uint8]]:
        generator = torch.Generator().manual_seed(0)
        return [
            _pgd_now(seen, hiding, encoders, lambda x: x, images, np.random.default_rng(seed), generator, "cpu")
            for seed in range(6)  # blind ones on the tripwire are among them
        ]

    def loudness(found: list[NDArray[np.uint8]]) -> float:
        return float(np.mean([features(sentinel, one).mean() for one in found]))

    blind, hidden = attacked(0), attacked(1)
    for one in hidden:
        moved = np.abs(one.astype(int) - images)
        assert moved.max() <= STRONGEST
        assert (moved.reshape(len(images), -1).max(axis=1) > 0).all()
    assert loudness(hidden) < loudness(blind)
    noise = np.random.default_rng(0).choice([-6, 6], images.shape)
    noisy = np.clip(images + noise, 0, 255).astype(np.uint8)
    for name in (*MPAE, BMP):
        clean = features(encoders[name], images)
        shifts = [1 - torch.cosine_similarity(features(encoders[name], one), clean).mean() for one in (*hidden, noisy)]
        assert sum(shifts[:-1]) / len(hidden) > 2 * shifts[-1], name
