"""Accounts, passwords and tokens: what is good, and whose it is.

IdTokens and refresh tokens look like Cognito's (JSON Web Tokens, RFC 7519) but are signed with this server's own key
(HS256). Used by `auth`, which speaks HTTP.
"""

import base64
import hashlib
import hmac
import json
import secrets
from dataclasses import dataclass
from typing import Any

from mock_api.clock import Clock
from mock_api.settings import Account, Settings
from mock_api.store import Store

_REFRESH_LIFE_S = 30 * 24 * 3600.0  # Cognito's default


@dataclass(frozen=True)
class Caller:
    """A signed-in account."""

    name: str
    groups: tuple[str, ...]


class Tokens:
    """Checks passwords and tokens, and makes new tokens. Thread-safe."""

    def __init__(self, store: Store, clock: Clock, settings: Settings, key: bytes) -> None:
        self._store = store
        self._clock = clock
        self._settings = settings
        self._key = key
        self._refused_before = 0  # generation: tokens of an earlier one count as expired
        for account in settings.accounts:
            self.add_account(account)
        for token, name in settings.tokens.items():
            store.put_token(token, name)

    def add_account(self, account: Account, token: str | None = None) -> None:
        """Make or replace an account, and its static token if one is given."""
        salt = secrets.token_bytes(16)
        self._store.put_account(account.name, salt, _digest(account.password, salt), list(account.groups))
        if token is not None:
            self._store.put_token(token, account.name)

    def expire_all(self) -> None:
        """From now on every IdToken made so far is refused; refresh tokens and static tokens stay good."""
        self._refused_before += 1

    def sign_in(self, name: str, password: str) -> dict[str, Any] | None:
        """Cognito's `AuthenticationResult` for a right password, else None."""
        found = self._store.account(name)
        if found is None or not hmac.compare_digest(_digest(password, found[0]), found[1]):
            return None
        return self._result(name) | {"RefreshToken": self._make("refresh", name, _REFRESH_LIFE_S)}

    def refresh(self, token: str) -> dict[str, Any] | None:
        """Cognito's `AuthenticationResult` (without a new refresh token) for a good refresh token, else None."""
        claims = self._read("refresh", token)
        return None if claims is None else self._result(claims["sub"])

    def caller(self, token: str) -> Caller | None:
        """Whose static token or live IdToken this is; an AccessToken or an expired token is nobody's."""
        name = self._store.token_account(token)
        if name is None:
            claims = self._read("id", token)
            if claims is None or claims["generation"] < self._refused_before:
                return None
            name = str(claims["sub"])
        found = self._store.account(name)
        return None if found is None else Caller(name, tuple(found[2]))

    def _result(self, name: str) -> dict[str, Any]:
        life = self._settings.token_life_s
        return {
            "AccessToken": self._make("access", name, life),
            "IdToken": self._make("id", name, life),
            "ExpiresIn": int(life),
            "TokenType": "Bearer",
        }

    def _make(self, use: str, name: str, life_s: float) -> str:
        now = self._clock.now()
        claims = {"sub": name, "cognito:username": name, "token_use": use, "iat": int(now), "exp": now + life_s}
        claims |= {"generation": self._refused_before, "jti": secrets.token_hex(8)}
        body = f"{_encode({'alg': 'HS256', 'typ': 'JWT'})}.{_encode(claims)}"
        return f"{body}.{self._signature(body)}"

    def _read(self, use: str, token: str) -> dict[str, Any] | None:
        """The claims of a token of ours, made for this use, that has not expired."""
        body, _, signature = token.rpartition(".")
        if not hmac.compare_digest(self._signature(body).encode(), signature.encode()):
            return None
        claims: dict[str, Any] = json.loads(_decode(body.partition(".")[2]))
        return claims if claims["token_use"] == use and claims["exp"] > self._clock.now() else None

    def _signature(self, body: str) -> str:
        return _base64url(hmac.digest(self._key, body.encode(), "sha256"))


def _digest(password: str, salt: bytes) -> bytes:
    # n = 2**12 takes about 10 ms: enough for a test server, and sign-ins stay quick
    return hashlib.scrypt(password.encode(), salt=salt, n=2**12, r=8, p=1)


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _encode(value: dict[str, Any]) -> str:
    return _base64url(json.dumps(value).encode())


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
