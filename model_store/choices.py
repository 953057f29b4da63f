"""Choices of the contract that commands offer too. A file of its own, because `--help` loads neither pydantic nor numpy."""

from __future__ import annotations

from typing import Literal

Fusion = Literal["guarded", "rfdm"]
"""How the branches vote: as far as each can be trusted on this image, or by certainty (ZePAD)."""
