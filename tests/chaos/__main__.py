"""The command: `python -m tests.chaos`."""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

from tests.chaos.campaign import CampaignError, Options, run
from tests.chaos.oracle import Verdict


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit code."""
    options = _parser().parse_args(arguments)
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    directory = Path(tempfile.mkdtemp(prefix="jobfetcher-chaos-"))
    print(f"seed {seed}, in {directory}", file=sys.stderr)
    signal.signal(signal.SIGTERM, _stop)
    code = 1
    try:
        asked = Options(
            options.kills,
            seed,
            options.engine,
            options.jobs,
            options.max_jobs,
            options.prefetch,
            options.cache,
            options.pages,
            options.broker,
        )
        verdict = run(asked, directory, _show)
        code = _report(verdict)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        code = 130
    except CampaignError as error:
        print(f"\n{error}", file=sys.stderr)
    except (pytest.skip.Exception, pytest.fail.Exception) as error:  # what the tests' services say when one is missing
        print(f"\n{error}", file=sys.stderr)
        code = 2
    finally:
        print(file=sys.stderr)
        if options.keep or code == 1:
            print(
                f"kept: {directory} (logs/ what the workers said, server/ the record, base/ PATH_BASE)", file=sys.stderr
            )
        else:
            shutil.rmtree(directory, ignore_errors=True)
    return code


def _report(verdict: Verdict) -> int:
    print(file=sys.stderr)
    for job, reasons in sorted(verdict.wrong.items(), key=lambda item: item[0] or 0):
        for reason in reasons:
            print(f"{'campaign' if job is None else f'job {job}'}: {reason}", file=sys.stderr)
    print(json.dumps(verdict.numbers()))
    return 0 if verdict.good else 1


def _show(line: str) -> None:
    """One line that is written over; where nobody looks, nothing."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def _stop(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Kill a worker again and again while it works, then see whether every job has ended right.",
        epilog="""\
It starts a mock API and a worker, submits jobs of many kinds whose outputs are known, and sends the worker SIGKILL at
times that the seed decides; each time it is started again at once. At the end one worker is left alone until all jobs
have ended. On standard output: one line of JSON; all must be 0 but kills, jobs, repeats (ends told once more because
the process that told them died before it noted the answer) and restart_to_beat_p99_s (seconds from a start to the first
heartbeat of a job held before). On standard error: how far it is, and what is wrong, by job.

examples:
  python -m tests.chaos                           50 kills, some minutes
  python -m tests.chaos --kills 1000 --seed 7     an hour or two
  python -m tests.chaos --engine --kills 30       kills an engine of its own, too; needs root
  python -m tests.chaos --max-jobs 3 --prefetch 1 --cache
  python -m tests.chaos --kills 200 --broker      a worker without the engine's socket
  python -m tests.chaos --kills 200 --pages       strangers' pages, and the user's side of the server away

Exit codes: 0 all well; 1 something is wrong; 2 something is missing here; 130 Ctrl-C.
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="how often (default: %(default)s)")
    parser.add_argument("--seed", type=int, metavar="S", help="decides jobs and times (default: a new one, printed)")
    parser.add_argument("--engine", action="store_true", help="use an engine of its own, and kill and stop that, too")
    parser.add_argument("--jobs", type=int, metavar="M", help="how many jobs (default: as many as the kills need)")
    parser.add_argument(
        "--max-jobs", type=int, default=8, metavar="K", help="jobs computing side by side (default: %(default)s)"
    )
    parser.add_argument(
        "--prefetch", type=int, default=0, metavar="N", help="jobs brought while others compute (default: %(default)s)"
    )
    parser.add_argument("--cache", action="store_true", help="keep inputs for later jobs (CACHE_SIZE)")
    parser.add_argument(
        "--pages",
        action="store_true",
        help="strangers' pages as answers, and the user's side away now and then",
    )
    parser.add_argument(
        "--broker", action="store_true", help="a broker between worker and engine, which is killed, too; needs root"
    )
    parser.add_argument("--keep", action="store_true", help="keep the directory also when all is well")
    return parser


if __name__ == "__main__":
    sys.exit(main())
