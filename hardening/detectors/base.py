"""What every detector is: a module of the exported graph, fitted on clean images only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn


class Detector(nn.Module):
    """Features in, confidence and score out.

    `views` names the features that it reads: an encoder's name, or `name@blur` for that encoder on a blurred image.
    """

    name: Literal["consistency", "sentinel", "paper"]
    description: str
    views: tuple[str, ...]
    branches: tuple[str, ...]
    """The order of the columns of `confidence`."""

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Features [N, d] by view -> (confidence [N, B] in [0, 1], score [N], higher = more suspicious)."""
        raise AssertionError("each detector has its own")

    def parameters_for_people(self) -> dict[str, Any]:
        """The fitted numbers that belong in the manifest."""
        return {}
