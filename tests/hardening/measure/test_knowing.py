"""Attackers who know the method: how much of a task they take at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hardening.attacks.target import Seen, Target
from hardening.measure import knowing
from tests.hardening.conftest import QuietBars


def blind(images: Tensor) -> Seen:
    raise AssertionError("this attack does not look")


@pytest.mark.parametrize(("side", "largest"), [(32, 50), (128, 9), (1024, 1)])
def test_large_pictures_are_attacked_few_at_a_time(side: int, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty photographs at once, with the gradients of the whole defence, once took more memory than the machine had."""
    seen = []

    def attack(target: Target, images: Tensor, labels: Tensor, **options: Any) -> Tensor:
        assert len(images) == len(labels)
        seen.append(len(images))
        return images

    monkeypatch.setitem(knowing._RUNS, knowing.HEAD_AWARE, attack)
    count = largest + 1
    images = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(side, 1).repeat(side, 2).repeat(3, 3)
    found = knowing.attack_knowing(
        knowing.HEAD_AWARE,
        Target(blind, 0.0),
        images,
        np.zeros(count, np.int64),
        epsilon=8,
        steps=1,
        seed=0,
        device="cpu",
        bars=QuietBars(),
    )
    assert seen == [largest, 1]
    assert torch.equal(torch.from_numpy(found), torch.from_numpy(images))
