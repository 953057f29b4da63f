from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hardening.branches import EARLY, LAYOUT, PARTS, Standard, embed, fuse, guarded_vote, rfdm_weights, train_head
from hardening.encoders import Encoder, features
from hardening.heads import VOTE_FLOOR
from tests.support.patterns import patterns


def logits_with_confidence(*confidences: float) -> torch.Tensor:
    """Logits [1, B, 12] whose largest softmax probability is each of these."""
    rows = []
    for m in confidences:
        rest = (1 - m) / 11
        rows.append([math.log(m)] + 11 * [math.log(max(rest, 1e-30))])
    return torch.tensor([rows], dtype=torch.float64)


@pytest.mark.parametrize(("m", "c"), [(0.1, 0.030), (0.3, 0.165), (0.5, 0.500), (0.6, 0.810), (0.9, 2.99), (1.0, 4.48)])
def test_rfdm_against_the_numbers_of_the_method(m: float, c: float) -> None:
    # Beside a branch of c = 0.5, the weight is c / (c + 0.5).
    (weight, other), *_ = rfdm_weights(logits_with_confidence(m, 0.5)).tolist()
    assert weight / other * 0.5 == pytest.approx(c, rel=0.02)
    assert weight + other == pytest.approx(1)


def test_fusion_is_of_raw_logits() -> None:
    logits = torch.tensor([[[1.0, 0], [0, 10], [2, 0]]])
    assert fuse(logits, torch.tensor([[0.5, 0.25, 0.25]])).tolist() == [[1.0, 2.5]]


def test_equal_branches_share_equally() -> None:
    weights = rfdm_weights(torch.randn(5, 1, 4).expand(5, 3, 4))
    assert torch.allclose(weights, torch.full((5, 3), 1 / 3))


def test_no_branch_overrules_two_that_agree() -> None:
    """However loud it is: where votes are raw logits, its voice has no bound."""
    mild, loud = [2.0, 0, 0], [0, 1000.0, 0]
    logits = torch.tensor([[mild, mild, loud]])
    assert guarded_vote(logits, torch.ones(1, 3)).argmax() == 0
    assert fuse(logits, rfdm_weights(logits)).argmax() == 1
    # It speaks against a class by no more than the logarithm of the floor.
    assert guarded_vote(logits[:, 2:], torch.ones(1, 1)).amin().item() == pytest.approx(math.log(VOTE_FLOOR / 3))


def test_the_guard_takes_half_of_the_vote_from_a_branch_that_was_broken() -> None:
    logits = torch.tensor([[[1.0, 0], [1, 0], [0, 9]]])
    votes = (logits.softmax(2) + VOTE_FLOOR / 2).log()[0]
    whole = torch.tensor([[0.5, 0.03, 1.0]])
    assert torch.allclose(guarded_vote(logits, whole)[0], votes.sum(0))
    assert torch.allclose(guarded_vote(logits, torch.tensor([[1, 1, 0.024]]))[0], votes[0] + votes[1] + 0.8 * votes[2])
    halved = guarded_vote(logits, torch.tensor([[1.0, 1, 0]]))[0]
    assert torch.allclose(halved, votes[0] + votes[1] + 0.5 * votes[2], atol=1e-4)
    # All three broken: what is left of their voices still names the likeliest class.
    assert guarded_vote(logits, torch.zeros(1, 3)).argmax() == votes.sum(0).argmax()


def test_the_embedding_has_unit_length_and_fixed_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(6, d, generator=generator) * scale for d, scale in ((4, 1), (7, 100), (3, 0.01), (5, 10))]
    found = embed([{"": parts[0]}, {"": parts[1], EARLY: parts[2], LAYOUT: parts[3]}])
    assert found.shape == (6, 19)
    assert torch.allclose(found.norm(dim=1), torch.ones(6), atol=1e-6)
    alone, features, early, layout = found.split([4, 7, 3, 5], dim=1)  # type: ignore[no-untyped-call]
    length = math.sqrt(sum(weight**2 for weight in PARTS.values()))
    weights = [1, *(weight / length for weight in PARTS.values())]
    for part, value, share in zip((alone, features, early, layout), parts, weights, strict=True):
        expected = torch.nn.functional.normalize(value, dim=1) * share / math.sqrt(2)
        assert torch.allclose(part, expected, atol=1e-6)
    # An image's embedding is its own affair.
    one = embed([{"": parts[0][2:3]}, {"": parts[1][2:3], EARLY: parts[2][2:3], LAYOUT: parts[3][2:3]}])
    assert torch.allclose(one, found[2:3], atol=1e-6)


def test_standard_features_have_mean_0_and_spread_1_and_dead_channels_stay_quiet() -> None:
    found = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 20, 0]) + 5
    out = Standard.of(found)(found)
    assert torch.allclose(out.mean(0), torch.zeros(3), atol=1e-4)
    assert torch.allclose(out.std(0)[:2], torch.ones(2), atol=1e-4)
    assert out[:, 2].abs().max() < 1e-4
    # A channel that moves a little on other images is not blown up to the size of the others.
    assert Standard.of(found)(found + torch.tensor([0, 0, 0.01]))[:, 2].abs().max() < 0.1


@pytest.mark.parametrize("classes", [2, 4])
def test_a_head_reads_the_class_of_new_images(toy_encoder: Encoder, classes: int) -> None:
    (images, labels), (new, expected) = patterns(30, seed=1), patterns(20, seed=2)
    chosen, held_out = labels < classes, expected < classes
    head = train_head(features(toy_encoder, images[chosen]), labels[chosen])
    logits = head(features(toy_encoder, new[held_out]))
    assert logits.shape == (held_out.sum(), classes)
    assert (logits.argmax(1).numpy() == expected[held_out]).mean() > 0.9
    assert np.isfinite(logits.numpy()).all()
