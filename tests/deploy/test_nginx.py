"""deploy/nginx as it is, with other ports: a real nginx between a client and the demo's album."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest

from service.settings import Settings
from tests.deploy.ports import free_port, listening
from tests.service.support import ThreadServer, thread_server, wait_until

DEPLOY = Path(__file__).parents[2] / "deploy"
MODULE = Path("/usr/lib/nginx/modules/ngx_http_js_module.so")
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
pytestmark = pytest.mark.skipif(not NGINX or not MODULE.exists(), reason="nginx with its njs module is not installed")
Proxied = Callable[..., AbstractContextManager[httpx.Client]]


@pytest.fixture(scope="module")
def album() -> Iterator[int]:
    """The port of the demo's app, as a process of its own."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(DEPLOY / "demo/app.py"), str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: listening(port))
        yield port
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def proxied(album: int, gate: ThreadServer, tmp_path: Path) -> Proxied:
    """Starts nginx with the recipe; gives a client of it."""

    @contextmanager
    def start(gate_port: int = gate.port, unavailable: str = "refuse", app_port: int = album) -> Iterator[httpx.Client]:
        port = free_port()
        text = (DEPLOY / "nginx/nginx.conf").read_text(encoding="utf-8")
        text = re.sub(r"/tmp/([\w.-]+)", lambda found: f'"{tmp_path / found[1]}"', text)  # whose name may hold spaces
        for old, new in (
            ("load_module modules/ngx_http_js_module.so", f"load_module {MODULE}"),
            ("listen 8080", f"listen 127.0.0.1:{port}"),
            ("server app:8080", f"server 127.0.0.1:{app_port}"),
            ("server twogate:8000", f"server 127.0.0.1:{gate_port}"),
            ("/etc/nginx/twogate", f'"{DEPLOY / "nginx"}"'),
            ("$twogate_unavailable refuse", f"$twogate_unavailable {unavailable}"),
        ):
            assert old in text
            text = text.replace(old, new)
        configuration = tmp_path / "nginx.conf"
        configuration.write_text(text, encoding="utf-8")
        user = " user root;" if os.getuid() == 0 else ""
        command = [str(NGINX), "-p", str(tmp_path), "-c", str(configuration), "-g", f"daemon off;{user}"]
        log = tmp_path / "nginx.log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, stderr=file)
        try:
            wait_until(lambda: listening(port) or process.poll() is not None)
            assert process.poll() is None, log.read_text(encoding="utf-8")
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
                yield client
        finally:
            process.terminate()
            process.wait(10)

    return start


@contextmanager
def recording(answer: bytes) -> Iterator[tuple[int, list[Message]]]:
    """A server that answers 200 with `answer`; its port, and the headers of each request."""
    heard: list[Message] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(self.headers)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST  # noqa: N815 - the standard library's name

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port, heard
        finally:
            server.shutdown()
            thread.join()


def pictures(client: httpx.Client) -> int:
    """How many the album has."""
    found = re.search(r"(\d+) pictures", client.get("/").text)
    assert found
    return int(found[1])


def test_a_clean_photo_reaches_the_album_unchanged(proxied: Proxied, photo: bytes) -> None:
    with proxied() as client:
        before = pictures(client)
        answer = client.post("/upload", files={"picture": ("clean.jpg", photo)})
        assert (answer.status_code, answer.text) == (201, "stored 1\n")
        assert pictures(client) == before + 1
        assert client.get("/pictures/clean.jpg").content == photo


def test_an_attacked_one_is_refused_with_a_reason(proxied: Proxied, photo: bytes, suspicious: bytes) -> None:
    with proxied() as client:
        before = pictures(client)
        files = [("picture", ("a.jpg", photo)), ("picture", ("b.png", suspicious))]
        answer = client.post("/upload", files=files, headers={"Cookie": "a=b", "Authorization": "Bearer of the app"})
        assert answer.status_code == 422
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["type"] == "/problems/adversarial-suspected"
        assert answer.json()["detail"] == "image 1 looks like an adversarial example"
        assert "p_value" not in answer.text
        assert pictures(client) == before


def test_each_is_told_what_concerns_it_alone(proxied: Proxied, photo: bytes) -> None:
    sent = {
        "Cookie": "a=b",
        "Authorization": "Bearer of the app",
        "X-Api-Key": "of the app",
        "X-Twogate-Verdict": "clean",
        "X-Request-Timeout": "600",
        "Content-Type": "image/jpeg",
    }
    with (
        recording(b'{"flagged": false}') as (gate_port, at_the_gate),
        recording(b"stored") as (app_port, at_the_app),
        proxied(gate_port=gate_port, app_port=app_port) as client,
    ):
        assert client.post("/upload", content=photo, headers=sent).text == "stored"
        assert client.get("/upload", headers=sent).text == "stored"
        assert client.post("/elsewhere", content=photo, headers=sent).text == "stored"
    (judged,) = at_the_gate
    assert {name.lower() for name in judged} == {"host", "connection", "content-length", "content-type", "x-request-timeout"}
    assert (judged["Content-Type"], judged["X-Request-Timeout"]) == ("application/octet-stream", "10")
    # The verdict is nginx's own: a client's word for it never arrives.
    assert [headers.get_all("X-Twogate-Verdict") for headers in at_the_app] == [["clean"], None, None]
    for headers in at_the_app:
        assert (headers["Cookie"], headers["Authorization"]) == (sent["Cookie"], sent["Authorization"])


def test_a_larger_upload_that_nginx_keeps_in_a_file(proxied: Proxied, photo: bytes) -> None:
    padded = photo + b"\0" * 3_000_000
    with proxied() as client:
        assert client.post("/upload", files={"picture": ("large.jpg", padded)}).status_code == 201
        assert client.get("/pictures/large.jpg").content == padded


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (b"%PDF-1.7", "application/pdf", 415),
        (b'{"input": "x"}', "application/json", 415),
        (b"--b--\r\n", "multipart/form-data; boundary=a; boundary=b", 400),
        (b"--b--\r\n", "multipart/mixed; boundary=b", 400),
        (b"--b--\r\n", "multipart/form-data, boundary=b", 400),
        (b"\0" * (33 << 20), "image/jpeg", 413),
    ],
)
def test_what_cannot_be_judged_is_refused(proxied: Proxied, content: bytes, content_type: str, status: int) -> None:
    with proxied() as client:
        before = pictures(client)
        assert client.post("/upload", content=content, headers={"Content-Type": content_type}).status_code == status
        assert pictures(client) == before


def test_there_is_no_way_around_for_other_paths_and_methods(proxied: Proxied, suspicious: bytes) -> None:
    with proxied() as client:
        for method, path in (("POST", "/Upload"), ("POST", "//upload"), ("POST", "/x/../upload"), ("GET", "/upload")):
            connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port or 0, timeout=20)
            connection.request(method, path, suspicious, {"Content-Type": "image/png"})
            answer = connection.getresponse()
            assert (answer.status, json.loads(answer.read())["type"]) == (422, "/problems/adversarial-suspected"), path
            connection.close()
        connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port or 0, timeout=20)
        connection.request("GET", "/upload/../")  # the app gets the path that nginx looked at
        assert b"pictures" in connection.getresponse().read()
        connection.close()
        assert client.get("/upload").status_code == 404


def test_a_form_without_files_passes(proxied: Proxied) -> None:
    with proxied() as client:
        assert client.post("/upload", files={"title": (None, "no picture today")}).text == "stored 0\n"


def test_many_at_once_get_each_their_own_verdict(proxied: Proxied, photos: list[Path], suspicious: bytes) -> None:
    contents = [*(path.read_bytes() for path in photos), suspicious] * 12

    with proxied() as client, ThreadPoolExecutor(12) as pool:

        def upload(n: int) -> int:
            return client.post("/upload", files={"picture": (f"many-{n}.jpg", contents[n])}).status_code

        statuses = list(pool.map(upload, range(len(contents))))
        assert statuses == [422 if content == suspicious else 201 for content in contents]
        for n, content in enumerate(contents):
            if content != suspicious:
                assert client.get(f"/pictures/many-{n}.jpg").content == content


def test_with_the_gate_down_uploads_are_refused_and_the_rest_works(proxied: Proxied, photo: bytes) -> None:
    with proxied(gate_port=free_port()) as client:
        answer = client.post("/upload", files={"picture": ("late.jpg", photo)})
        assert answer.status_code == 503
        assert answer.json()["type"] == "/problems/gate-unavailable"
        assert answer.headers["retry-after"] == "5"
        assert "late.jpg" not in client.get("/").text


def test_with_the_gate_down_the_policy_may_be_to_pass(proxied: Proxied, photo: bytes) -> None:
    with proxied(gate_port=free_port(), unavailable="pass") as client:
        assert client.post("/upload", files={"picture": ("late.jpg", photo)}).status_code == 201


def test_with_the_default_bundle_a_photo_passes_and_its_attacked_version_does_not(
    proxied: Proxied, photos: list[Path]
) -> None:
    attacked = photos[0].with_name(photos[0].name.replace("-clean.jpg", "-attacked.png"))
    with thread_server(Settings(threads=1)) as real, proxied(gate_port=real.port) as client:
        passed = client.post("/upload", files={"picture": ("album.jpg", photos[0].read_bytes())})
        refused = client.post("/upload", files={"picture": ("attacked.png", attacked.read_bytes())})
        assert (passed.status_code, refused.status_code) == (201, 422)
        assert refused.json()["type"] == "/problems/adversarial-suspected"
        assert client.get("/pictures/album.jpg").content == photos[0].read_bytes()
        assert client.get("/pictures/attacked.png").status_code == 404
