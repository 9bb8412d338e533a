"""Some of these tests work on scripted answers of the API, or on a clock that they set."""

from tests.support.talk import api, clock, emit, lease

__all__ = ["api", "clock", "emit", "lease"]
