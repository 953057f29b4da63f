from __future__ import annotations

import copy
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hardening.baselines.adversarial_training import Method, mart_loss, trades_loss, train
from hardening.baselines.classifier import Classifier, Split, attack_labels, validate, with_head
from hardening.encoders import Encoder, as_input
from tests.hardening.conftest import Interrupted, InterruptingBars, QuietBars
from tests.support.patterns import patterns

METHODS: tuple[Method, ...] = get_args(Method)
TRAIN, VALIDATION, TEST = patterns(24, seed=1), patterns(8, seed=2), patterns(15, seed=3)


def run(
    encoder: Encoder, method: Method, folder: Path, epochs: int = 2, *, bars: QuietBars | None = None, split: Split = TRAIN
) -> tuple[Encoder, nn.Module]:
    return train(
        encoder,
        method,
        split,
        VALIDATION,
        epochs=epochs,
        batch_size=32,
        epsilon=8,
        steps=2,
        learning_rate=1e-2,
        flip=False,
        crop=0.9,
        seed=4,
        folder=folder,
        job="at",
        device="cpu",
        bars=bars or QuietBars(),
    )


def scores(classifier: Classifier) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    return validate(classifier, TEST, epsilon=8, batch_size=60, generator=generator, device="cpu")


def joined(pair: tuple[Encoder, nn.Module]) -> Classifier:
    encoder, head = pair
    return Classifier(encoder, head).eval()  # type: ignore[arg-type]


def identical(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("method", "per_class", "epochs"), [("pgd_at", 24, 25), ("trades", 24, 25), ("mart", 40, 22)])
def test_it_withstands_more_than_the_undefended(
    method: Method, per_class: int, epochs: int, toy_encoder: Encoder, tmp_path: Path
) -> None:
    """MART first goes through a time of saying the same of every picture, so it gets more of them."""
    given = copy.deepcopy(toy_encoder)
    before = scores(with_head(copy.deepcopy(toy_encoder), TRAIN, "cpu"))
    bars = QuietBars()
    trained = joined(run(toy_encoder, method, tmp_path, epochs, bars=bars, split=patterns(per_class, seed=1)))
    after = scores(trained)
    assert before["clean_acc"] > 0.95
    assert after["robust_acc"] > before["robust_acc"] + 0.15
    assert after["clean_acc"] > 0.6
    assert len(bars.said) == epochs
    assert not any(module.training for module in trained.modules())
    assert identical(given, toy_encoder)


@pytest.mark.parametrize("method", METHODS)
def test_stopped_and_started_again_it_ends_with_the_same_weights(
    method: Method, toy_encoder: Encoder, tmp_path: Path
) -> None:
    """Three batches an epoch; stopped in the second."""
    whole = run(toy_encoder, method, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(toy_encoder, method, tmp_path / "stopped", bars=InterruptingBars(4))
    torch.manual_seed(99)
    bars = QuietBars()
    again = run(toy_encoder, method, tmp_path / "stopped", bars=bars)
    assert identical(joined(whole), joined(again))
    assert len(bars.said) == 1
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["at.pt"]
    bars = QuietBars()
    assert identical(joined(whole), joined(run(toy_encoder, method, tmp_path / "stopped", bars=bars)))
    assert bars.said == []


def test_methods_differ_and_the_best_epoch_is_kept(toy_encoder: Encoder, tmp_path: Path) -> None:
    found = [joined(run(toy_encoder, method, tmp_path / method, 1)) for method in METHODS]
    assert not any(identical(found[i], found[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    # On wrong labels it gets worse with every epoch, so the first is kept.
    wrong = TRAIN[0], (TRAIN[1] + 1) % 4
    one = joined(run(toy_encoder, "pgd_at", tmp_path / "one", 5, split=wrong))
    saved = torch.load(tmp_path / "one" / "at.pt", weights_only=True)["history"]
    best = int(np.argmax([record["selection"] for record in saved]))
    generator = torch.Generator().manual_seed(0)
    again = validate(one, VALIDATION, epsilon=8, batch_size=32, generator=generator, device="cpu")
    assert again["clean_acc"] == pytest.approx(saved[best]["clean_acc"])


def test_the_head_is_linear_and_reads_the_features(toy_encoder: Encoder) -> None:
    classifier = with_head(toy_encoder, TRAIN, "cpu")
    x, y = torch.randn(3, toy_encoder.dim), torch.randn(3, toy_encoder.dim)
    head = classifier.head
    assert torch.allclose(head((x + y) / 2), (head(x) + head(y)) / 2, atol=1e-4)
    assert scores(classifier)["clean_acc"] > 0.95


def test_an_attack_leaves_the_mode_and_stays_in_the_ball(toy_encoder: Encoder) -> None:
    classifier = with_head(toy_encoder, TRAIN, "cpu").train()
    classifier.encoder.network.bn1.eval()  # type: ignore[union-attr, operator]
    state = copy.deepcopy(classifier.state_dict())
    x, y = as_input(TEST[0]), torch.as_tensor(TEST[1])
    found = attack_labels(classifier, x, y, epsilon=8, steps=3, generator=torch.Generator().manual_seed(0))
    assert (found - x).abs().max() <= 8 / 255 + 1e-6
    assert classifier.training
    assert classifier.encoder.network.layer1.training
    assert not classifier.encoder.network.bn1.training  # type: ignore[union-attr]
    assert all(torch.equal(state[name], value) for name, value in classifier.state_dict().items())
    assert all(p.grad is None for p in classifier.parameters())


def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, adversarial = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    return clean, adversarial, torch.tensor([0, 1, 2, 3, 0, 1])


def test_trades_against_its_formula() -> None:
    clean, adversarial, labels = logits()
    p, q = clean.softmax(1), adversarial.softmax(1)
    expected = 0.0
    for i, label in enumerate(labels):
        expected -= float(p[i, label].log())
        expected += 6 * sum(float(p[i, k] * (p[i, k] / q[i, k]).log()) for k in range(4))
    assert trades_loss(clean, adversarial, labels).item() == pytest.approx(expected / 6)
    assert trades_loss(clean, clean, labels).item() == pytest.approx(F.cross_entropy(clean, labels).item())


def test_mart_against_its_formula() -> None:
    clean, adversarial, labels = logits()
    p, q = clean.softmax(1), adversarial.softmax(1)
    expected = 0.0
    for i, label in enumerate(labels):
        other = max(float(q[i, k]) for k in range(4) if k != label)
        expected += -float(q[i, label].log()) - float(np.log(1.0001 - other))
        kl = sum(float(p[i, k] * (p[i, k] / q[i, k]).log()) for k in range(4))
        expected += 5 * kl * (1 - float(p[i, label]))
    assert mart_loss(clean, adversarial, labels).item() == pytest.approx(expected / 6)
