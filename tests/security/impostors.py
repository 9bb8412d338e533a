"""Servers that are not who they say, or say it in a way that is no proof (T20), for whoever asks a server."""

import ssl

import pytest
from cryptography import x509


def _old_tls(context: ssl.SSLContext) -> ssl.SSLContext:
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


#: `made` is the server's context, made by an authority; `trusted`: that authority is the one of CA_FILE.
IMPOSTORS = pytest.mark.parametrize(
    ("made", "trusted"),
    [
        (lambda authority: authority.server(), False),
        (lambda authority: authority.server(x509.DNSName("elsewhere.example")), True),
        (lambda authority: authority.server(days=-1), True),
        (lambda authority: _old_tls(authority.server()), True),
    ],
    ids=["unknown authority", "other name", "expired", "TLS 1.1"],
)
