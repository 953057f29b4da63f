"""What /v1/embeddings, /v1/scan and /v1/tasks have in common: from the request to the verdicts, and the policy on them."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from service.api.context import Context, context_of
from service.api.intake import BodyOptions, EmbeddingRequest, Intake, Options, parse
from service.api.models import check_served
from service.api.schemas import Dae, ProblemDocument
from service.engine.local import LocalGate
from service.engine.verdict import Judged
from service.notes import notes_of
from service.problems import AdversarialSuspected, InvalidRequest, MalformedRequest

T = TypeVar("T")


async def judged_request(request: Request, *, foreign_forms: bool = False) -> tuple[Options, LocalGate, list[Judged]]:
    """Read the request, judge its images, apply the policy. Raises a Problem, or ClientDisconnect.

    `foreign_forms` as in `intake.parse`.
    """
    context = context_of(request)
    deadline = time.monotonic() + _seconds(request, context)
    # Before the body: a client should not send megabytes to learn that the model is still loading.
    model = context.gate.model
    intake = await _read(request, context, foreign_forms)
    _check_model(intake.options, model)
    notes_of(request.scope).images = len(intake.images)
    judged = await _unless_gone(request, context.gate.judge(intake.images, deadline))
    if "reject" in (context.settings.on_flag, intake.options.on_flag):
        _reject_flagged(judged)
    return intake.options, model, judged


def _seconds(request: Request, context: Context) -> float:
    """What the request has left: the server's limit, or less if the client asks for less."""
    limit = context.settings.request_timeout_s
    asked = request.headers.get("x-request-timeout")
    if asked is None:
        return limit
    try:
        seconds = float(asked)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise MalformedRequest("X-Request-Timeout must be a positive number of seconds")
    return min(limit, seconds)


async def _read(request: Request, context: Context, foreign_forms: bool) -> Intake:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
    return await asyncio.to_thread(
        parse,
        bytes(body),
        request.headers.get("content-type", ""),
        request.query_params,
        max_images=context.settings.max_images,
        max_bytes=context.settings.max_image_bytes,
        foreign_forms=foreign_forms,
    )


def _check_model(options: Options, model: LocalGate) -> None:
    if options.model is not None:
        check_served(options.model, model)
    if options.dimensions is not None and options.dimensions != model.manifest.embedding_dim:
        raise InvalidRequest(
            f"/dimensions: this model has {model.manifest.embedding_dim}; embeddings are not cut",
            limit=model.manifest.embedding_dim,
            actual=options.dimensions,
        )


def _reject_flagged(judged: list[Judged]) -> None:
    flagged = [index for index, answer in enumerate(judged) if answer.verdict.flagged]
    if flagged:
        first = judged[flagged[0]].verdict
        raise AdversarialSuspected(
            f"image {flagged[0]}: at most {first.p_value:.2g} of clean images look at least as suspicious",
            index=flagged[0],
            p_value=first.p_value,
            detector=first.detector,
            verdicts=[{"index": index, "dae": Dae.of(answer.verdict).model_dump()} for index, answer in enumerate(judged)],
        )


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do `work`, but give it up when the client leaves: nobody would read the answer."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


_TINY_PNG = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAIAQMAAAD+wSzIAAAABlBMVEUeWqDwyFqeKo"
    "I3AAAAGElEQVR42mNgYGBkYmJiYeJgEmBSYHIAAAHTAIw5zihvAAAAAElFTkSuQmCC"
)


def _options_as_parameters() -> list[dict[str, Any]]:
    properties = Options.model_json_schema()["properties"]
    return [
        {"name": name, "in": "query", "required": False, "description": schema.get("description", ""), "schema": schema}
        for name, schema in properties.items()
    ] + [
        {
            "name": "X-Request-Timeout",
            "in": "header",
            "required": False,
            "description": "seconds that the client is willing to wait, if fewer than the server's limit",
            "schema": {"type": "number"},
        }
    ]


def _json_body() -> dict[str, Any]:
    """The JSON body's schema with its one definition put in place: a reference would have to lead to the document."""
    schema = EmbeddingRequest.model_json_schema()
    item = schema.pop("$defs")["ImageItem"]
    text = json.dumps(schema).replace('{"$ref": "#/$defs/ImageItem"}', json.dumps(item))
    inlined: dict[str, Any] = json.loads(text)
    return inlined


OPENAPI_INPUT: dict[str, Any] = {
    "parameters": _options_as_parameters(),
    "requestBody": {
        "required": True,
        "description": "One of three forms. The type of an image is told by its content: JPEG, PNG or WebP.",
        "content": {
            "application/json": {
                "schema": _json_body(),
                "examples": {
                    "one": {"summary": "one image, as a data-URI", "value": {"input": _TINY_PNG}},
                    "several": {
                        "summary": "several images; plain base64 and objects will do",
                        "value": {"input": [_TINY_PNG, {"image": _TINY_PNG}], "encoding_format": "base64"},
                    },
                },
            },
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "description": "Every file is an image, whatever its field is called. The other fields are those of the "
                    "JSON; at /v1/scan, where apps have whole forms of their own judged, only on_flag=reject counts.",
                    "properties": {
                        "file": {"type": "array", "items": {"type": "string", "format": "binary"}},
                        **BodyOptions.model_json_schema()["properties"],
                    },
                },
            },
            "image/*": {"schema": {"type": "string", "format": "binary", "description": "one image, as it is"}},
        },
    },
}
"""What FastAPI cannot derive, since the body is read by hand: one body in three forms."""

OPENAPI_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "model": ProblemDocument}
    for status, description in {
        400: "malformed-request",
        401: "unauthorized",
        404: "model-not-found",
        408: "body-timeout",
        413: "body-too-large, image-too-large",
        415: "unsupported-media",
        422: "invalid-request, too-many-images, undecodable-image, adversarial-suspected",
        503: "overloaded, model-loading (both with Retry-After), model-unavailable",
        504: "deadline-exceeded",
    }.items()
}
