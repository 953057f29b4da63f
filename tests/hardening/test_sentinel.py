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
from hardening.sentinel import _Made, _perturbed, train_sentinel
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


def test_a_training_that_was_stopped_ends_as_one_that_was_not(
    toy_encoder: Encoder, toy_dataset: Dataset, tmp_path: Path, bars: QuietBars
) -> None:
    images, recipe = toy_dataset.take("local")[0], Sentinel(epochs=3, batch_size=32, width=4)
    whole = trained(toy_encoder, images, tmp_path / "whole", bars, recipe)
    with pytest.raises(Interrupted):
        trained(toy_encoder, images, tmp_path / "parts", InterruptingBars(66), recipe)
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
    rng = np.random.default_rng(0)
    images = rng.integers(60, 190, (200, 16, 16, 3), dtype=np.uint8)
    universal = rng.choice((-8, 8), (2, 16, 16, 3)).astype(np.float32)
    made = _Made(images + np.uint8(3), universal, rng.integers(0, 256, (2, 3, 3, 3), dtype=np.uint8))
    found = _perturbed(images, made, np.arange(200), rng)
    assert (found != images).any(axis=(1, 2, 3)).all()
    by_pgd = (found == made.pgd).all(axis=(1, 2, 3)).sum()
    assert 60 < by_pgd < 160, "the others have a universal perturbation or a patch, or are honestly changed too"
