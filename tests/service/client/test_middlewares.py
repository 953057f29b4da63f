"""Both middlewares, each in front of an app of its kind, asking a real gate."""

from __future__ import annotations

import asyncio
import io
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast
from wsgiref.util import setup_testing_defaults

import httpx
import pytest
from fastapi import FastAPI, Request

from service.client import asgi
from service.client.asgi import TwogateMiddleware as AsgiMiddleware
from service.client.uploads import Uploads
from service.client.wsgi import TwogateMiddleware as WsgiMiddleware
from tests.service.client.serving import assert_refused, free_url, served_asgi, served_wsgi
from tests.service.support import ThreadServer

Guarded = Callable[..., Any]


def asgi_app() -> FastAPI:
    """Tells what reached it."""
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST", "PUT"])
    async def told(request: Request) -> dict[str, Any]:
        return {"bytes": len(await request.body()), "verdict": request.headers.get("x-twogate-verdict")}

    return app


def wsgi_app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """Tells what reached it."""
    import json

    length = int(environ.get("CONTENT_LENGTH") or 0)
    told = {"bytes": len(environ["wsgi.input"].read(length)), "verdict": environ.get("HTTP_X_TWOGATE_VERDICT")}
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(told).encode()]


@pytest.fixture(params=["asgi", "wsgi"])
def guarded(request: pytest.FixtureRequest, server: ThreadServer) -> Iterator[Guarded]:
    """Starts an app behind the middleware, with a policy; gives a client of it."""
    running: list[Any] = []

    def start(**policy: Any) -> httpx.Client:
        policy = {"gate": server.url, "paths": ["/upload"], **policy}
        if request.param == "asgi":
            app = asgi_app()
            app.add_middleware(cast(Any, AsgiMiddleware), **policy)
            context = served_asgi(app)
        else:
            context = served_wsgi(WsgiMiddleware(wsgi_app, **policy))
        running.append(context)
        client = httpx.Client(base_url=context.__enter__(), timeout=20)
        running.append(client)
        return client

    yield start
    for context in reversed(running):
        context.__exit__(None, None, None) if not isinstance(context, httpx.Client) else context.close()


def test_a_clean_upload_arrives_unchanged(guarded: Guarded, photo: bytes) -> None:
    client = guarded()
    assert client.post("/upload", content=photo).json() == {"bytes": len(photo), "verdict": "clean"}
    form = client.post("/upload/album", files={"picture": ("a.jpg", photo)})
    assert form.json()["verdict"] == "clean"
    assert form.json()["bytes"] > len(photo)


def test_an_attacked_one_does_not(guarded: Guarded, photo: bytes, suspicious: bytes) -> None:
    client = guarded()
    document = assert_refused(client.post("/upload", files=[("a", ("a.jpg", photo)), ("b", ("b.png", suspicious))]), 422)
    assert document["type"] == "/problems/adversarial-suspected"
    assert document["index"] == 1
    assert not {"p_value", "verdicts"} & set(document)
    assert_refused(client.put("/upload", content=suspicious), 422)


def test_other_paths_and_reading_are_left_alone(guarded: Guarded, suspicious: bytes) -> None:
    client = guarded()
    assert client.post("/other", content=suspicious).json() == {"bytes": len(suspicious), "verdict": None}
    assert client.post("/uploads", content=suspicious).status_code == 200
    told = client.post("/other", content=suspicious, headers={"X-Twogate-Verdict": "clean"}).json()
    assert told["verdict"] is None
    assert client.get("/upload").json() == {"bytes": 0, "verdict": None}


def test_what_is_no_image_is_refused(guarded: Guarded) -> None:
    client = guarded()
    assert_refused(client.post("/upload", content=b"%PDF-1.7"), 415)
    assert_refused(client.post("/upload", json={"input": "x"}), 415)


def test_a_form_without_files_passes(guarded: Guarded) -> None:
    answer = guarded().post("/upload", files={"title": (None, "no picture today")})
    assert answer.json()["verdict"] == "nothing"


def test_a_verdict_that_the_client_sends_does_not_count(guarded: Guarded) -> None:
    answer = guarded().post("/upload", headers={"X-Twogate-Verdict": "clean"})
    assert answer.json()["verdict"] == "nothing"


def test_two_boundaries_are_refused(guarded: Guarded, photo: bytes) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=a; boundary=b"}
    assert_refused(guarded().post("/upload", content=b"--b--\r\n", headers=headers), 400)


@pytest.mark.parametrize(
    "said", ["multipart/mixed; boundary=x", "multipart/form-data, boundary=x", "multipart/form-data boundary=x"]
)
def test_one_picture_with_a_form_behind_it_is_not_taken_for_a_picture(
    guarded: Guarded, photo: bytes, suspicious: bytes, said: str
) -> None:
    head = b'Content-Disposition: form-data; name="picture"; filename="a.png"'
    both = photo + b"\r\n--x\r\n" + head + b"\r\n\r\n" + suspicious + b"\r\n--x--\r\n"
    document = assert_refused(guarded().post("/upload", content=both, headers={"Content-Type": said}), 400)
    assert document["type"] == "/problems/malformed-request"


def test_reading_with_a_body_is_judged(guarded: Guarded, suspicious: bytes) -> None:
    client = guarded()
    for method in ("GET", "DELETE", "OPTIONS"):
        assert_refused(client.request(method, "/upload", content=suspicious), 422)


def test_a_path_that_is_no_ascii_is_judged(guarded: Guarded, suspicious: bytes) -> None:
    assert_refused(guarded(paths=["/téléversement"]).post("/téléversement", content=suspicious), 422)


def test_many_slashes_are_one() -> None:
    uploads = Uploads("http://127.0.0.1:1", paths=["/upload"])
    for path in ("/upload", "//upload", "///upload//x", "/upload/"):
        assert uploads.concerns("POST", path, has_body=True)
    for path in ("/", "/uploads", "/x/upload"):
        assert not uploads.concerns("POST", path, has_body=True)


@pytest.mark.parametrize("where", ["server", "mount"])
def test_asgi_with_a_root_path(server: ThreadServer, suspicious: bytes, where: str) -> None:
    app = asgi_app()
    app.add_middleware(cast(Any, AsgiMiddleware), gate=server.url, paths=["/upload"])
    whole = FastAPI()
    whole.mount("/v1", app)
    root, before, served = ("/api", "", app) if where == "server" else ("", "/v1", whole)
    with served_asgi(served, root) as url, httpx.Client(base_url=url) as client:
        assert_refused(client.post(f"{before}/upload", content=suspicious), 422)
        assert client.post(f"{before}/other", content=suspicious).status_code == 200


def test_asgi_a_gate_that_hangs_keeps_nobody_in_a_queue(photo: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "_AT_ONCE", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(6) as pool:
        app = asgi_app()
        gate = f"http://127.0.0.1:{silent.getsockname()[1]}"
        app.add_middleware(cast(Any, AsgiMiddleware), gate=gate, paths=["/upload"], timeout_s=2)
        with served_asgi(app) as url, httpx.Client(base_url=url, timeout=20) as client:

            def upload(_: int) -> float:
                started = time.monotonic()
                assert_refused(client.post("/upload", content=photo), 503)
                return time.monotonic() - started

            waited = sorted(pool.map(upload, range(6)))
            assert waited[3] < 1.5  # four were answered at once
            assert waited[4] > 1.5
            assert len(list(pool.map(upload, range(2)))) == 2  # and there is room again


def test_too_large(guarded: Guarded, photo: bytes) -> None:
    client = guarded(max_body_bytes=1000)
    assert assert_refused(client.post("/upload", content=photo), 413)["limit"] == 1000


def test_wsgi_bodies_without_a_length(server: ThreadServer, photo: bytes) -> None:
    """As servers hand them over that undo the chunks and end the body themselves, gunicorn for one."""
    seen: dict[str, Any] = {}

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        seen.update(environ)
        start_response("200 OK", [])
        return [environ["wsgi.input"].read()]

    def put(body: bytes, **more: Any) -> tuple[str, bytes]:
        environ: dict[str, Any] = {
            "REQUEST_METHOD": "POST",
            "PATH_INFO": "/upload",
            "wsgi.input": io.BytesIO(body),
            **more,
        }
        setup_testing_defaults(environ)
        answers: list[str] = []
        answer = WsgiMiddleware(app, gate=server.url, paths=["/upload"], max_body_bytes=len(photo))(
            environ, lambda status, headers: answers.append(status)
        )
        return answers[0], b"".join(answer)

    chunked = {"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"}
    assert put(photo, **chunked) == ("200 OK", photo)
    assert (seen["CONTENT_LENGTH"], seen["HTTP_X_TWOGATE_VERDICT"]) == (str(len(photo)), "clean")
    assert "HTTP_TRANSFER_ENCODING" not in seen
    assert put(photo + b"x", **chunked)[0].startswith("413")
    # A server that does not end it would wait for ever: nothing is read, and nothing arrives.
    assert put(photo)[1] == b""
    # What is no number of the protocol is none here.
    assert put(photo, CONTENT_LENGTH="\xb2", **chunked) == ("200 OK", photo)


@pytest.mark.parametrize("policy", ["refuse", "pass"])
def test_with_the_gate_down_the_policy_decides(guarded: Guarded, photo: bytes, policy: str) -> None:
    client = guarded(gate=free_url(), unavailable=policy)
    answer = client.post("/upload", content=photo)
    if policy == "refuse":
        assert assert_refused(answer, 503)["type"] == "/problems/gate-unavailable"
        assert answer.headers["retry-after"]
    else:
        assert answer.json() == {"bytes": len(photo), "verdict": "unjudged"}


def test_asgi_bodies_without_a_length(server: ThreadServer, photo: bytes) -> None:
    app = asgi_app()
    app.add_middleware(cast(Any, AsgiMiddleware), gate=server.url, paths=["/upload"], max_body_bytes=6000)
    with served_asgi(app) as url, httpx.Client(base_url=url) as client:
        pieces = [photo[start : start + 500] for start in range(0, len(photo), 500)]
        assert client.post("/upload", content=iter(pieces)).json() == {"bytes": len(photo), "verdict": "clean"}
        assert_refused(client.post("/upload", content=iter(pieces * 3)), 413)


def test_asgi_two_content_types_are_refused(server: ThreadServer) -> None:
    app = asgi_app()
    app.add_middleware(cast(Any, AsgiMiddleware), gate=server.url, paths=["/upload"])
    with served_asgi(app) as url, httpx.Client(base_url=url) as client:
        types = [("Content-Type", "multipart/form-data; boundary=a"), ("Content-Type", "multipart/form-data; boundary=b")]
        assert_refused(client.post("/upload", content=b"--b--\r\n", headers=types), 400)


@pytest.mark.parametrize("version", ["1.1", "2", "3"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_asgi_bodies_that_no_header_announces(
    server: ThreadServer, photo: bytes, suspicious: bytes, version: str, method: str
) -> None:
    """As HTTP/2 and 3 allow; uvicorn speaks neither, so its side is played here. In HTTP/1.1 there is no such body."""

    def put(*pieces: bytes) -> tuple[int, bytes, list[bytes]]:
        sent: list[Any] = []
        messages = [
            {"type": "http.request", "body": piece, "more_body": number < len(pieces)}
            for number, piece in enumerate(pieces, 1)
        ]
        reached = bytearray()
        verdicts: list[bytes] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            verdicts.extend(value for name, value in scope["headers"] if name == b"x-twogate-verdict")
            more = True
            while more:
                message = await receive()
                reached.extend(message["body"])
                more = message["more_body"]
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def receive() -> Any:
            return messages.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "http_version": version, "method": method, "path": "/upload", "headers": []}
        asyncio.run(AsgiMiddleware(app, gate=server.url, paths=["/upload"])(scope, receive, send))
        return sent[0]["status"], bytes(reached), verdicts

    assert put(b"") == (200, b"", [])
    if version == "1.1":
        return
    assert put(suspicious) == (422, b"", [])
    assert put(b"", suspicious[:100], suspicious[100:]) == (422, b"", [])
    assert put(photo[:100], photo[100:]) == (200, photo, [b"clean"])


def test_a_policy_that_would_not_guard_is_refused() -> None:
    for policy in ({"paths": "/upload"}, {"paths": []}, {"paths": ["upload"]}, {"paths": ["/x"], "unavailable": "open"}):
        with pytest.raises(ValueError, match=r"paths|unavailable"):
            WsgiMiddleware(wsgi_app, gate="http://127.0.0.1:1", **policy)


def test_no_free_port_is_left_open() -> None:
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", int(free_url().rsplit(":", 1)[1])), timeout=1)
