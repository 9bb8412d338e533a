"""Names of images, parsed by the grammar of the distribution project (reference specification) and normalised.

Used by `images`. Promises: two spellings of one image give one `Reference`, and what a glob of the allow-list sees is
what the engine is asked for. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

_DEFAULT_DOMAIN = "docker.io"

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?")
_PATH = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[a-f0-9]{64}|sha512:[a-f0-9]{128}")

#: The specification's limit for domain and path together.
_NAME_MAX = 255


@dataclass(frozen=True, slots=True)
class Reference:
    """One image, by tag or by digest. A digest is the stronger: a tag written beside it says nothing and is dropped."""

    domain: str
    path: str
    tag: str | None
    digest: str | None

    @property
    def repository(self) -> str:
        return f"{self.domain}/{self.path}"

    def __str__(self) -> str:
        return f"{self.repository}@{self.digest}" if self.digest else f"{self.repository}:{self.tag}"


def parse_reference(text: str) -> Reference:
    """`text` as a Reference; ValueError saying why it is none. No domain: docker.io; no tag and no digest: latest."""
    name, at, digest = text.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise ValueError("what follows the @ is not a digest")
    domain, rest = _split_domain(name)
    path, colon, tag = rest.partition(":")
    if colon and not _TAG.fullmatch(tag):
        raise ValueError("what follows the : is not a tag")
    if not _DOMAIN.fullmatch(domain):
        raise ValueError("the registry's name is not a host name")
    if domain == _DEFAULT_DOMAIN and "/" not in path:
        path = f"library/{path}"
    if not _PATH.fullmatch(path):
        raise ValueError("the repository's name has characters that none may have (small letters, digits, . _ - /)")
    if len(f"{domain}/{path}") > _NAME_MAX:
        raise ValueError(f"the repository's name is longer than {_NAME_MAX} characters")
    return Reference(domain, path, None if at else tag or "latest", digest if at else None)


def allowed(reference: Reference, patterns: Iterable[str]) -> bool:
    """Whether one of the globs of ALLOWED_IMAGES matches.

    The registry is matched on its own, so `public.ecr.aws/*` never matches `public.ecr.aws.evil.io/x`. In the rest, `*`
    goes over `/`. A pattern without a tag takes every tag and digest; without a registry it means docker.io.
    """
    return any(_matches(reference, pattern) for pattern in patterns)


def names_registry(patterns: Iterable[str], domain: str) -> bool:
    """Whether one of the globs of ALLOWED_IMAGES names that registry: letter for letter, or by the domain that it lies
    in (`*.lab.example`). Any other glob may take names that a stranger gives (`registry.lab*`)."""
    return any(pattern != "*" and _names(_split_domain(pattern)[0], domain) for pattern in patterns)


def _names(named: str, domain: str) -> bool:
    above = named.removeprefix("*")
    if above != named and above.startswith(".") and "." in above[1:] and not set(above) & set("*?["):
        return domain.endswith(above)
    return named == domain


def _matches(reference: Reference, pattern: str) -> bool:
    if pattern == "*":
        return True
    domain, path = _split_domain(pattern)
    if domain == _DEFAULT_DOMAIN and "/" not in path and not path.startswith("*"):
        path = f"library/{path}"
    if not fnmatchcase(reference.domain, domain):
        return False
    whole = str(reference).removeprefix(f"{reference.domain}/")
    return fnmatchcase(reference.path, path) or fnmatchcase(whole, path)


def _split_domain(name: str) -> tuple[str, str]:
    """The registry and the rest. The first part is a registry if no repository could be called so (or it is a glob)."""
    first, slash, rest = name.partition("/")
    if not slash or not (set(first) & set(".:*") or first == "localhost"):
        return _DEFAULT_DOMAIN, name
    return (_DEFAULT_DOMAIN if first == "index.docker.io" else first), rest
