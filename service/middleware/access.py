"""Around every request: its id, its line in the log, its metrics, and an answer even where something broke."""

from __future__ import annotations

import asyncio
import json
import logging
import time

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.notes import notes_of
from service.problems import InternalError, Overloaded
from service.responses import problem_response
from service.telemetry import Telemetry

logger = logging.getLogger("twogate.access")
failures = logging.getLogger("twogate.failures")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
CLIENT_CLOSED_REQUEST = 499
"""Never sent: what log and metrics say where the client left before it was answered."""


class AccessMiddleware:
    """The outermost one. Logs one line of JSON per request, without query, headers or body."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; lifespan messages pass through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        notes = notes_of(scope)
        started = time.monotonic()
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = notes.identity.request_id
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        except ClientDisconnect:
            status = CLIENT_CLOSED_REQUEST
        except asyncio.CancelledError:
            # The server's patience at shutdown is over: say so before the connection closes.
            if not status:
                problem = Overloaded("the server is shutting down")
                await problem_response(problem, scope)(scope, receive, send_marked)
            raise
        except Exception:
            failures.exception("request %s failed", notes.identity.request_id)
            if status:
                raise  # the answer has begun; all that is left is to cut the connection
            await problem_response(InternalError(), scope)(scope, receive, send_marked)
        finally:
            seconds = time.monotonic() - started
            method = scope["method"] if scope["method"] in _METHODS else "other"
            route = getattr(scope.get("route"), "path", None) or "unmatched"
            self._telemetry.requests.labels(route, method, str(status)).inc()
            self._telemetry.request_seconds.labels(route).observe(seconds)
            if notes.problem:
                self._telemetry.rejects.labels(notes.problem).inc()
            # Probes come every few seconds, and say nothing that the metrics do not.
            probe = route == "/metrics" or route.startswith("/health/")
            logger.log(
                logging.DEBUG if probe else logging.INFO,
                json.dumps(
                    {
                        "request_id": notes.identity.request_id,
                        "trace_id": notes.identity.trace_id,
                        "method": method,
                        "route": route,
                        "status": status,
                        "ms": round(seconds * 1000, 1),
                        "body_bytes": notes.body_bytes,
                        "images": notes.images,
                        "problem": notes.problem,
                    }
                ),
            )
