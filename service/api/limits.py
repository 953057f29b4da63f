"""GET /v1/limits: every limit, in numbers, so that nobody has to find them by hitting them."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request

from model_store.pixels import ACCEPTED
from service.api.auth import require_key
from service.api.context import context_of
from service.api.schemas import LimitList

router = APIRouter(tags=["about"], dependencies=[Depends(require_key)])


@router.get("/v1/limits", summary="Every limit, in numbers")
async def limits(request: Request) -> LimitList:
    """What one request may bring, and what all requests together may hold."""
    settings = context_of(request).settings
    return LimitList(
        accepted=list(ACCEPTED),
        **{name: getattr(settings, name) for name in LimitList.model_fields if name != "accepted"},
    )
