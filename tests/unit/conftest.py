"""Some of these tests work on scripted answers, on a clock that they set, or with certificates of their own."""

from tests.support.talk import api, client, clock, emit, lease
from tests.support.transfers import authority

__all__ = ["api", "authority", "client", "clock", "emit", "lease"]
