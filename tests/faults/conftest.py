"""The tests of faults work in a lab, with the oracle after every test; some in a wired one."""

from tests.support.lab import lab
from tests.support.wired import wire

__all__ = ["lab", "wire"]
