"""What a pattern of ALLOWED_IMAGES may look like.

Used by `settings`, so that every command refuses one that is none. What it matches is told in `engine/references`.
Pure.
"""

from __future__ import annotations

import re


def check_pattern(pattern: str) -> None:
    """Raise ValueError for a pattern that is a regular expression and not a glob: it would match no image at all.

    Of what regular expressions are made of, `*`, `?` and `[` mean something in a glob; the rest is in no name. A dot
    begins no part of a name, so `.*` there is meant as `*`; after a letter it may be right (`v1.*`).
    """
    wrong = set(pattern) & set("^$\\()|+{}")
    if wrong or re.search(r"(?:^|[/:@])\.\*", pattern):
        raise ValueError(
            f"{pattern} looks like a regular expression; patterns are as those of file names, in which * stands for "
            "any text, such as docker.io/library/*"
        )
