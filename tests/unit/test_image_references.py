"""References of images: the grammar, the normal form, and what a glob of the allow-list takes."""

import pytest

from jobfetcher.core.patterns import check_pattern
from jobfetcher.engine.references import allowed, parse_reference

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("decode/decode", "docker.io/decode/decode:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/decode/decode:v1", "docker.io/decode/decode:v1"),
        ("localhost/x", "localhost/x:latest"),
        ("localhost:5000/x", "localhost:5000/x:latest"),
        ("127.0.0.1:5000/a/b/c:tag", "127.0.0.1:5000/a/b/c:tag"),
        ("[::1]:5000/x", "[::1]:5000/x:latest"),
        ("public.ecr.aws/g0k0/decode_cloud:v1.2", "public.ecr.aws/g0k0/decode_cloud:v1.2"),
        (f"busybox@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
        (f"busybox:1.36@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
        ("a__b/c--d/e.f", "docker.io/a__b/c--d/e.f:latest"),
    ],
)
def test_a_reference_has_one_normal_form(text: str, normal: str) -> None:
    assert str(parse_reference(text)) == normal
    assert str(parse_reference(normal)) == normal


@pytest.mark.fault("E6")
@pytest.mark.fault("T14")
@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "busybox ",
        "busybox\n",
        "Busybox",
        "Upper/case",
        "https://example.org/x",
        "-x",
        "x/",
        "/x",
        "a//b",
        "a/../b",
        "a/./b",
        "a___b",
        "x:",
        "x:-tag",
        "x:" + "t" * 129,
        "x@",
        "x@sha256:abc",
        f"x@{DIGEST.upper()}",
        "x@sha256:" + "g" * 64,
        f"x@{DIGEST}@{DIGEST}",
        "büsybox",
        "busybox:lätest",
        "exämple.org/x",
        "busybox:１",  # noqa: RUF001 - a full-width digit is the point
        "example..org/x",
        "-example.org/x",
        "example.org:port/x",
        "*.example.org/x",
        "x?platform=evil",
        "x#y",
        "x%2fy",
        "a/" * 127 + "ab",
    ],
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_reference(text)


@pytest.mark.fault("T14")
@pytest.mark.parametrize(
    ("text", "pattern", "taken"),
    [
        ("busybox", "*", True),
        ("busybox", "busybox", True),
        ("busybox:1", "busybox", True),
        ("busybox:1", "busybox:1", True),
        ("busybox:2", "busybox:1", False),
        ("busybox:1.36", "busybox:1.*", True),
        (f"busybox@{DIGEST}", "busybox", True),
        (f"busybox:1@{DIGEST}", "busybox:1", False),
        (f"busybox:1@{DIGEST}", "busybox:*", False),
        (f"busybox@{DIGEST}", f"busybox@{DIGEST}", True),
        ("decode/decode:v1", "decode/*", True),
        ("evil.io/decode/decode", "decode/*", False),
        ("evil.io/decode", "*/decode", True),
        ("public.ecr.aws/g0k0/decode:v1", "public.ecr.aws/*", True),
        ("public.ecr.aws/g0k0/decode:v1", "public.ecr.aws/g0k0/decode", True),
        ("public.ecr.aws/g0k0/decode-evil:v1", "public.ecr.aws/g0k0/decode", False),
        ("public.ecr.aws.evil.io/x", "public.ecr.aws/*", False),
        ("PUBLIC.ECR.AWS/x", "public.ecr.aws/*", False),
        ("evil.io/public.ecr.aws/x", "public.ecr.aws/*", False),
        ("public.ecr.aws:444/x", "public.ecr.aws/*", False),
        ("registry.lab.example/x", "*.lab.example/*", True),
        ("lab.example.evil.io/x", "*.lab.example/*", False),
        ("localhost:5000/x", "localhost:5000/*", True),
    ],
)
def test_globs_of_the_allow_list(text: str, pattern: str, taken: bool) -> None:
    assert allowed(parse_reference(text), [pattern]) is taken
    assert allowed(parse_reference(text), ["nowhere.example/*", pattern]) is taken


@pytest.mark.parametrize(
    "pattern",
    [
        "docker.io/library/.*",
        ".*",
        "^docker.io/library/busybox$",
        r"docker\.io/library/busybox",
        "docker.io/(a|b)",
        "ghcr.io/lab/[a-z]+",
        "ghcr.io/lab/x:.*",
        "ghcr.io/lab/x{1,3}",
    ],
)
def test_a_regular_expression_is_no_pattern(pattern: str) -> None:
    with pytest.raises(ValueError, match="looks like a regular expression"):
        check_pattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "*",
        "docker.io/library/*",
        "busybox",
        "localhost:5000/lab/x:v1.*",
        "registry.example.*/x",
        "*.example.org/lab/[a-c]?-x_y.z",
        "ghcr.io/lab/x@sha256:" + "a" * 64,
    ],
)
def test_what_is_a_pattern_is_taken(pattern: str) -> None:
    check_pattern(pattern)
