"""Epochs that survive a kill: everything random is drawn from (seed, job, epoch), and each epoch ends in a checkpoint."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hardening.files import load_tensors, save_tensors
from model_store.errors import TwogateError


class TrainingError(TwogateError):
    """A training came to nothing."""


def seed_everything(*parts: object) -> torch.Generator:
    """Seed Python, numpy and torch from the parts (seed, job, epoch, ...); returns a torch generator of the same seed."""
    seed = int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def run_epochs(
    job: str,
    epochs: int,
    seed: int,
    checkpoint: Path,
    parts: Mapping[str, Any],
    epoch: Callable[[int, torch.Generator], dict[str, float]],
) -> list[dict[str, float]]:
    """Run `epoch(number, generator)` until `epochs` have been done, resuming from `checkpoint`; returns their records.

    `parts` are modules, optimisers and schedules: whatever has `state_dict` and `load_state_dict`. TrainingError where an
    epoch ends in numbers that are none.
    An interrupted run that is resumed draws the same random numbers as one that never stopped.
    On an NVIDIA card convolutions run in TF32, by the algorithm that is fastest there.
    """
    history: list[dict[str, float]] = []
    if checkpoint.exists():
        saved = load_tensors(checkpoint)
        history = saved["history"]
        for name, part in parts.items():
            part.load_state_dict(saved["parts"][name])
    for number in range(len(history), epochs):
        begun = time.monotonic()
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
            record = epoch(number, seed_everything(seed, job, number))
        _check_finite(job, number, record, parts)
        history.append({**record, "seconds": time.monotonic() - begun})
        state = {name: part.state_dict() for name, part in parts.items()}
        save_tensors(checkpoint, {"history": history, "parts": state})
    return history


def _check_finite(job: str, number: int, record: Mapping[str, float], parts: Mapping[str, Any]) -> None:
    """TrainingError where the training has run away: said before it is saved, so that the last good epoch stays."""
    modules = [part for part in parts.values() if isinstance(part, nn.Module)]
    whole = all(torch.isfinite(value).all() for module in modules for value in module.parameters())
    if not (whole and all(math.isfinite(value) for value in record.values())):
        raise TrainingError(
            f"{job}: in epoch {number + 1} the weights or the loss ran away to infinity; a lower learning_rate helps"
        )
