"""GET /v1/models: what is served, exactly."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request

from service.api.auth import require_key
from service.api.context import context_of
from service.api.schemas import InputSize, Model, ModelList, TaskInfo

router = APIRouter(tags=["about"], dependencies=[Depends(require_key)])


@router.get("/v1/models", summary="What is served")
async def models(request: Request) -> ModelList:
    """The model that answers, with its version, the hash of its graph and the operator's policy."""
    context = context_of(request)
    gate = context.gate.model
    manifest = gate.manifest
    return ModelList(
        data=[
            Model(
                id=manifest.name,
                created=int(manifest.created.timestamp()),
                version=manifest.version,
                sha256=gate.model_sha256,
                embedding_dim=manifest.embedding_dim,
                input=InputSize(height=manifest.pixels.height, width=manifest.pixels.width),
                branches=[branch.name for branch in manifest.branches],
                detector=manifest.detector.name,
                tasks=[TaskInfo.of(task) for task in manifest.tasks],
                max_fpr=gate.max_fpr,
                smallest_max_fpr=manifest.calibration.smallest_budget,
                on_flag=context.settings.on_flag,
                provider=gate.provider,
            )
        ]
    )
