from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

import service.client
from service.client import Outcome, TwogateClient
from service.settings import Settings
from tests.service.support import ThreadServer, thread_server


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """A server that gives one answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_photo_is_clean(server: ThreadServer, photo: bytes) -> None:
    answer = TwogateClient(server.url).scan(photo, "image/jpeg")
    assert answer.outcome is Outcome.CLEAN
    assert json.loads(answer.body)["flagged"] is False


def test_a_suspicious_picture_is_flagged_with_a_reason(server: ThreadServer, suspicious: bytes) -> None:
    answer = TwogateClient(server.url + "/").scan(suspicious)
    assert (answer.outcome, answer.status) == (Outcome.FLAGGED, 422)
    assert "adversarial-suspected" in answer.reason


@pytest.mark.parametrize("name", ["model", "encoding_format", "modality", "dimensions", "on_flag", "note"])
def test_no_field_of_a_form_takes_a_picture_past_the_gate(server: ThreadServer, suspicious: bytes, name: str) -> None:
    form = httpx.Request("POST", "http://x", files={"file": suspicious, "empty": b""}, data={name: "nonsense"})
    only = httpx.Request("POST", "http://x", files={"file": suspicious}, data={name: "nonsense"})
    client = TwogateClient(server.url)
    assert client.scan(only.read(), only.headers["content-type"]).outcome is Outcome.FLAGGED
    assert client.scan(form.read(), form.headers["content-type"]).outcome is Outcome.REFUSED  # for the empty file


@pytest.mark.parametrize(
    ("body", "content_type", "outcome"),
    [
        (b"%PDF-1.7", "application/pdf", Outcome.REFUSED),
        (b"\xff\xd8\xff\xe0 cut off", "image/jpeg", Outcome.REFUSED),
        (b"{}", "application/json", Outcome.REFUSED),
        (b"not a form", "multipart/form-data; boundary=x", Outcome.REFUSED),
        (b"", "", Outcome.NOTHING),
        (b"photo", "image/jpeg\nX: y", Outcome.REFUSED),
    ],
)
def test_what_is_no_image(server: ThreadServer, body: bytes, content_type: str, outcome: Outcome) -> None:
    assert TwogateClient(server.url).scan(body, content_type).outcome is outcome


def test_a_compressed_body_is_refused(server: ThreadServer, photo: bytes) -> None:
    assert TwogateClient(server.url).scan(photo, content_encoding="gzip").outcome is Outcome.REFUSED


def test_keys(make_settings: Callable[..., Settings], photo: bytes) -> None:
    with thread_server(make_settings(api_keys="secret")) as server:
        assert TwogateClient(server.url, key="secret").scan(photo).outcome is Outcome.CLEAN
        assert TwogateClient(server.url, key="wrong").scan(photo).outcome is Outcome.UNAVAILABLE


def test_white_space_around_a_key_does_not_count(make_settings: Callable[..., Settings], photo: bytes) -> None:
    with thread_server(make_settings(api_keys="secret")) as server:
        assert TwogateClient(server.url, key=" secret\n").scan(photo).outcome is Outcome.CLEAN


@pytest.mark.parametrize("key", ["one\ntwo", "sch\u00fcssel", "\u20ac", "a\x00b"])
def test_a_key_that_cannot_be_sent_is_refused_at_once(key: str) -> None:
    with pytest.raises(ValueError, match=r"^the gate's key must be printable ASCII, on one line$"):
        TwogateClient("http://twogate:8000", key=key)


@pytest.mark.parametrize("host", ["a..b", "x" * 64])
def test_a_host_that_can_be_no_name_is_the_operators_mistake(host: str, photo: bytes) -> None:
    assert TwogateClient(f"http://{host}").scan(photo).outcome is Outcome.UNAVAILABLE


def test_a_gate_without_bundle_is_unavailable(make_settings: Callable[..., Settings], tmp_path: Path, photo: bytes) -> None:
    with thread_server(make_settings(store=tmp_path)) as server:
        answer = TwogateClient(server.url).scan(photo)
    assert (answer.outcome, answer.status) == (Outcome.UNAVAILABLE, 503)
    assert answer.retry_after


def test_nobody_there(photo: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    answer = TwogateClient(f"http://127.0.0.1:{port}").scan(photo)
    assert answer.outcome is Outcome.UNAVAILABLE
    assert str(port).encode() not in answer.body


def test_somebody_who_never_answers(photo: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = TwogateClient(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)
        assert client.scan(photo).outcome is Outcome.UNAVAILABLE


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b"<html>"), (200, b"[]"), (200, b"{}"), (200, b'{"flagged": true}'), (422, b"{}"), (404, b"{}"), (302, b"{}")],
)
def test_another_server_is_never_taken_for_a_clean_verdict(status: int, body: bytes, photo: bytes) -> None:
    with answering(status, body) as url:
        assert TwogateClient(url).scan(photo).outcome is Outcome.UNAVAILABLE


@pytest.mark.parametrize("body", [b"<html>too large</html>", b"{}", b"[]", b"", b"[" * 100_000])
def test_what_a_proxy_finds_too_large_is_refused_and_not_passed(body: bytes, photo: bytes) -> None:
    with answering(413, body) as url:
        answer = TwogateClient(url).scan(photo)
    assert (answer.outcome, answer.status) == (Outcome.REFUSED, 413)
    assert json.loads(answer.body) == {"type": "/problems/body-too-large", "status": 413}


def test_an_answer_before_the_upload_is_over_is_heard(photo: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            connection, _ = listener.accept()
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
            connection.shutdown(socket.SHUT_WR)
            connection.close()

        thread = threading.Thread(target=refuse)
        thread.start()
        answer = TwogateClient(f"http://127.0.0.1:{listener.getsockname()[1]}").scan(bytes(30_000_000))
        thread.join()
    assert answer.outcome is Outcome.REFUSED


@pytest.mark.parametrize("url", ["twogate:8000", "ftp://twogate", "http://", "http://twogate?x=1", "http://me:pw@twogate"])
def test_odd_urls(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        TwogateClient(url)


def test_a_path_that_is_no_ascii() -> None:
    with pytest.raises(ValueError, match="%-encoded"):
        TwogateClient("http://twogate/pr\u00fcfen")


def test_the_folder_stands_alone_under_any_name(tmp_path: Path) -> None:
    shutil.copytree(Path(service.client.__file__).parent, tmp_path / "gatekeeper")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import gatekeeper.asgi, gatekeeper.wsgi"
    subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True)
