"""Bearer keys in front of /v1."""

from __future__ import annotations

import hmac
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from service.api.context import context_of
from service.problems import Unauthorized

_bearer = HTTPBearer(auto_error=False, description="Needed only where the operator set api_keys.")


async def require_key(request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> None:
    """Raise Unauthorized unless the request has one of the operator's keys, or there are none.

    Every key is compared in full, so that the time taken says nothing about how much of a guess was right.
    """
    keys = context_of(request).settings.api_keys
    if not keys:
        return
    guess = given.credentials.encode() if given else b""
    matches = [hmac.compare_digest(guess, key.get_secret_value().encode()) for key in keys]
    if not given or not any(matches):
        raise Unauthorized
