"""The worker-facing HTTP API of DECODE OpenCloud (PROTOCOL.md).

deadline.py  a transport whose calls end in time, whatever the peer does
auth.py      tokens: a fixed one, or Cognito sign-in and refresh
client.py    one request, one reply, mapped to our errors
wire.py      the server's JSON, strictly parsed
source.py    the JobSource and its Lease: every oddity of the server is handled here
"""

import sys

# httpx loads its own command line with click, rich and pygments wherever those are installed, and typer brings them:
# 5 MiB and 0.08 s that an idle worker has no use for. None in this place means "there is no such module" (The Python
# Language Reference, 5.3.1), and httpx knows what to do then.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]  # typeshed does not know of None
