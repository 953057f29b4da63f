"""From a score to a p-value: how many clean images look at least as suspicious.

The operator chooses a false-positive budget, never a threshold. Split-conformal p-values (Vovk et al., "Algorithmic
Learning in a Random World", ch. 2): for a fresh clean image exchangeable with the calibration images, P(p <= a) <= a.

A table may promise more: that of fresh images after an honest change (`model_store.honest`) at most 2 a have p <= a, for each
kind of change on its own. Its scores are then raised to those of the changed copies of calibration images, and of clean
images fewer than a have p <= a. Target d of the project is this promise; small pictures pay for it with attacks unseen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from model_store.errors import TwogateError


def is_empty(values: tuple[object, ...]) -> bool:
    """For optional fields: a manifest without them is what programs that do not know them can read."""
    return not values


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

        A kind of change with m copies bounds the budgets from 1 / (2 (m + 1)) on: half as many as there are clean images
        bound all that these support, and below that the kind's highest score is the best that is known.
        """
        table = np.sort(np.asarray(clean, np.float64))
        share = np.arange(len(table), 0, -1) / (len(table) + 1)  # of images that may be above each score
        for scores in (changed or {}).values():
            copies = np.sort(np.asarray(scores, np.float64))
            # As many of the copies may lie above; a whisker more, because 2 * share * (m + 1) may be a rounded integer.
            above = np.maximum(np.floor(2 * share * (len(copies) + 1) + 1e-9).astype(int), 1)
            table = np.where(above <= len(copies), np.maximum(table, copies[-np.minimum(above, len(copies))]), table)
        return cls(source=source, scores=tuple(table.tolist()), changes=tuple(changed or ()))

    @property
    def n(self) -> int:
        """Number of clean images."""
        return len(self.scores)

    @property
    def words(self) -> str:
        """What it was made of, and after which honest changes at most twice max_fpr are flagged."""
        return f"{self.source}; quiet after {', '.join(self.changes)}" if self.changes else self.source

    @property
    def smallest_budget(self) -> float:
        """The smallest false-positive rate that n clean images can promise: 1 / (n + 1)."""
        return 1 / (self.n + 1)

    @cached_property
    def _table(self) -> NDArray[np.float64]:
        return np.asarray(self.scores, dtype=np.float64)

    def p_value(self, score: ArrayLike) -> NDArray[np.float64]:
        """p = (1 + #{clean >= score}) / (n + 1), elementwise; a NaN score gets the smallest p, the suspicious end."""
        values = np.asarray(score, dtype=np.float64)
        at_least = self.n - np.searchsorted(self._table, values, side="left")
        return np.asarray((1 + np.where(np.isnan(values), 0, at_least)) / (self.n + 1))

    def require_budget(self, max_fpr: float) -> None:
        """Raise BudgetTooSmall unless some p-value can be as small as `max_fpr`, a share between 0 and 1."""
        if not 0 < max_fpr < 1:
            raise TwogateError(f"max_fpr {max_fpr:g} is not a share of clean images: it must lie between 0 and 1")
        if max_fpr < self.smallest_budget:
            needed = math.ceil(1 / max_fpr) - 1
            raise BudgetTooSmall(
                f"max_fpr {max_fpr:g} needs at least {needed} calibration images, this bundle has {self.n}: "
                f"the smallest budget it supports is {self.smallest_budget:.2g}"
            )
