"""Fakes of the seams, for the tests of this program and of those who build on it.

Each passes the same contract tests as the real adapter; none imports one.
"""
