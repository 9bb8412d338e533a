"""The tests of faults work in a lab, with the oracle after every test; some in a wired one, or on scripted answers."""

from tests.support.lab import lab
from tests.support.talk import api, client, clock, emit, lease, source
from tests.support.transfers import authority, nap
from tests.support.wired import wire

__all__ = ["api", "authority", "client", "clock", "emit", "lab", "lease", "nap", "source", "wire"]
