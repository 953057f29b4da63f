"""What both middlewares share: which requests are uploads, and what follows from the gate's answer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .client import Answer, Outcome, TwogateClient, unavailable

MIB = 1024 * 1024
VERDICT_HEADER = "x-twogate-verdict"
_NO_UPLOADS = frozenset({"GET", "HEAD", "OPTIONS", "DELETE", "TRACE"})
_PROBLEM = "application/problem+json"
_FORM = re.compile(r"multipart/form-data\s*;", re.IGNORECASE)


@dataclass(frozen=True)
class Refusal:
    """An answer in the app's place."""

    status: int
    body: bytes
    headers: list[tuple[str, str]]


class Uploads:
    """The policy in front of an app.

    `paths`: uploads to these paths, and below them, are judged; a body there is a form or one image, anything else is
    refused. `max_body_bytes`: larger uploads are refused; an upload is held in memory while it is judged.
    `unavailable`: what happens to an upload when the gate cannot be asked: `refuse` (503) or `pass`.
    """

    def __init__(
        self,
        gate: str | TwogateClient,
        *,
        paths: Sequence[str],
        key: str | None = None,
        timeout_s: float = 10,
        max_body_bytes: int = 32 * MIB,
        unavailable: Literal["refuse", "pass"] = "refuse",
    ) -> None:
        if isinstance(paths, str) or not paths or not all(path.startswith("/") for path in paths):
            raise ValueError('paths must be a list like ["/upload"]')
        if unavailable not in ("refuse", "pass"):
            raise ValueError('unavailable must be "refuse" or "pass"')
        self._gate = TwogateClient(gate, key=key, timeout_s=timeout_s) if isinstance(gate, str) else gate
        self._paths = [path.rstrip("/") for path in paths]
        self.max_body_bytes = max_body_bytes
        self._unavailable = unavailable

    def concerns(self, method: str, *paths: str, has_body: bool) -> bool:
        """Whether this request, to a path that apps may know by several names, is an upload that must be judged."""
        if method.upper() in _NO_UPLOADS and not has_body:
            return False
        # Some routers take many slashes for one.
        found = [re.sub("/{2,}", "/", path) for path in paths]
        return any(path == own or path.startswith(f"{own}/") for path in found for own in self._paths)

    def judge(self, body: bytes, content_type: str, content_encoding: str) -> Refusal | str:
        """Ask the gate; the answer in the app's place, or the word for the header that tells the app."""
        said = content_type.lower()
        if said.count("boundary") > 1:
            # The gate and the app might each take another one, and so see other files.
            return _problem(400, "malformed-request", "The request cannot be parsed", "Content-Type says two things")
        if ("multipart" in said or "boundary" in said) and not _FORM.match(content_type.strip()):
            # The gate would see one image, and some apps a form.
            return _problem(400, "malformed-request", "The request cannot be parsed", "Content-Type is nearly that of a form")
        return self._follow(self._gate.scan(body, content_type, content_encoding))

    def busy(self) -> Refusal | str:
        """What follows where the gate is not even asked, because too many others are being judged."""
        return self._follow(unavailable("too many uploads are being judged at once"))

    def _follow(self, answer: Answer) -> Refusal | str:
        match answer.outcome:
            case Outcome.CLEAN | Outcome.NOTHING:
                return answer.outcome.value
            case Outcome.UNAVAILABLE if self._unavailable == "pass":
                return "unjudged"
        return _refusal(answer)

    def too_large(self) -> Refusal:
        """The refusal of a body that is larger than allowed."""
        limit = self.max_body_bytes
        return _problem(413, "body-too-large", "The request has too many bytes", f"the limit is {limit} bytes", limit=limit)


def _refusal(answer: Answer) -> Refusal:
    if answer.outcome is Outcome.FLAGGED:
        # Which image, but no number: scores would tell an attacker which way to go.
        index = json.loads(answer.body).get("index")
        detail = f"image {index} looks like an adversarial example"
        return _problem(answer.status, "adversarial-suspected", "An image is suspected", detail, index=index)
    headers = [("content-type", _PROBLEM)]
    if answer.retry_after:
        headers.append(("retry-after", answer.retry_after))
    return Refusal(answer.status, answer.body, headers)


def _problem(status: int, name: str, title: str, detail: str, **members: object) -> Refusal:
    document = {"type": f"/problems/{name}", "title": title, "status": status, "detail": detail, **members}
    return Refusal(status, json.dumps(document).encode(), [("content-type", _PROBLEM)])
