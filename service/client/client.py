"""Ask the gate about one body, and say in one word what came of it."""

from __future__ import annotations

import http.client
import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import urlsplit

logger = logging.getLogger("twogate.client")
_FORM = "multipart/form-data"


class Outcome(StrEnum):
    """What came of asking."""

    CLEAN = "clean"
    """All images were judged, none is suspected."""
    FLAGGED = "flagged"
    """At least one image is suspected of being an adversarial example."""
    REFUSED = "refused"
    """It cannot be judged: not an image, damaged, too large, not parsable."""
    NOTHING = "nothing"
    """There was no image to judge: a form without files, an empty body."""
    UNAVAILABLE = "unavailable"
    """The gate did not answer, is overloaded, or is not set up as it should be; says nothing about the images."""


@dataclass(frozen=True)
class Answer:
    """The gate's answer; `body` is JSON, a problem document where `status` is not 200."""

    outcome: Outcome
    status: int
    reason: str
    body: bytes
    retry_after: str | None = None


class TwogateClient:
    """A gate at `url`. May be used by many threads; keeps nothing between calls.

    `timeout_s` bounds every wait for the gate, which is told to give up after the same time. `key` is one of the
    operator's API keys, where there are any; white space around it, as at the end of a file, does not count. ValueError where
    `url` or `key` cannot be used.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout_s: float = 10) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ValueError(f"the gate's URL must be like http://twogate:8000, not {url!r}")
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        if not parts.path.isascii():
            raise ValueError(f"the path of the gate's URL must be ASCII, %-encoded where it is not: {url!r}")
        self._path = f"{parts.path.rstrip('/')}/v1/scan?on_flag=reject"
        self._key = (key or "").strip()
        # Not shown: it is a secret.
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError("the gate's key must be printable ASCII, on one line")
        self._timeout_s = timeout_s

    def scan(self, body: bytes, content_type: str = "application/octet-stream", content_encoding: str = "") -> Answer:
        """Judge one encoded image, or, if `content_type` says multipart/form-data, every file of a form.

        Never raises for what the network or the gate does: that is an outcome.
        """
        form = content_type.partition(";")[0].strip().lower() == _FORM
        # Whatever else a client called it: a body that is no form is one image, and its type is told by its content.
        theirs = {"Content-Type": content_type if form else "application/octet-stream"}
        if content_encoding:
            theirs["Content-Encoding"] = content_encoding  # the gate refuses it, as long as nobody undoes it
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout_s)
        try:
            answer = self._ask(connection, body, theirs)
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a host that can be no name
            answer = unavailable(f"the gate did not answer: {type(error).__name__}")
        finally:
            connection.close()
        if answer.outcome is not Outcome.CLEAN:
            logger.log(
                logging.ERROR if answer.outcome is Outcome.UNAVAILABLE else logging.INFO,
                "%s: %s",
                answer.outcome,
                answer.reason,
            )
        return answer

    def _ask(self, connection: http.client.HTTPConnection, body: bytes, theirs: dict[str, str]) -> Answer:
        connection.putrequest("POST", self._path)
        connection.putheader("X-Request-Timeout", f"{self._timeout_s:g}")
        connection.putheader("Content-Length", str(len(body)))
        if self._key:
            connection.putheader("Authorization", f"Bearer {self._key}")
        try:
            for name, value in theirs.items():
                connection.putheader(name, value)
        except ValueError:  # what the client sent in these headers cannot be sent on
            return _refused(400, "malformed-request", "malformed headers")
        connection.connect()
        with suppress(BrokenPipeError, ConnectionResetError):  # who finds it too large may answer before all of it was sent
            connection.endheaders(body)
        response = connection.getresponse()
        return _understood(response.status, response.read(1_000_000), response.getheader("Retry-After"))


def _understood(status: int, body: bytes, retry_after: str | None) -> Answer:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    document = found if isinstance(found, dict) else {}
    name = str(document.get("type", "")).rpartition("/")[2]
    if status == 413 and not name:  # a proxy's page; trying again would not help
        return _refused(413, "body-too-large", "too large for what is before the gate")
    if found is not document:
        return unavailable(f"what answered with {status} is not the gate")
    if status == 200 and document.get("flagged") is False:
        return Answer(Outcome.CLEAN, status, "no image is suspected", body)
    reason = f"{name}: {document.get('detail', '')}"
    match status, name:
        case 422, "adversarial-suspected":
            outcome = Outcome.FLAGGED
        case 422, "invalid-request":
            outcome = Outcome.NOTHING
        case ((400 | 413 | 415 | 422), _) if name:
            outcome = Outcome.REFUSED
        case _:
            return unavailable(reason if name else f"the gate answered {status}", retry_after)
    return Answer(outcome, status, reason, body)


def _refused(status: int, name: str, reason: str) -> Answer:
    """A refusal that is not the gate's own."""
    return Answer(Outcome.REFUSED, status, reason, json.dumps({"type": f"/problems/{name}", "status": status}).encode())


def unavailable(reason: str, retry_after: str | None = None) -> Answer:
    """What the app's own clients are told, without a word of how the gate is reached."""
    document = {
        "type": "/problems/gate-unavailable",
        "title": "Uploads cannot be checked at the moment",
        "status": 503,
        "detail": "try again later",
    }
    return Answer(Outcome.UNAVAILABLE, 503, reason, json.dumps(document).encode(), retry_after or "5")
