"""Some of these tests work in a lab, with the oracle after each of them."""

from tests.support.lab import lab

__all__ = ["lab"]
