"""Attackers who know the method: how much of a task they take at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hardening.attacks.target import Seen, Target
from hardening.measure import knowing
from model_store.calibration import BudgetTooSmall, Calibration
from model_store.errors import TwogateError
from tests.hardening.conftest import QuietBars


def blind(images: Tensor) -> Seen:
    raise AssertionError("this attack does not look")


@pytest.mark.parametrize(("side", "largest"), [(32, 50), (128, 9), (1024, 1)])
def test_large_pictures_are_attacked_few_at_a_time(side: int, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty photographs at once, with the gradients of the whole defence, once took more memory than the machine had."""
    seen = []

    def attack(target: Target, images: Tensor, labels: Tensor, **options: Any) -> Tensor:
        assert len(images) == len(labels)
        assert options["epsilon"] == pytest.approx(8 / 255)
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
        restarts=1,
        seed=0,
        device="cpu",
        bars=QuietBars(),
    )
    assert seen == [largest, 1]
    assert torch.equal(torch.from_numpy(found), torch.from_numpy(images))


def test_a_universal_perturbation_is_one_for_all_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def attack(target: Target, images: Tensor, labels: Tensor, **options: Any) -> Tensor:
        seen.append((len(images), options["chunk"]))
        return images

    monkeypatch.setattr(knowing, "ensemble_universal", attack)
    monkeypatch.setitem(knowing._RUNS, "T1-universal", attack)
    images, labels, target = np.zeros((20, 128, 128, 3), np.uint8), np.zeros(20, np.int64), Target(blind, 0.0)
    options: Any = {"epsilon": 8, "steps": 1, "restarts": 1, "seed": 0, "device": "cpu", "bars": QuietBars()}
    knowing.attack_knowing("T1-universal", target, images, labels, **options)
    assert seen == [(20, 9)]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("T5-selective", 7),
        ("T5-selective@200", 200),
        ("T5-selective@mixture@3", 3),
        ("T5-selective@fpr0.2", 7),
        ("T5-selective@mixture@fpr0.2@3", 3),
    ],
)
def test_a_name_may_say_how_many_steps(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def attack(target: Target, images: Tensor, labels: Tensor, **options: Any) -> Tensor:
        taken.append(options["steps"])
        return images

    knowing.check_names((name,))
    monkeypatch.setitem(knowing._RUNS, "T5-selective", attack)
    images, labels, target = np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1, np.int64), Target(blind, 0.0)
    knowing.attack_knowing(
        name, target, images, labels, epsilon=8, steps=7, restarts=1, seed=0, device="cpu", bars=QuietBars()
    )
    assert taken == [steps]


@pytest.mark.parametrize(
    ("name", "share", "less"),
    [
        ("T3", 0.5, "T3@20"),
        ("T4@mixture", 0.125, "T4@mixture@5"),
        ("T5-selective@fpr0.2@200", 0.25, "T5-selective@fpr0.2@50"),
        ("T2@3", 0.125, "T2@1"),
    ],
)
def test_less_effort_is_fewer_steps_of_the_same(name: str, share: float, less: str) -> None:
    assert knowing.fewer_steps(name, 40, share) == less
    knowing.check_names((less,))


@pytest.mark.parametrize(("name", "budget"), [("T5-selective", 0.05), ("T4@mixture@fpr0.2", 0.2), ("T3@fpr0.01@9", 0.01)])
def test_a_name_may_say_which_budget_is_aimed_at(name: str, budget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    knowing.check_names((name,))
    table = Calibration(source="", scores=tuple(float(score) for score in range(999)))
    bundle: Any = SimpleNamespace(calibration=table)
    graph: Any = SimpleNamespace(feature_names={})
    task: Any = None
    aimed = knowing.target_of(graph, task, bundle, name).threshold
    p_value = table.p_value(np.array([aimed, aimed + 1]))
    assert p_value[0] > budget >= p_value[1]


def test_a_budget_that_a_bundle_cannot_have_is_refused_before_the_work() -> None:
    table = Calibration(source="", scores=tuple(float(score) for score in range(56)))
    knowing.check_budgets(("T5-selective", "T4@fpr0.02"), table)
    with pytest.raises(BudgetTooSmall, match="needs at least 99 calibration images, this bundle has 56"):
        knowing.check_budgets(("T5-selective", "T4@fpr0.01@9"), table)


@pytest.mark.parametrize(
    "name",
    [
        *("T7", "T5-selective@", "T5-selective@0", "T5-selective@many", "T3@mixture", "@200"),
        *("T5-selective@fpr", "T5-selective@fpr0.0", "T5-selective@fpr5", "T5-selective@9@fpr0.2"),
        "PGD-head@fpr0.2",  # blind to the flag
    ],
)
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(TwogateError, match="as in PGD-head@200"):
        knowing.check_names((name,))
