"""Faults on purpose, at the level of HTTP: what the client sees is a real delay, a real hang-up, a real short body.

`Faults` holds the rules (`POST /_mock/faults`); `FaultLayer` is the outermost ASGI layer and acts on them. It also
sees when two updates of one job overlap (PROTOCOL.md S9).
"""

import asyncio
import random
import re
import threading
from collections.abc import Iterable
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi.responses import Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mock_api import gateway
from mock_api.context import Context

#: An update takes so long at least. A deployed server's takes longer; without it, two senders would hardly ever be seen
#: to overlap (S9) on a server that is done in a tenth of that.
_UPDATE_LASTS_S = 0.001
_UPDATE = re.compile(r"/jobs/(\d+)/status")


def _regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_regex)]


class Rule(BaseModel):
    """Which requests a fault meets, and what it does to them. Several effects may stand in one rule.

    Instead of handling: `status` (with `body`, `content_type`, `headers`, `retry_after`), `page` (a page of a gateway
    or a portal, one of `mock_api.gateway.Page` or "any", S20; `garbage` is the page `login`), `drop` "before". Besides
    handling: `delay_s`, `expire_tokens`, `nested_headers`, `no_range`, `unheard` (the user's side cannot be told: what
    the request changes is committed, then answered 500, S19). To the answer: `drop` "after" (handled, reply lost),
    `cut_after` (bytes of the body, then the connection ends), `flip_at` (the byte at this offset is inverted),
    `bytes_per_s` (slow body).
    """

    model_config = ConfigDict(extra="forbid")

    method: Pattern = Field(".*", description="regular expression, the whole method")
    path: Pattern = Field(".*", description="regular expression, found anywhere in the decoded path")
    skip: int = Field(0, ge=0, description="leave this many matching requests alone first")
    times: int | None = Field(None, ge=1, description="act this often, then no more; null: always")
    rate: float = Field(1, gt=0, le=1, description="the share of matching requests that are met, thrown by `seed`")
    seed: int = Field(0, description="of the throws for `rate` and for the page of `any`")

    status: int | None = Field(None, ge=200, le=599)
    body: str = ""
    content_type: str = "application/json"
    headers: dict[str, str] = Field(default_factory=dict)
    retry_after: str | int | None = None
    page: gateway.Page | Literal["any"] | None = None
    garbage: bool = False
    drop: Literal["before", "after"] | None = None
    delay_s: float = Field(0, ge=0)
    expire_tokens: bool = False
    nested_headers: bool = False
    no_range: bool = False
    unheard: bool = False
    cut_after: int | None = Field(None, ge=0)
    flip_at: int | None = Field(None, ge=0)
    bytes_per_s: int | None = Field(None, ge=1)

    _thrown: random.Random = PrivateAttr()

    def model_post_init(self, _: Any) -> None:
        """Begin the throws."""
        self._thrown = random.Random(self.seed)  # noqa: S311 - which requests fail is no secret

    def hits(self) -> bool:
        """Whether a matching request is met; each question is one throw."""
        return self.rate == 1 or self._thrown.random() < self.rate

    def next_page(self) -> gateway.Page | None:
        """The page that answers, if one does."""
        if self.page == "any":
            return self._thrown.choice(list(gateway.Page))
        return gateway.Page.LOGIN if self.garbage else self.page

    def matches(self, method: str, path: str) -> bool:
        """Whether the rule is about this request."""
        return re.fullmatch(self.method, method) is not None and re.search(self.path, path) is not None


class Faults:
    """The rules, in the order they were added. Thread-safe."""

    def __init__(self) -> None:
        self._rules: list[Rule] = []
        self._lock = threading.Lock()

    def add(self, rules: Iterable[Rule]) -> None:
        """Append rules."""
        with self._lock:
            self._rules += rules

    def clear(self) -> None:
        """Forget all rules."""
        with self._lock:
            self._rules.clear()

    def rules(self) -> list[Rule]:
        """The rules that still act, with what is left of their counts."""
        with self._lock:
            return [rule.model_copy() for rule in self._rules]

    def take(self, method: str, path: str) -> tuple[Rule, gateway.Page | None] | None:
        """The rule that acts on this request, counted down, and the page that it answers with, if it does."""
        with self._lock:
            for rule in self._rules:
                if not rule.matches(method, path):
                    continue
                if rule.skip:
                    rule.skip -= 1
                    continue
                if not rule.hits():
                    continue
                if rule.times is not None:
                    rule.times -= 1
                    if rule.times == 0:
                        self._rules.remove(rule)
                return rule, rule.next_page()
        return None


class FaultLayer:
    """ASGI middleware that does to a request what the rules say."""

    def __init__(self, app: ASGIApp, faults: Faults) -> None:
        self._app = app
        self._faults = faults
        self._updating: set[str] = set()  # ids of jobs with an update in progress; touched on the event loop only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or scope["path"].startswith("/_mock"):
            await self._app(scope, receive, send)
            return
        update = _UPDATE.fullmatch(scope["path"]) if scope["method"] == "PUT" else None
        if update is None:
            await self._faulty(scope, receive, send)
            return
        await self._update(update.group(1), scope, receive, send)

    async def _update(self, job_id: str, scope: Scope, receive: Receive, send: Send) -> None:
        if job_id in self._updating:
            parts: Context = scope["app"].state.context
            parts.store.note("overlap", job_id=int(job_id))
            if parts.settings.conflict_500:
                await Response("Internal Server Error", 500)(scope, receive, send)
                return
            await self._faulty(scope, receive, send)
            return
        self._updating.add(job_id)
        try:
            await asyncio.sleep(_UPDATE_LASTS_S)
            await self._faulty(scope, receive, send)
        finally:
            self._updating.discard(job_id)

    async def _faulty(self, scope: Scope, receive: Receive, send: Send) -> None:
        taken = self._faults.take(scope["method"], scope["path"])
        if taken is None:
            await self._app(scope, receive, send)
            return
        rule, page = taken
        parts: Context = scope["app"].state.context
        effects = rule.model_dump_json(
            exclude_defaults=True, exclude={"method", "path", "skip", "times", "page", "rate", "seed"}
        )
        note = f"{scope['method']} {scope['path']} {page or effects}"
        stand_in = _stand_in(rule, page, scope)
        parts.store.note("fault", code=None if stand_in is None else stand_in.status_code, note=note)
        await asyncio.sleep(rule.delay_s)
        if rule.expire_tokens:
            parts.tokens.expire_all()
        if rule.drop == "before":
            await _hang_up(receive, at_once=True)
        elif stand_in is not None:
            await stand_in(scope, receive, send)
        else:
            await self._altered(rule, scope, receive, send)

    async def _altered(self, rule: Rule, scope: Scope, receive: Receive, send: Send) -> None:
        if rule.nested_headers:
            scope.setdefault("state", {})["nested_headers"] = True
        if rule.unheard:
            scope.setdefault("state", {})["unheard"] = True
        if rule.no_range:
            scope["headers"] = [item for item in scope["headers"] if item[0] != b"range"]
        reply = _Reply(rule, send)
        await self._app(scope, receive, reply)
        if reply.lost:
            await _hang_up(receive, at_once=rule.drop == "after")


class _Reply:
    """`send`, with the rule's effects on the answer."""

    def __init__(self, rule: Rule, send: Send) -> None:
        self.lost = rule.drop == "after"
        self._rule = rule
        self._send = send
        self._offset = 0

    async def __call__(self, message: Message) -> None:
        if self.lost:
            return
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        body = bytearray(message.get("body", b""))
        flip, cut = self._rule.flip_at, self._rule.cut_after
        if flip is not None and 0 <= flip - self._offset < len(body):
            body[flip - self._offset] ^= 0xFF
        if cut is not None and self._offset + len(body) > cut:
            del body[cut - self._offset :]
            self.lost = True
        self._offset += len(body)
        await self._send_body(bytes(body), more=self.lost or message.get("more_body", False))

    async def _send_body(self, body: bytes, *, more: bool) -> None:
        rate = self._rule.bytes_per_s
        # ten pieces a second, of one byte or more: a body of one byte per second is slow, too
        step = len(body) if rate is None else max(rate // 10, 1)
        for start in range(0, len(body), max(step, 1)):
            piece = body[start : start + step]
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
            if rate is not None:
                await asyncio.sleep(len(piece) / rate)
        if not more:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def _stand_in(rule: Rule, page: gateway.Page | None, scope: Scope) -> Response | None:
    """What is answered instead of the request's being handled."""
    if page is not None:
        return gateway.answer(page, str(Request(scope).base_url).rstrip("/"))
    if rule.status is None:
        return None
    headers = dict(rule.headers)
    if rule.retry_after is not None:
        headers["Retry-After"] = str(rule.retry_after)
    empty = rule.status in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)
    return Response(None if empty else rule.body, rule.status, headers, media_type=rule.content_type)


async def _hang_up(receive: Receive, *, at_once: bool) -> None:
    """End the connection without an (other) answer; `at_once`: what is still unsent is thrown away.

    ASGI has no message for that. uvicorn's `receive` is a method of the object that holds the connection's transport.
    """
    transport: Any = getattr(receive, "__self__").transport  # noqa: B009 - a type checker knows no `__self__` here
    if at_once:
        transport.abort()
    else:
        transport.close()
    while (await receive())["type"] != "http.disconnect":
        pass
