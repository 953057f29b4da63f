"""A running service, asked over HTTP as any client asks it."""

from __future__ import annotations

import http.client
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from model_store.bundle import Bundle
from model_store.errors import TwogateError

_CONNECTIONS = 2
"""Requests at a time: enough to keep a service busy while one answer travels."""
_TIMEOUT_S = 120
_PATIENCE_S = 120
"""How long an overloaded service is asked again."""
_FRAME = 512
"""More than a form adds to each file."""


class ServiceError(TwogateError):
    """The service cannot be asked, or is not the one that is to be measured."""


@dataclass(frozen=True)
class Answers:
    """What the service said, image by image."""

    embedding: NDArray[np.float32]
    """[N, D], unit length."""
    p_value: NDArray[np.float64]
    """[N]"""
    score: NDArray[np.float64]
    """[N]; infinite where the service gave none, because it was not finite."""


class LiveService:
    """The service at `url`, which must serve `bundle` and return flagged images' embeddings; ServiceError otherwise."""

    def __init__(self, url: str, bundle: Bundle) -> None:
        try:
            parts = urlsplit(url)
            port, known = parts.port, parts.scheme in ("http", "https") and parts.hostname
        except ValueError:  # a port or an address that is none
            known = None
        if not known:
            raise ServiceError(f"the service's URL must be like http://127.0.0.1:8000, not {url!r}")
        self._url, self._label, self._calibration = url, bundle.label, bundle.manifest.calibration
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._path = known, port, parts.path.rstrip("/")
        model = self._call("GET", "/v1/models")["data"][0]
        served = f"{model['id']}/{model['version']}"
        if (served, model["sha256"]) != (bundle.label, bundle.model_sha256):
            raise ServiceError(
                f"{url} serves {served} (graph {model['sha256'][:12]}), not {bundle.label} "
                f"(graph {bundle.model_sha256[:12]}): start it with --store and --bundle of the bundle that is measured"
            )
        if model["on_flag"] != "flag":
            raise ServiceError(f"{url} refuses flagged images and gives no embedding: start it with --on-flag flag")
        limits = self._call("GET", "/v1/limits")
        self._most_images, self._most_bytes = int(limits["max_images"]), int(limits["max_body_bytes"])
        self.max_image_bytes = int(limits["max_image_bytes"])

    def ask(self, images: Sequence[bytes]) -> Answers:
        """Embedding and verdict of encoded images, in as few requests as the service's limits allow."""
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            found = [item for items in pool.map(self._embeddings, self._batches(images)) for item in items]
        answers = Answers(
            np.array([item["embedding"] for item in found], np.float32),
            np.array([item["dae"]["p_value"] for item in found]),
            np.array([np.inf if (s := item["dae"]["score"]) is None else s for item in found], np.float64),
        )
        # The graph alone does not tell: a bundle that was calibrated anew has the same.
        sound = np.isfinite(answers.score)
        if not np.allclose(self._calibration.p_value(answers.score[sound]), answers.p_value[sound], rtol=1e-6, atol=0):
            raise ServiceError(f"{self._url} serves {self._label} with another calibration than the bundle that is measured")
        return answers

    def _batches(self, images: Sequence[bytes]) -> Iterator[list[bytes]]:
        batch: list[bytes] = []
        size = _FRAME
        for image in images:
            if batch and (len(batch) == self._most_images or size + len(image) + _FRAME > self._most_bytes):
                yield batch
                batch, size = [], _FRAME
            batch.append(image)
            size += len(image) + _FRAME
        if batch:
            yield batch

    def _embeddings(self, images: list[bytes]) -> list[dict[str, Any]]:
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="image"\r\n\r\n'.encode()
        body = b"".join(head + image + b"\r\n" for image in images) + f"--{boundary}--\r\n".encode()
        answer = self._call("POST", "/v1/embeddings", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})
        if answer["model"] != self._label:
            raise ServiceError(f"{self._url} now serves {answer['model']}, not {self._label}")
        items: list[dict[str, Any]] = answer["data"]
        return items

    def _call(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> dict[str, Any]:
        """The JSON of a good answer; an overloaded service is asked again after the time that it names."""
        until = time.monotonic() + _PATIENCE_S
        while True:
            connection = self._kind(self._host, self._port, timeout=_TIMEOUT_S)
            try:
                connection.request(method, self._path + path, body, headers or {})
                response = connection.getresponse()
                content, status = response.read(), response.status
                wait = response.getheader("Retry-After") or "1"
            except (OSError, http.client.HTTPException, UnicodeError) as error:  # the last of a host's name
                raise ServiceError(
                    f"no service answers at {self._url} ({type(error).__name__}): "
                    f"start one with twogate serve --bundle {self._label}"
                ) from None
            finally:
                connection.close()
            if status != 503 or time.monotonic() > until:
                return self._understood(status, content, path)
            time.sleep(min(float(wait), 5.0) if wait.isdigit() else 1.0)

    def _understood(self, status: int, content: bytes, path: str) -> dict[str, Any]:
        try:
            document = json.loads(content)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise ServiceError(f"what answers {path} at {self._url} is no Twogate service (status {status})")
        if status != 200:
            raise ServiceError(f"{self._url}{path} answered {status}: {document.get('detail', document.get('title', ''))}")
        return document
