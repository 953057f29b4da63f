from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image, ImageOps

from model_store.bundle import Bundle
from model_store.pixels import decode
from model_store.session import GateSession
from service.settings import Settings
from tests.service.support import ThreadServer, assert_problem, data_uri, png, post_raw, thread_server


def _embedding(response: httpx.Response, index: int = 0) -> np.ndarray:  # type: ignore[type-arg]
    assert response.status_code == 200, response.text
    return np.array(response.json()["data"][index]["embedding"])


def test_it_is_what_onnxruntime_says(client: httpx.Client, bundle: Bundle, photos: list[Path]) -> None:
    session = GateSession(bundle)
    for path in photos:
        answer = post_raw(client, path.read_bytes())
        expected = session.run(decode(path.read_bytes(), bundle.manifest.pixels)[None])
        np.testing.assert_allclose(_embedding(answer), expected.embedding[0], atol=1e-6, rtol=0)
        dae = answer.json()["data"][0]["dae"]
        assert dae["score"] == pytest.approx(float(expected.score[0]), abs=1e-6)
        assert dae["p_value"] == pytest.approx(float(bundle.manifest.calibration.p_value(expected.score)[0]))
        assert dae["flagged"] == (dae["p_value"] <= 0.01)
        assert list(dae["confidence"]) == [branch.name for branch in bundle.manifest.branches]
        assert list(dae["confidence"].values()) == pytest.approx(expected.confidence[0].tolist(), abs=1e-6)


def test_the_answer_has_openais_shape_and_the_verdict(client: httpx.Client, photo: bytes) -> None:
    body = post_raw(client, photo).json()
    assert body["object"] == "list"
    assert body["model"] == "tiny/1"
    assert body["usage"] == {"prompt_tokens": 0, "total_tokens": 0}
    assert [(item["object"], item["index"]) for item in body["data"]] == [("embedding", 0)]
    assert np.linalg.norm(body["data"][0]["embedding"]) == pytest.approx(1, abs=1e-5)
    assert set(body["data"][0]["dae"]) == {"flagged", "p_value", "score", "detector", "confidence"}


def test_all_forms_of_a_request_give_the_same_answer(client: httpx.Client, photo: bytes, suspicious: bytes) -> None:
    raw = [post_raw(client, data).json()["data"][0] for data in (photo, suspicious)]
    many = [
        client.post("/v1/embeddings", json={"input": [data_uri(photo), base64.b64encode(suspicious).decode()]}),
        client.post("/v1/embeddings", files={"a": ("x.jpg", photo), "b": ("y.png", suspicious)}),
        client.post("/v1/embeddings", json={"input": [{"image": data_uri(photo)}, data_uri(suspicious)]}),
        client.post("/v1/embeddings", files=[("f", photo), ("f", suspicious)], data={"model": "tiny", "note": "a field"}),
    ]
    for answer in many:
        assert answer.status_code == 200, answer.text
        for one, expected in zip(answer.json()["data"], raw, strict=True):
            np.testing.assert_allclose(one["embedding"], expected["embedding"], atol=1e-6, rtol=0)
            assert one["dae"]["flagged"] == expected["dae"]["flagged"]
            assert one["dae"]["score"] == pytest.approx(expected["dae"]["score"], abs=1e-6)


def test_fields_of_a_form_are_honoured(client: httpx.Client, photo: bytes) -> None:
    def post(**fields: str) -> httpx.Response:
        return client.post("/v1/embeddings", files={"file": photo}, data=fields)

    assert isinstance(post(encoding_format="base64").json()["data"][0]["embedding"], str)
    assert_problem(post(model="a car"), 404, "model-not-found")
    assert_problem(post(modality="text"), 422, "invalid-request")


def test_neighbours_never_change_an_embedding(client: httpx.Client, photos: list[Path], suspicious: bytes) -> None:
    images = [path.read_bytes() for path in photos] + [suspicious]
    images = (images * 16)[:16]
    together = client.post("/v1/embeddings", files=[("f", image) for image in images])
    for index, image in enumerate(images):
        alone = _embedding(post_raw(client, image))
        assert np.abs(alone - _embedding(together, index)).max() <= 1e-5


def test_the_official_client_works(server: ThreadServer, client: httpx.Client, photo: bytes, suspicious: bytes) -> None:
    expected = _embedding(post_raw(client, photo))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as sdk:
        default = sdk.embeddings.create(model="tiny", input=data_uri(photo))
        np.testing.assert_allclose(default.data[0].embedding, expected, atol=1e-6)
        floats = sdk.embeddings.create(model="tiny/1", input=data_uri(photo), encoding_format="float")
        np.testing.assert_allclose(floats.data[0].embedding, expected, atol=1e-6)
        several = sdk.embeddings.create(
            model="tiny", input=[data_uri(photo), data_uri(suspicious)], extra_body={"modality": "image"}
        )
        assert [item.index for item in several.data] == [0, 1]
        verdicts = [(item.model_extra or {})["dae"]["flagged"] for item in several.data]
        assert verdicts == [False, True]
        assert [model.id for model in sdk.models.list()] == ["tiny"]
        with pytest.raises(openai.NotFoundError, match="served is tiny"):
            sdk.embeddings.create(model="text-embedding-3-small", input=data_uri(photo))
        with pytest.raises(openai.UnprocessableEntityError, match="URLs are not fetched"):
            sdk.embeddings.create(model="tiny", input="https://example.com/cat.jpg")


def test_base64_is_little_endian_float32(client: httpx.Client, photo: bytes) -> None:
    expected = _embedding(post_raw(client, photo))
    answer = post_raw(client, photo, params={"encoding_format": "base64"}).json()
    found = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), dtype="<f4")
    np.testing.assert_array_equal(found, expected.astype("<f4"))


def _stored_sideways(photo: bytes, orientation: int) -> bytes:
    """The same view, stored turned or mirrored, with the EXIF tag that undoes it."""
    upright = Image.open(io.BytesIO(photo)).convert("RGB")
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, "JPEG", quality=95, subsampling=0, exif=exif)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue())))
    assert shown.size == upright.size
    return file.getvalue()


def test_the_eight_ways_to_store_a_photo_give_the_same_answer(client: httpx.Client, photo: bytes) -> None:
    answers = [post_raw(client, _stored_sideways(photo, orientation)).json()["data"][0] for orientation in range(1, 9)]
    turned = Image.open(io.BytesIO(photo)).convert("RGB").transpose(Image.Transpose.ROTATE_90)
    for answer in answers[1:]:
        assert np.dot(answer["embedding"], answers[0]["embedding"]) > 0.9995
        assert answer["dae"]["score"] == pytest.approx(answers[0]["dae"]["score"], abs=0.05)
    # And the test can tell: without the tag the answer is another.
    file = io.BytesIO()
    turned.save(file, "JPEG", quality=95)
    assert np.dot(_embedding(post_raw(client, file.getvalue())), answers[0]["embedding"]) < 0.999


def test_every_refusal_is_a_problem_that_names_the_guilty(client: httpx.Client, photo: bytes) -> None:
    half = photo[: len(photo) // 2]
    document = assert_problem(client.post("/v1/embeddings", files=[("f", photo), ("f", half)]), 422, "undecodable-image")
    assert document["index"] == 1
    gif = assert_problem(post_raw(client, b"GIF89a" + bytes(50)), 415, "unsupported-media")
    assert (gif["index"], gif["detected"]) == (0, "image/gif")
    assert gif["accepted"] == ["image/jpeg", "image/png", "image/webp"]
    small = assert_problem(post_raw(client, png(np.zeros((4, 40, 3), np.uint8))), 422, "undecodable-image")
    assert "8" in small["detail"]
    long = assert_problem(post_raw(client, png(np.zeros((8, 16385, 3), np.uint8))), 413, "image-too-large")
    assert (long["limit"], long["actual"]) == (16384, 16385)
    bomb = io.BytesIO()
    Image.new("1", (10000, 10000)).save(bomb, "PNG")
    assert assert_problem(post_raw(client, bomb.getvalue()), 413, "image-too-large")["limit"] == 50_000_000
    many = assert_problem(client.post("/v1/embeddings", files=[("f", photo)] * 17), 422, "too-many-images")
    assert many["limit"] == 16
    assert_problem(post_raw(client, b"x" * (10 * 2**20 + 1)), 413, "image-too-large")
    assert_problem(client.post("/v1/embeddings", json={"input": "no!"}), 422, "invalid-request")
    assert_problem(
        client.post("/v1/embeddings", content="{", headers={"Content-Type": "application/json"}),
        400,
        "malformed-request",
    )
    assert_problem(post_raw(client, photo, headers={"Content-Type": "text/plain"}), 415, "unsupported-media")


def test_model_and_dimensions_must_be_the_served_ones(client: httpx.Client, photo: bytes) -> None:
    uri = data_uri(photo)
    for model in ("tiny", "tiny/1"):
        assert client.post("/v1/embeddings", json={"input": uri, "model": model}).status_code == 200
    document = assert_problem(client.post("/v1/embeddings", json={"input": uri, "model": "tiny/2"}), 404, "model-not-found")
    assert document["served"] == ["tiny", "tiny/1"]
    assert client.post("/v1/embeddings", json={"input": uri, "dimensions": 24}).status_code == 200
    document = assert_problem(client.post("/v1/embeddings", json={"input": uri, "dimensions": 12}), 422, "invalid-request")
    assert document["limit"] == 24


def test_a_request_may_ask_to_reject(client: httpx.Client, photo: bytes, suspicious: bytes) -> None:
    assert post_raw(client, photo, params={"on_flag": "reject"}).status_code == 200
    flagged = post_raw(client, suspicious)
    assert flagged.status_code == 200
    assert flagged.json()["data"][0]["dae"]["flagged"]
    response = client.post("/v1/embeddings", json={"input": [data_uri(photo), data_uri(suspicious)], "on_flag": "reject"})
    document = assert_problem(response, 422, "adversarial-suspected")
    assert document["index"] == 1
    assert document["p_value"] <= 0.01
    assert [verdict["dae"]["flagged"] for verdict in document["verdicts"]] == [False, True]
    assert "embedding" not in response.text


def test_where_the_operator_rejects_a_request_cannot_ask_for_less(
    make_settings: Callable[..., Settings], photo: bytes, suspicious: bytes
) -> None:
    with thread_server(make_settings(on_flag="reject")) as server, httpx.Client(base_url=server.url) as client:
        for params in ({}, {"on_flag": "flag"}):
            assert post_raw(client, photo, params=params).status_code == 200
            assert_problem(post_raw(client, suspicious, params=params), 422, "adversarial-suspected")
            assert_problem(post_raw(client, suspicious, "/v1/scan", params=params), 422, "adversarial-suspected")
        body = {"input": data_uri(suspicious), "on_flag": "flag"}
        assert_problem(client.post("/v1/embeddings", json=body), 422, "adversarial-suspected")


@pytest.mark.parametrize("seconds", ["soon", "0", "-1", "nan", ""])
def test_a_time_limit_that_is_no_number_is_refused(client: httpx.Client, photo: bytes, seconds: str) -> None:
    assert_problem(post_raw(client, photo, headers={"X-Request-Timeout": seconds}), 400, "malformed-request")


def test_time_limits(client: httpx.Client, photo: bytes) -> None:
    assert post_raw(client, photo, headers={"X-Request-Timeout": "9999"}).status_code == 200
    assert_problem(post_raw(client, photo, headers={"X-Request-Timeout": "0.000001"}), 504, "deadline-exceeded")


def test_nobody_asks_for_more_time_than_the_server_gives(
    make_settings: Callable[..., Settings], photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    with (
        thread_server(make_settings(request_timeout_s=0.5)) as server,
        httpx.Client(base_url=server.url, timeout=20) as client,
    ):
        assert server.gate._engine is not None
        monkeypatch.setattr(server.gate._engine.batcher, "_compute", lambda _: go.wait(20))
        try:
            assert_problem(post_raw(client, photo, headers={"X-Request-Timeout": "9999"}), 504, "deadline-exceeded")
        finally:
            go.set()


def test_an_operators_limit_holds(make_settings: Callable[..., Settings], photo: bytes) -> None:
    with (
        thread_server(make_settings(max_pixels=1000)) as server,
        httpx.Client(base_url=server.url, timeout=20) as client,
    ):
        assert_problem(post_raw(client, photo), 413, "image-too-large")
