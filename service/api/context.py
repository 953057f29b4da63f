"""What the endpoints of one app share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from starlette.requests import Request

from service.engine.gate import Gate
from service.settings import Settings
from service.telemetry import Telemetry


@dataclass(frozen=True)
class Context:
    """One app's settings, core and metrics."""

    settings: Settings
    gate: Gate
    telemetry: Telemetry


def context_of(request: Request) -> Context:
    """The context that `create_app` made."""
    return cast(Context, request.app.state.context)
