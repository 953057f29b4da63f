"""What an attacker who knows the method aims at: everything that one forward of a defence shows, differentiable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model_store.errors import TwogateError

_SOFT = 0.25
"""Defences whose scores are about that much apart both count, in units of the score."""


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

    @classmethod
    def together(cls, targets: Sequence[Target]) -> Target:
        """Several defences as one, for who lacks the weights of the real one: what fools all of his own carries over better
        (Liu et al., ICLR 2017). Each must have the same heads' classes.

        Logits, fused ones and confidences are averaged; features and embeddings stand side by side, each at unit length, so
        that a distance is the mean of the distances. The score is the highest excess over a threshold, softened so that each
        defence near it has a gradient; nothing is unflagged before all let it pass.
        """
        if len(targets) == 1:
            return targets[0]

        def see(images: Tensor) -> Seen:
            every = [target.see(images) for target in targets]
            excess = torch.stack([one.score - target.threshold for one, target in zip(every, targets, strict=True)])
            return Seen(
                embedding=_side_by_side([one.embedding for one in every]),
                confidence=torch.stack([one.confidence for one in every]).mean(dim=0),
                score=_SOFT * (excess / _SOFT).logsumexp(dim=0),
                features={name: _side_by_side([one.features[name] for one in every]) for name in every[0].features},
                logits=_mean([one.logits for one in every]),
                fused=_mean([one.fused for one in every]),
            )

        return cls(see, 0.0)


def _side_by_side(values: list[Tensor]) -> Tensor:
    return torch.cat([F.normalize(value, dim=1) for value in values], dim=1)


def _mean(values: list[Tensor | None]) -> Tensor | None:
    there = [value for value in values if value is not None]
    return torch.stack(there).mean(dim=0) if len(there) == len(values) else None
