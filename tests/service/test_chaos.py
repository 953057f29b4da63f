"""Clients that leave, lie and stutter, many at a time; in the end the server must be as well as before."""

from __future__ import annotations

import random
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil

from tests.service.support import data_uri, process_server, wait_until

REQUESTS = 300
ALLOWED = (200, 400, 404, 405, 408, 413, 415, 422, 503, 504)


def _head(path: str, length: int, content_type: str = "image/jpeg") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n\r\n".encode()


def _misbehave(port: int, seed: int, photo: bytes) -> int | None:
    """One client's visit; the status that it was given, if it stayed to hear it."""
    rng = random.Random(seed)
    json = f'{{"input": ["{data_uri(photo)}", "{data_uri(photo)}"]}}'.encode()
    path = rng.choice(["/v1/embeddings", "/v1/scan"])
    body, content_type = rng.choice([(photo, "image/jpeg"), (json, "application/json"), (rng.randbytes(500), "")])
    request = _head(path, len(body), content_type) + body
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        if rng.random() < 0.3:
            # Close with a reset instead of a farewell.
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        try:
            match rng.randrange(6):
                case 0:  # leaves in the middle of the request
                    raw.sendall(request[: rng.randrange(len(request))])
                case 1:  # leaves right after it
                    raw.sendall(request)
                case 2:  # leaves a little later, at any stage of the work
                    raw.sendall(request)
                    time.sleep(rng.random() * 0.03)
                case 3:  # is damaged somewhere
                    at = rng.randrange(len(request))
                    raw.sendall(request[:at] + rng.randbytes(3) + request[at + 3 :])
                    raw.shutdown(socket.SHUT_WR)
                    return _status(raw)
                case 4:  # stutters, but is honest
                    at = rng.randrange(len(request))
                    raw.sendall(request[:at])
                    time.sleep(0.01)
                    raw.sendall(request[at:])
                    return _status(raw)
                case _:  # is no HTTP at all
                    raw.sendall(rng.randbytes(200))
                    raw.shutdown(socket.SHUT_WR)
                    return _status(raw)
        except OSError:
            pass
    return None


def _status(raw: socket.socket) -> int | None:
    answer = raw.recv(65536)
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else None


def test_after_all_that_it_is_as_well_as_before(tmp_path: Path, tiny_bundle: Path, photo: bytes) -> None:
    log = tmp_path / "log"
    settings = {"store": tiny_bundle.parents[1], "bundle": "tiny", "threads": 1, "decode_threads": 2, "body_timeout_s": 1}
    with process_server(log, **settings) as server, httpx.Client(base_url=server.url, timeout=10) as client:
        expected = client.post("/v1/embeddings", content=photo).json()["data"]
        together = client.post("/v1/scan", json={"input": [data_uri(photo)] * 8})  # by then every thread has begun
        assert together.status_code == 200
        threads = psutil.Process(server.process.pid).num_threads()
        with ThreadPoolExecutor(8) as pool:
            statuses = list(pool.map(lambda seed: _misbehave(server.port, seed, photo), range(REQUESTS)))
        heard = [status for status in statuses if status is not None]
        assert set(heard) <= set(ALLOWED)
        assert heard.count(200) > REQUESTS / 20

        def quiet() -> bool:
            metrics = client.get("/metrics").text
            return all(
                f"twogate_{name} 0.0\n" in metrics for name in ("images_in_flight", "body_bytes_in_flight", "queue_images")
            )

        wait_until(quiet)
        answer = client.post("/v1/embeddings", content=photo)
        assert answer.status_code == 200
        assert answer.json()["data"] == expected
        assert client.get("/health/ready").json()["state"] == "ready"
        assert psutil.Process(server.process.pid).num_threads() <= threads + 8
        assert "twogate_batcher_restarts_total 0.0" in client.get("/metrics").text
        assert "twogate_forward_failures_total 0.0" in client.get("/metrics").text
        server.terminate()
        assert server.process.wait(10) == 0
    text = log.read_text(encoding="utf-8")
    assert "Traceback" not in text, text[-3000:]
    assert "never retrieved" not in text
