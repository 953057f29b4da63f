"""From a score to a p-value: how many clean images look at least as suspicious.

The operator chooses a false-positive budget, never a threshold. Split-conformal p-values (Vovk et al., "Algorithmic
Learning in a Random World", ch. 2): for a fresh clean image exchangeable with the calibration images, P(p <= a) <= a.

A table may promise more: that of fresh images after an honest change (`model_store.honest`) at most 2 a have p <= a, for each
kind of change on its own, and where single images would decide (`each_alone_from`), for all kinds together. Its scores are
then raised to those of changed copies of calibration images, and of clean images fewer than a have p <= a. Tiny pictures pay
for that with attacks unseen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from model_store.errors import TwogateError

_FEWEST = 5
"""Copies of a kind of change above a score, that this kind may decide alone."""
_MOST_COPIES = 500


def copies_of(n: int) -> int:
    """How many of n calibration images are changed in each way: half of them, which can tell twice a budget as well as all
    can tell the budget, and 500 at most: each kind then decides alone from 0.005 on."""
    return min((n + 1) // 2, _MOST_COPIES)


def images_for(max_fpr: float) -> int:
    """The fewest clean images that can promise a false-positive rate: `smallest_budget` the other way round."""
    return math.ceil(1 / max_fpr) - 1


def is_empty(values: tuple[object, ...]) -> bool:
    """For optional fields: a manifest without them is what programs that do not know them can read."""
    return not values


def _exceeded(scores: NDArray[np.float64], share: NDArray[np.float64], fewest: int) -> NDArray[np.float64]:
    """What each share of ascending scores [m] exceeds, one fresh score counted in; -inf where that are fewer than `fewest`,
    or all of them. A share of less than one score counts as one."""
    # A whisker more, because a product may be a rounded integer.
    above = np.maximum(np.floor(share * (len(scores) + 1) + 1e-9).astype(int), 1)
    return np.where((above >= fewest) & (above <= len(scores)), scores[-np.minimum(above, len(scores))], -np.inf)


class BudgetTooSmall(TwogateError):
    """The calibration set is too small to promise this false-positive rate."""


class Calibration(BaseModel):
    """The scores of held-out clean images, which no encoder, head or detector was fitted on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(description="what the clean images were, in words")
    scores: tuple[float, ...] = Field(min_length=1, description="ascending; one per clean image")
    changes: tuple[str, ...] = Field(
        default=(),
        exclude_if=is_empty,
        description="honest changes after which at most twice max_fpr are flagged; the scores are raised to that; left out "
        "if there are none",
    )

    @model_validator(mode="after")
    def _ascending(self) -> Calibration:
        values = np.asarray(self.scores)
        if not np.isfinite(values).all() or (np.diff(values) < 0).any():
            raise ValueError("scores must be finite and ascending")
        return self

    @classmethod
    def of(cls, source: str, clean: ArrayLike, changed: Mapping[str, ArrayLike] | None = None) -> Calibration:
        """From the scores [n] of clean images in any order, and those [m] of copies of some of them by honest change.

        Twice a budget of the copies may be above: of each kind's, where these are five or more, and for smaller budgets of
        all kinds' together. Fewer of one kind are the accident of a picture, and the largest of many such accidents would let
        attacks pass that hardly an honest picture is as loud as.
        """
        table = np.sort(np.asarray(clean, np.float64))
        share = np.arange(len(table), 0, -1) / (len(table) + 1)  # of images that may be above each score
        kinds = [np.sort(np.asarray(scores, np.float64)) for scores in (changed or {}).values()]
        if kinds:
            pooled = np.sort(np.concatenate(kinds))
            table = np.maximum(table, _exceeded(pooled, 2 * share, 1))
            for copies in kinds:
                table = np.maximum(table, _exceeded(copies, 2 * share, _FEWEST))
            # A smaller budget never flags what a larger one lets pass.
            table = np.maximum.accumulate(table)
        return cls(source=source, scores=tuple(table.tolist()), changes=tuple(changed or ()))

    @property
    def n(self) -> int:
        """Number of clean images."""
        return len(self.scores)

    @property
    def words(self) -> str:
        """What it was made of, and after which honest changes at most twice max_fpr are flagged."""
        if not self.changes:
            return self.source
        return f"{self.source}; quiet after {', '.join(self.changes)} (each alone from max_fpr {self.each_alone_from:.2g} on)"

    @property
    def smallest_budget(self) -> float:
        """The smallest false-positive rate that n clean images can promise: 1 / (n + 1)."""
        return 1 / (self.n + 1)

    @property
    def each_alone_from(self) -> float:
        """The smallest max_fpr of which the promise after honest changes holds for each kind on its own.

        Below, it holds for all kinds together, and a loud one may have all that the quiet ones leave.
        """
        return _FEWEST / (2 * (copies_of(self.n) + 1))

    @cached_property
    def _table(self) -> NDArray[np.float64]:
        return np.asarray(self.scores, dtype=np.float64)

    def p_value(self, score: ArrayLike) -> NDArray[np.float64]:
        """p = (1 + #{clean >= score}) / (n + 1), elementwise; a NaN score gets the smallest p, the suspicious end."""
        values = np.asarray(score, dtype=np.float64)
        at_least = self.n - np.searchsorted(self._table, values, side="left")
        return np.asarray((1 + np.where(np.isnan(values), 0, at_least)) / (self.n + 1))

    def threshold(self, max_fpr: float) -> float:
        """The largest score that is not flagged at a false-positive rate. BudgetTooSmall where every score passes it."""
        self.require_budget(max_fpr)
        # p <= max_fpr while at most this many clean images are as suspicious.
        flagged = int(max_fpr * (self.n + 1) + 1e-9) - 1
        return self.scores[-1 - flagged]

    def require_budget(self, max_fpr: float) -> None:
        """Raise BudgetTooSmall unless some p-value can be as small as `max_fpr`, a share between 0 and 1."""
        if not 0 < max_fpr < 1:
            raise TwogateError(f"max_fpr {max_fpr:g} is not a share of clean images: it must lie between 0 and 1")
        if max_fpr < self.smallest_budget:
            raise BudgetTooSmall(
                f"max_fpr {max_fpr:g} needs at least {images_for(max_fpr)} calibration images, this bundle has {self.n}: "
                f"the smallest budget it supports is {self.smallest_budget:.2g}"
            )
