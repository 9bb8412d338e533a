"""A pull-based worker for container jobs.

Importing this package costs nothing: every room is imported by the one that needs it, when it needs it.
"""

__version__ = "0.1.0"
