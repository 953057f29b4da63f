from __future__ import annotations

import httpx

from service.settings import Settings


def test_every_limit_that_can_be_set_is_told_in_numbers(client: httpx.Client) -> None:
    body = client.get("/v1/limits").json()
    assert body.pop("accepted") == ["image/jpeg", "image/png", "image/webp"]
    assert all(isinstance(value, int | float) for value in body.values())
    assert {name for name in Settings.model_fields if name.startswith(("max_", "min_"))} - {
        "max_fpr",
        "max_wait_ms",
    } <= set(body)
    assert body["max_images"] == 16
    assert body["request_timeout_s"] == 30
