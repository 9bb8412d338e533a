"""Pages of what stands between a worker and a server: gateways, filters, portals. None of them is the API's word (S20).

Used by `faults`, which answers a request with one of them in the API's place or the storage's.
"""

from dataclasses import dataclass
from enum import StrEnum

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response

PORTAL_PATH = "/_portal/login"

router = APIRouter()


class Page(StrEnum):
    """Who answers, and what."""

    NO_BACKEND = "no_backend"
    FORBIDDEN = "forbidden"
    REDIRECT = "redirect"
    LOGIN = "login"
    BAD_GATEWAY = "bad_gateway"
    UNAVAILABLE = "unavailable"
    PLAIN = "plain"


@dataclass(frozen=True)
class _Text:
    status: int
    body: str
    kind: str = "text/html"


def _nginx(title: str) -> str:
    return (
        f"<html>\r\n<head><title>{title}</title></head>\r\n<body>\r\n<center><h1>{title}</h1></center>\r\n"
        "<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n"
    )


_LOGIN = """<!DOCTYPE html>
<html><head><title>Campus network</title></head>
<body><h1>Please sign in to use the network</h1>
<form method="post"><input name="user"><input name="password" type="password"><button>Sign in</button></form>
</body></html>
"""

_TEXTS = {
    Page.NO_BACKEND: _Text(404, _nginx("404 Not Found")),
    Page.FORBIDDEN: _Text(403, "<html><body><h1>Blocked</h1><p>This category is not allowed here.</p></body></html>"),
    Page.REDIRECT: _Text(302, _nginx("302 Found")),
    Page.LOGIN: _Text(200, _LOGIN),
    Page.BAD_GATEWAY: _Text(502, _nginx("502 Bad Gateway")),
    Page.UNAVAILABLE: _Text(503, _nginx("503 Service Temporarily Unavailable")),
    Page.PLAIN: _Text(200, "OK\n", "text/plain"),
}


def answer(page: Page, origin: str) -> Response:
    """The page; a redirect leads to the portal's sign-in page at `origin`, which is a page with 200 in turn."""
    text = _TEXTS[page]
    headers = {"Location": f"{origin}{PORTAL_PATH}"} if page is Page.REDIRECT else None
    return Response(text.body, text.status, headers, media_type=text.kind)


@router.get(PORTAL_PATH, include_in_schema=False)
async def portal() -> HTMLResponse:
    """The sign-in page that a redirect leads to."""
    return HTMLResponse(_LOGIN)
