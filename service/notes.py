"""What is known of one request beside its content: who it is, and what the log and the metrics will say of it."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import cast

from starlette.datastructures import Headers
from starlette.types import Scope

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_TRACEPARENT = re.compile(
    r"(?P<version>(?!ff)[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<parent>[0-9a-f]{16})-[0-9a-f]{2}(?P<more>-.*)?"
)


_KEY = "twogate.notes"


@dataclass(frozen=True)
class Identity:
    """How the logs, the answer and the caller's tracing call one request."""

    request_id: str
    """From `X-Request-Id` if it is harmless (letters, digits, `._-`, at most 128), else made here."""
    trace_id: str | None
    """From a valid W3C `traceparent`, 32 hexadecimal digits."""

    @property
    def urn(self) -> str:
        """A problem document's `instance`."""
        return f"urn:twogate:trace:{self.trace_id}" if self.trace_id else f"urn:twogate:request:{self.request_id}"


def identify(scope: Scope) -> Identity:
    """Read the identity of a request from its headers."""
    headers = Headers(scope=scope)
    given = headers.get("x-request-id", "")
    request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    found = _TRACEPARENT.fullmatch(headers.get("traceparent", ""))
    return Identity(request_id, found["trace"] if found and _sound(found) else None)


def _sound(traceparent: re.Match[str]) -> bool:
    """What the pattern cannot say: ids are not all zero, and version 00 has exactly four fields."""
    zero = not traceparent["trace"].strip("0") or not traceparent["parent"].strip("0")
    return not zero and (traceparent["version"] != "00" or traceparent["more"] is None)


@dataclass
class Notes:
    """Filled in on the way through, read by `AccessMiddleware` when the request is over."""

    identity: Identity
    problem: str | None = None
    """The name of the problem that was answered, if any."""
    body_bytes: int = 0
    images: int = 0


def notes_of(scope: Scope) -> Notes:
    """The notes on this request; the first call makes them."""
    if _KEY not in scope:
        scope[_KEY] = Notes(identify(scope))
    return cast(Notes, scope[_KEY])
