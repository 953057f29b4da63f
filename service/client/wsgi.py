"""In front of a Flask, Django or any other WSGI app:

    from service.client.wsgi import TwogateMiddleware
    app.wsgi_app = TwogateMiddleware(app.wsgi_app, gate="http://twogate:8000", paths=["/upload"])

The same policy and the same header as `asgi`, as `HTTP_X_TWOGATE_VERDICT` in the environment.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any

from .uploads import Refusal, Uploads

_Environ = dict[str, Any]
_App = Callable[[_Environ, Callable[..., Any]], Iterable[bytes]]


class TwogateMiddleware:
    """Takes what `uploads.Uploads` takes."""

    def __init__(self, app: _App, gate: Any, **policy: Any) -> None:
        self._app = app
        self._uploads = Uploads(gate, **policy)

    def __call__(self, environ: _Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Pass one request on, or answer it."""
        # What a client sent under this name must not reach the app.
        environ = {name: value for name, value in environ.items() if name != "HTTP_X_TWOGATE_VERDICT"}
        # Bytes in the guise of Latin-1 (PEP 3333).
        path = environ.get("PATH_INFO", "").encode("latin-1", "replace").decode("utf-8", "replace") or "/"
        has_body = environ.get("CONTENT_LENGTH") not in (None, "", "0") or "HTTP_TRANSFER_ENCODING" in environ
        if not self._uploads.concerns(environ["REQUEST_METHOD"], path, has_body=has_body):
            return self._app(environ, start_response)
        body = self._read(environ)
        if body is None:
            return _answer(start_response, self._uploads.too_large())
        verdict = self._uploads.judge(body, environ.get("CONTENT_TYPE", ""), environ.get("HTTP_CONTENT_ENCODING", ""))
        if isinstance(verdict, Refusal):
            return _answer(start_response, verdict)
        seen = {
            **environ,
            "wsgi.input": io.BytesIO(body),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_X_TWOGATE_VERDICT": verdict,
        }
        # What was chunked has a length now.
        seen.pop("HTTP_TRANSFER_ENCODING", None)
        return self._app(seen, start_response)

    def _read(self, environ: _Environ) -> bytes | None:
        """The body, or None if it is larger than allowed."""
        limit = self._uploads.max_body_bytes
        source, length = environ["wsgi.input"], environ.get("CONTENT_LENGTH") or ""
        counted = length.isascii() and length.isdigit()
        if counted and int(length) > limit:
            return None
        # Without a length, only what a server ends by itself may be read.
        ends = bool(environ.get("wsgi.input_terminated"))
        wanted = int(length) if counted else (limit + 1) * ends
        parts, size = [], 0
        while size < wanted and (part := source.read(min(65536, wanted - size))):
            parts.append(part)
            size += len(part)
        return None if size > limit else b"".join(parts)


def _answer(start_response: Callable[..., Any], refusal: Refusal) -> list[bytes]:
    status = HTTPStatus(refusal.status)
    start_response(f"{status.value} {status.phrase}", [*refusal.headers, ("content-length", str(len(refusal.body)))])
    return [refusal.body]
