"""Tokens for the worker API: a fixed one, or signed in with a name and password.

Cognito's `InitiateAuth` is one JSON POST (PROTOCOL.md, Auth), so no SDK and no AWS credentials are needed. The token is
renewed at 75 % of its life, by one thread while the others go on with the old one, which is kept until it is really
refused (FAULTS.md B4, B5).
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobfetcher.core.errors import SourceRefused, SourceUnavailable
from jobfetcher.core.text import clean

#: Renewed when this part of its life is over: late enough to be rare, early enough for retries before it ends.
_RENEW_AT = 0.75

#: At most one attempt in this many seconds when the sign-in service fails or the server keeps refusing new tokens.
_PAUSE_S = 30.0

#: Cognito's words for "wrong name or password", as opposed to "try later".
_REFUSALS = frozenset(
    {
        "NotAuthorizedException",
        "UserNotFoundException",
        "UserNotConfirmedException",
        "PasswordResetRequiredException",
        "InvalidParameterException",
        "ResourceNotFoundException",
    }
)

#: Sends one POST: URL, headers, body -> status, body. Raises SourceUnavailable.
Post = Callable[[str, dict[str, str], bytes], tuple[int, bytes]]


class Auth(Protocol):
    """What the client needs: the token to send now, and a new one after the old was refused."""

    def token(self) -> str:
        """The token to send. Raises SourceUnavailable or SourceRefused if there is none."""
        ...

    def renew(self, refused: str) -> str:
        """Another token than `refused`, which the server answered with 401. Raises as `token` does."""
        ...


class StaticToken:
    """A token that somebody else renews."""

    def __init__(self, token: str) -> None:
        self._token = token

    def token(self) -> str:
        return self._token

    def renew(self, refused: str) -> str:  # noqa: ARG002 - the seam's signature; a fixed token has no successor
        raise SourceRefused(
            "the server refused ACCESS_TOKEN (401); it has probably expired: set a new one, or USERNAME and PASSWORD"
        )


class CognitoPool(BaseModel):
    """Where to sign in, as `GET /access_info` says."""

    model_config = ConfigDict(frozen=True)

    user_pool_id: str = ""
    client_id: str = Field(min_length=1, max_length=256)
    region: str = Field(pattern=re.compile(r"^[a-z0-9-]{1,40}$"))


class _Result(BaseModel):
    IdToken: str = Field(pattern=r"^[\x21-\x7e]+$")  # it goes into a header
    RefreshToken: str | None = None
    ExpiresIn: float = Field(default=3600.0, gt=0, allow_inf_nan=False)


class _Reply(BaseModel):
    AuthenticationResult: _Result | None = None
    ChallengeName: str | None = None


class CognitoAuth:
    """Signs in with a name and password. `pool` asks the server where; `endpoint` overrides AWS's own address.

    `on_token` is told of every new token, so that it can be kept out of logs.
    """

    def __init__(
        self,
        username: str,
        password: str,
        *,
        pool: Callable[[], CognitoPool],
        post: Post,
        endpoint: str | None = None,
        on_token: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._username = username
        self._password = password
        self._find_pool = pool
        self._post = post
        self._endpoint = endpoint
        self._on_token = on_token
        self._clock = clock
        self._lock = threading.Lock()
        self._pool: CognitoPool | None = None
        self._token: str | None = None
        self._refresh_token: str | None = None
        self._renew_from = 0.0
        self._not_before = 0.0
        self._last_error: SourceRefused | SourceUnavailable | None = None

    def token(self) -> str:
        token = self._token
        if token is not None and self._clock() < self._renew_from:
            return token
        # With a token in hand only one thread renews and the others go on; without one, all must wait for it.
        if not self._lock.acquire(blocking=token is None):
            return token or self.token()
        try:
            if self._token is not None and (self._clock() < self._renew_from or self._clock() < self._not_before):
                return self._token
            try:
                return self._obtain(forced=False)
            except (SourceUnavailable, SourceRefused):
                if self._token is None:
                    raise
                return self._token  # the old one may still be good; the server decides
        finally:
            self._lock.release()

    def renew(self, refused: str) -> str:
        with self._lock:
            if self._token is not None and self._token != refused:
                return self._token  # another thread was quicker
            return self._obtain(forced=True)

    def _obtain(self, *, forced: bool) -> str:
        """Sign in or refresh. No new attempt for _PAUSE_S after a failure, or after one that a refused token forced."""
        now = self._clock()
        if now < self._not_before:
            raise self._last_error or SourceRefused(
                "the server refuses the token that sign-in just gave (401); is API_URL the server of this account?"
            )
        self._not_before = now + _PAUSE_S
        try:
            if self._pool is None:
                self._pool = self._find_pool()
            result = self._initiate(self._pool, refresh=True) if self._refresh_token else None
            if result is None:
                result = self._initiate(self._pool, refresh=False)
        except (SourceUnavailable, SourceRefused) as error:
            self._last_error = error
            self._not_before = self._clock() + _PAUSE_S  # from its end: a service that hangs took half a minute
            raise
        assert result is not None  # noqa: S101 - refresh=False returns a result or raises
        self._last_error = None
        self._token = result.IdToken
        self._refresh_token = result.RefreshToken or self._refresh_token
        self._renew_from = now + _RENEW_AT * result.ExpiresIn
        if not forced:
            self._not_before = now
        if self._on_token is not None:
            self._on_token(result.IdToken)
        return result.IdToken

    def _initiate(self, pool: CognitoPool, *, refresh: bool) -> _Result | None:
        """One InitiateAuth call. A refused refresh token is None (sign in anew); a refused password raises."""
        if refresh and self._refresh_token:
            flow, parameters = "REFRESH_TOKEN_AUTH", {"REFRESH_TOKEN": self._refresh_token}
        else:
            flow, parameters = "USER_PASSWORD_AUTH", {"USERNAME": self._username, "PASSWORD": self._password}
        status, body = self._post(
            self._endpoint or f"https://cognito-idp.{pool.region}.amazonaws.com/",
            {
                "Content-Type": "application/x-amz-json-1.1",
                "X-Amz-Target": "AWSCognitoIdentityProviderService.InitiateAuth",
            },
            json.dumps({"AuthFlow": flow, "ClientId": pool.client_id, "AuthParameters": parameters}).encode(),
        )
        if status == 200:
            return self._read(body)
        kind, words = _error(body)
        if kind in _REFUSALS or status in {401, 403}:
            if flow == "REFRESH_TOKEN_AUTH":
                self._refresh_token = None
                return None
            raise SourceRefused(f"sign-in as {clean(self._username, 80)!r} was refused: {words or kind or status}")
        raise SourceUnavailable(f"the sign-in service answered {status} {kind}".rstrip())

    def _read(self, body: bytes) -> _Result:
        try:
            reply = _Reply.model_validate_json(body)
        except ValidationError:
            raise SourceUnavailable("the sign-in service sent an answer that cannot be read") from None
        if reply.AuthenticationResult is None:
            challenge = clean(reply.ChallengeName or "no token", 80)
            raise SourceRefused(
                f"sign-in as {clean(self._username, 80)!r} needs a person first ({challenge}); "
                "finish it in the web interface, then start again"
            )
        return reply.AuthenticationResult


def _error(body: bytes) -> tuple[str, str]:
    """Cognito's error name and words, both cleaned; empty where there are none."""
    try:
        data = json.loads(body)
        kind = str(data.get("__type", "")).rpartition("#")[2]
        return clean(kind, 80), clean(str(data.get("message") or data.get("Message") or ""), 200)
    except (ValueError, AttributeError, RecursionError):
        return "", ""
