"""How much disk the volumes of a container take; used by `docker`.

Of anonymous volumes only: those that the engine makes for what an image declares outside of /files. `inspect` counts a
container's own layer and no volume. Where the engine's directories can be read (a worker with root rights on the
engine's own machine), a volume is measured in a moment; else the engine is asked, which measures all volumes it has.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobfetcher import tree
from jobfetcher.engine.api import EngineApi

#: From this version on an engine can be asked for its volumes alone (Docker Engine API, GET /system/df, `type`).
_VOLUMES_ALONE = (1, 42)


def volume_bytes(api: EngineApi, mounts: Sequence[Mapping[str, Any]]) -> int:
    """Bytes that the volumes among `mounts` (of an inspect) take on the engine's disk. For use inside `calling`."""
    volumes = {str(mount["Name"]): str(mount.get("Source") or "") for mount in mounts if mount.get("Type") == "volume"}
    if not volumes:
        return 0
    if all(source and os.access(source, os.R_OK | os.X_OK) for source in volumes.values()):
        return sum(tree.disk_usage(Path(source)) for source in volumes.values())
    path = "/system/df?type=volume" if tuple(map(int, api.version.api.split("."))) >= _VOLUMES_ALONE else "/system/df"
    known = api.ask("GET", path, timeout_s=api.work_s).json().get("Volumes") or ()
    sizes = {str(volume["Name"]): int((volume.get("UsageData") or {}).get("Size") or 0) for volume in known}
    return sum(max(0, sizes.get(name, 0)) for name in volumes)  # -1: not known
