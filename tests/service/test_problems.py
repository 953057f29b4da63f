from __future__ import annotations

import pytest

from model_store.errors import ImageTooLarge, UndecodableImage, UnsupportedMedia
from service import problems
from service.problems import Problem, all_problems, refused_image

CONTRACT = {
    "unsupported-media": 415,
    "undecodable-image": 422,
    "image-too-large": 413,
    "too-many-images": 422,
    "unauthorized": 401,
    "overloaded": 503,
    "deadline-exceeded": 504,
    "model-loading": 503,
    "adversarial-suspected": 422,
}


def test_the_types_of_the_contract_exist_with_their_status() -> None:
    found = {kind.name: kind.status for kind in all_problems()}
    assert CONTRACT.items() <= found.items()


def test_names_are_unique_and_the_tree_in_the_docstring_is_complete() -> None:
    kinds = all_problems()
    assert len({kind.name for kind in kinds}) == len(kinds)
    for kind in kinds:
        line = next(line for line in (problems.__doc__ or "").splitlines() if f" {kind.name} " in line)
        assert kind.__name__ in line
        assert f" {kind.status}" in line


def test_a_document_has_the_members_of_the_rfc_and_its_own() -> None:
    document = problems.TooManyImages("too many", limit=2, actual=3).document("urn:x")
    assert document == {
        "type": "/problems/too-many-images",
        "title": "Too many images in one request",
        "status": 422,
        "detail": "too many",
        "instance": "urn:x",
        "error": {"message": "too many", "type": "too-many-images", "code": "too-many-images", "param": None},
        "limit": 2,
        "actual": 3,
    }


@pytest.mark.parametrize(("after", "header"), [(0, "1"), (0.2, "1"), (1.2, "2"), (7, "7")])
def test_retry_after_is_a_whole_number_of_at_least_one(after: float, header: str) -> None:
    assert problems.Overloaded("full", after=after).headers == {"Retry-After": header}


@pytest.mark.parametrize(
    ("error", "kind", "members"),
    [
        (UnsupportedMedia("image/gif", ("image/png",)), problems.UnsupportedMedia, {"detected": "image/gif"}),
        (ImageTooLarge("side", 5, 6), problems.ImageTooLarge, {"limit": 5, "actual": 6}),
        (UndecodableImage("broken"), problems.UndecodableImage, {}),
    ],
)
def test_every_image_error_has_its_problem(error: Exception, kind: type[Problem], members: dict[str, object]) -> None:
    problem = refused_image(error, 3)  # type: ignore[arg-type]
    assert type(problem) is kind
    assert problem.members.items() >= {"index": 3, **members}.items()
