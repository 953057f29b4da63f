"""Epochs that survive a kill: everything random is drawn from (seed, job, epoch), and each epoch ends in a checkpoint."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hardening.files import load_tensors, save_tensors


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

    `parts` are modules, optimisers and schedules: whatever has `state_dict` and `load_state_dict`.
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
        history.append({**record, "seconds": time.monotonic() - begun})
        state = {name: part.state_dict() for name, part in parts.items()}
        save_tensors(checkpoint, {"history": history, "parts": state})
    return history
