"""What the service answers when it does not answer: RFC 9457 problem documents with stable types.

    Problem
    ├── MalformedRequest      malformed-request      400  the body or a header cannot be parsed at all
    ├── Unauthorized          unauthorized           401  a key is needed, and none or a wrong one was given
    ├── NotFound              not-found              404  no such path
    ├── ModelNotFound         model-not-found        404  `model` names something that is not served
    ├── TaskNotFound          task-not-found         404  the model has no head for the task in the path
    ├── MethodNotAllowed      method-not-allowed     405
    ├── BodyTimeout           body-timeout           408  the body did not arrive in time
    ├── BodyTooLarge          body-too-large         413  the request as a whole has too many bytes
    ├── ImageTooLarge         image-too-large        413  one image has too many bytes, pixels or a too long side
    ├── UnsupportedMedia      unsupported-media      415  the body's or an image's type, or a Content-Encoding
    ├── InvalidRequest        invalid-request        422  understood, but a member is missing, unknown or out of range
    ├── TooManyImages         too-many-images        422
    ├── UndecodableImage      undecodable-image      422  damaged, truncated, or too small
    ├── AdversarialSuspected  adversarial-suspected  422  an image was flagged and the policy is to reject
    ├── InternalError         internal-error         500  our fault; the log has the rest under the request's id
    ├── Overloaded            overloaded             503  with Retry-After
    ├── ModelLoading          model-loading          503  with Retry-After
    ├── ModelUnavailable      model-unavailable      503  the bundle was refused
    └── DeadlineExceeded      deadline-exceeded      504  not computed: the request's time was over

One type has one status. Members beside RFC 9457's: `error` repeats type and detail in the place where OpenAI's clients
look for them (they show nothing else to their users), `index` is the guilty image (from 0), `limit` and `actual` are
numbers in the unit that `detail` names, `accepted` and `detected` are media types. No message quotes a library, names a
path of this machine or repeats what the client sent in bulk.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from model_store import errors

MEDIA_TYPE = "application/problem+json"


class Problem(errors.TwogateError):
    """Base: `detail` is for the person who reads this one occurrence, `members` are for programs."""

    status: ClassVar[int]
    name: ClassVar[str]
    title: ClassVar[str]

    def __init__(self, detail: str, *, headers: dict[str, str] | None = None, **members: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = headers or {}
        self.members = members

    def document(self, instance: str | None = None) -> dict[str, Any]:
        """The members of the problem document; `instance` is the URI of this occurrence."""
        base: dict[str, Any] = {
            "type": f"/problems/{self.name}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "error": {"message": self.detail, "type": self.name, "code": self.name, "param": None},
        }
        if instance:
            base["instance"] = instance
        return base | self.members


class MalformedRequest(Problem):
    """The body or a header cannot be parsed at all."""

    status, name, title = 400, "malformed-request", "The request cannot be parsed"


class Unauthorized(Problem):
    """A key is needed, and none or a wrong one was given."""

    status, name, title = 401, "unauthorized", "A valid API key is needed"

    def __init__(self) -> None:
        super().__init__("send an API key as `Authorization: Bearer <key>`", headers={"WWW-Authenticate": "Bearer"})


class NotFound(Problem):
    """There is no such path."""

    status, name, title = 404, "not-found", "There is nothing at this path"


class ModelNotFound(Problem):
    """`model` names something that is not served; `served` says what is."""

    status, name, title = 404, "model-not-found", "This model is not served"


class TaskNotFound(Problem):
    """The model has no head for the task in the path; `tasks` says for which it has one."""

    status, name, title = 404, "task-not-found", "This task is not served"


class MethodNotAllowed(Problem):
    """The path exists, for other methods; the header `Allow` names them."""

    status, name, title = 405, "method-not-allowed", "This path does not know this method"


class BodyTimeout(Problem):
    """The request's body did not arrive in time."""

    status, name, title = 408, "body-timeout", "The request's body did not arrive in time"


class BodyTooLarge(Problem):
    """The request as a whole has more bytes than allowed."""

    status, name, title = 413, "body-too-large", "The request has too many bytes"


class ImageTooLarge(Problem):
    """One image has more bytes, pixels or a longer side than allowed."""

    status, name, title = 413, "image-too-large", "An image is too large"


class UnsupportedMedia(Problem):
    """The type of the body or of an image, or a Content-Encoding, is not one that is accepted."""

    status, name, title = 415, "unsupported-media", "This type of content is not accepted"


class InvalidRequest(Problem):
    """The request was understood, but a member is missing, unknown or out of range."""

    status, name, title = 422, "invalid-request", "The request is not valid"


class TooManyImages(Problem):
    """More images than one request may bring."""

    status, name, title = 422, "too-many-images", "Too many images in one request"


class UndecodableImage(Problem):
    """No picture comes out of these bytes, or one that is too small."""

    status, name, title = 422, "undecodable-image", "An image cannot be decoded"


class AdversarialSuspected(Problem):
    """An image was flagged, and the policy is to reject; `verdicts` has every image's verdict."""

    status, name, title = 422, "adversarial-suspected", "An image looks like an adversarial example"


class InternalError(Problem):
    """Our fault; the log has the rest, under the request's id."""

    status, name, title = 500, "internal-error", "Something went wrong on our side"

    def __init__(self) -> None:
        super().__init__("the failure was logged under this request's id")


class _TryLater(Problem):
    """A state of the server that passes; `after` is in seconds."""

    def __init__(self, detail: str, *, after: float = 1) -> None:
        super().__init__(detail, headers={"Retry-After": str(max(1, math.ceil(after)))})


class Overloaded(_TryLater):
    """The server is full; the same request may pass a little later."""

    status, name, title = 503, "overloaded", "The server is overloaded"


class ModelLoading(_TryLater):
    """The server has started and is still loading the model."""

    status, name, title = 503, "model-loading", "The model is still loading"


class ModelUnavailable(Problem):
    """The bundle was refused; only an operator can help."""

    status, name, title = 503, "model-unavailable", "The model cannot be served"


class DeadlineExceeded(Problem):
    """The time that the request had is over; nothing more is computed for it."""

    status, name, title = 504, "deadline-exceeded", "The request's time is over"

    def __init__(self) -> None:
        super().__init__("the time limit of this request passed before all its images were answered")


def refused_image(error: errors.ImageError, index: int) -> Problem:
    """The problem that says why image number `index` (from 0) is refused."""
    detail = f"image {index}: {error}"
    match error:
        case errors.UnsupportedMedia():
            return UnsupportedMedia(detail, index=index, detected=error.detected, accepted=list(error.accepted))
        case errors.ImageTooLarge():
            return ImageTooLarge(detail, index=index, limit=error.limit, actual=error.actual)
        case _:
            return UndecodableImage(detail, index=index)


def all_problems() -> list[type[Problem]]:
    """Every problem type that can be answered, by name."""
    found: list[type[Problem]] = []
    rest = [Problem]
    while rest:
        for kind in rest.pop().__subclasses__():
            rest.append(kind)
            if hasattr(kind, "status"):
                found.append(kind)
    return sorted(found, key=lambda kind: kind.name)
