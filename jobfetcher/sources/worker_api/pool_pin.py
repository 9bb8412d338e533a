"""Where this worker's password may be sent: the sign-in that the server named first, or the one that its owner set.

Used by `build` around `auth`. The server says where its workers sign in (`GET /access_info`), and Cognito's password
flow sends the password itself there. A server that was taken over could name a user pool of its own, and have every
worker hand its password to it (FAULTS.md M2). So the pool is kept from the first sign-in on that worked, below
PATH_BASE, and another one is refused until a person accepts it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from jobfetcher.core.errors import SourceRefused
from jobfetcher.core.text import clean
from jobfetcher.pinned import shown
from jobfetcher.sources.worker_api.auth import CognitoPool

#: Lies in PATH_BASE from the first sign-in on. No secret is in it.
NAME = "sign-in.json"


class PoolPin:
    """Checks a pool before anything is sent to it. `wanted`: COGNITO_POOL, which then is the only word on it.

    `base` says where PATH_BASE is when that is needed, for it is made after what reads settings.

    Not thread-safe: `auth` asks for one pool at a time.
    """

    def __init__(self, base: Callable[[], Path], api_url: str, wanted: str | None = None) -> None:
        self._base, self._api_url, self._wanted = base, api_url, wanted
        self._checked: CognitoPool | None = None

    @property
    def _path(self) -> Path:
        return self._base() / NAME

    def check(self, pool: CognitoPool) -> CognitoPool:
        """The pool, if the password may be sent there. Raises SourceRefused, saying how to accept another one."""
        known = self._kept()
        if self._wanted is not None:
            pool_id, _, client_id = self._wanted.partition("/")
            # The region of a pool is the first part of its id.
            if pool.user_pool_id in {"", pool_id} and _goes_to(pool) == (pool_id.partition("_")[0], client_id):
                return pool
            why = f"and COGNITO_POOL is {self._wanted}"
            how = "set COGNITO_POOL to it"
        elif known is None or _goes_to(known) == _goes_to(pool):
            self._checked = pool
            return pool
        else:
            why = f"and it was {_described(known)} when this worker signed in first"
            how = f"set COGNITO_POOL to it, or delete {shown(self._path)}"
        raise SourceRefused(
            f"the server has its workers sign in at {_described(pool)}, {why}: no password is sent there. If the "
            f"server's administrator says that it is right, {how}"
        )

    def keep(self) -> None:
        """The sign-in that was checked last has worked: remember it. Never raises: what cannot be written down is as
        new at the next start."""
        pool, self._checked = self._checked, None
        if pool is None or self._wanted is not None or self._kept() == pool:
            return
        noted = json.dumps({"api_url": self._api_url, **pool.model_dump()})
        path = self._path
        draft = path.with_name(f"{NAME}.new")
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(draft, flags, 0o600), "w") as file:
                file.write(noted)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)

    def _kept(self) -> CognitoPool | None:
        """What was kept for this server; what cannot be read counts as nothing, for damage must not stop a worker."""
        try:
            noted = json.loads(self._path.read_bytes())
            return CognitoPool.model_validate(noted) if noted["api_url"] == self._api_url else None
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            return None


def _goes_to(pool: CognitoPool) -> tuple[str, str]:
    """What decides where a password arrives: the service of that region asks the pool that the client belongs to."""
    return pool.region, pool.client_id


def _described(pool: CognitoPool) -> str:
    return f"{clean(f'{pool.user_pool_id}/{pool.client_id}', 150)} in {pool.region}"
