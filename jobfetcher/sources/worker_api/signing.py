"""Jobs that their server signed: what is signed, and how a worker checks it (FAULTS.md T15).

With JOB_SIGNING_KEYS set a worker runs only jobs that the holder of one of those keys has seen, so that a server that
was taken over cannot make up its own. The signature lies in `meta`, which servers hand on as it is:

    "meta": {"signature": {"key": KEYID, "value": BASE64}}

It is Ed25519 (RFC 8032) over the JSON object of `job_id` (a string), `image` (handler.image_url), `cmd`, `env`,
`files_down` and `files_up`, with sorted keys, no spaces, in UTF-8; what a specification does not say is null. So
neither what runs nor its files can be changed, and no signature serves a second job. The labels of the handler
(`entrypoint`, `image_name`, `image_version`) are not signed, because nothing of them runs; neither is the hardware that
a job asks for: at worst it waits in vain. `cryptography` is imported only where keys are set: the extra `signing`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobfetcher.core.errors import ConfigError
from jobfetcher.core.job import JobId
from jobfetcher.core.text import clean

#: Public keys by id, as their 32 raw bytes.
Keys = Mapping[str, bytes]

#: Of FAULTS.md T22: no key id and no signature is longer; a signature has 64 bytes, 88 characters of base64.
_LONGEST = 200


def read_keys(path: Path) -> Keys:
    """The keys in a file of lines `KEYID BASE64` (32 raw bytes); empty lines and those that begin with # are skipped.

    Raises ConfigError, also when there is no key in it: a check that lets nothing pass was not meant.
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
        lines = path.read_text(encoding="utf-8").splitlines()
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


def sign(private_key: bytes, key_id: str, job_id: JobId, specs: Mapping[str, Any]) -> dict[str, str]:
    """What a server puts into `meta.signature` of a job; `private_key` is its 32 raw bytes. For servers and tests."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    signature = Ed25519PrivateKey.from_private_bytes(private_key).sign(_signed_bytes(job_id, specs))
    return {"key": key_id, "value": base64.b64encode(signature).decode()}


def verify(keys: Keys, job_id: JobId, specs: Any) -> None:
    """Raise ValueError, saying why, unless one of `keys` signed exactly this job under exactly this id."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    signature = _section(_section(specs, "meta"), "signature")
    key_id, text = signature.get("key"), signature.get("value")
    if not isinstance(key_id, str) or not isinstance(text, str):
        raise ValueError("it is not signed, and this worker runs signed jobs only")
    if key_id not in keys:
        raise ValueError(f"it is signed with key {clean(key_id, 80)!r}, which this worker does not know")
    try:
        value = base64.b64decode(text[:_LONGEST], validate=True)
        Ed25519PublicKey.from_public_bytes(keys[key_id]).verify(value, _signed_bytes(job_id, specs))
    except (InvalidSignature, ValueError, RecursionError):
        raise ValueError(
            f"its signature by key {clean(key_id, 80)!r} is not one of this job as it is: it was changed, "
            "or belongs to another job"
        ) from None


def _signed_bytes(job_id: JobId, specs: Mapping[str, Any]) -> bytes:
    """The signed part of a specification as canonical JSON. ValueError for what JSON or UTF-8 cannot write."""
    app, handler = _section(specs, "app"), _section(specs, "handler")
    signed = {
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
