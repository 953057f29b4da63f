"""Put the parts together: settings in, an ASGI application out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from service.api import docs, embeddings, health, limits, models, scan, tasks
from service.api.context import Context
from service.engine.admission import Allowance
from service.engine.gate import Gate
from service.middleware.access import AccessMiddleware
from service.middleware.wire import WireMiddleware
from service.problems import InternalError, InvalidRequest, MalformedRequest, MethodNotAllowed, NotFound, Problem
from service.responses import problem_response
from service.settings import Settings
from service.telemetry import Telemetry

_DESCRIPTION = (
    "For every image an embedding that withstands adversarial examples, and a verdict: is this image one? "
    "Images come as JSON (data-URI or base64), as multipart files, or as one raw body."
)


def create_app(settings: Settings) -> FastAPI:
    """The application. It begins to load the bundle when the server starts it, and answers meanwhile.

    `app.state.context` is its Context: settings, gate, telemetry.
    """
    telemetry = Telemetry()
    gate = Gate(settings, telemetry)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        gate.start()
        yield
        await gate.close()

    app = FastAPI(
        title="Twogate",
        description=_DESCRIPTION,
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        middleware=[
            Middleware(AccessMiddleware, telemetry=telemetry),
            Middleware(
                WireMiddleware,
                max_body_bytes=settings.max_body_bytes,
                body_timeout_s=settings.body_timeout_s,
                in_flight=Allowance(settings.max_inflight_bytes, telemetry.body_bytes_in_flight),
            ),
        ],
        exception_handlers={
            Problem: _answer_problem,
            HTTPException: _answer_http,
            RequestValidationError: _answer_validation,
        },
    )
    app.state.context = Context(settings, gate, telemetry)
    for part in (embeddings, scan, tasks, models, limits, health, docs):
        app.include_router(part.router)
    return app


async def _answer_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return problem_response(error, request.scope)


async def _answer_http(request: Request, error: Exception) -> Response:
    """What the framework raises by itself: no such path, no such method."""
    assert isinstance(error, HTTPException)
    problem: Problem
    match error.status_code:
        case 404:
            problem = NotFound("see /docs for the paths that exist")
        case 405:
            headers = dict(error.headers or {})
            problem = MethodNotAllowed(f"allowed: {headers.get('Allow', 'see /docs')}", headers=headers)
        case status if status < 500:
            problem = MalformedRequest("the request cannot be understood")
        case _:
            problem = InternalError()
    return problem_response(problem, request.scope)


async def _answer_validation(request: Request, error: Exception) -> Response:
    return problem_response(InvalidRequest("a parameter is missing or not valid"), request.scope)
