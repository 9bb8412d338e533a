"""The server, put together: `uvicorn mock_api.app:app --host 0.0.0.0`, or `create_app(settings)` in a test.

Nothing is opened before the server starts and everything is closed when it stops.
"""

import os
import secrets
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from xml.sax.saxutils import escape

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from mock_api import auth, files, gateway, mock_routes, page, user_routes, worker_routes
from mock_api.clock import Clock
from mock_api.context import Context, crash
from mock_api.disk import LocalStorage, SignedStorage
from mock_api.faults import FaultLayer, Faults
from mock_api.s3 import S3Storage
from mock_api.settings import Settings
from mock_api.signing import Signer
from mock_api.storage import NotAllowed, Storage, StorageError
from mock_api.store import Store, UserSideAway
from mock_api.tokens import Tokens
from mock_api.tree import Tree

DATABASE = "mock.db"  # in the data directory


def create_app(settings: Settings | None = None) -> FastAPI:
    """The ASGI application. Without settings it reads `MOCK_API_*` from the environment when it starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        parts = await run_in_threadpool(build, settings or Settings.from_env(os.environ))
        app.state.context = parts
        try:
            with _sweeping(parts):
                yield
        finally:
            parts.storage.close()
            parts.store.close()

    app = FastAPI(title="mock worker API", lifespan=lifespan)
    app.state.faults = Faults()
    app.add_middleware(FaultLayer, faults=app.state.faults)
    app.add_exception_handler(StorageError, _storage_refusal)
    app.add_exception_handler(NotAllowed, _not_allowed)
    app.add_exception_handler(ClientDisconnect, _nobody_there)
    app.add_exception_handler(OverflowError, _no_such_number)
    app.add_exception_handler(UserSideAway, _crash)
    app.add_exception_handler(Exception, _bug)
    for module in (auth, worker_routes, files, user_routes, mock_routes, page, gateway):
        app.include_router(module.router)
    return app


def build(settings: Settings) -> Context:
    """The parts of a server with these settings. Makes the data directory; raises `OSError` when it cannot."""
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    key = _secret_key(settings.data_dir / "secret")
    clock = Clock()
    store = Store(
        settings.data_dir / DATABASE,
        clock,
        lease_s=settings.lease_s,
        max_retries=settings.max_retries,
        retry_different=settings.retry_different,
    )
    signer = Signer(key, clock, settings.url_life_s)
    tree = Tree(settings.data_dir, store)
    storage: Storage
    if settings.file_mode == "s3":
        storage = S3Storage(settings)
    elif settings.file_mode == "local":
        storage = LocalStorage(tree)
    else:
        storage = SignedStorage(tree, signer)
    return Context(settings, clock, store, Tokens(store, clock, settings, key), signer, tree, storage)


@contextmanager
def _sweeping(parts: Context) -> Iterator[None]:
    """Sweep every period (S4) until the end of the block. The period is real time, the lease the server's clock."""
    stop = threading.Event()

    def sweep() -> None:
        while not stop.wait(parts.settings.sweep_period_s):
            parts.store.sweep()

    thread = threading.Thread(target=sweep, name="mock-api-sweep")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _secret_key(path: Path) -> bytes:
    """The key of all signatures, made at the first start, so that URLs and tokens outlive a restart."""
    try:
        with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(secrets.token_bytes(32))
    except FileExistsError:
        pass
    return path.read_bytes()


async def _storage_refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, StorageError)  # noqa: S101 - for the type checker; registered for no other exception
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{escape(error.code)}</Code>'
        f"<Message>{escape(error.message)}</Message></Error>"
    )
    return Response(body, error.status, error.headers, media_type="application/xml")


async def _not_allowed(_: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, 403)


async def _nobody_there(_: Request, __: Exception) -> Response:
    """The client left in the middle of its body: nobody reads this answer."""
    return Response(status_code=400)


async def _no_such_number(request: Request, error: Exception) -> Response:
    """A number beyond 64 bits: the database has none of those, and a deployed server on SQLite crashes over it."""
    if request.url.path.startswith("/user/"):
        return JSONResponse({"detail": "a number is too large"}, 400)
    return await _crash(request, error)


async def _crash(_: Request, __: Exception) -> Response:
    """What a deployed server answers where it crashes: plain words, no JSON (S20)."""
    return crash()


async def _bug(_: Request, __: Exception) -> Response:
    """A crash of this server's own, in other words than those that it answers on purpose."""
    return PlainTextResponse("the mock API has a bug: its log says where", 500)


app = create_app()
