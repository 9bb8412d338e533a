"""A faithful server of the worker-facing job API, for demonstrations and tests.

It keeps jobs in SQLite, hands them out, signs file URLs and reproduces the oddities S1 to S24 of PROTOCOL.md. It
shares no code with `jobfetcher`: two independent readings of the protocol test each other.

It is a test server: its user side and its switches below `/_mock` ask for no password. Do not put it on an open
network.
"""
