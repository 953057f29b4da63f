from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hardening.attacks.adaptive import (
    ADAPTIVE,
    Best,
    Box,
    distance,
    ensemble_universal,
    false_alarm,
    log_odds,
    margin,
    orthogonal,
    penalised,
    switching,
    two_aims,
)
from hardening.attacks.head_aware import pgd_head
from hardening.attacks.target import NeedsHeads, Seen, Target
from hardening.branches import BMP, BRANCHES, MPAE, TRIPWIRE, embed, fuse, rfdm_weights
from hardening.encoders import Encoder, as_input
from tests.support.patterns import patterns, trained_encoder

EPSILON = 16 / 255
SIZE, PIXELS = 6, 3 * 6 * 6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_target(*, heads: bool = True, flat: bool = False) -> Target:
    """Features and logits linear in the pixels; the score grows with what lies along one direction that tempts the margin.

    With `flat` the score is clipped from below, as a table of -log p is.
    """
    ways = {name: torch.randn(PIXELS, 8, generator=generator(n)) / 4 for n, name in enumerate((*BRANCHES, TRIPWIRE))}
    readings = {name: torch.randn(8, 3, generator=generator(10 + n)) for n, name in enumerate(BRANCHES)}
    # What all branches' logits respond to is what the score sees.
    tempting = sum((ways[name] @ readings[name] for name in BRANCHES), torch.zeros(PIXELS, 3))

    def see(images: Tensor) -> Seen:
        x = images.flatten(1) - 0.5
        features = {name: x @ way for name, way in ways.items()}
        logits = torch.stack([features[name] @ readings[name] for name in BRANCHES], dim=1)
        score = (x @ tempting).square().sum(dim=1) / 40
        score = (score - 0.2).clamp_min(0) if flat else score
        confidence = torch.exp(-score[:, None] - torch.stack([f.square().mean(dim=1) for f in features.values()], dim=1))
        embedding = embed([{"": features[name] - 1} for name in BRANCHES])
        fused = fuse(logits, rfdm_weights(logits))
        return Seen(embedding, confidence, score, features, logits if heads else None, fused if heads else None)

    return Target(see, 0.1 if flat else 0.3)


def linear_images(target: Target, count: int = 24) -> tuple[Tensor, Tensor]:
    """Images in 8-bit values that are not flagged, with the predictions as labels."""
    pool = ((0.5 + 0.08 * torch.randn(400, 3, SIZE, SIZE, generator=generator(5))).clamp(0, 1) * 255).round() / 255
    seen = target.see(pool)
    images = pool[seen.score < target.threshold][:count]
    assert len(images) == count
    return images, target.see(images).require_fused().argmax(dim=1)


@pytest.fixture(scope="module")
def target() -> Target:
    return linear_target()


@pytest.fixture(scope="module")
def batch(target: Target) -> tuple[Tensor, Tensor]:
    return linear_images(target)


def judged(target: Target, found: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(wrong, wrong and not flagged), [N] each."""
    seen = target.see(found)
    wrong = seen.require_fused().argmax(dim=1) != labels
    return wrong, wrong & (seen.score <= target.threshold)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_it_stays_in_its_budget_and_in_8_bit_values(target: Target, batch: tuple[Tensor, Tensor], name: str) -> None:
    images, labels = batch
    found = ADAPTIVE[name](target, images, labels, epsilon=EPSILON, steps=4, generator=generator())
    assert found.shape == images.shape
    assert not found.requires_grad
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.allclose(found * 255, (found * 255).round(), atol=1e-3)
    if name.startswith("T10"):
        changed = (found != images).any(dim=1).float().mean(dim=(1, 2))
        assert changed.max() <= 0.03 + 1e-6
    else:
        assert (found - images).abs().max() <= EPSILON + 1e-6


def test_a_budget_between_8_bit_values_is_kept(target: Target, batch: tuple[Tensor, Tensor]) -> None:
    found = penalised(target, *batch, epsilon=2.5 / 255, steps=5, generator=generator())
    assert (found - batch[0]).abs().max() <= 2.5 / 255 + 1e-6


@pytest.mark.parametrize("name", ["T4", "T5-selective", "T5-orthogonal"])
@pytest.mark.parametrize("flat", [False, True])
def test_knowing_the_flag_evades_it_where_plain_pgd_does_not(name: str, flat: bool) -> None:
    target = linear_target(flat=flat)
    images, labels = linear_images(target)
    options = {"epsilon": EPSILON, "steps": 30}
    plain = pgd_head(target, images, labels, **options, generator=generator())  # type: ignore[arg-type]
    knowing = ADAPTIVE[name](target, images, labels, **options, generator=generator())  # type: ignore[arg-type]
    plain_wrong, plain_success = judged(target, plain, labels)
    _, success = judged(target, knowing, labels)
    assert plain_wrong.float().mean() > 0.9
    assert success.float().mean() > 0.5
    assert success.float().mean() > plain_success.float().mean() + 0.3


@pytest.mark.parametrize("name", ["T4", "T5-selective", "T5-orthogonal"])
def test_with_a_budget_that_hides_nothing_all_succeed(target: Target, batch: tuple[Tensor, Tensor], name: str) -> None:
    found = ADAPTIVE[name](target, *batch, epsilon=64 / 255, steps=60, generator=generator())
    assert judged(target, found, batch[1])[1].float().mean() > 0.95


@pytest.mark.parametrize("name", ["T6-penalised", "T6-selective", "T6-orthogonal"])
def test_the_embedding_moves_under_the_threshold(target: Target, batch: tuple[Tensor, Tensor], name: str) -> None:
    images, _ = batch
    blind = Target(linear_target(heads=False).see, target.threshold)
    found = ADAPTIVE[name](blind, images, None, epsilon=EPSILON, steps=20, generator=generator())
    seen, clean = target.see(found), target.see(images)
    assert (seen.score <= target.threshold).all()
    signs = (torch.rand(images.shape, generator=generator()) > 0.5).float() * 2 - 1
    by_noise = distance(target.see((images + EPSILON * signs).clamp(0, 1)).embedding, clean.embedding)
    assert distance(seen.embedding, clean.embedding).median() > 2 * by_noise.median()


@pytest.mark.parametrize("name", ["T1", "T2", "T3", "T4", "T5-selective", "T5-orthogonal", "T11"])
def test_more_steps_or_restarts_are_worse_on_no_image(target: Target, batch: tuple[Tensor, Tensor], name: str) -> None:
    images, labels = batch
    attack, merits = ADAPTIVE[name], []
    for steps, restarts in ((2, 1), (8, 1), (8, 2)):
        options = {"epsilon": EPSILON, "steps": steps, "restarts": restarts}
        found = attack(target, images, labels, generator=generator(), **options)  # type: ignore[arg-type]
        success = judged(target, found, labels)[1]
        merits.append(success * 1e3 + margin(target.see(found).require_fused(), labels))
    if name in ("T1", "T2", "T4", "T5-selective", "T5-orthogonal"):  # several searches share one generator's starts
        merits = merits[:2]
    for fewer, more in itertools.pairwise(merits):
        assert (more >= fewer - 1e-4).all()


Rank = Callable[[Target, Tensor, Tensor, Tensor], Tensor]


def by_margin(target: Target, found: Tensor, clean: Tensor, labels: Tensor) -> Tensor:
    return 1e3 * judged(target, found, labels)[1] + margin(target.see(found).require_fused(), labels)


def by_distance(target: Target, found: Tensor, clean: Tensor, labels: Tensor) -> Tensor:
    seen = target.see(found)
    return 1e3 * (seen.score <= target.threshold) + distance(seen.embedding, target.see(clean).embedding)


def by_alarm(target: Target, found: Tensor, clean: Tensor, labels: Tensor) -> Tensor:
    seen = target.see(found)
    return 1e3 * ((seen.score > target.threshold) & (seen.require_fused().argmax(dim=1) == labels)) + seen.score


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("T6-penalised", by_distance),
        ("T6-selective", by_distance),
        ("T6-orthogonal", by_distance),
        ("T9", by_alarm),
        ("T10-T1", by_margin),
        ("T10-T3", by_margin),
    ],
)
def test_more_steps_are_worse_on_no_image_by_what_the_attack_wants(
    target: Target, batch: tuple[Tensor, Tensor], name: str, rank: Rank
) -> None:
    images, labels = batch
    ranks = [rank(target, images, images, labels)]
    for steps in (1, 3, 12):
        found = ADAPTIVE[name](target, images, labels, epsilon=EPSILON, steps=steps, generator=generator())
        ranks.append(rank(target, found, images, labels))
    # Fewer steps are the beginning of more, so nothing is allowed for but the last digits.
    for fewer, more in itertools.pairwise(ranks):
        assert (more >= fewer - 1e-4).all()
    assert (ranks[3] > ranks[0] + 1e-3).float().mean() > 0.5


@pytest.mark.parametrize("name", ["T5-selective", "T5-orthogonal", "T9", "T10-T3", "T10-T5"])
def test_more_restarts_are_worse_on_no_image(target: Target, batch: tuple[Tensor, Tensor], name: str) -> None:
    images, labels = batch
    # Each is one search: several share the generator, and all but the first start elsewhere with more restarts.
    one_level: Any = {"levels": (5.0,)} if "T5" in name else {}
    ranks = []
    for restarts in (1, 4):
        options = {"epsilon": EPSILON, "steps": 4, "restarts": restarts, **one_level}
        found = ADAPTIVE[name](target, images, labels, generator=generator(), **options)
        ranks.append((by_alarm if name == "T9" else by_margin)(target, found, images, labels))
    assert (ranks[1] >= ranks[0] - 1e-4).all()
    assert (ranks[1] > ranks[0] + 1e-4).any()


def test_more_steps_make_no_weaker_universal_attack(target: Target, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    reached = []
    for steps in (0, 1, 5, 20):
        found = ensemble_universal(target, images, labels, epsilon=EPSILON, steps=steps, generator=generator())
        merit = margin(target.see(found).require_fused(), labels)
        reached.append((int(judged(target, found, labels)[1].sum()), float(merit.sum())))
    # One delta for all: it is never weaker on them together, first by successes, and may be on one of them.
    for fewer, more in itertools.pairwise(reached):
        assert more[0] >= fewer[0]
        assert more[0] > fewer[0] or more[1] >= fewer[1] - 1e-3
    assert reached[3] > reached[0]


def test_a_step_is_orthogonal_to_the_other_gradient() -> None:
    gradient, other = (torch.randn(5, 3, 4, 4, generator=generator(n)) for n in (1, 2))
    step = orthogonal(gradient, other)
    assert (step * other).sum(dim=(1, 2, 3)).abs().max() < 1e-4
    assert ((step * gradient).sum(dim=(1, 2, 3)) > 0).all()
    # Nothing to be orthogonal to: the gradient itself.
    assert torch.equal(orthogonal(gradient, torch.zeros_like(other)), gradient)


@pytest.mark.parametrize("first", [True, False])
def test_the_step_of_orthogonal_pgd_leaves_the_other_aim_alone(first: bool) -> None:
    up, down = (torch.randn(48, generator=generator(n)) for n in (3, 4))

    def see(x: Tensor) -> Seen:
        flat = x.flatten(1)
        return Seen(flat, flat, flat @ down, {}, None, (flat @ up)[:, None])

    z = torch.rand(4, 3, 4, 4, generator=generator()).requires_grad_()
    seen = see(z)
    rule = switching(
        lambda s: s.require_fused()[:, 0],
        lambda s: s.score,
        lambda s: torch.full_like(s.score, 1.0 if first else 0.0),
        project=True,
    )
    step = rule(z, seen).flatten(1)
    assert step.abs().mean(dim=1).tolist() == pytest.approx([1.0] * 4, rel=1e-4)
    assert (step @ (down if first else up)).abs().max() < 1e-3
    assert ((step @ up > 0.1) if first else (step @ down < -0.1)).all()


def test_a_success_is_kept_before_any_merit() -> None:
    def image(value: float) -> Tensor:
        return torch.full((1, 3, 1, 1), value)

    best = Best(image(0), torch.tensor([False]), torch.tensor([5.0]))
    best.offer(image(1), torch.tensor([True]), torch.tensor([0.1]))
    assert best.images.max() == 1
    for value, success, merit in ((2.0, False, 9.0), (3.0, True, 0.05), (4.0, True, math.nan)):
        best.offer(image(value), torch.tensor([success]), torch.tensor([merit]))
        assert best.images.max() == 1
    best.offer(image(5), torch.tensor([True]), torch.tensor([0.2]))
    assert best.images.max() == 5


def test_margins_and_log_odds_by_hand() -> None:
    logits, labels = torch.tensor([[1.0, 3.0, 2.0], [4.0, 0.0, 1.0]]), torch.tensor([2, 0])
    assert margin(logits, labels).tolist() == [1.0, -3.0]
    p = logits.softmax(dim=1)[[0, 1], labels]
    assert torch.allclose(log_odds(logits, labels), (p / (1 - p)).log(), atol=1e-5)
    both = margin(logits[:, None].expand(-1, 3, -1), labels)
    assert both.tolist() == [[1.0] * 3, [-3.0] * 3]
    assert log_odds(torch.tensor([[200.0, 0.0]]), torch.tensor([0])).item() == pytest.approx(200)


def test_the_universal_attack_adds_one_perturbation(target: Target, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    made_on, applied = images[:16], images[16:]
    found = ensemble_universal(
        target, applied, labels[16:], epsilon=EPSILON, steps=10, generator=generator(), surrogate=made_on
    )
    delta = found - applied
    inside = ((found > 0) & (found < 1)).all(dim=0)
    assert (delta - delta[:1]).abs()[:, inside].max() < 1e-5
    assert delta.abs().max() > 0.9 * EPSILON


def test_the_universal_attack_looks_at_few_images_at_a_time(target: Target, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    seen: list[int] = []

    def see(few: Tensor) -> Seen:
        seen.append(len(few))
        return target.see(few)

    watched = replace(target, see=see)
    common: Any = {"epsilon": EPSILON, "steps": 3}
    found = ensemble_universal(watched, images, labels, chunk=5, generator=generator(), **common)
    assert max(seen) == 5
    whole = ensemble_universal(target, images, labels, chunk=len(images), generator=generator(), **common)
    torch.testing.assert_close(found, whole)


def test_a_patch_lies_where_advencoder_puts_it() -> None:
    images = torch.full((1, 3, 64, 64), 0.5)
    box = Box.patch(images)
    rows, columns = torch.nonzero((box.high - box.low)[0, 0] == 1, as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (39, 49, 39, 49)


def test_a_false_alarm_raises_the_score_and_keeps_the_prediction(target: Target, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    found = false_alarm(target, images, labels, epsilon=EPSILON, steps=20, generator=generator())
    seen = target.see(found)
    flagged = seen.score > target.threshold
    assert flagged.float().mean() > 0.8
    assert (seen.require_fused().argmax(dim=1) == labels)[flagged].float().mean() > 0.95


def test_the_joint_attack_makes_the_branches_agree(target: Target, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    found = ADAPTIVE["T3"](Target(target.see, math.inf), images, labels, epsilon=64 / 255, steps=20, generator=generator())
    classes = target.see(found).require_logits().argmax(dim=2)
    agree = (classes == classes[:, :1]).all(dim=1) & (classes[:, 0] != labels)
    assert agree.float().mean() > 0.9


def test_without_labels_the_clean_prediction_is_the_truth(target: Target, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    told, guessed = (
        two_aims(target, images, given, epsilon=EPSILON, steps=3, generator=generator()) for given in (labels, None)
    )
    assert torch.equal(told, guessed)


@pytest.mark.parametrize("name", ["T2", "T3", "T4", "T5-selective", "T5-orthogonal", "T10-T3", "T10-T5", "T11"])
def test_attacks_through_heads_say_that_they_need_them(batch: tuple[Tensor, Tensor], name: str) -> None:
    with pytest.raises(NeedsHeads, match="heads"):
        ADAPTIVE[name](linear_target(heads=False), *batch, epsilon=EPSILON, steps=1, generator=generator())


def test_attacks_are_seeded(target: Target, batch: tuple[Tensor, Tensor]) -> None:
    first, again = (
        two_aims(target, *batch, epsilon=EPSILON, steps=3, generator=generator(seed), project=True) for seed in (1, 1)
    )
    assert torch.equal(first, again)


def test_the_suite_on_trained_networks(toy_encoder: Encoder) -> None:
    """Real features: MPAE and BMP are networks of other seeds; the score is how far BMP is from their account of it."""
    encoders = {TRIPWIRE: toy_encoder, **{name: trained_encoder(seed=n) for n, name in enumerate(BRANCHES, 1)}}
    for encoder in encoders.values():
        encoder.requires_grad_(False).zero_grad()
    clean, truth = patterns(40, seed=7)
    with torch.no_grad():
        clean_features = {name: encoder(as_input(clean)) for name, encoder in encoders.items()}
    one_hot = torch.nn.functional.one_hot(torch.as_tensor(truth), 4).float() * 8 - 2
    heads = {name: torch.linalg.lstsq(_affine(clean_features[name]), one_hot).solution for name in BRANCHES}
    across = torch.linalg.lstsq(_affine(clean_features[MPAE[0]]), clean_features[BMP]).solution
    centres = [clean_features[name].mean(dim=0) for name in BRANCHES]

    def see(images: Tensor) -> Seen:
        features = {name: encoder(images) for name, encoder in encoders.items()}
        score = distance(_affine(features[MPAE[0]]) @ across - centres[2], features[BMP] - centres[2])
        logits = torch.stack([_affine(features[name]) @ heads[name] for name in BRANCHES], dim=1)
        confidence = torch.exp(-score)[:, None].expand(-1, 3)
        embedding = embed([{"": features[name] - centre} for name, centre in zip(BRANCHES, centres, strict=True)])
        return Seen(embedding, confidence, score, features, logits, logits.mean(dim=1))

    with torch.no_grad():
        target = Target(see, float(see(as_input(clean)).score.quantile(0.95)))
    pictures, answers = patterns(3, seed=8)
    x, y = as_input(pictures), torch.as_tensor(answers)
    before = judged(target, pgd_head(target, x, y, epsilon=24 / 255, steps=25, generator=generator()), y)[1]
    for name in ("T5-selective", "T5-orthogonal"):
        found = ADAPTIVE[name](target, x, y, epsilon=24 / 255, steps=25, generator=generator())
        after = judged(target, found, y)[1]
        assert after.float().mean() > before.float().mean() + 0.5
    assert all(p.grad is None for encoder in encoders.values() for p in encoder.parameters())


def _affine(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones(len(features), 1)], dim=1)
