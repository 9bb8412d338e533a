"""Files in and out, over the server's own signed URLs and forms and over a local-disk server's: rows S13 to S15."""

import hashlib
import http.client
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest

from tests.mock_api.calls import MOCK_TOKEN, pull, put, worker_client
from tests.support.mock_server import MockServer, job_spec, running_mock_api
from tests.support.services import wait_until

CONTENT = bytes(range(256)) * 41
LIMIT_BYTES = 3_000_000  # more than the server gathers before it writes, so that there is a part to leave behind
ETAG = f'"{hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()}"'


@pytest.fixture
def held(mock: MockServer, worker: httpx.Client) -> int:
    """A job that the worker holds."""
    job_id = mock.submit(job_spec())
    assert pull(worker) == [job_id]
    return job_id


@pytest.fixture
def url(mock: MockServer, worker: httpx.Client) -> str:
    """A signed URL of an object with CONTENT."""
    return str(ask_download(worker, mock.put_input("data.bin", CONTENT))["url"])


def ask_download(worker: httpx.Client, file_id: str) -> dict[str, Any]:
    path = "/".join(quote(segment, safe="") for segment in file_id.split("/"))
    return dict(worker.get(f"/files/{path}/url").raise_for_status().json())


def ask_upload(
    worker: httpx.Client, job_id: int, kind: str = "output", base_path: str = "", **more: str
) -> dict[str, Any]:
    answer = worker.post(f"/jobs/{job_id}/files/url", params={"type": kind, "base_path": base_path, **more})
    assert answer.status_code == 201
    return dict(answer.json())


def send_form(answer: dict[str, Any], filename: str, content: bytes) -> httpx.Response:
    return httpx.post(
        answer["url"],
        headers=answer["headers"],
        data=answer["data"],
        files={"file": (filename, content)},
        trust_env=False,
    )


def fetch(url: str, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.get(url, headers=named, trust_env=False)


def error_code(answer: httpx.Response) -> str:
    """The `Code` of an S3-like XML error."""
    assert answer.headers["content-type"] == "application/xml"
    return answer.text.partition("<Code>")[2].partition("</Code>")[0]


# -- downloads ---------------------------------------------------------------------------------------------------------


def test_a_download_answer_is_a_get_whose_url_needs_no_token(mock: MockServer, worker: httpx.Client) -> None:
    answer = ask_download(worker, mock.put_input("a b/ü.tif", CONTENT))
    assert (answer["method"], answer["headers"], answer["data"]) == ("get", {}, {})
    got = fetch(answer["url"])
    assert (got.status_code, got.content, got.headers["etag"]) == (200, CONTENT, ETAG)
    assert got.headers["content-length"] == str(len(CONTENT))


def test_a_file_id_is_an_s3_uri_of_the_servers_own_bucket(mock: MockServer, worker: httpx.Client) -> None:
    file_id = mock.put_input("a/x.tif", CONTENT)
    assert file_id == "s3://mock-api/inputs/a/x.tif"
    assert fetch(ask_download(worker, file_id)["url"]).content == CONTENT
    assert [event["note"] for event in mock.events("sign_download")] == [file_id]
    for path, reason in (
        ("s3%3A//some-bucket/inputs/a/x.tif", "Bucket does not match"),
        ("/inputs/a/x.tif", "Path should start with s3://"),
        ("inputs/a/x.tif", "Path should start with s3://"),
    ):
        answer = worker.get(f"/files/{path}/url")
        assert (answer.status_code, answer.json()) == (403, {"detail": reason})


def test_a_file_id_may_itself_end_in_url_and_hold_reserved_characters(mock: MockServer, worker: httpx.Client) -> None:
    for name in ("url", "a?b#c%20d&e=f", "download"):
        file_id = mock.put_input(f"odd/{name}", name.encode())
        assert fetch(ask_download(worker, file_id)["url"]).content == name.encode()


@pytest.mark.parametrize("path", ["inputs/..%2F..%2Fsecret", "inputs/%2E%2E/%2E%2E/secret", "../parts"])
def test_dot_segments_reach_nothing(mock: MockServer, worker: httpx.Client, path: str) -> None:
    mock.put_input("x", b"")
    connection = http.client.HTTPConnection(urlsplit(mock.url).netloc)  # unlike httpx it sends the path as it is
    connection.request("GET", f"/files/s3%3A//mock-api/{path}/url", headers={"Authorization": f"Bearer {MOCK_TOKEN}"})
    assert connection.getresponse().status == 404
    connection.close()


def test_an_input_that_is_nowhere_is_a_404_of_the_api(worker: httpx.Client) -> None:
    assert worker.get("/files/s3%3A//mock-api/inputs/none.tif/url").status_code == 404


@pytest.mark.fault("S14")
def test_a_url_for_a_missing_object_with_the_right_prefix_is_handed_out_and_the_storage_says_404(
    mock: MockServer, worker: httpx.Client
) -> None:
    file_id = mock.put_input("a.tif.bak", b"x").removesuffix(".bak")
    answer = fetch(ask_download(worker, file_id)["url"])
    assert (answer.status_code, error_code(answer)) == (404, "NoSuchKey")


@pytest.mark.fault("S13")
def test_a_url_lives_600_s(mock: MockServer, url: str) -> None:
    mock.advance(590)
    assert fetch(url).status_code == 200
    mock.advance(20)
    answer = fetch(url)
    assert (answer.status_code, error_code(answer)) == (403, "AccessDenied")
    assert "<Message>Request has expired</Message>" in answer.text


def test_a_url_is_good_for_its_object_and_method_only(mock: MockServer, url: str) -> None:
    mock.put_input("data.bix", b"secret")
    assert error_code(fetch(url.replace("data.bin", "data.bix"))) == "SignatureDoesNotMatch"
    assert error_code(fetch(url.replace("expires=1", "expires=9"))) == "SignatureDoesNotMatch"
    assert error_code(fetch(url.partition("?")[0])) == "AccessDenied"
    assert error_code(httpx.put(url, content=b"mine", trust_env=False)) == "SignatureDoesNotMatch"
    assert fetch(url).content == CONTENT


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=10-19", 10, 19),
        ("bytes=10000-", 10000, len(CONTENT) - 1),
        ("bytes=-7", len(CONTENT) - 7, len(CONTENT) - 1),
        (f"bytes=0-{10**9}", 0, len(CONTENT) - 1),
        (f"bytes=-{10**9}", 0, len(CONTENT) - 1),
    ],
)
def test_ranges(url: str, asked: str, first: int, last: int) -> None:
    answer = fetch(url, Range=asked)
    assert (answer.status_code, answer.content) == (206, CONTENT[first : last + 1])
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{len(CONTENT)}"
    assert answer.headers["etag"] == ETAG


@pytest.mark.parametrize("asked", ["bytes=5-4", "bytes=0-1,3-4", "lines=1-2", "bytes=-", "bytes=a-b"])
def test_a_range_that_cannot_be_read_is_ignored(url: str, asked: str) -> None:
    assert fetch(url, Range=asked).status_code == 200


@pytest.mark.parametrize("asked", [f"bytes={len(CONTENT)}-", f"bytes={10**9}-{10**9 + 1}", "bytes=-0"])
def test_a_range_outside_is_416(url: str, asked: str) -> None:
    answer = fetch(url, Range=asked)
    assert (answer.status_code, error_code(answer)) == (416, "InvalidRange")
    assert answer.headers["content-range"] == f"bytes */{len(CONTENT)}"


def test_if_range_and_if_none_match(mock: MockServer, url: str) -> None:
    assert fetch(url, Range="bytes=5-", If_Range=ETAG).status_code == 206
    assert fetch(url, If_None_Match=ETAG).status_code == 304
    mock.put_input("data.bin", b"other content")
    changed = fetch(url, Range="bytes=5-", If_Range=ETAG)
    assert (changed.status_code, changed.content) == (200, b"other content")
    assert fetch(url, If_None_Match=ETAG).status_code == 200


@pytest.mark.parametrize("asked", [ETAG, f"W/{ETAG}", f'"other", {ETAG}', f'"other",W/{ETAG}', "*"])
def test_what_the_reader_has_already_is_not_sent(url: str, asked: str) -> None:
    answer = fetch(url, If_None_Match=asked, Range="bytes=0-3")
    assert (answer.status_code, answer.content) == (304, b"")
    assert answer.headers["etag"] == ETAG
    assert "content-range" not in answer.headers
    assert answer.headers.get("content-length", "0") == "0"


@pytest.mark.parametrize("asked", ['"other"', ETAG.strip('"'), ETAG[:-2] + '"', '"*"', ""])
def test_what_the_reader_has_not_is_sent(url: str, asked: str) -> None:
    assert fetch(url, If_None_Match=asked).content == CONTENT


@pytest.mark.parametrize(
    ("condition", "status"), [(ETAG, 206), (f"W/{ETAG}", 200), ('"other"', 200), ("Thu, 01 Jan 1970 00:00:00 GMT", 200)]
)
def test_a_range_of_the_same_object_only(url: str, condition: str, status: int) -> None:
    answer = fetch(url, Range="bytes=1-2", If_Range=condition)
    assert (answer.status_code, answer.headers["accept-ranges"]) == (status, "bytes")
    assert answer.content == (CONTENT[1:3] if status == 206 else CONTENT)
    assert ("content-range" in answer.headers) == (status == 206)
    assert fetch(url, Range="bytes=1-2", If_Range=answer.headers["last-modified"]).status_code == 206


def test_a_range_of_a_large_object_has_its_exact_length(mock: MockServer, worker: httpx.Client) -> None:
    content = os.urandom(3 * 1024**2 + 7)
    url = ask_download(worker, mock.put_input("large", content))["url"]
    answer = fetch(url, Range="bytes=1000-2500000")
    assert (answer.status_code, answer.content) == (206, content[1000:2500001])
    assert answer.headers["content-length"] == "2499001"
    assert answer.headers["content-range"] == f"bytes 1000-2500000/{len(content)}"


def test_an_empty_object_has_no_ranges(mock: MockServer, worker: httpx.Client) -> None:
    url = ask_download(worker, mock.put_input("empty", b""))["url"]
    assert (fetch(url).status_code, fetch(url).headers["content-length"]) == (200, "0")
    answer = fetch(url, Range="bytes=0-")
    assert (answer.status_code, answer.headers["content-range"]) == (416, "bytes */0")


def test_a_url_signed_for_get_is_not_good_for_head(url: str) -> None:
    assert httpx.head(url, trust_env=False).status_code == 403


def test_an_object_put_there_by_other_hands_has_an_etag_that_follows_its_content(
    mock: MockServer, worker: httpx.Client
) -> None:
    url = ask_download(worker, mock.put_input("mine", b"first"))["url"]
    before = fetch(url).headers["etag"]
    (mock.data_dir / "files/inputs/mine").write_bytes(b"other")
    after = fetch(url, If_None_Match=before)
    assert (after.status_code, after.content) == (200, b"other")
    assert after.headers["etag"] == f'"{hashlib.md5(b"other", usedforsecurity=False).hexdigest()}"'


def test_a_token_or_an_unsigned_amz_header_beside_the_signature_is_refused(mock: MockServer, url: str) -> None:
    assert mock.violations() == []
    answer = fetch(url, Authorization=f"Bearer {MOCK_TOKEN}")
    assert (answer.status_code, error_code(answer)) == (400, "InvalidArgument")
    assert [found["rule"] for found in mock.violations()] == [
        "Authorization header sent to the storage: /_storage/inputs/data.bin"
    ]
    assert fetch(url, x_amz_checksum_mode="ENABLED").status_code == 403


def test_traffic_is_counted(mock: MockServer, url: str) -> None:
    fetch(url)
    fetch(url, Range="bytes=0-9")
    fetch(url, If_None_Match=ETAG)
    fetch(url, Range=f"bytes={len(CONTENT)}-")
    assert mock.traffic()["inputs/data.bin"] == {"gets": 2, "unchanged": 1, "sent": len(CONTENT) + 10, "puts": 1}


def test_only_bytes_that_went_out_are_counted(mock: MockServer, worker: httpx.Client) -> None:
    """A reader that leaves after the first bytes of a large file is not said to have had all of it."""
    size = 64 * 1024**2
    file_id = mock.put_input("large", bytes(size))
    place = urlsplit(ask_download(worker, file_id)["url"])
    with socket.create_connection((place.hostname or "", place.port or 0)) as connection:
        connection.sendall(f"GET {place.path}?{place.query} HTTP/1.1\r\nHost: {place.netloc}\r\n\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 200"
    wait_until(lambda: mock.traffic()["inputs/large"]["gets"] == 1, "the server to count it")
    assert mock.traffic()["inputs/large"]["sent"] < size


# -- uploads -----------------------------------------------------------------------------------------------------------


def test_a_form_stores_any_file_of_its_folder(mock: MockServer, worker: httpx.Client, held: int) -> None:
    answer = ask_upload(worker, held, "artifact", "model/a")
    assert answer["method"] == "post"
    sent = send_form(answer, "b.pt", CONTENT)
    assert (sent.status_code, sent.headers["etag"]) == (204, ETAG)
    assert send_form(answer, "ü c.pt", b"").status_code == 204
    assert send_form(answer, "../../elsewhere/d.pt", b"d").status_code == 204  # as on S3: what follows the last slash
    assert mock.results(held) == {
        "artifact/model/a/b.pt": CONTENT,
        "artifact/model/a/ü c.pt": b"",
        "artifact/model/a/d.pt": b"d",
    }
    assert (mock.data_dir / f"files/outputs/{held}/artifact/model/a/b.pt").read_bytes() == CONTENT


def test_an_empty_base_path_is_the_kinds_own_folder(mock: MockServer, worker: httpx.Client, held: int) -> None:
    assert send_form(ask_upload(worker, held, "log"), "x.log", b"x").status_code == 204
    assert mock.results(held) == {"log/x.log": b"x"}


@pytest.mark.fault("S13")
def test_a_form_lives_600_s(mock: MockServer, worker: httpx.Client, held: int) -> None:
    answer = ask_upload(worker, held)
    mock.advance(590)
    assert send_form(answer, "in-time", b"x").status_code == 204
    mock.advance(20)
    late = send_form(answer, "late", b"x")
    assert (late.status_code, error_code(late)) == (403, "AccessDenied")
    assert "Policy expired" in late.text
    assert list(mock.results(held)) == ["output/in-time"]


def test_a_form_is_good_for_its_folder_only_and_cannot_be_altered(
    mock: MockServer, worker: httpx.Client, held: int
) -> None:
    answer = ask_upload(worker, held, "output", "out")
    for change, code in (
        ({"key": "inputs/${filename}"}, "AccessDenied"),
        ({"key": f"outputs/{held}/output/out2/x"}, "AccessDenied"),
        ({"policy": "e30="}, "SignatureDoesNotMatch"),
        ({"x-amz-signature": "00"}, "SignatureDoesNotMatch"),
    ):
        refused = send_form({**answer, "data": {**answer["data"], **change}}, "x", b"x")
        assert (refused.status_code, error_code(refused)) == (403, code)
    sneaky = send_form(
        {**answer, "data": {**answer["data"], "key": f"outputs/{held}/output/out/../../../../x"}}, "x", b""
    )
    assert (sneaky.status_code, error_code(sneaky)) == (400, "InvalidURI")
    assert mock.results(held) == {}


def test_fields_behind_the_file_do_not_count(worker: httpx.Client, held: int) -> None:
    answer = ask_upload(worker, held)
    parts = [("file", ("x", b"x")), *((name, (None, value)) for name, value in answer["data"].items())]
    refused = httpx.post(answer["url"], files=parts, trust_env=False)
    assert (refused.status_code, error_code(refused)) == (403, "AccessDenied")


def test_an_upload_without_a_length_is_411(worker: httpx.Client, held: int) -> None:
    def chunked() -> Iterator[bytes]:
        yield b"--b\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    form = httpx.post(ask_upload(worker, held)["url"], content=chunked(), headers=headers, trust_env=False)
    assert (form.status_code, error_code(form)) == (411, "MissingContentLength")


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("multipart/form-data; boundary=b", b"not a form", 400),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="key"\r\n\r\nx\r\n--b--\r\n',
            400,
        ),
        ("application/json", b"{}", 412),
    ],
)
def test_a_body_that_is_no_form_is_refused(
    worker: httpx.Client, held: int, content_type: str, body: bytes, status: int
) -> None:
    url = ask_upload(worker, held)["url"]
    answer = httpx.post(url, content=body, headers={"Content-Type": content_type}, trust_env=False)
    assert answer.status_code == status


def test_a_form_cut_in_the_middle_stores_nothing(mock: MockServer, worker: httpx.Client, held: int) -> None:
    answer = ask_upload(worker, held)
    request = httpx.Request("POST", answer["url"], data=answer["data"], files={"file": ("x", bytes(LIMIT_BYTES))})
    body = request.read()
    parts = mock.data_dir / "parts"
    place = urlsplit(answer["url"])
    with socket.create_connection((place.hostname or "", place.port or 0)) as connection:
        head = f"POST {place.path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(f"{head}Content-Type: {request.headers['content-type']}\r\n\r\n".encode())
        connection.sendall(body[:-2000])
        wait_until(lambda: any(parts.iterdir()), "the server to write what it got")
    wait_until(lambda: not any(parts.iterdir()), "the server to notice and clean up")
    assert send_form(answer, "whole", b"x").status_code == 204
    assert mock.results(held) == {"output/whole": b"x"}


@pytest.mark.fault("S13")
def test_an_object_that_is_too_large_is_refused_whatever_the_way(tmp_path: Path) -> None:
    for method in ("post", "put"):
        with (
            running_mock_api(tmp_path / method, max_object_bytes=LIMIT_BYTES, upload_method=method) as mock,
            worker_client(mock) as worker,
        ):
            job_id = mock.submit(job_spec())
            assert pull(worker) == [job_id]
            answer = ask_upload(worker, job_id, filename="x")
            for size in (LIMIT_BYTES, LIMIT_BYTES + 1):
                if method == "post":
                    sent = send_form(answer, "x", bytes(size))
                else:
                    sent = httpx.put(answer["url"], content=bytes(size), trust_env=False)
                assert sent.is_success == (size == LIMIT_BYTES)
            assert error_code(sent) == "EntityTooLarge"
            assert mock.results(job_id) == {"output/x": bytes(LIMIT_BYTES)}
            assert list((mock.data_dir / "parts").iterdir()) == []


def test_a_server_set_to_put_signs_one_object(tmp_path: Path) -> None:
    with running_mock_api(tmp_path, upload_method="put") as mock, worker_client(mock) as worker:
        job_id = mock.submit(job_spec())
        assert pull(worker) == [job_id]
        answer = ask_upload(worker, job_id, "output", "out", filename="a b.csv")
        assert (answer["method"], answer["data"]) == ("put", {})
        sent = httpx.put(answer["url"], content=CONTENT, trust_env=False)
        assert (sent.status_code, sent.headers["etag"]) == (200, ETAG)
        assert mock.results(job_id) == {"output/out/a b.csv": CONTENT}
        assert ask_upload(worker, job_id, "output", "out")["method"] == "post"  # no file name was sent
        late = ask_upload(worker, job_id, filename="late")
        mock.advance(601)
        refused = httpx.put(late["url"], content=b"", trust_env=False)
        assert (refused.status_code, "Request has expired" in refused.text) == (403, True)
        chunked = httpx.put(ask_upload(worker, job_id, filename="x")["url"], content=iter([b"x"]), trust_env=False)
        assert (chunked.status_code, error_code(chunked)) == (411, "MissingContentLength")


def test_deployed_servers_ignore_the_file_name(worker: httpx.Client, held: int) -> None:
    assert ask_upload(worker, held, filename="x")["method"] == "post"


@pytest.mark.parametrize("base_path", ["..", "a/../../b", "./a"])
def test_a_form_for_a_folder_outside_the_jobs_is_handed_out_and_good_for_nothing(
    mock: MockServer, worker: httpx.Client, held: int, base_path: str
) -> None:
    refused = send_form(ask_upload(worker, held, "output", base_path), "x", b"x")
    assert (refused.status_code, error_code(refused)) == (400, "InvalidURI")
    assert mock.results(held) == {}


def test_an_absolute_upload_folder_is_refused(worker: httpx.Client, held: int) -> None:
    answer = worker.post(f"/jobs/{held}/files/url", params={"type": "output", "base_path": "/etc"})
    assert (answer.status_code, answer.json()) == (403, {"detail": "Path should start with s3://"})


def test_an_unknown_kind_of_file_is_refused(worker: httpx.Client, held: int) -> None:
    assert worker.post(f"/jobs/{held}/files/url", params={"type": "other", "base_path": ""}).status_code == 422


def test_names_of_255_bytes_and_no_more(mock: MockServer, worker: httpx.Client, held: int) -> None:
    answer = ask_upload(worker, held)
    assert send_form(answer, "n" * 255, b"x").status_code == 204
    assert send_form(answer, "n" * 256, b"x").status_code == 400
    assert list(mock.results(held)) == ["output/" + "n" * 255]


@pytest.mark.fault("S15")
def test_nested_headers_by_setting(tmp_path: Path) -> None:
    with running_mock_api(tmp_path, nested_headers=True) as mock, worker_client(mock) as worker:
        job_id = mock.submit(job_spec())
        assert pull(worker) == [job_id]
        file_id = mock.put_input("x", b"x")
        for answer in (ask_download(worker, file_id), ask_upload(worker, job_id)):
            assert any(isinstance(value, dict) for value in answer["headers"].values())


# -- a local-disk server -----------------------------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path: Path) -> Iterator[MockServer]:
    with running_mock_api(tmp_path / "local", file_mode="local") as server:
        yield server


def test_local_urls_are_on_the_api_and_carry_the_callers_token(local: MockServer) -> None:
    with worker_client(local) as worker:
        file_id = local.put_input("user/a b.tif", CONTENT)
        assert file_id == "/inputs/user/a b.tif"
        answer = ask_download(worker, file_id)
        assert answer["headers"] == {"authorization": f"Bearer {MOCK_TOKEN}"}
        assert answer["url"] == f"{local.url}/files//inputs/user/a b.tif/download"  # decoded, as it is asked for
        assert fetch(answer["url"]).status_code == 401
        whole = fetch(answer["url"], **answer["headers"])
        assert (whole.content, whole.headers["content-type"]) == (CONTENT, "image/tiff")
        assert whole.headers["etag"] not in (ETAG, "")  # made of time and size
        part = fetch(answer["url"], Range="bytes=3-", If_Range=whole.headers["etag"], **answer["headers"])
        assert (part.status_code, part.content) == (206, CONTENT[3:])
        again = fetch(answer["url"], If_None_Match=whole.headers["etag"], **answer["headers"])
        assert (again.status_code, again.content) == (200, CONTENT)  # no other condition is looked at
        sent = 2 * len(CONTENT) + len(CONTENT) - 3
        assert local.traffic()["inputs/user/a b.tif"] == {"gets": 3, "unchanged": 0, "sent": sent, "puts": 1}


def test_a_local_address_is_the_decoded_one_that_was_asked_with_every_url_in_it_replaced(local: MockServer) -> None:
    with worker_client(local) as worker:
        for name in ("ü ö.tif", "a%41b.tif", "a#b?c.tif", "url/url"):
            answer = ask_download(worker, local.put_input(name, CONTENT))
            assert answer["url"] == f"{local.url}/files//inputs/{name}/download"
        assert worker.get("/files//inputs/url/url/url", params={"x": "/url"}).json()["url"].endswith("/url?x=%2Furl")
        job_id = local.submit(job_spec())
        assert pull(worker) == [job_id]
        asked = httpx.URL(f"{local.url}/jobs/{job_id}/files/url?type=output&base_path=a/url/ü")
        url = worker.post(asked).json()["url"]
        assert url == f"{local.url}/jobs/{job_id}/files/upload?type=output&base_path=a/upload/%C3%BC"


def test_an_upload_whose_address_names_no_folder_is_refused(local: MockServer) -> None:
    with worker_client(local) as worker:
        job_id = local.submit(job_spec())
        assert pull(worker) == [job_id]
        answer = worker.post(f"/jobs/{job_id}/files/url", params={"type": "log"}).json()
        refused = send_form(answer, "x.log", b"x")
        assert (refused.status_code, refused.json()["detail"][0]["loc"]) == (422, ["query", "base_path"])
        assert send_form(ask_upload(worker, job_id, "log"), "x.log", b"x").status_code == 201
        assert local.results(job_id) == {"log/x.log": b"x"}


def test_a_local_server_takes_a_body_without_a_length_and_no_path_that_leads_out(local: MockServer) -> None:
    with worker_client(local) as worker:
        job_id = local.submit(job_spec())
        assert pull(worker) == [job_id]
        form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\nx\r\n--b--\r\n'
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        url = ask_upload(worker, job_id, base_path="out")["url"]
        assert worker.post(url, content=iter([form % b"x"]), headers=headers).status_code == 201
        assert worker.post(url, content=iter([form[:40]]), headers=headers).status_code == 400
        assert worker.post(url, content=iter([form % (b"n" * 256)]), headers=headers).status_code == 500
        outside = ask_upload(worker, job_id, base_path="../../../..")["url"]
        assert worker.post(outside, content=iter([form % b"x"]), headers=headers).status_code == 403
        assert local.results(job_id) == {"output/out/x": b"x"}
        for path in ("/files//inputs/../../secret/download", "/files//etc/passwd/download"):
            assert worker.get(path).status_code in (403, 404)
        assert worker.get(f"/files//outputs/{job_id}/download").status_code == 500  # a folder


def test_local_uploads(local: MockServer) -> None:
    with worker_client(local) as worker:
        job_id = local.submit(job_spec())
        assert pull(worker) == [job_id]
        answer = ask_upload(worker, job_id, "output", "out/a&b")
        assert (answer["method"], answer["headers"]) == ("post", {"authorization": f"Bearer {MOCK_TOKEN}"})
        assert send_form(answer, "x.csv", CONTENT).status_code == 201
        assert send_form({**answer, "headers": {}}, "y.csv", CONTENT).status_code == 401
        local.delete(job_id)
        assert put(worker, job_id, "running") == 404  # the server meets the deletion only now
        assert send_form(answer, "z.csv", CONTENT).status_code == 500
        assert (local.data_dir / f"files/outputs/{job_id}/output/out/a&b/x.csv").read_bytes() == CONTENT
        assert not (local.data_dir / f"files/outputs/{job_id}/output/out/a&b/z.csv").exists()


def test_local_put(tmp_path: Path) -> None:
    with running_mock_api(tmp_path, file_mode="local", upload_method="put") as mock, worker_client(mock) as worker:
        job_id = mock.submit(job_spec())
        assert pull(worker) == [job_id]
        answer = ask_upload(worker, job_id, "output", "out", filename="x.csv")
        assert answer["method"] == "put"
        sent = httpx.put(answer["url"], headers=answer["headers"], content=CONTENT, trust_env=False)
        assert sent.status_code == 201
        assert mock.results(job_id) == {"output/out/x.csv": CONTENT}


# -- size --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_large_files_stream_both_ways_in_little_memory(mock: MockServer, worker: httpx.Client, held: int) -> None:
    """512 MiB each way: the process (client included) may grow by 64 MiB at most."""
    size, piece = 512 * 1024**2, os.urandom(1024 * 1024)
    answer = ask_upload(worker, held)
    fields = "".join(
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in answer["data"].items()
    )
    head = f'{fields}--b\r\nContent-Disposition: form-data; name="file"; filename="big"\r\n\r\n'.encode()
    tail = b"\r\n--b--\r\n"

    def body() -> Iterator[bytes]:
        yield head
        for _ in range(size // len(piece)):
            yield piece
        yield tail

    headers = {"Content-Type": "multipart/form-data; boundary=b", "Content-Length": str(len(head) + size + len(tail))}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sent = httpx.post(answer["url"], content=body(), headers=headers, timeout=120, trust_env=False)
    assert sent.status_code == 204
    stored = mock.data_dir / f"files/outputs/{held}/output/big"
    assert stored.stat().st_size == size
    got = hashlib.md5(usedforsecurity=False)
    url = ask_download(worker, f"s3://mock-api/outputs/{held}/output/big")["url"]
    with httpx.stream("GET", url, timeout=120, trust_env=False) as reply:
        for data in reply.iter_bytes():
            got.update(data)
    assert f'"{got.hexdigest()}"' == sent.headers["etag"] == reply.headers["etag"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
