from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from hardening.encoders import Encoder, as_input, features
from hardening.files import load_tensors
from hardening.pretrain import _MoCo, pretrain, supcon_loss, views
from hardening.recipe import Pretrain, RecipeError, SSLMethod
from tests.hardening.conftest import Interrupted, InterruptingBars, QuietBars
from tests.support.patterns import patterns, untrained_encoder

METHODS = get_args(SSLMethod)
IMAGES, LABELS = patterns(16)


def run(
    method: str,
    folder: Path,
    epochs: int = 2,
    *,
    labels: object = LABELS,
    bars: QuietBars | None = None,
    batch_size: int = 32,
    learning_rate: float = 1e-2,
) -> tuple[Encoder, list[dict[str, float]]]:
    recipe = Pretrain.model_validate(
        {"method": method, "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    )
    return pretrain(
        untrained_encoder(width=16),
        recipe,
        IMAGES,
        np.asarray(labels),
        job="start",
        seed=1,
        folder=folder,
        device="cpu",
        bars=bars or QuietBars(),
    )


def identical(a: Encoder, b: Encoder) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


WITH_LABELS = {"supcon", "supervised"}


def test_there_are_nine_methods() -> None:
    assert set(METHODS) == {"simclr", "moco", "nnclr", "byol", "swav", "vicreg", "barlowtwins"} | WITH_LABELS


@pytest.mark.parametrize("shape", [(32, 32), (24, 40), (80, 80)])
def test_views_are_pictures_each_on_its_own_and_repeatable(shape: tuple[int, int]) -> None:
    image = torch.rand(1, 3, *shape).expand(16, -1, -1, -1)
    view = views(*shape)
    torch.manual_seed(3)
    first = view(image)
    assert first.shape == image.shape
    assert first.min() >= 0
    assert first.max() <= 1
    different = (first[:, None] - first[None]).abs().amax((2, 3, 4)) > 1e-3
    assert different.sum() == 16 * 15  # no two of one batch are the same view
    torch.manual_seed(3)
    assert torch.equal(view(image), first)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "moco"])
def test_the_loss_falls(method: str, tmp_path: Path) -> None:
    labels = LABELS if method in WITH_LABELS else np.full_like(LABELS, -1)
    encoder, history = run(method, tmp_path, 24, labels=labels)
    losses = [record["loss"] for record in history]
    assert len(losses) == 24
    first, last = np.mean(losses[:3]), np.mean(losses[-12:])
    assert last < first - 0.02 * abs(first), losses
    assert not encoder.training
    found = features(encoder, IMAGES)
    assert torch.isfinite(found).all()
    # It has not collapsed to one point.
    assert found.std(0).mean() > 1e-3


def test_moco_learns_to_tell_images_from_its_queue() -> None:
    """Its loss rises while real images replace the queue's random ones, so it is measured from then on, on fixed views."""
    torch.manual_seed(0)
    method = _MoCo(untrained_encoder(width=16), 32).train()
    first = as_input(IMAGES)
    second = (first + 0.05 * torch.randn(first.shape)).clamp(0, 1)
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(60):
        chosen = torch.arange(16) + 16 * (step % 4)
        loss = method(first[chosen], second[chosen], torch.zeros(16))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        method.after_step(step / 60)
        losses.append(loss.item())
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[4:12]), losses


def test_mocos_queue_holds_no_image_of_its_own_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    method = _MoCo(untrained_encoder(width=16), 64).train()
    bank = method.criterion.memory_bank
    before, seen, original = bank.bank.clone(), [], bank.forward

    def forward(*args: object, **more: object) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = original(*args, **more)
        seen.append(found[1].T)
        return found

    monkeypatch.setattr(bank, "forward", forward)
    first, second = torch.rand(2, 8, 3, 16, 16)
    method(first, second, torch.zeros(8))
    assert len(seen) == 1
    assert torch.equal(seen[0], before)
    # Afterwards it holds both views' targets, and nothing else has moved.
    assert (bank.bank != before).any(1).tolist() == [True] * 16 + [False] * 48


@pytest.mark.parametrize("method", ["moco", "nnclr"])
def test_the_queue_is_in_the_checkpoint(method: str, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(method, tmp_path, bars=InterruptingBars(3))
    state = load_tensors(tmp_path / "start.checkpoint.pt")["parts"]["method"]
    assert any(name.endswith("bank") for name in state)
    assert any(name.endswith("bank_ptr") for name in state)


@pytest.mark.parametrize("method", METHODS)
def test_stopped_and_started_again_it_ends_with_the_same_weights(method: str, tmp_path: Path) -> None:
    """Two batches an epoch; stopped in the second epoch."""
    whole, history = run(method, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(method, tmp_path / "stopped", bars=InterruptingBars(3))
    torch.manual_seed(99)
    bars = QuietBars()
    again, history_again = run(method, tmp_path / "stopped", bars=bars)
    assert identical(whole, again)
    assert [r["loss"] for r in history] == [r["loss"] for r in history_again]
    assert len(bars.said) == 1
    assert [p.name for p in (tmp_path / "stopped").iterdir()] == ["start.pt"]


def test_a_finished_job_is_loaded_and_methods_differ(tmp_path: Path) -> None:
    first, history = run("simclr", tmp_path / "a", 1)
    bars = QuietBars()
    second, history_again = run("simclr", tmp_path / "a", 1, bars=bars)
    assert identical(first, second)
    assert (history, bars.said) == (history_again, [])
    assert not identical(first, run("vicreg", tmp_path / "b", 1)[0])
    assert not identical(first, untrained_encoder(width=16))


@pytest.mark.parametrize("method", sorted(WITH_LABELS))
def test_some_methods_need_labels(method: str, tmp_path: Path) -> None:
    labels = LABELS.copy()
    labels[3] = -1
    with pytest.raises(RecipeError, match=f"{method} needs labelled images"):
        run(method, tmp_path, labels=labels)


def slow_supcon(vectors: list[list[float]], labels: list[int], temperature: float) -> float:
    """Khosla et al. 2020, Eq. 2, with loops only."""

    def similarity(a: list[float], b: list[float]) -> float:
        lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / lengths / temperature

    total = 0.0
    for i, anchor in enumerate(vectors):
        everyone = sum(math.exp(similarity(anchor, other)) for a, other in enumerate(vectors) if a != i)
        positives = [p for p in range(len(vectors)) if p != i and labels[p] == labels[i]]
        total -= sum(math.log(math.exp(similarity(anchor, vectors[p])) / everyone) for p in positives) / len(positives)
    return total / len(vectors)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [0, 1, 0, 2, 2, 1, 0], [3, 3]])
def test_supcon_against_the_formula_in_loops(labels: list[int]) -> None:
    vectors = torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = supcon_loss(vectors, torch.tensor(labels), temperature=0.3).item()
    assert found == pytest.approx(slow_supcon(vectors.tolist(), labels, 0.3), rel=1e-9, abs=1e-12)


def test_supcon_has_a_finite_gradient() -> None:
    vectors: Tensor = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    supcon_loss(vectors, torch.arange(4).repeat(2)).backward()  # type: ignore[no-untyped-call]
    assert vectors.grad is not None
    assert torch.isfinite(vectors.grad).all()
    assert vectors.grad.abs().sum() > 0
