from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hardening.attacks.adaptive import ADAPTIVE, distance
from hardening.attacks.head_aware import pgd_head
from hardening.attacks.target import Seen, Target

PIXELS, CLASSES, EPSILON = 3 * 6 * 6, 4, 2 / 255
SHAPE = (3, 6, 6)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative(seed: int, *, heads: bool = True) -> Target:
    """A linear defence: what all seeds share, and half as much again of its own."""
    shared, own = (torch.randn(PIXELS, CLASSES, generator=generator(s)) for s in (0, seed))
    weight, threshold = shared + 1.5 * own, 0.3 + seed / 10

    def see(images: Tensor) -> Seen:
        logits = (images.flatten(1) - 0.5) @ weight
        score = logits.square().mean(dim=1) / 10
        three = torch.stack([logits, 2 * logits, logits], dim=1) if heads else None
        found = {"mpae_victim": logits, "bmp": 3 * logits}
        confidence = torch.exp(-score)[:, None].expand(-1, 4)
        return Seen(10 * seed * logits, confidence, score, found, three, logits if heads else None)

    return Target(see, threshold)


def images(count: int) -> Tensor:
    return ((0.5 + 0.1 * torch.randn(count, *SHAPE, generator=generator(9))).clamp(0, 1) * 255).round() / 255


def test_one_alone_is_itself() -> None:
    target = relative(1)
    assert Target.together([target]) is target


def test_nothing_is_unflagged_that_one_of_them_flags() -> None:
    targets, x = [relative(seed) for seed in (1, 2, 3)], images(500)
    both = Target.together(targets)
    unflagged = both.see(x).score <= both.threshold
    assert 20 < unflagged.sum() < 480
    for target in targets:
        assert bool((target.see(x[unflagged]).score <= target.threshold).all())


def test_distances_and_logits_are_means() -> None:
    targets, x = [relative(seed) for seed in (1, 2)], images(8)
    both, (a, b) = Target.together(targets).see(x), [target.see(x) for target in targets]
    torch.testing.assert_close(both.require_logits(), (a.require_logits() + b.require_logits()) / 2)
    torch.testing.assert_close(both.require_fused(), (a.require_fused() + b.require_fused()) / 2)
    torch.testing.assert_close(
        distance(both.embedding[:4], both.embedding[4:]),
        (distance(a.embedding[:4], a.embedding[4:]) + distance(b.embedding[:4], b.embedding[4:])) / 2,
    )


def test_without_heads() -> None:
    seen = Target.together([relative(1, heads=False), relative(2, heads=False)]).see(images(2))
    assert seen.fused is None
    assert seen.logits is None


@pytest.mark.parametrize("name", ["PGD-head", "T5-selective"])
def test_what_fools_several_carries_over_better(name: str) -> None:
    attack = {**ADAPTIVE, "PGD-head": pgd_head}[name]
    real, x = relative(9), images(200)
    labels = real.see(x).require_fused().argmax(dim=1)

    def wrong(surrogates: list[Target]) -> float:
        found = attack(Target.together(surrogates), x, labels, epsilon=EPSILON, steps=10, generator=generator(0))
        return float((real.see(found).require_fused().argmax(dim=1) != labels).float().mean())

    alone = [wrong([relative(seed)]) for seed in (1, 2, 3, 4)]
    assert wrong([relative(seed) for seed in (1, 2, 3, 4)]) > max(alone)
