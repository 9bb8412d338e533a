"""Signed URLs and upload forms of this server's own: HMAC-SHA256 over method, object and expiry (PROTOCOL.md S13).

A form is good for every file of its folder, as an S3 POST policy with `starts-with $key` is.
"""

import base64
import hmac
import json
import time
from typing import Any
from urllib.parse import urlencode

from mock_api.clock import Clock
from mock_api.storage import StorageError

FILENAME = "${filename}"  # stands in a form's key for the name of the file part, as on S3


class Signer:
    """Makes and checks signatures with one secret key."""

    def __init__(self, key: bytes, clock: Clock, life_s: float) -> None:
        self._key = key
        self._clock = clock
        self._life_s = life_s

    def query(self, method: str, key: str) -> str:
        """The query string that lets its bearer `method` the object."""
        expires = f"{self._clock.now() + self._life_s:.3f}"
        return urlencode({"expires": expires, "signature": self._sign(f"{method}\n{key}\n{expires}")})

    def check_query(self, method: str, key: str, expires: str | None, signature: str | None) -> None:
        """Raise `StorageError` unless the signature is ours, for this, and has not expired."""
        if expires is None or signature is None:
            raise StorageError(403, "AccessDenied", "Access Denied")
        if not hmac.compare_digest(self._sign(f"{method}\n{key}\n{expires}").encode(), signature.encode()):
            raise _mismatch()
        if float(expires) <= self._clock.now():
            raise StorageError(403, "AccessDenied", "Request has expired")

    def form(self, folder: str) -> dict[str, str]:
        """The fields that let their bearer store any file in `folder` (which ends in a slash): those of an S3 form."""
        policy = {"expires": self._clock.now() + self._life_s, "conditions": [["starts-with", "$key", folder]]}
        encoded = base64.b64encode(json.dumps(policy).encode()).decode()
        date = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self._clock.now()))
        return {
            "key": folder + FILENAME,
            "x-amz-algorithm": "AWS4-HMAC-SHA256",
            "x-amz-credential": f"mock/{date[:8]}/us-east-1/s3/aws4_request",
            "x-amz-date": date,
            "policy": encoded,
            "x-amz-signature": self._sign(encoded),
        }

    def check_form(self, fields: dict[str, str], filename: str) -> str:
        """The key that a form stores `filename` under. Raises `StorageError` when the form does not allow it."""
        policy_text, signature = fields.get("policy"), fields.get("x-amz-signature")
        if policy_text is None or signature is None or "key" not in fields:
            raise StorageError(403, "AccessDenied", "Access Denied")
        if not hmac.compare_digest(self._sign(policy_text).encode(), signature.encode()):
            raise _mismatch()
        policy: dict[str, Any] = json.loads(base64.b64decode(policy_text))
        if policy["expires"] <= self._clock.now():
            raise StorageError(403, "AccessDenied", "Invalid according to Policy: Policy expired.")
        key = fields["key"].replace(FILENAME, base_name(filename))
        condition = policy["conditions"][0]
        if not key.startswith(condition[2]):
            message = f"Invalid according to Policy: Policy Condition failed: {json.dumps(condition)}"
            raise StorageError(403, "AccessDenied", message)
        return key

    def _sign(self, text: str) -> str:
        return hmac.digest(self._key, text.encode(), "sha256").hex()


def base_name(filename: str) -> str:
    """The last component: S3 uses only what follows the last slash of a file name that a form sends."""
    return filename.rpartition("/")[2]


def _mismatch() -> StorageError:
    message = "The request signature we calculated does not match the signature you provided."
    return StorageError(403, "SignatureDoesNotMatch", message)
