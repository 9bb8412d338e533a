"""reply: whose word an answer is, and what a person hears of one that is not the API's (PROTOCOL.md S20)."""

from __future__ import annotations

import pytest

from jobfetcher.sources.worker_api.reply import ForeignAnswer, Reply, UnusableAnswer, failure, own

pytestmark = pytest.mark.fault("S20", "B21", "B22")

JSON, HTML, PLAIN = "application/json", "text/html; charset=utf-8", "text/plain; charset=utf-8"
NGINX = b"<html>\r\n<head><title>404 Not Found</title></head>\r\n<body><center>nginx</center></body>\r\n</html>"


def answer(status: int, kind: str | None, body: bytes, **headers: str) -> Reply:
    return Reply(status, body, headers if kind is None else {"Content-Type": kind, **headers})


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [  # as recorded from deployed servers, but for the last ones
        (204, None, b""),
        (200, JSON, b"{}"),
        (200, JSON, b'{"cognito":{"user_pool_id":"p","client_id":"c","region":"eu-central-1"}}'),
        (200, JSON, b'"pulled"'),
        (201, JSON, b'{"method":"post","url":"http://HOST/bucket","headers":{},"data":{}}'),
        (201, JSON, b"null"),
        (401, JSON, b'{"detail":"Not authenticated"}'),
        (403, JSON, b'{"detail":"Not a member of the \'workers\' group"}'),
        (404, JSON, b'{"detail":"Not Found"}'),
        (422, JSON, b'{"detail":[{"type":"missing","loc":["query","memory"],"msg":"Field required","input":null}]}'),
        (500, PLAIN, b"Internal Server Error"),
        (200, None, b""),
        (200, JSON, b""),
        (202, None, b'"ok"'),
        (200, "application/problem+json", b"{}"),
        (503, JSON, b'{"detail": "busy"}'),
        (404, None, b'{"detail": "Not Found"}'),
    ],
)
def test_the_apis_own_word(status: int, kind: str | None, body: bytes) -> None:
    reply = answer(status, kind, body)
    assert reply.is_own
    assert own(reply, "a call") is reply


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (200, HTML, b"<html><body>Please sign in</body></html>"),
        (200, PLAIN, b"OK\n"),
        (200, HTML, b"{}"),
        (200, PLAIN, b"1"),
        (200, None, b"<html>"),
        (200, JSON, b"<html>"),
        (200, JSON, b'{"1": '),
        (301, None, b""),
        (302, HTML, b"<html>"),
        (307, JSON, b'{"detail": "moved"}'),
        (404, HTML, NGINX),
        (404, None, b""),
        (404, JSON, b""),
        (404, JSON, b"{}"),
        (404, JSON, b'"Not Found"'),
        (404, JSON, b'["detail"]'),
        (404, JSON, b'{"message": "no Route matched with those values"}'),
        (404, PLAIN, b"404 page not found\n"),
        (403, HTML, b"<html>Blocked</html>"),
        (401, JSON, b'{"message": "Unauthorized"}'),
        (429, HTML, b"<html>slow down</html>"),
        (500, HTML, b"<html>Internal Server Error</html>"),
        (500, None, b""),
        (502, PLAIN, b"Internal Server Error"),
        (502, HTML, b"<html>502 Bad Gateway</html>"),
        (503, PLAIN, b"upstream connect error or disconnect/reset before headers"),
        (504, JSON, b'{"message": "Endpoint request timed out"}'),
        (599, None, b"\xff\xfe"),
    ],
)
def test_somebody_elses_page(status: int, kind: str | None, body: bytes) -> None:
    reply = answer(status, kind, body)
    assert not reply.is_own
    with pytest.raises(ForeignAnswer) as error:
        own(reply, "PUT /jobs/7/status")
    assert error.value.status == status
    for named in (str(status), "PUT /jobs/7/status", kind or "no content type"):
        assert named in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600


def test_what_a_person_hears_of_it() -> None:
    page = (
        b"<!-- x --><style>p {}</style>\n<script>alert('<p>')</script><h1>Campus\x1b[2J</h1>\n <p>Please&nbsp;sign in"
    )
    reply = answer(302, HTML, page, location="http://portal.example/login?\x1b[2J", retry_after="7")
    with pytest.raises(ForeignAnswer) as error:
        own(reply, "GET /jobs", "; is API_URL right?")
    assert str(error.value) == (
        "not the worker API but something before it answered 302 to GET /jobs; a gateway, filter or sign-in page? It is"
        ": 302 Found, text/html; charset=utf-8, Location http://portal.example/login?\\x1b[2J, it begins:"
        " Campus\\x1b[2J Please&nbsp;sign in; is API_URL right?"
    )


@pytest.mark.fault("B11")
@pytest.mark.fault("B21")
@pytest.mark.parametrize(
    ("kind", "page"),
    [
        ("text/html", "<html><head><title>400 The plain HTTP request was sent to HTTPS port</title></head></html>"),
        ("text/html", "<p>Reason: You're speaking plain HTTP to an SSL-enabled server port.<br /></p>"),
        ("text/plain; charset=utf-8", "Client sent an HTTP request to an HTTPS server.\n"),
    ],
)
def test_a_port_that_wants_tls_is_told_by_what_it_says(kind: str, page: str) -> None:
    with pytest.raises(ForeignAnswer, match="this port wants TLS: the address must begin with https://") as told:
        own(Reply(400, page.encode(), {"Content-Type": kind}), "GET /jobs", hint="; is it a gateway?")
    assert "gateway" not in str(told.value)


def test_a_page_may_ask_for_patience() -> None:
    with pytest.raises(ForeignAnswer) as error:
        own(Reply(503, b"busy", {"Retry-After": "17"}), "a call")
    assert error.value.retry_after_s == 17


@pytest.mark.fault("B15")
def test_what_json_permits_and_nobody_should_act_upon_is_still_the_apis() -> None:
    reply = answer(200, JSON, b'{"7": {"a": 1, "a": 2}}')
    assert own(reply, "a call") is reply
    for _ in range(2):
        with pytest.raises(UnusableAnswer, match="the same key twice"):
            reply.json()
    assert not answer(404, JSON, b'{"detail": 1, "detail": 2}').is_own


@pytest.mark.fault("B6")
def test_only_the_apis_own_403_is_about_the_account() -> None:
    assert "in the group 'workers'" in str(failure(answer(403, JSON, b'{"detail":"no"}'), "a call"))
    with pytest.raises(ForeignAnswer) as error:
        own(answer(403, HTML, b"<html>Blocked</html>"), "a call")
    assert "workers'" not in str(error.value)
