"""How a problem becomes a response."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from service.notes import notes_of
from service.problems import MEDIA_TYPE, Problem


def problem_response(problem: Problem, scope: Scope) -> Response:
    """The problem document of one occurrence, noted for the access log and the metrics."""
    notes = notes_of(scope)
    notes.problem = problem.name
    return JSONResponse(
        problem.document(notes.identity.urn),
        status_code=problem.status,
        headers=problem.headers,
        media_type=MEDIA_TYPE,
    )
