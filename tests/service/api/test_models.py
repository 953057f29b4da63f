from __future__ import annotations

import httpx

from model_store.bundle import Bundle


def test_it_says_exactly_what_is_served(client: httpx.Client, bundle: Bundle) -> None:
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    (model,) = body["data"]
    assert model["id"] == "tiny"
    assert model["object"] == "model"
    assert model["version"] == 1
    assert model["sha256"] == bundle.model_sha256
    assert model["embedding_dim"] == 24
    assert model["input"] == {"height": 32, "width": 32}
    assert model["detector"] == "consistency"
    assert model["max_fpr"] == 0.01
    assert model["provider"] == "CPUExecutionProvider"
