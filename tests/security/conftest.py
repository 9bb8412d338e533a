"""Some of these tests work in a lab, with the oracle after each of them; some on an engine alone."""

from tests.support.boxes import bench
from tests.support.lab import lab
from tests.support.transfers import authority

__all__ = ["authority", "bench", "lab"]
