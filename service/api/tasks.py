"""POST /v1/tasks/{task}/classify: for every image its class in a task that the bundle has a head for, and a verdict."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Depends, Request, Response

from model_store.manifest import Task
from service.api.auth import require_key
from service.api.context import context_of
from service.api.judging import OPENAPI_INPUT, OPENAPI_PROBLEMS, judged_request
from service.api.schemas import ClassificationList, ProblemDocument
from service.engine.local import LocalGate
from service.problems import TaskNotFound

router = APIRouter(tags=["judging"], dependencies=[Depends(require_key)])

_PARAMETER = {
    "name": "task",
    "in": "path",
    "required": True,
    "description": "one of the tasks in /v1/models",
    "schema": {"type": "string"},
}


@router.post(
    "/v1/tasks/{task}/classify",
    response_model=ClassificationList,
    responses={**OPENAPI_PROBLEMS, 404: {"description": "model-not-found, task-not-found", "model": ProblemDocument}},
    openapi_extra={**OPENAPI_INPUT, "parameters": [_PARAMETER, *OPENAPI_INPUT["parameters"]]},
    summary="Classes, each with a verdict",
)
async def classify(request: Request) -> Response:
    """For every image the probability of each class of a task, and a verdict: is it an adversarial example?

    The branches vote; in a guarded head, one that its own evidence speaks against loses half of its vote. Ask for
    `on_flag=reject` to get no class for a suspicious image.
    """
    name = request.path_params["task"]
    # Before the body, as a model that is still loading is.
    _task(context_of(request).gate.model, name)
    _, model, judged = await judged_request(request)
    task = _task(model, name)

    def render() -> bytes:
        probabilities = model.classify(name, judged)
        answer = ClassificationList.of(model.label, name, task.classes, judged, probabilities)
        return answer.model_dump_json().encode()

    # In a thread: many classes are a lot of arithmetic and of digits, and the event loop must not wait for either.
    return Response(await asyncio.to_thread(render), media_type="application/json")


def _task(model: LocalGate, name: str) -> Task:
    """The task of this name. TaskNotFound says which there are."""
    tasks = {task.name: task for task in model.manifest.tasks}
    if name not in tasks:
        there = ", ".join(tasks) or "none"
        raise TaskNotFound(f"{model.label} has heads for these tasks: {there}", tasks=list(tasks))
    return tasks[name]
