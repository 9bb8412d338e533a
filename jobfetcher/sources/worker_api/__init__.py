"""The worker-facing HTTP API of DECODE OpenCloud (PROTOCOL.md).

deadline.py  a transport whose calls end in time, whatever the peer does
auth.py      tokens: a fixed one, or Cognito sign-in and refresh
client.py    one request, one reply, mapped to our errors
wire.py      the server's JSON, strictly parsed
source.py    the JobSource and its Lease: every oddity of the server is handled here
"""
