from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from service.settings import MIB, Settings
from tests.service.support import ThreadServer, assert_problem, post_raw, thread_server, wait_until


@pytest.fixture(scope="module")
def narrow(make_settings: Callable[..., Settings]) -> Iterator[ThreadServer]:
    settings = make_settings(max_image_bytes=MIB, max_body_bytes=MIB, max_inflight_bytes=MIB + MIB // 2, body_timeout_s=0.6)
    with thread_server(settings) as server:
        yield server


@pytest.fixture
def narrow_client(narrow: ThreadServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=narrow.url, timeout=10) as client:
        yield client


def _exchange(server: ThreadServer, *chunks: bytes, pause: float = 0) -> bytes:
    """Send chunks over a bare socket until it answers, then read until it closes or pauses."""
    answer = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=3) as raw:
        try:
            for chunk in chunks:
                raw.sendall(chunk)
                if select.select([raw], [], [], pause)[0]:
                    break
            while data := raw.recv(65536):
                answer += data
        except (TimeoutError, ConnectionError):
            pass
    return answer


def _head(length: int | str, more: str = "") -> bytes:
    return f"POST /v1/scan HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{more}\r\n".encode()


def test_a_length_that_says_too_much_is_refused_before_the_body(narrow: ThreadServer) -> None:
    answer = _exchange(narrow, _head(10 * MIB, "Connection: close\r\n"))
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"/problems/body-too-large" in answer
    assert f'"limit":{MIB},"actual":{10 * MIB}'.encode() in answer


def test_without_a_length_the_bytes_that_come_are_counted(narrow_client: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * (MIB // 20)

    document = assert_problem(narrow_client.post("/v1/scan", content=chunks()), 413, "body-too-large")
    assert document["limit"] == MIB


def test_a_body_that_is_too_large_by_one_byte(narrow_client: httpx.Client) -> None:
    assert_problem(post_raw(narrow_client, b"x" * (MIB + 1)), 413, "body-too-large")
    assert_problem(post_raw(narrow_client, b"x" * MIB), 415, "unsupported-media")


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip"])
def test_compressed_bodies_are_refused(client: httpx.Client, photo: bytes, encoding: str) -> None:
    response = post_raw(client, photo, headers={"Content-Encoding": encoding})
    assert_problem(response, 415, "unsupported-media")
    assert response.headers["accept-encoding"] == "identity"
    assert post_raw(client, photo, headers={"Content-Encoding": "identity"}).status_code == 200


def test_a_slow_body_is_given_up(narrow: ThreadServer, narrow_client: httpx.Client, photo: bytes) -> None:
    started = time.monotonic()
    # Ten seconds of dripping: a limit for each piece would never be reached.
    answer = _exchange(narrow, _head(len(photo)), *[bytes([byte]) for byte in photo[:200]], pause=0.05)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"/problems/body-timeout" in answer
    assert b"connection: close" in answer.lower()
    assert time.monotonic() - started < 6
    assert post_raw(narrow_client, photo).status_code == 200


def test_a_body_shorter_than_its_length_is_given_up(narrow: ThreadServer, photo: bytes) -> None:
    assert _exchange(narrow, _head(len(photo) + 10) + photo).startswith(b"HTTP/1.1 408")


def test_a_body_longer_than_its_length_is_cut_there(narrow: ThreadServer, photo: bytes) -> None:
    answer = _exchange(narrow, _head(len(photo), "Connection: close\r\n") + photo + b"and more, which is no request")
    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("length", ["-1", "abc", "1, 2", "1" * 30, ""])
def test_a_length_that_is_no_number_is_a_400(narrow: ThreadServer, length: str) -> None:
    assert _exchange(narrow, _head(length) + b"x").startswith(b"HTTP/1.1 400")


def test_an_unhurried_answer_is_not_cut_by_the_bodys_time_limit(
    narrow: ThreadServer, narrow_client: httpx.Client, photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert narrow.gate._engine is not None
    batcher = narrow.gate._engine.batcher
    real = batcher._compute

    def slow(pictures):  # type: ignore[no-untyped-def]
        time.sleep(1)
        return real(pictures)

    monkeypatch.setattr(batcher, "_compute", slow)
    assert post_raw(narrow_client, photo).status_code == 200


def test_the_bodies_of_all_requests_together_are_bounded(make_settings: Callable[..., Settings]) -> None:
    def held() -> float:
        lines = client.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith("twogate_body_bytes_in_flight ")).split()[1])

    limits = {"max_image_bytes": MIB, "max_body_bytes": MIB, "max_inflight_bytes": MIB + MIB // 2}
    with (
        thread_server(make_settings(**limits, body_timeout_s=20)) as patient,
        httpx.Client(base_url=patient.url, timeout=10) as client,
    ):
        with socket.create_connection(("127.0.0.1", patient.port), timeout=10) as big:
            big.sendall(_head(MIB) + b"x" * (MIB - 1))
            wait_until(lambda: held() >= MIB - 1)
            response = post_raw(client, b"x" * (MIB - 10))
            assert_problem(response, 503, "overloaded")
            assert int(response.headers["retry-after"]) >= 1
        wait_until(lambda: held() == 0)
        assert_problem(post_raw(client, b"x" * (MIB - 10)), 415, "unsupported-media")
