from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hardening.attacks.adaptive import margin
from hardening.attacks.head_aware import (
    _checkpoints,
    apgd,
    auto_attack_without_fab,
    cross_entropy,
    dlr,
    pgd_head,
    targeted_dlr,
)
from hardening.attacks.target import NeedsHeads, Seen, Target
from hardening.encoders import Encoder, as_input
from tests.support.patterns import patterns

EPSILON = 8 / 255


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def target(toy_encoder: Encoder) -> Target:
    """A least-squares head on the toy; its score is high for everything, which these attacks must not mind."""
    images, labels = patterns(40, seed=7)
    toy_encoder.requires_grad_(False)
    with torch.no_grad():
        known = toy_encoder(as_input(images))
    centre = known.mean(dim=0)
    weights = torch.linalg.lstsq(known - centre, F.one_hot(torch.as_tensor(labels), 4).float() * 20 - 5).solution

    def see(x: Tensor) -> Seen:
        features = toy_encoder(x)
        fused = (features - centre) @ weights
        return Seen(features, features, fused.new_full((len(x),), 9.0), {}, fused[:, None].expand(-1, 3, -1), fused)

    return Target(see, 0.0)


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    images, labels = patterns(4, seed=3)
    return as_input(images), torch.as_tensor(labels)


def wrong(target: Target, found: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((target.see(found).require_fused().argmax(dim=1) != labels).float().mean())


@pytest.mark.parametrize("attack", [pgd_head, auto_attack_without_fab])
def test_it_breaks_the_head_within_the_budget(target: Target, batch: tuple[Tensor, Tensor], attack: object) -> None:
    assert callable(attack)
    images, labels = batch
    found = attack(target, images, labels, epsilon=EPSILON, steps=12, generator=generator())
    assert (found - images).abs().max() <= EPSILON + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.allclose(found * 255, (found * 255).round(), atol=1e-3)
    signs = (torch.rand(images.shape, generator=generator()) > 0.5).float() * 2 - 1
    noise = (images + EPSILON * signs).clamp(0, 1)
    assert wrong(target, found, labels) > wrong(target, noise, labels)
    wide = attack(target, images, labels, epsilon=64 / 255, steps=10, generator=generator())
    assert wrong(target, wide, labels) == 1


def test_the_ensemble_is_at_least_as_strong_as_plain_pgd(target: Target, batch: tuple[Tensor, Tensor]) -> None:
    options = {"epsilon": 4 / 255, "steps": 8}
    plain = pgd_head(target, *batch, **options, generator=generator())  # type: ignore[arg-type]
    strong = auto_attack_without_fab(target, *batch, **options, generator=generator())  # type: ignore[arg-type]
    assert wrong(target, strong, batch[1]) >= wrong(target, plain, batch[1])


def test_more_steps_or_restarts_are_worse_on_no_image(target: Target, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    reached = []
    for steps, restarts in ((1, 1), (6, 1), (6, 3)):
        options = {"steps": steps, "restarts": restarts, "loss": "dlr"}
        found = pgd_head(target, images, labels, epsilon=EPSILON, generator=generator(), **options)  # type: ignore[arg-type]
        reached.append(margin(target.see(found).require_fused(), labels))
    assert (reached[1] >= reached[0] - 1e-4).all()
    assert (reached[2] >= reached[1] - 1e-4).all()


def test_more_steps_of_the_ensemble_break_no_fewer(target: Target, batch: tuple[Tensor, Tensor]) -> None:
    broken = [
        wrong(target, auto_attack_without_fab(target, *batch, epsilon=7 / 255, steps=s, generator=generator()), batch[1])
        for s in (1, 4, 16)
    ]
    # Its step sizes follow their number, so more are another way and not a longer one: one picture of 16 may be missed.
    assert broken[1] >= broken[0] - 1 / 16
    assert broken[2] >= broken[1] - 1 / 16
    assert broken[2] > broken[0]


def test_both_losses_are_no_worse_than_the_first(target: Target, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    one, both = (
        pgd_head(target, images, labels, epsilon=EPSILON, steps=4, generator=generator(), loss=loss)  # type: ignore[arg-type]
        for loss in ("ce", "both")
    )
    before, after = (margin(target.see(found).require_fused(), labels) for found in (one, both))
    assert (after >= before - 1e-4).all()


@pytest.mark.parametrize("loss", [cross_entropy, dlr])
def test_apgd_finds_the_corner_of_a_linear_model(loss: object) -> None:
    weights = torch.randn(48, 3, generator=generator())
    weights[:, 2] = 0

    def see(x: Tensor) -> Seen:
        fused = (x.flatten(1) - 0.5) @ weights - torch.tensor([0.0, 0.0, 50.0])  # the third is never a rival
        return Seen(fused, fused, fused[:, 0], {}, None, fused)

    images, labels = torch.full((2, 3, 4, 4), 128 / 255), torch.tensor([0, 1])
    target = Target(see, 0.0)
    found = apgd(target, images, labels, loss, epsilon=EPSILON, steps=20, generator=generator())  # type: ignore[arg-type]
    assert found.success.all()
    best = (images.flatten(1) - 0.5) @ (weights[:, 1] - weights[:, 0]) * torch.tensor([1, -1])
    best = best + EPSILON * (weights[:, 1] - weights[:, 0]).abs().sum()
    assert (found.merit > 0.8 * best).all()


def test_losses_by_hand() -> None:
    logits, labels = torch.tensor([[5.0, 1.0, 2.0, -1.0], [0.0, 4.0, 3.0, 1.0]]), torch.tensor([0, 2])
    assert dlr(logits, labels).tolist() == pytest.approx([-(5 - 2) / (5 - 1), (4 - 3) / (4 - 1)])
    assert dlr(7 * logits, labels).tolist() == pytest.approx(dlr(logits, labels).tolist())
    wanted = torch.tensor([3, 0])
    assert targeted_dlr(logits, labels, wanted).tolist() == pytest.approx([(-1 - 5) / (5 - 0), (0 - 3) / (4 - 0.5)])
    assert dlr(logits[:, :2], torch.tensor([0, 0])).tolist() == [-4.0, 4.0]
    assert cross_entropy(logits, labels)[0].item() == pytest.approx(-logits[0].log_softmax(dim=0)[0].item())


def test_auto_pgd_looks_back_when_the_paper_says() -> None:
    assert sorted(_checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_a_target_without_heads_is_refused(batch: tuple[Tensor, Tensor]) -> None:
    def see(x: Tensor) -> Seen:
        flat = x.flatten(1)
        return Seen(flat, flat, flat[:, 0], {}, None, None)

    with pytest.raises(NeedsHeads):
        pgd_head(Target(see, 0.0), *batch, epsilon=EPSILON, steps=1, generator=generator())
