"""GET /v1/models and /v1/models/{id}: what is served, exactly."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request

from service.api.auth import require_key
from service.api.context import context_of
from service.api.schemas import InputSize, Model, ModelList, ProblemDocument, TaskInfo
from service.engine.local import LocalGate
from service.problems import ModelNotFound

router = APIRouter(tags=["about"], dependencies=[Depends(require_key)])


@router.get("/v1/models", summary="What is served")
async def models(request: Request) -> ModelList:
    """The model that answers, with its version, the hash of its graph and the operator's policy."""
    return ModelList(data=[_served(request)])


# A name/version has a slash.
@router.get(
    "/v1/models/{id:path}",
    responses={404: {"description": "model-not-found", "model": ProblemDocument}},
    summary="What is served, by its name",
)
async def model(request: Request, id: str) -> Model:
    """The same for a name, or name/version, that is served."""
    check_served(id, context_of(request).gate.model)
    return _served(request)


def check_served(name: str, model: LocalGate) -> None:
    """Raise ModelNotFound, which says what is served, unless `model` goes by this name."""
    served = [model.manifest.name, model.label]
    if name not in served:
        raise ModelNotFound(f"served is {model.manifest.name}, also as {model.label}", served=served)


def _served(request: Request) -> Model:
    context = context_of(request)
    gate = context.gate.model
    manifest = gate.manifest
    return Model(
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
