"""Which URLs, addresses and signed requests are taken, as tables (FAULTS.md T6, T7, T8, T22). Nothing connects."""

import pytest

from jobfetcher.core.errors import JobFault, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.urls import Method, Origin, UrlPolicy, parse_origin

PUBLIC = UrlPolicy(api=parse_origin("https://api.example"))
PUBLIC_API = ["93.184.216.34", "2606:2800:220:1::1"]
STORE = "https://bucket.s3.example/key"


@pytest.mark.fault("T7")
@pytest.mark.parametrize(
    "url",
    [
        "",
        "key",
        "/key",
        "//s3.example/key",
        "https:",
        "https://",
        "https:///key",
        "https:key",
        "https://:443/key",
        "https://./key",
        "https://.../key",
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "ftp://s3.example/key",
        "gopher://s3.example:70/_x",
        "dict://s3.example:2628/x",
        "ldap://s3.example/x",
        "scp://s3.example/x",
        "smb://s3.example/x",
        "tftp://s3.example/x",
        "telnet://s3.example/x",
        "ws://s3.example/x",
        "data:text/plain,x",
        "javascript:alert(1)",
        "unix:/var/run/docker.sock",
        "http+unix://%2Fvar%2Frun%2Fdocker.sock/x",
        "https://user@s3.example/key",
        "https://user:pass@s3.example/key",
        "https://s3.example:pass@169.254.169.254/key",
        "https://@s3.example/key",
        "https://s3.example@169.254.169.254/key",
        "https://s3.example\\@169.254.169.254/key",
        "https:\\\\s3.example\\key",
        "https://s3.example /key",
        " https://s3.example/key",
        "https://s3.example/key\n",
        "https://s3.example/\r\nHost: evil",
        "https://s3.example/\tkey",
        "https://s3.example/\0",
        "https://s3.example/\x7f",
        "https://s3.example/ü",
        "https://ⓛⓞⓒⓐⓛhost/",
        "https://127。0。0。1/",
        "https://localhost%00.s3.example/",
        "https://%6c%6f%63alhost/",
        "https://[::1/",
        "https://::1]/",
        "https://[fe80::1%25eth0]/",
        "https://s3.example:65536/",
        "https://s3.example:-1/",
        "https://s3.example:+80/",
        "https://s3.example:8_0/",
        "https://s3.example:http/",
        "https://s3.example:80:80/",
        "https://s3.example;evil/",
        "https://s3.example,evil/",
        "https://s3.example&evil/",
        "https://<script>/",
        "https://" + "a" * 254 + "/",
        "https://s3.example/" + "x" * 16_384,
    ],
    ids=lambda url: ascii(url[:50]),
)
def test_a_url_that_is_none_of_ours_is_refused(url: str) -> None:
    with pytest.raises(JobFault, match="the server handed out a file URL that") as caught:
        PUBLIC.check_url(url)
    assert caught.value.reason is JobReason.UNSAFE_REQUEST
    assert len(str(caught.value)) < 200


@pytest.mark.fault("T7")
@pytest.mark.parametrize(
    ("url", "origin"),
    [
        (STORE, Origin("https", "bucket.s3.example", 443)),
        ("HTTPS://Bucket.S3.Example/Key", Origin("https", "bucket.s3.example", 443)),
        ("https://s3.example:9000/a//b/../c?X=%2F&y#z", Origin("https", "s3.example", 9000)),
        ("https://s3.example./key", Origin("https", "s3.example", 443)),
        ("https://[2001:db8::1]:8443/", Origin("https", "2001:db8::1", 8443)),
        ("https://a_b.example/?u=https://evil@evil/", Origin("https", "a_b.example", 443)),
    ],
)
def test_a_url_that_is_taken_has_one_origin(url: str, origin: Origin) -> None:
    assert PUBLIC.check_url(url) == origin


@pytest.mark.fault("T7")
@pytest.mark.fault("T20")
def test_unencrypted_urls_are_for_unencrypted_apis_and_trusted_hosts() -> None:
    with pytest.raises(WorkerFault, match="STORAGE_ALLOW") as caught:
        PUBLIC.check_url("http://s3.example/key")
    assert caught.value.reason is WorkerReason.STORAGE
    UrlPolicy(parse_origin("http://api.example")).check_url("http://s3.example/key")
    UrlPolicy(parse_origin("https://api.example"), frozenset({"s3.example"})).check_url("http://s3.example/key")


INTERNAL = [
    "127.0.0.1",
    "127.1.2.3",
    "127.255.255.255",
    "0.0.0.0",
    "0.0.0.1",
    "10.0.0.1",
    "10.255.255.255",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.0.1",
    "192.168.255.255",
    "100.64.0.1",  # RFC 6598, carrier-grade NAT
    "100.127.255.255",
    "169.254.0.1",
    "169.254.169.254",  # cloud metadata
    "169.254.170.2",
    "192.0.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "fe80::1",
    "fe80::1%eth0",
    "fc00::1",
    "fd00:ec2::254",  # cloud metadata
    "ff02::1",
    "2001:db8::1",
    "100::1",
    "::ffff:127.0.0.1",
    "::ffff:7f00:1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:0.0.0.0",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b::a00:1",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "2002:c0a8:1::1",
    "2001:0:7f00:1::1",
]

#: Other ways to write an IPv4 address, and addresses that older Pythons take for public ones.
DISGUISED = ["::127.0.0.1", "::ffff:0:7f00:1", "fec0::1", "64:ff9b:1::7f00:1", "192.88.99.1", "3fff::1"]


@pytest.mark.fault("T7")
@pytest.mark.parametrize(
    "address",
    [*INTERNAL, *DISGUISED],
)
def test_an_internal_address_is_refused_where_the_api_is_public(address: str) -> None:
    for known in (PUBLIC_API, []):
        with pytest.raises(WorkerFault, match=r"storage host files\.example has the internal address") as caught:
            PUBLIC.check_address("files.example", address, known)
        assert caught.value.reason is WorkerReason.STORAGE


@pytest.mark.fault("T7")
@pytest.mark.parametrize(
    "address", ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_a_public_address_is_taken(address: str) -> None:
    PUBLIC.check_address("files.example", address, [])


@pytest.mark.fault("T7")
@pytest.mark.parametrize(
    ("api", "address", "taken"),
    [
        (["192.168.1.5"], "192.168.1.9", True),
        (["192.168.1.5"], "10.0.0.1", True),
        (["192.168.1.5"], "127.0.0.1", False),
        (["192.168.1.5"], "::1", False),
        (["192.168.1.5"], "169.254.169.254", False),
        (["192.168.1.5"], "::ffff:169.254.169.254", False),
        (["192.168.1.5"], "0.0.0.0", False),
        (["192.168.1.5"], "224.0.0.1", False),
        (["fd12::1"], "fd12::2", True),
        (["fd12::1"], "fe80::1", False),
        (["127.0.0.1"], "127.0.0.1", True),
        (["127.0.0.1"], "::1", True),
        (["::1"], "127.0.0.1", True),
        (["127.0.0.1"], "192.168.1.9", True),
        (["127.0.0.1"], "169.254.169.254", False),
        (["127.0.0.1"], "::", False),
        (["93.184.216.34"], "192.168.1.9", False),
    ],
)
def test_a_private_api_may_have_private_storage_but_never_metadata(api: list[str], address: str, taken: bool) -> None:
    if taken:
        PUBLIC.check_address("files.example", address, api)
    else:
        with pytest.raises(WorkerFault):
            PUBLIC.check_address("files.example", address, api)


@pytest.mark.fault("T7")
def test_the_apis_own_host_and_trusted_hosts_may_be_anywhere() -> None:
    policy = UrlPolicy(parse_origin("https://api.example"), frozenset({"minio"}))
    for host in ("api.example", "minio"):
        policy.check_address(host, "192.168.1.9", [])
    with pytest.raises(WorkerFault):
        policy.check_address("minio.evil.example", "192.168.1.9", [])


GOOD = {"method": "get", "url": STORE, "headers": {}, "data": {}}


@pytest.mark.fault("T6")
@pytest.mark.parametrize(
    "extra",
    [
        {"verify": False},
        {"proxies": {"https": "http://evil"}},
        {"auth": ["a", "b"]},
        {"cert": "/etc/key"},
        {"hooks": {"response": "x"}},
        {"timeout": 0},
        {"allow_redirects": True},
        {"stream": True},
        {"params": {"a": "b"}},
        {"json": {}},
        {"files": {"file": "/etc/passwd"}},
        {"cookies": {"a": "b"}},
    ],
    ids=str,
)
def test_other_keys_are_dropped_and_named(extra: dict[str, object]) -> None:
    request = PUBLIC.parse_request(GOOD | extra)
    assert request == PUBLIC.parse_request(GOOD).__class__(Method.GET, STORE, ignored=tuple(extra))


@pytest.mark.fault("T6")
@pytest.mark.parametrize(
    "raw",
    [
        None,
        [],
        "get",
        GOOD | {"method": "delete"},
        GOOD | {"method": "connect"},
        GOOD | {"method": None},
        GOOD | {"method": "get\r\nX: y"},
        GOOD | {"url": None},
        GOOD | {"url": ["https://s3.example"]},
        GOOD | {"url": "file:///etc/passwd"},
        GOOD | {"data": {"file": "x"}},
        GOOD | {"url": "https://s3.example /key"},
        GOOD | {"url": " https://s3.example/key"},
        GOOD | {"url": "https://s3.example/a\tb"},
        GOOD | {"url": "https://s3.example/a\\b"},
        GOOD | {"url": "https://s3.\u00fc.example/a"},
        GOOD | {"url": "https://s3.example/\ud800"},
        GOOD | {"data": {"a": ["b"]}},
        GOOD | {"data": {"a": "x" * 70_000}},
        GOOD | {"data": {f"f{number}": "x" for number in range(65)}},
    ],
    ids=lambda raw: str(raw)[:60],
)
def test_what_is_no_request_is_refused(raw: object) -> None:
    with pytest.raises(JobFault) as caught:
        PUBLIC.parse_request(raw)
    assert caught.value.reason is JobReason.UNSAFE_REQUEST


@pytest.mark.fault("T8")
@pytest.mark.fault("T22")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Authorization", "Bearer theirs"),
        ("authorization", "Bearer theirs"),
        ("Cookie", "a=b"),
        ("Host", "evil"),
        ("Content-Length", "5"),
        ("Transfer-Encoding", "chunked"),
        ("Proxy-Authorization", "x"),
        ("Range", "bytes=0-"),
        ("X-Forwarded-For", "127.0.0.1"),
        ("x-amz-meta", "a\r\nHost: evil"),
        ("x-amz-meta", "a\nb"),
        ("x-amz-meta", "a\0b"),
        ("x-amz-meta", "ü"),
        ("x-amz-meta", "a" * 8193),
        ("x-amz-meta", {"nested": "S15"}),
        ("x-amz-meta", 5),
        ("x-amz-meta:", "a"),
        ("x-amz-\r\nHost", "evil"),
        ("x-amz-" + "a" * 128, "a"),
        ("", "a"),
    ],
)
def test_a_header_that_may_not_go_along_is_dropped(name: str, value: object) -> None:
    request = PUBLIC.parse_request(GOOD | {"headers": {name: value, "x-amz-acl": "private"}})
    assert request.headers == (("x-amz-acl", "private"),)
    assert len(request.ignored) == 1


@pytest.mark.fault("T8")
@pytest.mark.parametrize(
    ("url", "goes"),
    [
        ("https://api.example/files/1/download", True),
        ("https://API.example:443/files/1/download", True),
        ("https://api.example:8443/files", False),
        ("https://api.example.evil/files", False),
        ("https://evil/api.example", False),
    ],
)
def test_authorization_goes_to_the_apis_origin_only(url: str, goes: bool) -> None:
    request = PUBLIC.parse_request(GOOD | {"url": url, "headers": {"Authorization": "Bearer canary"}})
    assert bool(request.headers) is goes


@pytest.mark.fault("C19")
@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("https://s3.example/a b.txt", "https://s3.example/a%20b.txt"),
        ("https://s3.example/gr\u00f6\u00dfe.txt?a=\u00fc b", "https://s3.example/gr%C3%B6%C3%9Fe.txt?a=%C3%BC%20b"),
        ("https://s3.example/a%20b+c#d?e", "https://s3.example/a%20b+c#d?e"),
        ("https://s3.example/100% a%zz", "https://s3.example/100%25%20a%25zz"),
        ("https://s3.example/\u202egnp.exe ", "https://s3.example/%E2%80%AEgnp.exe%20"),
        (STORE, STORE),
        (f"{STORE}?X-Amz-Signature=a%2Fb==&q={{1}}|^`", f"{STORE}?X-Amz-Signature=a%2Fb==&q={{1}}|^`"),
    ],
    ids=lambda url: ascii(url)[:50],
)
def test_a_raw_address_is_encoded_where_no_url_may_hold_it(given: str, asked: str) -> None:
    assert PUBLIC.parse_request(GOOD | {"url": given}).url == asked
    assert PUBLIC.tidy(asked) == asked  # encoded once, it stays


@pytest.mark.fault("C19", "T20")
@pytest.mark.parametrize(
    ("api", "given", "asked"),
    [
        ("https://api.example", "http://api.example/files/1", "https://api.example/files/1"),
        ("https://api.example", "HTTP://API.Example:80/files/1?a=b", "https://api.example/files/1?a=b"),
        ("https://api.example:8443", "http://api.example:8443/f", "https://api.example:8443/f"),
        ("https://api.example:8443", "http://api.example/f", "https://api.example:8443/f"),
        ("https://[2001:db8::1]:8443", "http://[2001:db8::1]/f", "https://[2001:db8::1]:8443/f"),
        ("http://api.example", "http://api.example/f", "http://api.example/f"),
        ("https://api.example", "https://api.example/f", "https://api.example/f"),
    ],
)
def test_a_link_to_the_apis_own_host_is_as_safe_as_the_api(api: str, given: str, asked: str) -> None:
    """Behind a TLS terminator a local-disk server writes http into links to itself; the token goes along."""
    policy = UrlPolicy(api=parse_origin(api))
    request = policy.parse_request(GOOD | {"url": given, "headers": {"Authorization": "Bearer canary"}})
    assert request.url == asked
    assert request.headers == (("Authorization", "Bearer canary"),)


@pytest.mark.fault("C19", "T20")
@pytest.mark.parametrize("url", ["http://api.example:9000/f", "http://api.example.evil/f", "http://api.example@evil/f"])
def test_another_port_or_host_is_not_upgraded(url: str) -> None:
    with pytest.raises((WorkerFault, JobFault)):
        PUBLIC.parse_request(GOOD | {"url": url})


@pytest.mark.fault("C20")
@pytest.mark.parametrize(
    ("value", "text"), [("a", "a"), (201, "201"), (0, "0"), (True, "true"), (False, "false"), (1.5, "1.5"), ("", "")]
)
def test_a_form_field_is_any_scalar(value: object, text: str) -> None:
    request = PUBLIC.parse_request(GOOD | {"method": "post", "data": {"a": value, "b": None}})
    assert request.fields == (("a", text),)


@pytest.mark.fault("C20")
@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"tags": ["b"]}, "field 'tags' is neither text nor a number but a list"),
        ({"tags": {"b": 1}}, "field 'tags' is neither text nor a number but an object"),
        ({"policy": "x" * 70_000}, "field 'policy' is too long"),
        ({"file": "x"}, "field 'file' has the name of the file's own part"),
    ],
    ids=str,
)
def test_a_form_field_that_cannot_be_used_is_named(fields: dict[str, object], why: str) -> None:
    with pytest.raises(JobFault, match=why):
        PUBLIC.parse_request(GOOD | {"method": "post", "data": fields})
