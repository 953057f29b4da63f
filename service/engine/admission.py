"""What may be inside at a time. Refused at the door is cheap; refused half-way is work for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Gauge


class Allowance:
    """A number of units that all requests share. A request gets all it asks for at once, or nothing.

    Only used on the event loop, so that taking and checking are one step.
    """

    def __init__(self, limit: int, gauge: Gauge) -> None:
        self.limit = limit
        self.taken = 0
        self._gauge = gauge

    def take(self, units: int) -> bool:
        """Take `units`, or nothing and return False."""
        if self.taken + units > self.limit:
            return False
        self._set(self.taken + units)
        return True

    def give(self, units: int) -> None:
        """Give back what `take` took."""
        self._set(self.taken - units)

    @contextmanager
    def held(self, units: int) -> Iterator[bool]:
        """`take` for the length of a block; yields whether it was granted."""
        granted = self.take(units)
        try:
            yield granted
        finally:
            if granted:
                self.give(units)

    def _set(self, taken: int) -> None:
        self.taken = taken
        self._gauge.set(taken)
