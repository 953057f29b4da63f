from __future__ import annotations

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from model_store.bundle import Bundle, load_bundle
from model_store.pixels import decode
from model_store.session import GateSession
from model_store.tasks import TaskHead
from service.settings import Settings
from tests.service.support import ThreadServer, assert_problem, data_uri, post_raw, thread_server
from tests.support.tiny_bundle import make_tiny_bundle
from tests.support.tiny_head import CLASSES, add_tiny_head

PATH = "/v1/tasks/animals/classify"


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """tiny/3 with the heads `animals` and `plants`."""
    store = tmp_path_factory.mktemp("headed")
    first = add_tiny_head(make_tiny_bundle(store), store, "animals")
    return load_bundle(add_tiny_head(first, store, "plants", fusion="rfdm"))


@pytest.fixture(scope="module")
def classifier(headed: Bundle) -> Iterator[ThreadServer]:
    with thread_server(Settings(store=headed.path.parents[1], bundle="tiny", threads=1)) as running:
        yield running


@pytest.fixture
def client(classifier: ThreadServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=classifier.url, timeout=20) as running:
        yield running


def test_it_is_what_onnxruntime_says(client: httpx.Client, headed: Bundle, photos: list[Path]) -> None:
    session = GateSession(headed)
    for task in headed.manifest.tasks:
        head = TaskHead(headed.manifest, task, headed.heads[task.name])
        for path in photos:
            out = session.run(decode(path.read_bytes(), headed.manifest.pixels)[None])
            (expected,) = head.run(out.embedding, out.confidence)
            answer = post_raw(client, path.read_bytes(), f"/v1/tasks/{task.name}/classify").json()["data"][0]
            assert list(answer["probabilities"]) == list(CLASSES)
            np.testing.assert_allclose(list(answer["probabilities"].values()), expected, atol=1e-5)
            assert answer["label"] == CLASSES[int(expected.argmax())]
            assert answer["probability"] == max(answer["probabilities"].values())


def test_the_answers_shape(client: httpx.Client, photo: bytes, suspicious: bytes) -> None:
    body = client.post(PATH, json={"input": [data_uri(photo), data_uri(suspicious)]}).json()
    assert (body["object"], body["model"], body["task"]) == ("list", "tiny/3", "animals")
    assert [(item["object"], item["index"]) for item in body["data"]] == [("classification", 0), ("classification", 1)]
    for item in body["data"]:
        assert set(item) == {"object", "index", "label", "probability", "probabilities", "dae"}
        assert sum(item["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    scan = client.post("/v1/scan", json={"input": [data_uri(photo), data_uri(suspicious)]}).json()
    assert [item["dae"] for item in body["data"]] == [item["dae"] for item in scan["data"]]
    assert [item["dae"]["flagged"] for item in body["data"]] == [False, True]


def test_all_forms_of_a_request_give_the_same_answer(client: httpx.Client, photo: bytes) -> None:
    expected = post_raw(client, photo, PATH).json()["data"]
    for answer in (
        client.post(PATH, json={"input": base64.b64encode(photo).decode()}),
        client.post(PATH, files={"a": ("x.jpg", photo)}),
        client.post(PATH, json={"input": [{"image": data_uri(photo)}], "model": "tiny"}),
    ):
        assert answer.json()["data"] == expected


def test_a_request_may_ask_to_reject(client: httpx.Client, photo: bytes, suspicious: bytes) -> None:
    assert post_raw(client, photo, PATH, params={"on_flag": "reject"}).status_code == 200
    response = client.post(PATH, json={"input": [data_uri(photo), data_uri(suspicious)], "on_flag": "reject"})
    document = assert_problem(response, 422, "adversarial-suspected")
    assert document["index"] == 1
    assert "probabilities" not in response.text


def test_where_the_operator_rejects_no_class_is_given(headed: Bundle, suspicious: bytes) -> None:
    settings = Settings(store=headed.path.parents[1], bundle="tiny", threads=1, on_flag="reject")
    with thread_server(settings) as server, httpx.Client(base_url=server.url) as client:
        assert_problem(post_raw(client, suspicious, PATH, params={"on_flag": "flag"}), 422, "adversarial-suspected")


@pytest.mark.parametrize("name", ["cars", "Animals", "animals.onnx", "%2e%2e", "animals%00"])
def test_an_unknown_task_is_told_which_there_are(client: httpx.Client, photo: bytes, name: str) -> None:
    document = assert_problem(post_raw(client, photo, f"/v1/tasks/{name}/classify"), 404, "task-not-found")
    assert document["tasks"] == ["animals", "plants"]
    assert "animals, plants" in document["detail"]


def test_a_bundle_without_heads_has_no_tasks(server: ThreadServer, photo: bytes) -> None:
    with httpx.Client(base_url=server.url) as client:
        document = assert_problem(post_raw(client, photo, PATH), 404, "task-not-found")
        assert document["tasks"] == []
        assert client.get("/v1/models").json()["data"][0]["tasks"] == []


def test_refusals_are_those_of_the_other_calls(client: httpx.Client, photo: bytes) -> None:
    assert_problem(post_raw(client, photo[:900], PATH), 422, "undecodable-image")
    assert_problem(client.post(PATH, files=[("f", photo)] * 17), 422, "too-many-images")
    assert_problem(client.post(PATH, json={"input": data_uri(photo), "model": "other"}), 404, "model-not-found")
    assert_problem(client.get(PATH), 405, "method-not-allowed")
    assert_problem(post_raw(client, photo, PATH, headers={"X-Request-Timeout": "0.000001"}), 504, "deadline-exceeded")


def test_a_key_is_needed_where_one_is_set(headed: Bundle, photo: bytes) -> None:
    settings = Settings(store=headed.path.parents[1], bundle="tiny", threads=1, api_keys=["secret-key-of-some-length"])
    with thread_server(settings) as server, httpx.Client(base_url=server.url) as client:
        assert_problem(post_raw(client, photo, PATH), 401, "unauthorized")
        # Nor are the tasks told to whoever has none.
        assert_problem(post_raw(client, photo, "/v1/tasks/cars/classify"), 401, "unauthorized")


def test_models_lists_the_tasks(client: httpx.Client) -> None:
    tasks = client.get("/v1/models").json()["data"][0]["tasks"]
    assert [task["name"] for task in tasks] == ["animals", "plants"]
    assert tasks[0]["classes"] == list(CLASSES)
    assert [task["fusion"] for task in tasks] == ["guarded", "rfdm"]
    assert tasks[0]["metrics"] == {"luck": 0.5}


def test_many_at_a_time_get_their_own_answers(client: httpx.Client, photos: list[Path], suspicious: bytes) -> None:
    images = [path.read_bytes() for path in photos] + [suspicious]
    alone = [post_raw(client, image, PATH).json()["data"][0] for image in images]

    def ask(number: int) -> None:
        found = client.post(PATH, files=[("f", images[(number + k) % 5]) for k in range(5)]).json()["data"]
        for k, item in enumerate(found):
            expected = alone[(number + k) % 5]["probabilities"]
            np.testing.assert_allclose(list(item["probabilities"].values()), list(expected.values()), atol=1e-5)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(40)))


def test_it_is_described_and_counted(client: httpx.Client, photo: bytes) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/v1/tasks/{task}/classify"]["post"]
    assert list(operation["requestBody"]["content"]) == ["application/json", "multipart/form-data", "image/*"]
    names = [parameter["name"] for parameter in operation["parameters"]]
    assert names.count("task") == 1
    assert {"on_flag", "X-Request-Timeout"} <= set(names)
    assert " /v1/tasks/{task}/classify</code>" in client.get("/docs").text
    post_raw(client, photo, PATH)
    post_raw(client, photo, "/v1/tasks/whatever/classify")
    metrics = client.get("/metrics").text
    assert 'route="/v1/tasks/{task}/classify"' in metrics
    assert "whatever" not in metrics
