from __future__ import annotations

import math

import pytest
import torch

from hardening.branches import BMP, BRANCHES, MPAE, Head, Standard
from hardening.detectors.paper import PAPER_THRESHOLD, PaperDetector


def test_it_is_the_papers_formula() -> None:
    """Mean of the two MPAE heads' largest softmax probability, less BMP's: with loops only."""
    generator = torch.Generator().manual_seed(0)
    heads, features = {}, {}
    for name in BRANCHES:
        features[name] = 3 * torch.randn(5, 4, generator=generator) + 1
        standard = Standard(torch.randn(4, generator=generator), torch.rand(4, generator=generator) + 0.5)
        heads[name] = Head(standard, torch.randn(3, 4, generator=generator), torch.randn(3, generator=generator))
    confidence, score = PaperDetector(heads)(features)

    def largest(name: str, image: int) -> float:
        head = heads[name]
        x = [
            (f - m) / s
            for f, m, s in zip(
                features[name][image].tolist(), head.standard.mean.tolist(), head.standard.scale.tolist(), strict=True
            )
        ]
        z = [
            sum(w * v for w, v in zip(row, x, strict=True)) + b
            for row, b in zip(head.weight.tolist(), head.bias.tolist(), strict=True)
        ]
        return max(math.exp(v) for v in z) / sum(math.exp(v) for v in z)

    for image in range(5):
        by_name = {name: largest(name, image) for name in BRANCHES}
        assert confidence[image].tolist() == pytest.approx([by_name[name] for name in BRANCHES], abs=1e-5)
        expected = (by_name[MPAE[0]] + by_name[MPAE[1]]) / 2 - by_name[BMP]
        assert score[image].item() == pytest.approx(expected, abs=1e-5)


def test_the_papers_threshold_is_told() -> None:
    assert PAPER_THRESHOLD == 0.1
