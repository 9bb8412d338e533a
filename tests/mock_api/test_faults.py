"""Fault switches: what a client meets on the wire when a rule acts."""

import time

import httpx
import pytest

from tests.mock_api.calls import pull, put
from tests.support.mock_server import API_CALLS, STORAGE_CALLS, MockServer, job_spec

CONTENT = bytes(range(256)) * 400


@pytest.fixture
def url(mock: MockServer, worker: httpx.Client) -> str:
    """A signed URL of CONTENT."""
    file_id = mock.put_input("data.bin", CONTENT)
    return str(worker.get(f"/files/{file_id}/url").json()["url"])


def fetch(url: str, **headers: str) -> httpx.Response:
    return httpx.get(url, headers=headers, trust_env=False)


def test_a_status_with_body_and_headers_acts_as_often_as_told(mock: MockServer, worker: httpx.Client) -> None:
    job_id = mock.submit(job_spec())
    mock.set_faults(
        {"method": "GET", "path": "^/jobs$", "skip": 1, "times": 2, "status": 503, "body": "busy", "retry_after": 7}
    )
    assert pull(worker) == [job_id]
    for _ in range(2):
        answer = worker.get("/jobs", params={"memory": 1})
        assert (answer.status_code, answer.text, answer.headers["retry-after"]) == (503, "busy", "7")
    assert pull(worker) == []
    assert [event["code"] for event in mock.events("fault")] == [503, 503]


def test_the_request_is_not_handled_where_a_status_stands_in(mock: MockServer, worker: httpx.Client) -> None:
    job_id = mock.submit(job_spec())
    assert pull(worker) == [job_id]
    mock.set_faults({"method": "PUT", "status": 500, "times": 1})
    assert put(worker, job_id, "preprocessing") == 500
    assert mock.state(job_id) == "pulled"
    assert mock.events("update") == []


def test_a_dropped_reply_was_handled_and_a_dropped_request_was_not(mock: MockServer, worker: httpx.Client) -> None:
    job_id = mock.submit(job_spec())
    assert pull(worker) == [job_id]
    mock.set_faults({"method": "PUT", "drop": "after", "times": 1}, {"method": "PUT", "drop": "before", "times": 1})
    with pytest.raises(httpx.TransportError):
        put(worker, job_id, "preprocessing")
    assert mock.state(job_id) == "preprocessing"
    with pytest.raises(httpx.TransportError):
        put(worker, job_id, "running")
    assert mock.state(job_id) == "preprocessing"
    assert put(worker, job_id, "running") == 204


def test_garbage_is_an_html_page_with_200(mock: MockServer, worker: httpx.Client) -> None:
    mock.set_faults({"path": "/jobs", "garbage": True})
    answer = worker.get("/jobs", params={"memory": 1})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "<html>" in answer.text


PAGES = {
    "no_backend": (404, "text/html", "nginx"),
    "forbidden": (403, "text/html", "Blocked"),
    "redirect": (302, "text/html", "nginx"),
    "login": (200, "text/html", "sign in"),
    "bad_gateway": (502, "text/html", "nginx"),
    "unavailable": (503, "text/html", "nginx"),
    "plain": (200, "text/plain", "OK"),
}


@pytest.mark.fault("S20")
@pytest.mark.parametrize("page", PAGES)
def test_a_page_stands_in_for_the_api_and_for_the_storage_and_nothing_is_handled(
    mock: MockServer, worker: httpx.Client, url: str, page: str
) -> None:
    job_id = mock.submit(job_spec())
    assert pull(worker) == [job_id]
    form = worker.post(f"/jobs/{job_id}/files/url", params={"type": "output", "base_path": "out"}).json()
    mock.set_faults({"page": page, "path": API_CALLS}, {"page": page, "path": STORAGE_CALLS})
    answers = [
        worker.get("/jobs", params={"memory": 1}),
        worker.put(f"/jobs/{job_id}/status", params={"status": "finished"}),
        worker.get(f"/jobs/{job_id}/status"),
        worker.get("/access_info"),
        worker.post("/", json={}),
        worker.post(f"/jobs/{job_id}/files/url", params={"type": "output"}),
        httpx.get(url, trust_env=False),
        httpx.put(url, content=b"x", trust_env=False),
        httpx.post(form["url"], data=form["data"], files={"file": ("x", b"x")}, trust_env=False),
    ]
    for answer in answers:
        assert (answer.status_code, answer.headers["content-type"].split(";")[0]) == PAGES[page][:2]
        assert PAGES[page][2] in answer.text
    assert [event["note"].split()[-1] for event in mock.events("fault")] == [page] * len(answers)
    mock.set_faults()
    assert (mock.queue_state(job_id), mock.results(job_id)) == ("pulled", {})
    if page == "redirect":
        followed = httpx.get(answers[0].headers["location"], trust_env=False)
        assert (followed.status_code, followed.headers["content-type"]) == (200, "text/html; charset=utf-8")


def test_a_rate_meets_a_share_of_the_requests_the_same_ones_for_the_same_seed(
    mock: MockServer, worker: httpx.Client
) -> None:
    def seen(seed: int) -> list[int]:
        mock.set_faults({"page": "any", "path": API_CALLS, "rate": 0.3, "seed": seed})
        return [worker.get("/jobs/1/status").status_code for _ in range(200)]

    first = seen(1)
    met = len(mock.events("fault"))
    assert 40 <= met <= 80  # 60 +- 3 standard deviations of 6.5
    assert set(first) == {200, 302, 403, 404, 502, 503}
    assert seen(1) == first
    assert seen(2) != first


def test_a_delay_is_before_the_handling(mock: MockServer, worker: httpx.Client) -> None:
    job_id = mock.submit(job_spec())
    mock.set_faults({"path": "^/jobs$", "delay_s": 0.5, "times": 1})
    with pytest.raises(httpx.ReadTimeout):
        worker.get("/jobs", params={"memory": 1}, timeout=0.1)
    assert mock.wait_for_state(job_id, "pulled", timeout_s=10) == "pulled"  # S1: the reply is lost, the job is gone
    [fault], [pull] = mock.events("fault"), mock.events("pull")
    assert pull["time"] - fault["time"] >= 0.5


def test_tokens_can_expire_in_the_middle(mock: MockServer) -> None:
    body = {
        "AuthFlow": "USER_PASSWORD_AUTH",
        "ClientId": "mock-client",
        "AuthParameters": {"USERNAME": "worker", "PASSWORD": "worker-password"},
    }
    target = {"X-Amz-Target": "AWSCognitoIdentityProviderService.InitiateAuth"}
    with httpx.Client(base_url=mock.url, trust_env=False) as client:
        token = client.post("/", json=body, headers=target).json()["AuthenticationResult"]["IdToken"]
        client.headers["Authorization"] = f"Bearer {token}"
        mock.set_faults({"path": "^/jobs$", "skip": 1, "times": 1, "expire_tokens": True})
        codes = [client.get("/jobs", params={"memory": 1}).status_code for _ in range(3)]
        assert codes == [200, 401, 401]


@pytest.mark.fault("S15")
def test_headers_can_be_nested_once(mock: MockServer, worker: httpx.Client) -> None:
    file_id = mock.put_input("x", b"x")
    mock.set_faults({"path": "/url$", "times": 1, "nested_headers": True})
    nested, plain = (worker.get(f"/files/{file_id}/url").json()["headers"] for _ in range(2))
    assert nested == {"x-nested": {"a": "b", "c": ["d"]}}
    assert plain == {}


def test_a_body_is_cut_after_n_bytes(mock: MockServer, url: str) -> None:
    mock.set_faults({"path": "/_storage", "cut_after": 1000, "times": 1})
    got = bytearray()
    with httpx.stream("GET", url, trust_env=False) as answer:
        assert answer.headers["content-length"] == str(len(CONTENT))
        with pytest.raises(httpx.RemoteProtocolError):
            _collect(answer, got)
    assert bytes(got) == CONTENT[:1000]
    assert fetch(url).content == CONTENT


def _collect(answer: httpx.Response, into: bytearray) -> None:
    for data in answer.iter_raw():
        into.extend(data)


def test_a_byte_is_flipped(mock: MockServer, url: str) -> None:
    mock.set_faults({"path": "/_storage", "flip_at": 5000, "times": 1})
    broken = fetch(url)
    assert [i for i, byte in enumerate(broken.content) if byte != CONTENT[i]] == [5000]
    assert fetch(url).content == CONTENT


def test_a_body_can_be_slow(mock: MockServer, url: str) -> None:
    mock.set_faults({"path": "/_storage", "bytes_per_s": 200_000})
    started = time.monotonic()
    assert fetch(url).content == CONTENT
    assert time.monotonic() - started > 0.4  # 102,400 bytes at 200,000 a second are 0.5 s


def test_ranges_can_be_unsupported(mock: MockServer, url: str) -> None:
    mock.set_faults({"path": "/_storage", "no_range": True, "times": 1})
    assert fetch(url, Range="bytes=5-").status_code == 200
    assert fetch(url, Range="bytes=5-").status_code == 206


def test_rules_are_listed_counted_down_and_cleared(mock: MockServer, worker: httpx.Client) -> None:
    with httpx.Client(base_url=mock.url, trust_env=False) as control:
        control.post("/_mock/faults", json={"path": "/jobs", "times": 2, "status": 500})
        control.post("/_mock/faults", json=[{"path": "/other", "status": 404}])
        assert worker.get("/jobs", params={"memory": 1}).status_code == 500
        listed = control.get("/_mock/faults").json()
        assert [(rule["path"], rule["times"]) for rule in listed] == [("/jobs", 1), ("/other", None)]
        assert control.delete("/_mock/faults").status_code == 204
        assert control.get("/_mock/faults").json() == []
    assert worker.get("/jobs", params={"memory": 1}).status_code == 200


@pytest.mark.parametrize("rule", [{"path": "("}, {"stauts": 500}, {"status": 42}, {"drop": "sometimes"}])
def test_a_rule_that_cannot_be_read_is_refused(mock: MockServer, rule: dict[str, object]) -> None:
    with pytest.raises(httpx.HTTPStatusError, match="422"):
        mock.set_faults(rule)


def test_the_switches_themselves_never_fail(mock: MockServer) -> None:
    mock.set_faults({"status": 500})
    assert [event["kind"] for event in mock.events()] == []
    mock.set_faults()
