"""POST /v1/embeddings: for every image an embedding and a verdict."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Depends, Request, Response

from service.api.auth import require_key
from service.api.judging import OPENAPI_INPUT, OPENAPI_PROBLEMS, judged_request
from service.api.schemas import EmbeddingList

router = APIRouter(tags=["judging"], dependencies=[Depends(require_key)])


@router.post(
    "/v1/embeddings",
    response_model=EmbeddingList,
    responses=OPENAPI_PROBLEMS,
    openapi_extra=OPENAPI_INPUT,
    summary="Embeddings, each with a verdict",
)
async def embeddings(request: Request) -> Response:
    """For every image an embedding that withstands attack, and a verdict: is it an adversarial example?

    The shape is OpenAI's, so its clients work; `dae` is the verdict.
    """
    options, model, judged = await judged_request(request)

    def render() -> bytes:
        return EmbeddingList.of(model.label, judged, options.encoding_format).model_dump_json().encode()

    # In a thread: many embeddings are a lot of digits.
    return Response(await asyncio.to_thread(render), media_type="application/json")
