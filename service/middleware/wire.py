"""Count the bytes of a body as they come off the wire, and refuse before anything reads them."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.engine.admission import Allowance
from service.notes import notes_of
from service.problems import BodyTimeout, BodyTooLarge, MalformedRequest, Overloaded, Problem, UnsupportedMedia
from service.responses import problem_response


class WireMiddleware:
    """Bounds one body's bytes and time, and the bytes that all requests in flight hold.

    `Content-Length` is believed only where it says too much; what counts is what arrives. Compressed bodies are
    refused: their size on the wire says nothing.
    """

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, body_timeout_s: float, in_flight: Allowance) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it by its headers."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_headers(Headers(scope=scope))
        except Problem as problem:
            await problem_response(problem, scope)(scope, receive, send)
            return
        body = _Body(receive, self._max_body_bytes, self._body_timeout_s, self._in_flight)
        try:
            await self._app(scope, body.receive, send)
        finally:
            notes_of(scope).body_bytes = body.size
            self._in_flight.give(body.size)

    def _check_headers(self, headers: Headers) -> None:
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise UnsupportedMedia(
                "send the body without Content-Encoding: images are compressed already",
                headers={"Accept-Encoding": "identity"},
                accepted=["identity"],
            )
        length = headers.get("content-length")
        if length is None:
            return
        if not (length.isascii() and length.isdigit()):
            raise MalformedRequest("Content-Length is not a number")
        if int(length) > self._max_body_bytes:
            raise _too_large(self._max_body_bytes, int(length))


class _Body:
    """One request's `receive`, counted and timed."""

    def __init__(self, receive: Receive, limit: int, seconds: float, in_flight: Allowance) -> None:
        self._receive = receive
        self._limit = limit
        self._seconds = seconds
        self._in_flight = in_flight
        self._until: float | None = None
        self._complete = False
        self.size = 0
        """Bytes that were taken from the shared allowance so far."""

    async def receive(self) -> Message:
        # Once the body is complete, all that can come is the client's leaving, for which there is no hurry.
        if self._complete:
            return await self._receive()
        if self._until is None:
            self._until = asyncio.get_running_loop().time() + self._seconds
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise BodyTimeout(f"the body must arrive within {self._seconds:g} s", headers={"Connection": "close"}) from None
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            if self.size + size > self._limit:
                raise _too_large(self._limit, self.size + size)
            if not self._in_flight.take(size):
                raise Overloaded("the bodies of other requests fill the memory set aside for them")
            self.size += size
            self._complete = not message.get("more_body", False)
        return message


def _too_large(limit: int, actual: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has {actual} bytes or more, the limit is {limit}", limit=limit, actual=actual)
