"""The JSON that goes out, as pydantic models: one description for the code, the documentation and the clients."""

from __future__ import annotations

import base64
import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from model_store.choices import Fusion
from model_store.manifest import Task
from service.choices import OnFlag
from service.engine.verdict import Judged, Verdict

EncodingFormat = Literal["float", "base64"]


class Dae(BaseModel):
    """The verdict on one image: is it a downstream-agnostic adversarial example?"""

    flagged: bool = Field(description="whether p_value is at most the operator's max_fpr")
    p_value: float = Field(description="of clean images at most this share look at least as suspicious, in (0, 1]")
    score: float | None = Field(description="the detector's score, higher = more suspicious; null if it is not finite")
    detector: str = Field(description="the rule that made the score")
    confidence: dict[str, float | None] = Field(
        description="branch -> how far it can be trusted on this image, in [0, 1]; null if it is not finite"
    )

    @classmethod
    def of(cls, verdict: Verdict) -> Dae:
        """The verdict in JSON's types; JSON has no NaN."""
        return cls(
            flagged=verdict.flagged,
            p_value=verdict.p_value,
            score=_finite(verdict.score),
            detector=verdict.detector,
            confidence={name: _finite(value) for name, value in verdict.confidence.items()},
        )


class Embedding(BaseModel):
    """One image's answer in OpenAI's shape, and the verdict."""

    object: Literal["embedding"] = "embedding"
    index: int = Field(description="the image's place in the request, from 0")
    embedding: list[float] | str = Field(
        description="unit length; or, for encoding_format base64, its little-endian float32 bytes"
    )
    dae: Dae


class Usage(BaseModel):
    """Clients of OpenAI's API expect it; images have no tokens."""

    prompt_tokens: int = 0
    total_tokens: int = 0


class EmbeddingList(BaseModel):
    """The answer of POST /v1/embeddings."""

    object: Literal["list"] = "list"
    model: str = Field(description="name/version of the bundle that answered; never compare across versions")
    data: list[Embedding]
    usage: Usage = Usage()

    @classmethod
    def of(cls, model: str, judged: list[Judged], encoding: EncodingFormat) -> EmbeddingList:
        """The answers for one request, in its order."""
        data = [
            Embedding.model_construct(
                index=index, embedding=_encoded(answer, encoding), dae=Dae.of(answer.verdict), object="embedding"
            )
            for index, answer in enumerate(judged)
        ]
        return cls.model_construct(object="list", model=model, data=data, usage=Usage())


class Scan(BaseModel):
    """One image's verdict."""

    index: int = Field(description="the image's place in the request, from 0")
    dae: Dae


class ScanList(BaseModel):
    """The answer of POST /v1/scan."""

    model: str = Field(description="name/version of the bundle that answered")
    flagged: bool = Field(description="whether any image was flagged")
    data: list[Scan]

    @classmethod
    def of(cls, model: str, judged: list[Judged]) -> ScanList:
        """The verdicts for one request, in its order."""
        data = [Scan(index=index, dae=Dae.of(answer.verdict)) for index, answer in enumerate(judged)]
        return cls(model=model, flagged=any(scan.dae.flagged for scan in data), data=data)


class Classification(BaseModel):
    """One image's class, and the verdict."""

    object: Literal["classification"] = "classification"
    index: int = Field(description="the image's place in the request, from 0")
    label: str = Field(description="the most probable class")
    probability: float = Field(description="its probability")
    probabilities: dict[str, float] = Field(description="class -> probability; they sum to 1")
    dae: Dae


class ClassificationList(BaseModel):
    """The answer of POST /v1/tasks/{task}/classify."""

    object: Literal["list"] = "list"
    model: str = Field(description="name/version of the bundle that answered")
    task: str
    data: list[Classification]

    @classmethod
    def of(
        cls, model: str, task: str, classes: tuple[str, ...], judged: list[Judged], probabilities: NDArray[np.float32]
    ) -> ClassificationList:
        """The answers for one request, in its order; `probabilities` are [N, C]."""
        data = []
        for index, (answer, row) in enumerate(zip(judged, probabilities.tolist(), strict=True)):
            best = int(np.argmax(row))
            data.append(
                Classification.model_construct(
                    object="classification",
                    index=index,
                    label=classes[best],
                    probability=row[best],
                    probabilities=dict(zip(classes, row, strict=True)),
                    dae=Dae.of(answer.verdict),
                )
            )
        return cls.model_construct(object="list", model=model, task=task, data=data)


class InputSize(BaseModel):
    """What every picture is resized to, pixels."""

    height: int
    width: int


class TaskInfo(BaseModel):
    """A task that the model has a head for."""

    name: str = Field(description="as in POST /v1/tasks/{task}/classify")
    classes: list[str]
    fusion: Fusion = Field(description="how the branches vote")
    trained_on: str
    metrics: dict[str, float] = Field(description="as measured when it was trained; accuracies are shares")

    @classmethod
    def of(cls, task: Task) -> TaskInfo:
        """What the manifest says about a task."""
        return cls(
            name=task.name,
            classes=list(task.classes),
            fusion=task.fusion,
            trained_on=task.trained_on,
            metrics=task.metrics,
        )


class Model(BaseModel):
    """A model in OpenAI's shape, and what is particular to a gate."""

    id: str = Field(description="the name; `model` in a request may be this, or name/version")
    object: Literal["model"] = "model"
    created: int = Field(description="when the bundle was made, Unix time")
    owned_by: Literal["twogate"] = "twogate"
    version: int
    sha256: str = Field(description="of the graph that runs")
    embedding_dim: int
    input: InputSize
    branches: list[str]
    detector: str
    tasks: list[TaskInfo] = Field(description="what it has heads for")
    max_fpr: float = Field(description="share of clean images that may be flagged")
    smallest_max_fpr: float = Field(description="the smallest max_fpr that the calibration supports")
    on_flag: OnFlag
    provider: str = Field(description="where the graph really runs")


class ModelList(BaseModel):
    """The answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class LimitList(BaseModel):
    """The answer of GET /v1/limits."""

    accepted: list[str] = Field(description="media types of images, told by content")
    max_images: int = Field(description="images in one request")
    max_image_bytes: int = Field(description="bytes of one encoded image, after base64 is undone")
    max_body_bytes: int = Field(description="bytes of one request body on the wire; base64 takes 4/3")
    max_pixels: int = Field(description="pixels of one image, by its header")
    max_side: int = Field(description="longer side, pixels")
    min_side: int = Field(description="shorter side, pixels")
    max_inflight_bytes: int = Field(description="body bytes of all requests in flight")
    max_pending_images: int = Field(description="images of all requests in flight")
    request_timeout_s: float = Field(description="seconds from the first byte to the answer")
    body_timeout_s: float = Field(description="seconds in which a body must have arrived")
    max_batch: int = Field(description="images in one forward")


class HealthReport(BaseModel):
    """The answer of GET /health/ready."""

    state: Literal["starting", "ready", "degraded", "draining", "failed"]
    reason: str


class ProblemDocument(BaseModel):
    """RFC 9457. Ignore members that you do not know; `type` is stable."""

    type: str = Field(examples=["/problems/undecodable-image"])
    title: str
    status: int
    detail: str
    instance: str | None = Field(None, description="this occurrence, as the log knows it")
    index: int | None = Field(None, description="the guilty image, from 0")
    limit: int | None = None
    actual: int | None = None


def _encoded(answer: Judged, encoding: EncodingFormat) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(answer.embedding.astype("<f4").tobytes()).decode("ascii")
    values: list[float] = answer.embedding.tolist()
    return values


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
