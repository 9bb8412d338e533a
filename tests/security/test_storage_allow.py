"""STORAGE_ALLOW: what each way to name a host opens, and what it leaves closed (FAULTS.md T7)."""

import pytest

from jobfetcher.core.errors import WorkerFault
from jobfetcher.core.urls import UrlPolicy, parse_origin

pytestmark = pytest.mark.fault("T7")

INSIDE, METADATA = "192.168.1.9", "169.254.169.254"


def policy(*entries: str) -> UrlPolicy:
    return UrlPolicy(parse_origin("https://api.example"), frozenset(entries))


def may_go(policy: UrlPolicy, url: str, address: str) -> bool:
    """Whether a file may come from `url`, whose host has `address`."""
    try:
        origin = policy.check_url(url)
        policy.check_address(origin.host, address, [], port=origin.port)
    except WorkerFault:
        return False
    return True


@pytest.mark.parametrize(
    ("entry", "url", "address", "allowed"),
    [
        ("minio.lab", "https://minio.lab/x", INSIDE, True),
        ("minio.lab", "http://minio.lab:9000/x", INSIDE, True),
        ("Minio.LAB.", "http://MINIO.lab:9000/x", INSIDE, True),
        ("minio.lab", "https://minio.lab.evil.example/x", INSIDE, False),
        ("minio.lab", "https://other.lab/x", INSIDE, False),
        ("minio.lab", "https://a.minio.lab/x", INSIDE, False),
        ("minio.lab:9000", "http://minio.lab:9000/x", INSIDE, True),
        ("minio.lab:9000", "http://minio.lab:22/x", INSIDE, False),
        ("minio.lab:443", "https://minio.lab/x", INSIDE, True),
        ("http://minio.lab:9000/bucket/", "http://minio.lab:9000/x", INSIDE, True),
        ("http://minio.lab:9000/bucket/", "https://minio.lab/x", INSIDE, False),
        ("https://minio.lab/", "http://minio.lab:9000/x", INSIDE, True),
        ("*.lab", "http://minio.lab/x", INSIDE, True),
        ("*.lab", "http://a.b.lab/x", INSIDE, True),
        ("*.lab", "http://lab/x", INSIDE, False),
        ("*.lab", "http://minilab/x", INSIDE, False),
        ("*.lab:9000", "http://minio.lab:80/x", INSIDE, False),
        ("192.168.0.0/16", "https://minio.lab/x", INSIDE, True),
        ("192.168.0.0/16", "https://minio.lab/x", "10.0.0.1", False),
        ("192.168.0.0/16", f"http://{INSIDE}/x", INSIDE, True),
        ("192.168.1.9/16", f"http://{INSIDE}/x", INSIDE, True),  # as people write the address of an interface
        ("192.168.0.0/16", "https://minio.lab/x", f"::ffff:{INSIDE}", True),
        ("192.168.0.0/16", "http://minio.lab/x", INSIDE, False),  # unencrypted only to who is named
        (INSIDE, f"http://{INSIDE}:9000/x", INSIDE, True),
        (INSIDE, "https://minio.lab/x", INSIDE, False),
        ("fd00::1", "http://[fd00:0::1]/x", "fd00::1", True),
        ("[fd00::1]:9000", "http://[fd00::1]:9000/x", "fd00::1", True),
        ("[fd00::1]:9000", "http://[fd00::1]/x", "fd00::1", False),
        ("fd00::/8", "http://[fd00::1]/x", "fd00::1", True),
        # the clouds' metadata address: by its own name only, not along with others
        ("0.0.0.0/0", "https://minio.lab/x", METADATA, False),
        ("0.0.0.0/0", f"https://{METADATA}/x", METADATA, False),
        ("169.254.0.0/16", "https://minio.lab/x", METADATA, True),
        (METADATA, f"http://{METADATA}/x", METADATA, True),
    ],
)
def test_an_entry_opens_what_it_names(entry: str, url: str, address: str, allowed: bool) -> None:
    assert may_go(policy(entry), url, address) is allowed


def test_one_of_several_is_enough() -> None:
    several = policy("a.lab", "*.cluster", "10.0.0.0/8")
    assert may_go(several, "https://x.cluster/x", INSIDE)
    assert may_go(several, "https://b.lab/x", "10.3.2.1")
    assert not may_go(several, "https://b.lab/x", INSIDE)
