"""Write files so that a kill at any point leaves the old content or the new, never half of it."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside, flush to disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def save_tensors(path: Path, content: Any) -> None:
    """`torch.save`, atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load_tensors(path: Path) -> Any:
    """`torch.load` onto the CPU; weights only, so that a file from elsewhere cannot run code."""
    return torch.load(path, map_location="cpu", weights_only=True)
