"""Ask the gate about one body, and say in one word what came of it."""

from __future__ import annotations

import http.client
import json
import logging
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
    operator's API keys, where there are any.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout_s: float = 10) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ValueError(f"the gate's URL must be like http://twogate:8000, not {url!r}")
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        self._path = f"{parts.path.rstrip('/')}/v1/scan?on_flag=reject"
        self._key = key
        self._timeout_s = timeout_s

    def scan(self, body: bytes, content_type: str = "application/octet-stream", content_encoding: str = "") -> Answer:
        """Judge one encoded image, or, if `content_type` says multipart/form-data, every file of a form.

        Never raises for what the network or the gate does: that is an outcome.
        """
        form = content_type.partition(";")[0].strip().lower() == _FORM
        headers = {
            # Whatever else a client called it: a body that is no form is one image, and its type is told by its content.
            "Content-Type": content_type if form else "application/octet-stream",
            "X-Request-Timeout": f"{self._timeout_s:g}",
        }
        if content_encoding:
            headers["Content-Encoding"] = content_encoding  # the gate refuses it, as long as nobody undoes it
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.request("POST", self._path, body, headers)
            response = connection.getresponse()
            answer = _understood(response.status, response.read(1_000_000), response.getheader("Retry-After"))
        except (OSError, http.client.HTTPException) as error:
            answer = unavailable(f"the gate did not answer: {type(error).__name__}")
        except ValueError:  # what the client sent in these headers cannot be sent on
            answer = Answer(
                Outcome.REFUSED, 400, "malformed headers", b'{"type": "/problems/malformed-request", "status": 400}'
            )
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


def _understood(status: int, body: bytes, retry_after: str | None) -> Answer:
    try:
        document = json.loads(body)
        assert isinstance(document, dict)
    except (ValueError, AssertionError):
        return unavailable(f"what answered with {status} is not the gate")
    if status == 200 and document.get("flagged") is False:
        return Answer(Outcome.CLEAN, status, "no image is suspected", body)
    name = str(document.get("type", "")).rpartition("/")[2]
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


def unavailable(reason: str, retry_after: str | None = None) -> Answer:
    """What the app's own clients are told, without a word of how the gate is reached."""
    document = {
        "type": "/problems/gate-unavailable",
        "title": "Uploads cannot be checked at the moment",
        "status": 503,
        "detail": "try again later",
    }
    return Answer(Outcome.UNAVAILABLE, 503, reason, json.dumps(document).encode(), retry_after or "5")
