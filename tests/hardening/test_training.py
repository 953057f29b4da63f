from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hardening.training import TrainingError, run_epochs, seed_everything


def draws(*parts: object) -> tuple[float, ...]:
    generator = seed_everything(*parts)
    return random.random(), float(np.random.random()), torch.rand(1).item(), torch.rand(1, generator=generator).item()


def test_every_source_of_chance_follows_the_parts() -> None:
    first = draws(0, "job", 3)
    assert draws(0, "job", 3) == first
    for other in ((1, "job", 3), (0, "other", 3), (0, "job", 4)):
        assert not set(draws(*other)) & set(first)


class Training:
    """A layer under Adam with momentum and a schedule, fed with noise."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.optimiser = torch.optim.AdamW(self.layer.parameters(), lr=0.1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda step: 1 / (step + 1))
        self.fail_at: int | None = None
        self.spoilt = ""

    def epoch(self, number: int, generator: torch.Generator) -> dict[str, float]:
        loss = torch.zeros(())
        for _ in range(3):
            x = torch.randn(8, 4, generator=generator) + torch.rand(1)
            loss = (self.layer(x) - x.flip(1)).square().mean()
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            self.schedule.step()
            if number == self.fail_at:
                raise KeyboardInterrupt
        if self.spoilt == "weights":
            with torch.no_grad():
                next(self.layer.parameters()).view(-1)[0] = torch.nan
        return {"loss": math.inf if self.spoilt == "loss" else loss.item()}

    def run(self, checkpoint: Path, epochs: int = 5) -> list[dict[str, float]]:
        parts: dict[str, Any] = {"layer": self.layer, "optimiser": self.optimiser, "schedule": self.schedule}
        return run_epochs("job", epochs, 7, checkpoint, parts, self.epoch)


def without_time(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in history]


@pytest.mark.parametrize("fail_at", [0, 1, 4])
def test_stopped_inside_an_epoch_it_ends_with_the_same_weights(tmp_path: Path, fail_at: int) -> None:
    whole = Training()
    expected = whole.run(tmp_path / "whole.pt")
    stopped = Training()
    stopped.fail_at = fail_at
    with pytest.raises(KeyboardInterrupt):
        stopped.run(tmp_path / "stopped.pt")
    again = Training()
    found = again.run(tmp_path / "stopped.pt")
    assert without_time(found) == without_time(expected)
    for name, value in whole.layer.state_dict().items():
        assert torch.equal(value, again.layer.state_dict()[name]), name


def test_only_what_is_missing_is_run(tmp_path: Path) -> None:
    first = Training()
    first.run(tmp_path / "x.pt", epochs=2)
    second = Training()
    second.fail_at = 1
    assert len(second.run(tmp_path / "x.pt", epochs=2)) == 2
    third = Training()
    third.fail_at = 1
    assert len(third.run(tmp_path / "x.pt", epochs=4)) == 4


def test_records_tell_the_time(tmp_path: Path) -> None:
    assert all(record["seconds"] > 0 for record in Training().run(tmp_path / "x.pt", epochs=1))


def test_a_training_that_ran_away_is_said_and_not_saved(tmp_path: Path) -> None:
    good = Training()
    good.run(tmp_path / "x.pt", epochs=1)
    kept = (tmp_path / "x.pt").read_bytes()
    for spoilt in ("weights", "loss"):
        training = Training()
        training.spoilt = spoilt
        with pytest.raises(TrainingError, match=r"job: in epoch 2 .* a lower learning_rate helps"):
            training.run(tmp_path / "x.pt", epochs=2)
        assert (tmp_path / "x.pt").read_bytes() == kept
