"""GET /health/live and /health/ready, GET /metrics: for the platform; no key is asked for."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service.api.context import context_of
from service.api.schemas import HealthReport

router = APIRouter(tags=["health"])


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live", summary="Is the process alive?")
async def live() -> dict[str, bool]:
    """200 as long as the event loop turns, whatever the load: restart the process only where this fails."""
    return {"live": True}


@router.head("/health/ready", include_in_schema=False)
@router.get(
    "/health/ready",
    response_model=HealthReport,
    responses={503: {"description": "not now; `state` says why", "model": HealthReport}},
    summary="Is new traffic welcome?",
)
async def ready(request: Request) -> Response:
    """200 only in the state `ready`: loaded, golden vector checked, warmed up, last forward good, not draining."""
    health = context_of(request).gate.health()
    report = HealthReport(state=health.state.value, reason=health.reason)
    return Response(
        report.model_dump_json(),
        status_code=200 if health.ready else 503,
        headers={} if health.ready else {"Retry-After": "1"},
        media_type="application/json",
    )


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """The metrics, all named twogate_*, and the process's own."""
    return Response(generate_latest(context_of(request).telemetry.registry), media_type=CONTENT_TYPE_LATEST)
