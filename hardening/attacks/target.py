"""What an attacker who knows the method aims at: everything that one forward of a defence shows, differentiable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from model_store.errors import TwogateError


class NeedsHeads(TwogateError):
    """This attack goes through the classifier heads of a task, and the target has none."""


@dataclass(frozen=True)
class Seen:
    """One forward of a defence."""

    embedding: Tensor
    """[N, D]"""
    confidence: Tensor
    """[N, B], columns as in `branches.BRANCHES`; a column for the tripwire may follow."""
    score: Tensor
    """[N], higher = more suspicious."""
    features: dict[str, Tensor]
    """[N, d] by encoder: mpae_victim, mpae_auxiliary, bmp, tripwire."""
    logits: Tensor | None
    """[N, 3, C]: raw logits of a task's heads, in the order of `branches.BRANCHES`."""
    fused: Tensor | None
    """[N, C]: the fused logits."""

    def detach(self) -> Seen:
        """The same values without their graph."""
        return Seen(
            self.embedding.detach(),
            self.confidence.detach(),
            self.score.detach(),
            {name: value.detach() for name, value in self.features.items()},
            None if self.logits is None else self.logits.detach(),
            None if self.fused is None else self.fused.detach(),
        )

    def require_logits(self) -> Tensor:
        """`logits`, or NeedsHeads."""
        if self.logits is None:
            raise NeedsHeads("this attack goes through a task's heads, and the target has none")
        return self.logits

    def require_fused(self) -> Tensor:
        """`fused`, or NeedsHeads."""
        if self.fused is None:
            raise NeedsHeads("this attack goes through a task's heads, and the target has none")
        return self.fused


@dataclass(frozen=True)
class Target:
    """A defence as its attacker sees it."""

    see: Callable[[Tensor], Seen]
    """Images [N, 3, H, W] in [0, 1]; an image's values must not depend on its neighbours in the batch."""
    threshold: float
    """A score above it is flagged."""
