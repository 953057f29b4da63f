from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.attacks.features import pgd_features
from hardening.encoders import Encoder, as_input, features
from hardening.files import load_tensors
from hardening.finetune import Best, augment, cosine, finetune, first_head
from hardening.knn import knn_predict
from hardening.recipe import Finetune
from tests.hardening.conftest import Interrupted, InterruptingBars, QuietBars
from tests.support.patterns import patterns

Split = tuple[NDArray[np.uint8], NDArray[np.int64]]
RECIPE = Finetune(epochs=3, batch_size=32, epsilon=8, steps=2, learning_rate=3e-3, flip=False, crop=0.9)


@pytest.fixture(scope="module")
def train() -> Split:
    return patterns(40, seed=1)


@pytest.fixture(scope="module")
def validation() -> Split:
    return patterns(8, seed=2)


@pytest.fixture(scope="module")
def test() -> Split:
    return patterns(15, seed=3)


def unlabelled(split: Split) -> Split:
    return split[0], np.full_like(split[1], -1)


def tune(
    encoder: Encoder,
    train: Split,
    validation: Split,
    folder: Path,
    recipe: Finetune = RECIPE,
    bars: QuietBars | None = None,
) -> tuple[Encoder, list[dict[str, float]]]:
    return finetune(
        encoder,
        recipe,
        train,
        validation,
        job="tune",
        seed=4,
        folder=folder,
        device="cpu",
        bars=bars or QuietBars(),
    )


def attacked(encoder: Encoder, images: NDArray[np.uint8], epsilon: float = 8) -> NDArray[np.uint8]:
    """Against this very encoder: the tuned one meets its own attack, not one made for another."""
    return pgd_features(encoder, images, epsilon=epsilon, steps=8, restarts=1, seed=5, device="cpu", bars=QuietBars())


def accuracy(encoder: Encoder, train: Split, test: Split, images: NDArray[np.uint8] | None = None) -> float:
    queries = features(encoder, test[0] if images is None else images)
    predicted = knn_predict(features(encoder, train[0]), train[1], queries, 5)
    return float((predicted == test[1]).mean())


def identical(a: Encoder, b: Encoder) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def weights(encoder: Encoder) -> Tensor:
    return torch.cat([p.detach().flatten() for p in encoder.parameters()])


def test_it_withstands_what_broke_it_before(
    toy_encoder: Encoder, train: Split, validation: Split, test: Split, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in toy_encoder.state_dict().items()}
    clean_before = accuracy(toy_encoder, train, test)
    robust_before = accuracy(toy_encoder, train, test, attacked(toy_encoder, test[0]))
    recipe = RECIPE.model_copy(update={"epochs": 25})
    tuned, history = tune(toy_encoder, train, validation, tmp_path, recipe)
    assert clean_before > 0.95
    assert robust_before < 0.5
    assert accuracy(tuned, train, test, attacked(tuned, test[0])) > robust_before + 0.2
    assert accuracy(tuned, train, test) > 0.85
    assert len(history) == 25
    assert history[-1]["robust_acc"] > history[0]["robust_acc"]
    assert not tuned.training
    # The encoder that was given is as it was: it stays in the bundle as the tripwire.
    assert all(torch.equal(before[name], value) for name, value in toy_encoder.state_dict().items())


class WatchingBars(QuietBars):
    """Bars that note the encoder's weights at the end of each epoch but the last, from the checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.after: list[dict[str, Tensor]] = []

    def say(self, text: str) -> None:
        super().say(text)
        if self.checkpoint.exists():  # of the epoch before the one that is spoken of
            self.after.append(load_tensors(self.checkpoint)["parts"]["encoder"])


def test_the_best_epoch_by_validation_is_kept(toy_encoder: Encoder, train: Split, validation: Split, tmp_path: Path) -> None:
    """Tuned on wrong labels it gets worse with every epoch, so the first is the best."""
    wrong = train[0], (train[1] + 1) % 4
    recipe = RECIPE.model_copy(update={"epochs": 4, "learning_rate": 1e-2, "anchor_weight": 0.0})
    bars = WatchingBars(tmp_path / "tune.checkpoint.pt")
    tuned, history = tune(toy_encoder, wrong, validation, tmp_path, recipe, bars)
    for record in history:
        assert record["selection"] == pytest.approx((record["clean_acc"] + record["robust_acc"]) / 2)
    best = int(np.argmax([record["selection"] for record in history]))
    assert best < 3
    assert len(bars.after) == 3
    for number, state in enumerate(bars.after):
        same = all(torch.equal(value, state[name]) for name, value in tuned.state_dict().items())
        assert same == (number == best)


def test_interpolated_weights_lie_between_the_public_and_the_tuned(
    toy_encoder: Encoder, train: Split, validation: Split, tmp_path: Path
) -> None:
    few = train[0][:32], train[1][:32]
    ends = [
        tune(
            toy_encoder,
            few,
            validation,
            tmp_path / str(share),
            RECIPE.model_copy(update={"interpolation": share, "epochs": 1}),
        )
        for share in (1.0, 0.25)
    ]
    public, _ = tune(toy_encoder, few, validation, tmp_path / "0", RECIPE.model_copy(update={"epochs": 0}))
    for (name, tuned), start, between in zip(
        ends[0][0].state_dict().items(), public.state_dict().values(), ends[1][0].state_dict().values(), strict=True
    ):
        torch.testing.assert_close(between, start + 0.25 * (tuned - start), msg=name)
    assert any(not tuned.equal(start) for tuned, start in zip(ends[0][0].parameters(), public.parameters(), strict=True))


def test_best_offers() -> None:
    layer = nn.Linear(1, 1)
    best = Best()
    for value, weight in ((0.2, 1.0), (0.5, 2.0), (0.5, 3.0), (0.1, 4.0)):
        nn.init.constant_(layer.weight, weight)
        best.offer(value, layer)
    nn.init.constant_(layer.weight, 9.0)
    # The first of equals, and a copy, not the layer's own tensor.
    assert (best.value, best.state["weight"].item()) == (0.5, 2.0)
    other = Best()
    other.load_state_dict(best.state_dict())
    assert (other.value, other.state["weight"].item()) == (0.5, 2.0)


def test_without_labels_the_features_learn_to_stay(
    toy_encoder: Encoder, train: Split, validation: Split, test: Split, tmp_path: Path
) -> None:
    def moved(encoder: Encoder) -> float:
        clean = features(encoder, test[0])
        return float((1 - F.cosine_similarity(clean, features(encoder, attacked(encoder, test[0])))).mean())

    recipe = RECIPE.model_copy(update={"epochs": 20})
    tuned, history = tune(toy_encoder, unlabelled(train), unlabelled(validation), tmp_path, recipe)
    assert moved(tuned) < 0.9 * moved(toy_encoder)
    assert history[-1]["distance"] < history[0]["distance"]
    assert all(record["selection"] == -record["distance"] for record in history)
    assert "clean_acc" not in history[0]
    assert accuracy(tuned, train, test) > 0.8


def test_without_labels_and_epsilon_the_encoder_stays(
    toy_encoder: Encoder, train: Split, validation: Split, tmp_path: Path
) -> None:
    """Nothing pulls, and an optimiser that scales what it is given would make steps of rounding errors."""
    recipe = RECIPE.model_copy(update={"epsilon": 0.0, "learning_rate": 1e-2})
    tuned, history = tune(toy_encoder, unlabelled(train), unlabelled(validation), tmp_path, recipe)
    assert history == []
    torch.testing.assert_close(features(tuned, train[0][:8]), features(toy_encoder, train[0][:8]))


def test_the_switches_reach_the_loss(toy_encoder: Encoder, train: Split, validation: Split, tmp_path: Path) -> None:
    base = RECIPE.model_copy(update={"epochs": 1, "steps": 1})
    changes: list[dict[str, object]] = [
        {},
        {"relation": "genaf_logits"},
        {"relation_weight": 0.0},
        {"relation": "genaf_logits", "relation_weight": 0.0},
        {"anchor_weight": 0.0},
        {"clean_weight": 0.0},
        {"epsilon": 0.0},
        {"crop": 1.0},
        {"ramp": 1.0},
        {"weight_decay": 0.5},
        {"head_learning_rate": 1e-4},
    ]
    small = (train[0][:64], train[1][:64])
    found = []
    for number, change in enumerate(changes):
        tuned, history = tune(toy_encoder, small, validation, tmp_path / str(number), base.model_copy(update=change))
        assert np.isfinite(history[0]["loss"])
        found.append(weights(tuned))
    for i, a in enumerate(found):
        for j, b in enumerate(found[:i]):
            # Without weight, which relation it is makes no difference.
            assert torch.equal(a, b) == ({i, j} == {2, 3}), (changes[i], changes[j])


def test_a_strong_anchor_keeps_the_features_near_the_public_ones(
    toy_encoder: Encoder, train: Split, validation: Split, test: Split, tmp_path: Path
) -> None:
    similarity = []
    for weight in (0.0, 30.0):
        recipe = RECIPE.model_copy(update={"epochs": 4, "anchor_weight": weight, "relation_weight": 0.0})
        tuned, _ = tune(toy_encoder, train, validation, tmp_path / str(weight), recipe)
        public, found = features(toy_encoder, test[0]), features(tuned, test[0])
        centre = public.mean(0)
        similarity.append(F.cosine_similarity(public - centre, found - centre).mean().item())
    assert 1 - similarity[1] < 0.9 * (1 - similarity[0])


@pytest.mark.parametrize("after", [2, 7, 12])
def test_stopped_and_started_again_it_ends_with_the_same_weights(
    toy_encoder: Encoder, train: Split, validation: Split, tmp_path: Path, after: int
) -> None:
    """Five batches an epoch: stopped in the first, in the second, and in the third."""
    whole, history = tune(toy_encoder, train, validation, tmp_path / "whole")
    with pytest.raises(Interrupted):
        tune(toy_encoder, train, validation, tmp_path / "stopped", bars=InterruptingBars(after))
    assert not (tmp_path / "stopped" / "tune.pt").exists()
    torch.manual_seed(99)  # whatever happened in between
    bars = QuietBars()
    again, history_again = tune(toy_encoder, train, validation, tmp_path / "stopped", bars=bars)
    assert identical(whole, again)
    assert [r["loss"] for r in history] == [r["loss"] for r in history_again]
    assert len(bars.said) == 3 - after // 5
    assert [p.name for p in (tmp_path / "stopped").iterdir()] == ["tune.pt"]


def test_a_finished_job_is_loaded(toy_encoder: Encoder, train: Split, validation: Split, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"epochs": 1, "steps": 1})
    first, history = tune(toy_encoder, train, validation, tmp_path, recipe)
    bars = QuietBars()
    second, history_again = tune(toy_encoder, train, validation, tmp_path, recipe, bars)
    assert identical(first, second)
    assert (history, bars.said) == (history_again, [])


def test_no_epochs_keep_the_features(toy_encoder: Encoder, train: Split, validation: Split, tmp_path: Path) -> None:
    tuned, history = tune(toy_encoder, train, validation, tmp_path, RECIPE.model_copy(update={"epochs": 0}))
    assert history == []
    assert torch.allclose(features(tuned, train[0]), features(toy_encoder, train[0]), atol=1e-4)


def test_two_classes(toy_encoder: Encoder, train: Split, validation: Split, tmp_path: Path) -> None:
    def two(split: Split) -> Split:
        chosen = split[1] < 2
        return split[0][chosen], split[1][chosen]

    _, history = tune(toy_encoder, two(train), two(validation), tmp_path, RECIPE.model_copy(update={"epochs": 1}))
    assert history[0]["clean_acc"] > 0.8


@pytest.mark.parametrize("classes", [2, 4])
def test_the_first_head_already_reads_the_features(toy_encoder: Encoder, train: Split, classes: int) -> None:
    chosen = train[1] < classes
    found = features(toy_encoder, train[0][chosen])
    standard = (found - found.mean(0)) / found.std(0).clamp_min(1e-3)
    head = first_head(standard, train[1][chosen], labelled=True)
    assert head.out_features == classes
    assert (head(standard).argmax(1).numpy() == train[1][chosen]).mean() > 0.95


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_augmentation_off_is_no_change() -> None:
    x = as_input(patterns(4)[0])
    still = augment(x, RECIPE.model_copy(update={"flip": False, "crop": 1.0}), generator())
    assert torch.allclose(still, x, atol=1e-5)


def test_mirrors_about_half_of_the_images() -> None:
    x = as_input(patterns(10)[0])
    found = augment(x, RECIPE.model_copy(update={"flip": True, "crop": 1.0}), generator())
    mirrored = [torch.allclose(f, i.flip(-1), atol=1e-5) for f, i in zip(found, x, strict=True)]
    kept = [torch.allclose(f, i, atol=1e-5) for f, i in zip(found, x, strict=True)]
    assert all(m or k for m, k in zip(mirrored, kept, strict=True))
    assert 10 < sum(mirrored) < 30


def test_crops_stay_inside_the_picture_and_differ() -> None:
    ramp = torch.linspace(0, 1, 16).expand(6, 3, 16, 16)
    found = augment(ramp, RECIPE.model_copy(update={"flip": False, "crop": 0.5}), generator())
    assert found.min() >= 0
    assert found.max() <= 1
    widths = found[:, 0, 0, -1] - found[:, 0, 0, 0]
    assert (widths < 1).all()
    assert (widths > 0.4).all()
    assert len({round(width.item(), 3) for width in widths}) == 6


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [cosine(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == 1
    assert rates[:5] == sorted(rates[:5])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0)
    assert cosine(0, 1) == 1
