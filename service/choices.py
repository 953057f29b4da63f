"""Choices of the settings that the command offers too. A file of its own, because `--help` loads no pydantic."""

from __future__ import annotations

from typing import Literal

OnFlag = Literal["flag", "reject"]
"""What happens to an image that is flagged."""
Provider = Literal["cpu", "cuda"]
"""Where the graph runs."""
