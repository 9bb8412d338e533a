"""Tokens for the worker API: a fixed one, or signed in with a name and password.

Cognito's `InitiateAuth` is one JSON POST (PROTOCOL.md, Auth), so no SDK and no AWS credentials are needed. The token is
renewed at 75 % of its life, by one thread while the others go on with the old one, which is kept until it is really
refused (FAULTS.md B4, B5). Only Cognito's own words refuse a password: a lock for a while, and pages of those who stand
before it, are waited for (B21, B24).
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobfetcher.core.errors import ConfigError, SourceRefused, SourceUnavailable
from jobfetcher.core.text import clean
from jobfetcher.sources.worker_api.reply import Reply

#: Renewed when this part of its life is over: late enough to be rare, early enough for retries before it ends.
_RENEW_AT = 0.75

#: At most one attempt in this many seconds when the sign-in service fails or the server keeps refusing new tokens.
_PAUSE_S = 30.0

#: A token that came of a 403 and is answered with 403 itself is no better than the one before: such a 403 is about the
#: account. So long it is kept all the same; then an account that was let in meanwhile is seen (the token says so).
_FORBIDDEN_S = 300.0

#: FAULTS.md B24: a locked account is tried again after so many seconds. Cognito locks for one second after five wrong
#: passwords, for twice as long after each further one, and for 15 minutes at most; a try meanwhile does not prolong it.
_LOCKED_S = 60.0
_LOCKED = "attempts exceeded"

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

#: Sends one POST: URL, headers, body. Raises SourceUnavailable.
Post = Callable[[str, dict[str, str], bytes], Reply]


class Auth(Protocol):
    """What the client needs: the token to send now, and a new one after the old was refused."""

    def token(self) -> str:
        """The token to send. Raises SourceUnavailable or SourceRefused if there is none."""
        ...

    def renew(self, refused: str, status: int = 401) -> str:
        """Another token than `refused`, which was answered with 401 or 403. Raises as `token` does."""
        ...


class StaticToken:
    """A token that somebody else renews. `read_again` reads the file that it came from (B24), and raises ConfigError;
    `on_token` is told of a token that was found there, so that it can be kept out of logs."""

    def __init__(
        self,
        token: str,
        read_again: Callable[[], str] | None = None,
        *,
        on_token: Callable[[str], None] | None = None,
    ) -> None:
        self._token = token
        self._read_again = read_again
        self._on_token = on_token
        self._lock = threading.Lock()

    def token(self) -> str:
        return self._token

    def renew(self, refused: str, status: int = 401) -> str:
        why = f"the server refused ACCESS_TOKEN ({status}); it has probably expired"
        if self._read_again is None:
            raise SourceRefused(f"{why}: set a new one, or USERNAME and PASSWORD")
        with self._lock:
            if self._token != refused:
                return self._token  # another thread was quicker
            try:
                found = self._read_again()
            except ConfigError as error:  # it is being replaced just now, perhaps
                raise SourceRefused(f"{why}, and {error}") from None
            if found == refused:
                raise SourceRefused(f"{why}, and ACCESS_TOKEN_FILE still holds the same: put a new one there")
            if self._on_token is not None:
                self._on_token(found)
            self._token = found
            return found


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
        #: The token that the last 403 brought, and until when it is not renewed for another one.
        self._forbidden, self._forbidden_until = "", 0.0

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

    def renew(self, refused: str, status: int = 401) -> str:
        with self._lock:
            if self._token is not None and self._token != refused:
                return self._token  # another thread was quicker
            if status == 403 and refused == self._forbidden and self._clock() < self._forbidden_until:
                raise SourceRefused("the server refuses a token that was renewed because of a 403 (403)")
            token = self._obtain(forced=True)
            if status == 403:
                self._forbidden, self._forbidden_until = token, self._clock() + _FORBIDDEN_S
            return token

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
            asked_s = error.retry_after_s if isinstance(error, SourceUnavailable) and error.retry_after_s else 0.0
            # From its end: a service that hangs took half a minute.
            self._not_before = self._clock() + max(_PAUSE_S, asked_s)
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
        reply = self._post(
            self._endpoint or f"https://cognito-idp.{pool.region}.amazonaws.com/",
            {
                "Content-Type": "application/x-amz-json-1.1",
                "X-Amz-Target": "AWSCognitoIdentityProviderService.InitiateAuth",
            },
            json.dumps({"AuthFlow": flow, "ClientId": pool.client_id, "AuthParameters": parameters}).encode(),
        )
        if reply.status == 200:
            return self._read(reply)
        kind, words = _error(reply.body)
        if kind not in _REFUSALS or not 400 <= reply.status < 500:
            said = f"the sign-in service answered {reply.status} {kind}: {words}"
            page = f"not the sign-in service but something before it answered: {reply.described}"
            raise SourceUnavailable(said if kind else page, retry_after_s=reply.retry_after_s)
        if refresh:
            self._refresh_token = None
            return None
        if _LOCKED in words.lower():
            raise SourceUnavailable(
                f"sign-in as {clean(self._username, 80)!r} is locked for some minutes ({words}): somebody used a wrong "
                "password too often; it is tried again",
                retry_after_s=_LOCKED_S,
            )
        raise SourceRefused(f"sign-in as {clean(self._username, 80)!r} was refused: {words or kind}")

    def _read(self, reply: Reply) -> _Result:
        try:
            read = _Reply.model_validate_json(reply.body)
        except ValidationError:
            # What is nearly right may have a token in it.
            shown = "" if reply.body.lstrip().startswith((b"{", b"[")) else f": {reply.described}"
            raise SourceUnavailable(f"the sign-in service sent an answer that cannot be read{shown}") from None
        if read.AuthenticationResult is None and not read.ChallengeName:
            raise SourceUnavailable("the sign-in service sent an answer without a token")
        if read.AuthenticationResult is None:
            challenge = clean(read.ChallengeName or "", 80)
            raise SourceRefused(
                f"sign-in as {clean(self._username, 80)!r} needs a person first ({challenge}); "
                "finish it in the web interface, then start again"
            )
        return read.AuthenticationResult


def _error(body: bytes) -> tuple[str, str]:
    """Cognito's error name and words, both cleaned; empty where there are none."""
    try:
        data = json.loads(body)
        kind = str(data.get("__type", "")).rpartition("#")[2]
        return clean(kind, 80), clean(str(data.get("message") or data.get("Message") or ""), 200)
    except (ValueError, AttributeError, RecursionError):
        return "", ""
