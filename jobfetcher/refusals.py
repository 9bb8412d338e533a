"""How often in a row the server refused to let this worker in, remembered from one start to the next.

Used by `cli`. Where a supervisor starts the worker again and again (`--restart unless-stopped`), a wrong password would
be tried every two seconds, until the account is locked. So the process waits before it leaves, longer each time.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

#: Lies in PATH_BASE from the first refusal until the server lets the worker in. No secret is in it.
NAME = "refused.json"

#: The first wait, in seconds, which doubles from each refusal to the next, and the longest one.
_FIRST_S, _LONGEST_S = 5.0, 900.0

#: After so long without a refusal it begins anew, in seconds.
_FORGOTTEN_S = 86_400.0


def another(base: Path, now: Callable[[], float] = time.time) -> float:
    """Note one more refusal; returns for how many seconds to wait before leaving. Never raises: without a note, as on a
    full disk, the wait is the longest one."""
    count, at = _read(base)
    moment = now()
    count = count + 1 if 0 <= moment - at < _FORGOTTEN_S else 1
    try:
        draft = base / f"{NAME}.new"
        draft.write_text(json.dumps({"count": count, "at": moment}))
        draft.replace(base / NAME)
    except OSError:
        return _LONGEST_S
    return min(_LONGEST_S, _FIRST_S * 2.0 ** min(count - 1, 20))


def forget(base: Path) -> None:
    """The server let the worker in."""
    with contextlib.suppress(OSError):
        (base / NAME).unlink(missing_ok=True)


def _read(base: Path) -> tuple[int, float]:
    try:
        noted = json.loads((base / NAME).read_text())
        return int(noted["count"]), float(noted["at"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0.0
