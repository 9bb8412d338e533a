"""The command `python -m benchmarks`. What it does: the package's docstring."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks import frame


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="How fast jobfetcher is, against its peers."
    )
    parser.add_argument("--only", metavar="ID", action="append", choices=frame.IDS, help="this one; may be repeated")
    parser.add_argument("--short", action="store_true", help="tiny sizes, once: only whether everything runs")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument(
        "--out", type=Path, default=frame.ROOT / "build" / "bench.json", help="rows (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    if given.list:
        for benchmark in frame.CATALOGUE:
            print(f"{'/'.join(benchmark.ids):8}{benchmark.what}")
        return 0
    signal.signal(signal.SIGTERM, _stop)
    try:
        return frame.run(given.only or frame.IDS, given.out, short=given.short, in_ci=bool(os.environ.get("CI")))
    except KeyboardInterrupt:
        print(f"stopped; what was measured is in {given.out}", file=sys.stderr)
        return 130


def _stop(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
