"""Most of these tests look at an engine as a worker does."""

from tests.support.boxes import bench

__all__ = ["bench"]
