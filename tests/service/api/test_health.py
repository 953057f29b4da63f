from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from service.app import create_app
from service.settings import Settings
from tests.service.support import ThreadServer, post_raw, thread_server, wait_until


def test_a_server_that_is_well(client: httpx.Client) -> None:
    assert client.get("/health/live").json() == {"live": True}
    ready = client.get("/health/ready")
    assert (ready.status_code, ready.json()) == (200, {"state": "ready", "reason": "serving tiny/1"})


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
def test_head_is_answered_as_get_is_without_a_body(client: httpx.Client, path: str) -> None:
    whole, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == whole.headers["content-length"]


def test_before_the_model_is_loaded(make_settings: Callable[..., Settings], photo: bytes) -> None:
    async def main() -> None:
        # Without a lifespan nothing is ever loaded: the state in which every server starts.
        transport = httpx.ASGITransport(create_app(make_settings()))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            assert (await client.get("/health/live")).status_code == 200
            ready = await client.get("/health/ready")
            assert (ready.status_code, ready.json()["state"]) == (503, "starting")
            assert ready.headers["retry-after"] == "1"
            for response in (await client.get("/v1/models"), await client.post("/v1/scan", content=photo)):
                assert response.status_code == 503
                assert response.json()["type"] == "/problems/model-loading"
                assert int(response.headers["retry-after"]) >= 1
            assert "twogate_ready 0.0" in (await client.get("/metrics")).text

    asyncio.run(main())


def test_degraded_while_forwards_fail_and_well_again_by_itself(
    make_settings: Callable[..., Settings], photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Any) -> None:
        raise RuntimeError("secret words of a library")

    with thread_server(make_settings()) as server, httpx.Client(base_url=server.url) as client:
        assert server.gate._engine is not None
        with monkeypatch.context() as patch:
            patch.setattr(server.gate._engine.batcher, "_compute", broken)
            failed = post_raw(client, photo)
            assert failed.status_code == 500
            assert failed.json()["type"] == "/problems/internal-error"
            assert "secret" not in failed.text
            ready = client.get("/health/ready")
            assert (ready.status_code, ready.json()["state"]) == (503, "degraded")
            assert client.get("/health/live").status_code == 200
        wait_until(lambda: client.get("/health/ready").status_code == 200, 5)
        assert post_raw(client, photo).status_code == 200


def test_probes_answer_at_once_while_the_model_is_busy(
    make_settings: Callable[..., Settings], photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with thread_server(make_settings()) as server, httpx.Client(base_url=server.url) as client:
        assert server.gate._engine is not None
        batcher = server.gate._engine.batcher
        real = batcher._compute

        begun, go_on = threading.Event(), threading.Event()

        def busy_until_told(pictures: Any) -> Any:
            begun.set()
            assert go_on.wait(20)
            return real(pictures)

        monkeypatch.setattr(batcher, "_compute", busy_until_told)

        async def main() -> None:
            async with httpx.AsyncClient(base_url=server.url) as busy:
                request = asyncio.create_task(busy.post("/v1/scan", content=photo))
                try:
                    assert await asyncio.to_thread(begun.wait, 20)
                    assert (await busy.get("/health/ready")).status_code == 200
                    assert not request.done()
                finally:
                    go_on.set()
                assert (await request).status_code == 200

        asyncio.run(main())
        assert client.get("/health/ready").status_code == 200


def test_metrics(server: ThreadServer, client: httpx.Client, photo: bytes, suspicious: bytes) -> None:
    def value(sample: str) -> float:
        lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(sample + " ")]
        return float(lines[0].rsplit(" ", 1)[1]) if lines else 0.0

    samples = [
        'twogate_verdicts_total{flagged="true"}',
        'twogate_verdicts_total{flagged="false"}',
        'twogate_requests_total{code="200",method="POST",route="/v1/scan"}',
        'twogate_rejects_total{reason="unsupported-media"}',
        "twogate_decode_seconds_count",
        "twogate_p_value_count",
    ]
    before = [value(sample) for sample in samples]
    post_raw(client, photo, "/v1/scan")
    post_raw(client, suspicious, "/v1/scan")
    post_raw(client, b"%PDF-1.7", "/v1/scan")
    client.get("/v1/" + "x" * 500)
    assert [value(sample) - old for sample, old in zip(samples, before, strict=True)] == [1, 1, 2, 1, 2, 2]
    text = client.get("/metrics").text
    for name in (
        "twogate_request_seconds_bucket",
        "twogate_images_in_flight 0.0",
        "twogate_body_bytes_in_flight 0.0",
        "twogate_queue_images 0.0",
        "twogate_queue_wait_seconds_count",
        "twogate_batch_images_bucket",
        "twogate_inference_seconds_count",
        'twogate_model_info{detector="consistency",name="tiny",sha256="',
        'twogate_provider_info{provider="CPUExecutionProvider"} 1.0',
        "twogate_ready 1.0",
        "twogate_last_success_timestamp_seconds 1",
        'route="unmatched"',
    ):
        assert name in text, name
    assert "xxx" not in text
