"""The end-to-end tests work in a lab, with the oracle after every test."""

from tests.support.lab import lab

__all__ = ["lab"]
