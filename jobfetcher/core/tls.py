"""What a failed TLS connection means, in words for the person who can mend it.

The API is asked by Python's ssl, files are moved by libcurl, and both pass on OpenSSL's own words; so one table serves
both. Pure: the caller says to whom it spoke.
"""

from __future__ import annotations

import re

#: OpenSSL's words (X509_verify_cert_error_string, ERR_reason_error_string), and what they mean. The first match counts.
_MEANINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), meaning)
    for pattern, meaning in (
        (
            r"self.signed certificate",
            "its certificate comes from an authority that this machine does not know; name that authority's "
            "certificate in CA_FILE",
        ),
        (
            r"unable to (?:get (?:local )?issuer certificate|verify the first certificate)",
            "this machine does not know who issued its certificate; if that is your institution's own authority, name "
            "its certificate in CA_FILE; if browsers know it, the server does not send its intermediate certificate, "
            "which its administrator must add",
        ),
        (
            r"certificate is not yet valid",
            "its certificate is not valid yet, by this machine's clock; set the clock",
        ),
        (
            r"certificate has expired",
            "its certificate has expired, by this machine's clock; set the clock, or have the certificate renewed",
        ),
        (
            r"hostname mismatch|ip address mismatch|no alternative certificate subject name|does not match target",
            "its certificate is for another name; is the address spelt as the server's administrator says?",
        ),
        (
            r"wrong version number|wrong_version_number|record layer failure|record_layer_failure|http request|"
            r"packet length too long|http_request",
            "there is plain http on this port and no TLS; https:// must be http:// there, or the port is another one",
        ),
        (
            r"unsupported.protocol|protocol.version|no protocols available",
            "it speaks only old versions of TLS, which are not safe; 1.2 is the least",
        ),
        (
            r"unexpected.eof|eof occurred in violation of protocol|ssl_error_syscall",
            "it hung up in the middle of the TLS greeting; there may be plain http on this port (then the address must "
            "begin with http://), or a firewall between",
        ),
        (r"ee key too small|ca md too weak|too weak|dh key too small", "its certificate or key is too weak to be safe"),
    )
)


def in_words(said: str) -> str:
    """What OpenSSL's words mean and what to do, as the rest of a sentence about the server; empty for other words."""
    return next((meaning for pattern, meaning in _MEANINGS if pattern.search(said)), "")


def is_about_time(said: str) -> bool:
    """Whether only the time is wrong: this machine's clock, or the certificate's."""
    return re.search(r"certificate is not yet valid|certificate has expired", said, re.IGNORECASE) is not None


def apart(seconds: float) -> str:
    """A difference of clocks as people say it, so coarse that it stays the same from one try to the next."""
    for unit, length in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = round(seconds / length)
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return "less than a minute"
