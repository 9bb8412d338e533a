"""What a running server consists of, and how a route gets at it. Built by `app`, once per start."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.responses import PlainTextResponse, Response

from mock_api.clock import Clock
from mock_api.settings import Settings
from mock_api.signing import Signer
from mock_api.storage import Storage
from mock_api.store import Store
from mock_api.tokens import Tokens
from mock_api.tree import Tree


@dataclass(frozen=True)
class Context:
    """The parts of one running server. `tree` is this machine's own object store; `storage` is what jobs are told."""

    settings: Settings
    clock: Clock
    store: Store
    tokens: Tokens
    signer: Signer
    tree: Tree
    storage: Storage


async def context(request: Request) -> Context:
    """The running server's parts, from inside a request."""  # async: no hop to a thread, as for all that is quick
    parts: Context = request.app.state.context
    return parts


def crash() -> Response:
    """The answer of a deployed server that has crashed: plain words, no JSON (S20)."""
    return PlainTextResponse("Internal Server Error", 500)


Parts = Annotated[Context, Depends(context)]
