"""What a worker that waits for jobs has loaded: an idle worker holds all of it (benchmark P7)."""

from __future__ import annotations

import subprocess
import sys

from tests.support.services import REPOSITORY

#: Each takes some MiB and tenths of a second: what draws on terminals, other HTTP clients than ours, the engine's SDK
#: (loaded for a registry's credentials), event loops, servers.
HEAVY = {"asyncio", "boto3", "click", "cryptography", "docker", "pygments", "requests", "rich", "uvicorn"}


def test_a_worker_without_a_terminal_loads_nothing_heavy() -> None:
    code = (
        "import sys, io, jobfetcher.cli, jobfetcher.build, jobfetcher.worker\n"
        "from jobfetcher.telemetry import logs, progress\n"
        "logs.configure('plain', 'info', progress.ProgressBars(io.StringIO()))\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert not HEAVY & set(done.stdout.split())
