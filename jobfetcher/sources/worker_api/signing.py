"""Jobs that their server signed: what is signed, and how a worker checks it (FAULTS.md T15, T30).

With JOB_SIGNING_KEYS set a worker runs only jobs that the holder of one of those keys has seen, so that a server that
was taken over cannot make up its own. The signature lies in `meta`, which servers hand on as it is:

    "meta": {"signature": {"version": 2, "key": KEYID, "value": BASE64,
                           "audience": ["https://jobs.example.org"], "expires": 1798761600,
                           "nonce": "0123456789abcdef0123456789abcdef",
                           "inputs": {"data/movie.tif": "sha256:HEX"}}}

`value` is Ed25519 (RFC 8032) over one JSON object with sorted keys, no spaces, in UTF-8; what a specification does not
say is null:

    version, audience, expires, nonce, inputs                 as they stand in the signature; inputs may be null
    job_id                                                    a string
    image, cmd, env, files_down, files_up                     handler.image_url, app.cmd, and so on

So neither what runs nor its files can be changed, and no signature serves a second job. `audience`: whom it is for, a
list of names; the worker must have one of them (its API's origin, or what JOB_SIGNING_AUDIENCE says), else the job is
given back for those it is meant for. `expires`: Unix time in seconds, at most 90 days ahead; five minutes of difference
between two clocks are forgiven. `nonce`: 16 to 128 letters, digits, `_` and `-`, never used before; once a job has
ended here, its nonce is known until long after it expired (nonces.py), and the same words played again are refused.
`inputs`: SHA-256 of the content by path below /files, for some or all of `files_down`; a file of another content fails
the job before it runs.
And what is signed must name its image by digest, because a tag means what its registry says today.

The labels of the handler (`entrypoint`, `image_name`, `image_version`) are not signed, because nothing of them runs;
neither is the hardware that a job asks for: at worst it waits in vain. Signatures of version 1, of before there were
audience, expiry and nonce, have no `version` and sign the lower row alone; they never expire, so they are refused
unless JOB_SIGNING_ALLOW says `version-1`. `cryptography` is imported only where keys are set: the extra `signing`.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobfetcher.core.errors import ConfigError
from jobfetcher.core.job import JobId
from jobfetcher.core.text import clean
from jobfetcher.sources.worker_api.nonces import Nonces

#: Public keys by id, as their 32 raw bytes.
Keys = Mapping[str, bytes]

#: Of FAULTS.md T22: no key id and no signature is longer; a signature has 64 bytes, 88 characters of base64.
_LONGEST = 200

#: A signature may be for so many names, none longer than _LONGEST.
_MOST_NAMES = 100

#: How far two clocks may differ, and how long before its end a job may be signed, in seconds: a nonce is kept so long.
_SKEW_S, _LONGEST_LIFE_S = 300.0, 90 * 86_400.0

_VERSION = 2
_NONCE = re.compile(r"[A-Za-z0-9_-]{16,128}")
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
_BY_DIGEST = re.compile(r".+@(?:sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})")


class NotForThisWorker(ValueError):
    """The signature is good, and others may run the job."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What the owner asks of a signature. `audience`: the names of this worker. `tags`: an image may be named by tag.
    `version_1`: so may a signature be. `every_input`: the content of each input must be signed."""

    audience: frozenset[str]
    tags: bool = False
    version_1: bool = False
    every_input: bool = False


def read_keys(path: Path) -> Keys:
    """The keys in a file of lines `KEYID BASE64` (32 raw bytes); empty lines and those that begin with # are skipped.

    Raises ConfigError, also when there is no key in it: a check that lets nothing pass was not meant. And where others
    than root and this user may write to it, who could then put their own key into it (FAULTS.md T32).
    """
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError:
        raise ConfigError(
            "JOB_SIGNING_KEYS needs the extra `signing`; in a checkout of jobfetcher type: "
            "pip install --require-hashes --only-binary :all: -r requirements/worker.txt"
        ) from None
    keys: dict[str, bytes] = {}
    try:
        with path.open(encoding="utf-8") as file:
            _check_owner(path, os.fstat(file.fileno()))
            lines = file.read().splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"JOB_SIGNING_KEYS: {path} cannot be read: {clean(str(error), 200)}") from error
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            key_id, text = words
            keys[key_id] = base64.b64decode(text, validate=True)
            Ed25519PublicKey.from_public_bytes(keys[key_id])
        except ValueError:
            raise ConfigError(f"JOB_SIGNING_KEYS: line {number} of {path} is not KEYID BASE64 of 32 bytes") from None
    if not keys:
        raise ConfigError(f"JOB_SIGNING_KEYS: there is no key in {path}")
    return keys


def _check_owner(path: Path, seen: os.stat_result) -> None:
    if seen.st_uid not in {0, os.geteuid()}:
        whose = f"belongs to another user (number {seen.st_uid}), who could put another key into it"
        raise ConfigError(f"JOB_SIGNING_KEYS: {path} {whose}; it must be root's or your own (chown)")
    if seen.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"JOB_SIGNING_KEYS: {path} may be written by others (run `chmod go-w {path}`)")


def sign(
    private_key: bytes,
    key_id: str,
    job_id: JobId,
    specs: Mapping[str, Any],
    *,
    audience: Sequence[str],
    expires: int,
    inputs: Mapping[str, str] | None = None,
    nonce: str | None = None,
) -> dict[str, Any]:
    """What a server puts into `meta.signature` of a job; `private_key` is its 32 raw bytes. For servers and tests.

    `nonce`: None makes a new one, which is right except in tests.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    terms = {
        "version": _VERSION,
        "audience": list(audience),
        "expires": expires,
        "nonce": nonce or secrets.token_hex(16),
        "inputs": None if inputs is None else dict(inputs),
    }
    signature = Ed25519PrivateKey.from_private_bytes(private_key).sign(_signed_bytes(job_id, specs, terms))
    return {"key": key_id, "value": base64.b64encode(signature).decode(), **terms}


class Verifier:
    """Checks signatures. `nonces` remembers those of jobs that were taken; `now` is the time of day, in seconds."""

    def __init__(self, keys: Keys, rules: Rules, nonces: Nonces, now: Callable[[], float] = time.time) -> None:
        self._keys = keys
        self._rules = rules
        self._nonces = nonces
        self._now = now

    def check(self, job_id: JobId, specs: Any) -> Mapping[str, str]:
        """The SHA-256 of inputs by path, in hex, that a known key signed with exactly this job under exactly this id.

        Raises ValueError, saying why it must not run here; NotForThisWorker where others may run it. A job that passed
        may be handed out again, until it has `ended`.
        """
        signature = _section(_section(specs, "meta"), "signature")
        key_id, text = signature.get("key"), signature.get("value")
        if not isinstance(key_id, str) or not isinstance(text, str):
            raise ValueError("it is not signed, and this worker runs signed jobs only")
        if key_id not in self._keys:
            raise ValueError(f"it is signed with key {clean(key_id, 80)!r}, which this worker does not know")
        terms = _terms(signature)
        self._check_signature(key_id, text, job_id, specs, terms)
        image = _section(specs, "handler").get("image_url")
        if not self._rules.tags and not (isinstance(image, str) and _BY_DIGEST.fullmatch(image)):
            raise ValueError(
                f"its image {clean(str(image), 200)!r} is named by a tag, which may mean another image tomorrow; a "
                "signed job must name it by digest (JOB_SIGNING_ALLOW=tags lets it run)"
            )
        if terms is None:
            if not self._rules.version_1:
                raise ValueError(
                    "its signature is of version 1, which says neither for whom it is nor until when; sign it anew "
                    "with version 2 (JOB_SIGNING_ALLOW=version-1 lets it run)"
                )
            if self._rules.every_input:
                self._check_inputs({}, specs)
            return {}
        return self._check_terms(key_id, job_id, specs, terms)

    def ended(self, job_id: JobId) -> None:
        """That job has ended here, whatever the server says of it: what was signed for it is used up. Never raises."""
        self._nonces.ended(job_id)

    def _check_signature(
        self, key_id: str, text: str, job_id: JobId, specs: Any, terms: Mapping[str, Any] | None
    ) -> None:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            value = base64.b64decode(text[:_LONGEST], validate=True)
            Ed25519PublicKey.from_public_bytes(self._keys[key_id]).verify(value, _signed_bytes(job_id, specs, terms))
        except (InvalidSignature, ValueError, RecursionError):
            raise ValueError(
                f"its signature by key {clean(key_id, 80)!r} is not one of this job as it is: it was changed, "
                "or belongs to another job"
            ) from None

    def _check_terms(self, key_id: str, job_id: JobId, specs: Any, terms: Mapping[str, Any]) -> Mapping[str, str]:
        """What the signature says beside the job. Whoever signed it may still have written nonsense."""
        audience, expires, nonce, inputs = (terms[name] for name in ("audience", "expires", "nonce", "inputs"))
        if not isinstance(audience, list) or len(audience) > _MOST_NAMES or not _are_texts(audience):
            raise ValueError("its signature does not say for whom it is: `audience` is no list of names")
        if type(expires) is not int or not 0 <= expires < 2**53:
            raise ValueError("its signature does not say until when it holds: `expires` is no Unix time in seconds")
        if not isinstance(nonce, str) or not _NONCE.fullmatch(nonce):
            raise ValueError("its signature has no `nonce` of 16 to 128 letters, digits, _ and -")
        now = self._now()
        if expires + _SKEW_S < now:
            raise ValueError(f"its signature ran out {_ago(now - expires)} ago (or the clock of this machine is wrong)")
        if expires - now > _LONGEST_LIFE_S + _SKEW_S:
            raise ValueError("its signature holds for more than 90 days, and so long nobody remembers its nonce")
        hashes = self._check_inputs({} if inputs is None else inputs, specs)
        if not self._rules.audience & set(audience):
            names = ", ".join(clean(name, 80) for name in audience[:5]) or "nobody"
            ours = ", ".join(sorted(self._rules.audience))
            raise NotForThisWorker(f"it is signed for {names}, and this worker is {ours} (JOB_SIGNING_AUDIENCE)")
        self._nonces.use(f"{key_id} {nonce}", job_id, expires + _SKEW_S)
        return hashes

    def _check_inputs(self, inputs: Any, specs: Any) -> dict[str, str]:
        if not isinstance(inputs, dict) or not all(
            isinstance(value, str) and _SHA256.fullmatch(value) for value in inputs.values()
        ):
            raise ValueError("`inputs` of its signature is not an object of sha256:HEX by path")
        named = _section(_section(specs, "handler"), "files_down")
        if strange := sorted(set(inputs) - set(named)):
            raise ValueError(f"its signature has a hash of {clean(strange[0], 120)!r}, which is no input of the job")
        if self._rules.every_input and (bare := sorted(set(named) - set(inputs))):
            raise ValueError(
                f"its signature says nothing of the content of input {clean(bare[0], 120)!r}, and this worker asks for "
                "that of every input (JOB_SIGNING_INPUTS=required)"
            )
        return {path: str(value).removeprefix("sha256:") for path, value in inputs.items()}


def _terms(signature: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a signature says beside the job; None for version 1. ValueError for a version that we do not know."""
    version = signature.get("version")
    if version is None:
        return None
    if type(version) is not int or version != _VERSION:
        raise ValueError("its signature is of a version that this worker does not know")
    return {"version": _VERSION} | {name: signature.get(name) for name in ("audience", "expires", "nonce", "inputs")}


def _signed_bytes(job_id: JobId, specs: Mapping[str, Any], terms: Mapping[str, Any] | None) -> bytes:
    """The signed part of a specification as canonical JSON. ValueError for what JSON or UTF-8 cannot write."""
    app, handler = _section(specs, "app"), _section(specs, "handler")
    signed = {
        **(terms or {}),
        "job_id": job_id,
        "image": handler.get("image_url"),
        "cmd": app.get("cmd"),
        "env": app.get("env"),
        "files_down": handler.get("files_down"),
        "files_up": handler.get("files_up"),
    }
    return json.dumps(signed, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _section(holder: Any, name: str) -> Mapping[str, Any]:
    """The object of that name; an empty one where there is none, as the parser reads it."""
    section = holder.get(name) if isinstance(holder, Mapping) else None
    return section if isinstance(section, Mapping) else {}


def _are_texts(names: list[Any]) -> bool:
    return all(isinstance(name, str) and len(name) <= _LONGEST for name in names)


def _ago(seconds: float) -> str:
    return f"{seconds / 86_400:.1f} days" if seconds >= 2 * 86_400 else f"{seconds / 60:.0f} min"
