from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import onnxruntime as ort
import pytest

from service.server import serve
from service.settings import Settings
from tests.service.support import ProcessServer, post_raw, process_server, wait_until
from tests.support.tiny_bundle import make_tiny_bundle

without_cuda = pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this machine can do it")


@pytest.fixture
def tiny(tiny_bundle: Path) -> dict[str, Any]:
    return {"store": tiny_bundle.parents[1], "bundle": "tiny", "threads": 1}


def test_one_line_says_where_it_is_ready(tmp_path: Path, tiny: dict[str, Any], photo: bytes) -> None:
    with process_server(tmp_path / "log", **tiny) as server:
        assert server.line.startswith("twogate: serving tiny/1 on http://127.0.0.1:")
        answer = httpx.post(f"{server.url}/v1/scan", content=photo)
        assert answer.status_code == 200
        assert "server" not in answer.headers
        server.terminate()
        assert server.process.wait(10) == 0
        assert server.process.stdout is not None
        assert server.process.stdout.read() == ""
    log = (tmp_path / "log").read_text(encoding="utf-8")
    assert "Traceback" not in log
    assert '"route": "/v1/scan"' in log


@pytest.mark.parametrize(("keys", "warned"), [((), True), (("secret",), False)])
def test_other_machines_may_ask_is_said(tmp_path: Path, tiny: dict[str, Any], keys: tuple[str, ...], warned: bool) -> None:
    log = tmp_path / "log"
    with process_server(log, **tiny, host="0.0.0.0", api_keys=keys) as server:
        port = server.port
        assert server.line == f"twogate: serving tiny/1 on http://0.0.0.0:{port} (try http://127.0.0.1:{port}/docs)\n"
    lines = log.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if "anyone" in line and "TWOGATE_API_KEYS" in line] == lines[:1] * warned


def test_the_serving_side_never_loads_torch(tmp_path: Path) -> None:
    import sys

    code = "import service.server, sys; print([m for m in ('torch', 'timm', 'hardening', 'onnx') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_port_in_use_is_told_in_one_line(
    make_settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve(make_settings(port=port)) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"twogate: cannot listen on 127.0.0.1 port {port}: Address already in use")
    assert captured.out == ""


def test_an_address_that_is_none_is_told_in_one_line(
    make_settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve(make_settings(host="300.1.2.3")) == 1
    assert "cannot listen on 300.1.2.3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bundle": "nobody"}, "the store holds tiny"),
        ({"store": "/nope"}, "there is no store /nope"),
        ({"max_fpr": 0.0001}, "needs at least 9999 calibration images"),
        pytest.param({"provider": "cuda"}, "allow_fallback", marks=without_cuda),
    ],
)
def test_a_bundle_that_is_refused_ends_it_with_the_reason(
    tmp_path: Path, tiny: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    _refused(tmp_path, {**tiny, **changes}, reason)


def test_a_bundle_with_one_flipped_byte_is_refused(tmp_path: Path) -> None:
    model = make_tiny_bundle(tmp_path / "store") / "model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    _refused(tmp_path, {"store": tmp_path / "store", "bundle": "tiny"}, "model.onnx: its sha256")


def _refused(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    server = ProcessServer(settings, tmp_path / "log")
    try:
        assert server.process.wait(20) == 1
        log = (tmp_path / "log").read_text(encoding="utf-8")
        assert [line.startswith("twogate: ") for line in log.splitlines() if reason in line] == [True], log
        assert "Traceback" not in log
        assert server.process.stdout is not None
        assert server.process.stdout.read() == ""
    finally:
        server.close()


def test_told_to_stop_it_drains_and_finishes_what_is_in_flight(tmp_path: Path, tiny: dict[str, Any], photo: bytes) -> None:
    with (
        process_server(tmp_path / "log", **tiny, drain_delay_s=3.0) as server,
        httpx.Client(base_url=server.url, timeout=10) as client,
    ):
        assert client.get("/health/ready").status_code == 200
        slow: list[httpx.Response] = []

        def dribble() -> Any:
            half = len(photo) // 2
            yield photo[:half]
            time.sleep(3.8)  # beyond the drain delay: it is in flight when the server stops to listen
            yield photo[half:]

        uploading = threading.Thread(target=lambda: slow.append(httpx.post(f"{server.url}/v1/scan", content=dribble())))
        uploading.start()
        time.sleep(0.2)
        server.terminate()
        wait_until(lambda: client.get("/health/ready").status_code == 503, 2)
        assert client.get("/health/ready").json()["state"] == "draining"
        assert client.get("/health/live").status_code == 200
        # Whoever has not heard of it yet, on a new connection, is answered as ever.
        assert httpx.post(f"{server.url}/v1/scan", content=photo).status_code == 200
        assert post_raw(client, photo).status_code == 200
        uploading.join()
        assert [response.status_code for response in slow] == [200]
        assert server.process.wait(10) == 0
    assert "Traceback" not in (tmp_path / "log").read_text(encoding="utf-8")


def test_a_second_signal_does_not_wait_for_the_drain(tmp_path: Path, tiny: dict[str, Any]) -> None:
    with process_server(tmp_path / "log", **tiny, drain_delay_s=30) as server:
        server.terminate()
        wait_until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 503)
        server.terminate()
        assert server.process.wait(5) == 0


def test_whoever_hangs_is_cut_off_when_patience_is_over(tmp_path: Path, tiny: dict[str, Any], photo: bytes) -> None:
    log = tmp_path / "log"
    with process_server(log, **tiny, drain_delay_s=0, shutdown_grace_s=1) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
            head = f"POST /v1/scan HTTP/1.1\r\nHost: x\r\nContent-Length: {len(photo)}\r\n\r\n"
            raw.sendall(head.encode() + photo[: len(photo) // 2])
            metrics = f"{server.url}/metrics"
            held = f"twogate_body_bytes_in_flight {len(photo) // 2:.1f}"
            wait_until(lambda: held in httpx.get(metrics).text)
            server.terminate()
            assert raw.recv(65536).startswith(b"HTTP/1.1 503")
        # The body's own time limit, 20 s, is no reason to stay.
        assert server.process.wait(15) == 0
