"""In front of a FastAPI, Starlette or any other ASGI app:

    from service.client.asgi import TwogateMiddleware
    app.add_middleware(TwogateMiddleware, gate="http://twogate:8000", paths=["/upload"])

A clean upload reaches the app unchanged, with the header `X-Twogate-Verdict` (clean, nothing, or unjudged where the gate
could not be asked and the policy is to pass). Others are answered in the app's place, with the gate's problem document.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .uploads import VERDICT_HEADER, Refusal, Uploads

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_AT_ONCE = 32
"""Uploads that are judged at a time; more are answered as if the gate were down."""
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]


class TwogateMiddleware:
    """Takes what `uploads.Uploads` takes."""

    def __init__(self, app: _App, gate: Any, **policy: Any) -> None:
        self._app = app
        self._uploads = Uploads(gate, **policy)
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="twogate-ask")
        self._asking = 0

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Pass one request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # What a client sent under this name must not reach the app.
        kept = [(name, value) for name, value in scope["headers"] if name.lower() != VERDICT_HEADER.encode()]
        scope = {**scope, "headers": kept}
        there = {name.lower(): value for name, value in kept}
        has_body = b"transfer-encoding" in there or there.get(b"content-length", b"0") != b"0"
        if not has_body and scope.get("http_version") in ("2", "3") and self._concerned(scope, True):
            # There a body needs no header that announces it.
            first = await receive()
            has_body = bool(first.get("body") or first.get("more_body"))
            receive = _after(first, receive)
        if not self._concerned(scope, has_body):
            await self._app(scope, receive, send)
            return
        # Joined where there are several: an app may look at the first, or at the last.
        joined: dict[bytes, str] = {}
        for name, value in scope["headers"]:
            text = value.decode("latin-1")
            joined[name.lower()] = f"{joined[name.lower()]}, {text}" if name.lower() in joined else text
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > self._uploads.max_body_bytes:
                await _answer(send, self._uploads.too_large())
                return
            if not message.get("more_body"):
                break
        whole = bytes(body)
        verdict = await self._judge(whole, joined.get(b"content-type", ""), joined.get(b"content-encoding", ""))
        if isinstance(verdict, Refusal):
            await _answer(send, verdict)
            return
        again = _after({"type": "http.request", "body": whole, "more_body": False}, receive)
        await self._app({**scope, "headers": [*kept, (VERDICT_HEADER.encode(), verdict.encode())]}, again, send)

    def _concerned(self, scope: _Scope, has_body: bool) -> bool:
        """The path may have the root path before it, which routers leave out."""
        path, root = scope["path"], scope.get("root_path") or ""
        inner = path.removeprefix(root) if path.startswith(f"{root}/") else path
        return self._uploads.concerns(scope["method"], path, inner, has_body=has_body)

    async def _judge(self, *upload: Any) -> Refusal | str:
        """In a thread of its own, so that a gate that hangs keeps nobody waiting for a thread, and not the app's threads."""
        if self._asking >= _AT_ONCE:
            return self._uploads.busy()
        self._asking += 1
        asked = asyncio.get_running_loop().run_in_executor(self._threads, self._uploads.judge, *upload)
        asked.add_done_callback(self._asked)
        return await asyncio.shield(asked)

    def _asked(self, _: asyncio.Future[Refusal | str]) -> None:
        self._asking -= 1


def _after(first: MutableMapping[str, Any], receive: _Receive) -> _Receive:
    """What gives `first`, and then what `receive` gives."""
    given = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return first

    return again


async def _answer(send: _Send, refusal: Refusal) -> None:
    headers = [(name.encode(), value.encode()) for name, value in refusal.headers]
    headers.append((b"content-length", str(len(refusal.body)).encode()))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": refusal.body})
