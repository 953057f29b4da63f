from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hardening.relation import feature_relation, genaf_relation

TINY = 1e-7


def cosine_distances(vectors: list[list[float]]) -> list[list[float]]:
    """1 - cos, less each row's nearest other; 0 on the diagonal: with loops only."""

    def distance(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return 1 - dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))

    table = []
    for i, a in enumerate(vectors):
        nearest = min(distance(a, b) for j, b in enumerate(vectors) if j != i)
        table.append([0.0 if i == j else distance(a, b) - nearest for j, b in enumerate(vectors)])
    return table


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def divergence(target: list[list[float]], found: list[list[float]]) -> float:
    total = 0.0
    for row_p, row_q in zip(target, found, strict=True):
        for raw_p, raw_q in zip(row_p, row_q, strict=True):
            p, q = clip(raw_p, TINY, 1 - TINY), clip(raw_q, TINY, 1 - TINY)
            total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return total / len(target)


def slow_feature_relation(adversarial: list[list[float]], benign: list[list[float]]) -> float:
    def shares(vectors: list[list[float]]) -> list[list[float]]:
        return [[d / sum(row) for d in row] for row in cosine_distances(vectors)]

    return divergence(shares(benign), shares(adversarial))


def slow_genaf_relation(clean: list[list[float]], adversarial: list[list[float]], labels: list[int]) -> float:
    """utils/gr.py of Gen-AF as methods describe it, with the adversarial side following the clean one."""
    losses = [math.log(sum(math.exp(z) for z in row)) - row[y] for row, y in zip(clean, labels, strict=True)]
    d_clean, d_adversarial = cosine_distances(clean), cosine_distances(adversarial)

    def similarity_shares(table: list[list[float]]) -> list[list[float]]:
        similar = [[(1 - clip(d, TINY, 2 - TINY) + 1) / 2 for d in row] for row in table]
        return [[s / sum(row) for s in row] for row in similar]

    target = []
    for i, row in enumerate(d_clean):
        blended = []
        for j, d in enumerate(row):
            weight = math.tanh((losses[i] + losses[j]) / 32)
            sign = -1 if labels[i] == labels[j] else 1
            blended.append((1 - weight) * d + 2 * sign * weight)
        target.append(blended)
    return divergence(similarity_shares(target), similarity_shares(d_adversarial))


def vectors(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", [3, 4, 9])
def test_features_against_the_formula_in_loops(n: int) -> None:
    a, b = vectors(n, 5, 1), vectors(n, 5, 2)
    assert feature_relation(a, b).item() == pytest.approx(slow_feature_relation(a.tolist(), b.tolist()), rel=1e-6)


@pytest.mark.parametrize("n", [3, 8])
def test_genaf_against_the_formula_in_loops(n: int) -> None:
    clean, adversarial = 4 * vectors(n, 3, 1), 4 * vectors(n, 3, 2)
    labels = torch.arange(n) % 3
    expected = slow_genaf_relation(clean.tolist(), adversarial.tolist(), labels.tolist())
    assert genaf_relation(clean, adversarial, labels).item() == pytest.approx(expected, rel=1e-6)


def test_zero_where_both_are_equal_and_positive_where_not() -> None:
    a = vectors(8, 5, 1)
    assert feature_relation(a, a).item() == pytest.approx(0, abs=1e-12)
    # Directions count, lengths do not.
    assert feature_relation(a, a * torch.rand(8, 1, dtype=torch.float64).add(0.1)).item() == pytest.approx(0, abs=1e-9)
    for seed in range(5):
        assert feature_relation(vectors(8, 5, 10 + seed), a).item() > 1e-3


def test_the_gradient_goes_to_the_adversarial_side_alone() -> None:
    a, b = vectors(8, 5, 1).requires_grad_(), vectors(8, 5, 2).requires_grad_()
    feature_relation(a, b).backward()  # type: ignore[no-untyped-call]
    assert a.grad is not None
    assert a.grad.abs().sum() > 0
    assert b.grad is None

    clean, adversarial = vectors(8, 3, 1).requires_grad_(), vectors(8, 3, 2).requires_grad_()
    genaf_relation(clean, adversarial, torch.arange(8) % 3).backward()  # type: ignore[no-untyped-call]
    assert adversarial.grad is not None
    assert adversarial.grad.abs().sum() > 0
    assert clean.grad is None


def test_its_size_does_not_grow_with_the_batch() -> None:
    a = vectors(512, 16, 1)
    b = a + 0.5 * vectors(512, 16, 2)
    whole = feature_relation(a, b).item()
    parts = [feature_relation(a[i : i + 32], b[i : i + 32]).item() for i in range(0, 512, 32)]
    # It falls a little, because the nearest neighbour weighs less among many; the published sum would grow fourfold.
    assert 0.1 < whole / (sum(parts) / len(parts)) <= 1


def test_following_the_gradient_restores_the_relations() -> None:
    b = vectors(16, 4, 1)
    a = (b + vectors(16, 4, 2)).requires_grad_()
    before = feature_relation(a, b).item()
    optimiser = torch.optim.Adam([a], lr=0.05)
    for _ in range(120):
        optimiser.zero_grad()
        feature_relation(a, b).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert feature_relation(a, b).item() < 0.5 * before


@pytest.mark.parametrize("features", [torch.zeros(4, 3), torch.ones(4, 3), torch.ones(2, 3)])
def test_features_that_do_not_differ_give_no_nan(features: Tensor) -> None:
    a = features.clone().requires_grad_()
    loss = feature_relation(a, features) + genaf_relation(features, a, torch.arange(len(features)) % 2)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    assert a.grad is not None
    assert torch.isfinite(a.grad).all()


def test_genaf_draws_hard_pairs_of_one_class_together() -> None:
    """With a very large loss the labels alone are the target: near within a class, far between classes."""
    labels = torch.tensor([0, 0, 1, 1])
    wrong = torch.tensor([[-400.0, 400], [-400, 400], [400, -400], [400, -400]], dtype=torch.float64)
    together = torch.tensor([[1.0, 0.1], [1, 0.1], [-1, 0.1], [-1, 0.1]], dtype=torch.float64)
    across = together[[0, 2, 1, 3]]
    assert genaf_relation(wrong, together, labels) < 0.2 * genaf_relation(wrong, across, labels)
