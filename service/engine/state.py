"""The states that a server can be in, and what each means to a load balancer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """Only READY takes new traffic; all but FAILED are expected to pass."""

    STARTING = "starting"
    """The model is being loaded and warmed up."""
    READY = "ready"
    DEGRADED = "degraded"
    """Requests are tried, but the last forward failed, or the batcher is being restarted."""
    DRAINING = "draining"
    """Told to stop; what comes is still answered, what is in flight is finished."""
    FAILED = "failed"
    """The bundle was refused."""


@dataclass(frozen=True)
class Health:
    """The state, and why, in words that may be shown to a client."""

    state: State
    reason: str

    @property
    def ready(self) -> bool:
        """Whether new traffic is welcome."""
        return self.state is State.READY
