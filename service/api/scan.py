"""POST /v1/scan: the verdict alone, for those who only want to keep attacks out."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request, Response

from service.api.auth import require_key
from service.api.judging import OPENAPI_INPUT, OPENAPI_PROBLEMS, judged_request
from service.api.schemas import ScanList

router = APIRouter(tags=["judging"], dependencies=[Depends(require_key)])


@router.post(
    "/v1/scan",
    response_model=ScanList,
    responses=OPENAPI_PROBLEMS,
    openapi_extra=OPENAPI_INPUT,
    summary="Verdicts only",
)
async def scan(request: Request) -> Response:
    """For every image a verdict: is it an adversarial example? Ask for `on_flag=reject` to see it in the status."""
    _, model, judged = await judged_request(request, foreign_forms=True)
    return Response(ScanList.of(model.label, judged).model_dump_json(), media_type="application/json")
