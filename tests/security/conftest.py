"""Some of these tests work in a lab, with the oracle after each of them; some with certificates of their own."""

from tests.support.lab import lab
from tests.support.transfers import authority

__all__ = ["authority", "lab"]
