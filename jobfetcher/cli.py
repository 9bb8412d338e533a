"""The command line: parse, build, run, and map errors to exit codes. Thin.

Exit codes: see `run`. Results go to standard output, everything else to standard error. Rooms are imported by the
command that needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from jobfetcher.core.ports import Emit
    from jobfetcher.settings import Loaded, Settings
    from jobfetcher.telemetry.progress import ProgressBars

#: Three signals end it within a second (FAULTS.md F4), also where a terminal or a disk takes nothing any more.
_PART_S = 0.8

app = typer.Typer(
    name="jobfetcher",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes 0.1 s to draw boxes around the help
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Takes container jobs that fit this machine from a job server, runs them, and reports how they ended.",
    epilog="Settings come from options, the environment and .env; `jobfetcher config` shows all of them.",
)

EnvFile = Annotated[
    Path | None, typer.Option("--env-file", help="Read settings from this file instead of .env in this directory.")
]


def _version(wanted: bool) -> None:
    if wanted:
        from jobfetcher import __version__

        typer.echo(f"jobfetcher {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    once: Annotated[bool, typer.Option("--once", help="Run one job, then exit; waits until there is one.")] = False,
    exit_when_idle: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="Exit after so many seconds without a job.")
    ] = None,
    max_jobs: Annotated[
        str | None, typer.Option(metavar="N|auto", help="Jobs computing side by side (setting MAX_JOBS).")
    ] = None,
    path_base: Annotated[
        Path | None, typer.Option(help="The worker's own directory (setting PATH_BASE).", show_default=False)
    ] = None,
    log_format: Annotated[str | None, typer.Option(metavar="plain|json", help="How log lines look.")] = None,
    log_level: Annotated[
        str | None, typer.Option(metavar="debug|info|warning|error", help="Least level that is logged.")
    ] = None,
    env_file: EnvFile = None,
) -> None:
    """Take jobs and run them until told to stop.

    Ctrl-C once: finish the jobs in hand, then exit; a job that has not run yet and waits for a registry or a storage
    that does not answer is given back. Twice: stop all and give them back. Three times: exit at once, saying what the
    next start does with each of them.
    With STOP_MODE=detach, once: exit and leave them running; the next start goes on with them. Twice: exit at once.

    Needs API_URL and either ACCESS_TOKEN or USERNAME and PASSWORD, from the environment or .env.

    Exit codes: 0 all well; 1 the server never answered, or with --once this machine failed the job; 2 a setting or the
    machine's set-up is wrong; 130 or 143 ended at once by a third signal.
    """
    options = {"max_jobs": max_jobs, "path_base": path_base, "log_format": log_format, "log_level": log_level}
    loaded = _load(options, env_file)
    with ExitStack() as opened:
        emit, bars = _telemetry(loaded.settings)
        opened.callback(bars.close)
        raise typer.Exit(_guarded(lambda: _run(loaded, once, exit_when_idle, emit, bars)))


@app.command()
def resources(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    env_file: EnvFile = None,
) -> None:
    """Show what this machine would offer to a job server now. Needs no server and no account."""
    raise typer.Exit(_guarded(lambda: _resources(as_json, env_file)))


@app.command()
def broker(env_file: EnvFile = None) -> None:
    """Stand between a worker and the container engine: pass what a worker needs, and nothing else.

    For machines whose worker shall not hold the engine's socket, which is as good as root. Runs beside the worker, as
    root, with the same settings (PATH_BASE, JOB_*, ALLOWED_IMAGES, GPUS, ...); needs no server and no account. The
    worker is given DOCKER_HOST=unix:///run/jobfetcher/broker.sock (BROKER_SOCKET). Jobs run on while it is away.

    Exit codes: 0 told to end; 1 the engine does not answer; 2 a setting or the machine's set-up is wrong.
    """
    loaded = _load({}, env_file, server=False)
    with ExitStack() as opened:
        emit, bars = _telemetry(loaded.settings)
        opened.callback(bars.close)
        raise typer.Exit(_guarded(lambda: _broker(loaded.settings, emit)))


@app.command()
def config(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    env_file: EnvFile = None,
) -> None:
    """Show every setting, its value and where it came from.

    Secrets are masked.
    """
    from jobfetcher.settings import check_server
    from jobfetcher.show import config_rows, print_json, print_table

    loaded = _load({}, env_file, server=False)
    rows = config_rows(loaded)
    if as_json:
        print_json({row["name"]: {"value": row["value"], "from": row["from"]} for row in rows})
    else:
        print_table(rows)
    raise typer.Exit(_guarded(lambda: check_server(loaded.settings)))


def _load(options: dict[str, Any], env_file: Path | None, *, server: bool = True) -> Loaded:
    from jobfetcher.core.errors import ConfigError
    from jobfetcher.settings import load

    try:
        loaded = load(options, env_file=env_file, server=server)
    except ConfigError as error:
        raise typer.Exit(_complain(error, 2)) from None
    for warning in loaded.warnings:
        _say(f"warning: {warning}")
    return loaded


def _complain(error: Exception, code: int) -> int:
    for line in str(error).splitlines():
        _say(line)
    return code


def _say(line: str) -> None:
    with suppress(OSError):  # a pipe that nobody reads any more
        typer.echo(f"jobfetcher: {line}", err=True)


def _telemetry(settings: Settings) -> tuple[Emit, ProgressBars]:
    from jobfetcher.telemetry.events import Events
    from jobfetcher.telemetry.logs import configure
    from jobfetcher.telemetry.progress import ProgressBars

    bars = ProgressBars(sys.stderr)
    log = configure(settings.log_format, settings.log_level, bars)
    return Events(log, bars).emit, bars


def _guarded(command: Callable[[], int | None]) -> int:
    """Run a command; a ConfigError is one readable line and exit code 2, another error of ours exit code 1."""
    from jobfetcher.core.errors import ConfigError, JobfetcherError

    try:
        return command() or 0
    except ConfigError as error:
        return _complain(error, 2)
    except JobfetcherError as error:
        return _complain(error, 1)


def _run(loaded: Loaded, once: bool, exit_when_idle: float | None, emit: Emit, bars: ProgressBars) -> int:
    from jobfetcher import build, refusals
    from jobfetcher.core.errors import ConfigError, SourceRefused
    from jobfetcher.core.failpoints import ask_for
    from jobfetcher.settings import failpoint_request
    from jobfetcher.worker import Leaving, Polling, Worker

    def enough(taken: int, idle_s: float) -> bool:
        return (once and taken > 0) or (exit_when_idle is not None and idle_s >= exit_when_idle)

    def part(worker: Worker, code: int) -> None:
        with suppress(Exception):
            for sentence in worker.last_words():
                emit("left_behind", level="warning", message=sentence)
        bars.close(within_s=0.3)
        os._exit(code)

    def end(code: int) -> None:
        time.sleep(_PART_S)
        os._exit(code)

    def on_signal(worker: Worker) -> None:
        signals = 0

        def handle(number: int, _frame: object) -> None:
            nonlocal signals
            signals += 1
            gone.set()
            if signals <= len(ways_out):
                worker.leave(ways_out[signals - 1])
                return
            worker.say_goodbye()
            try:
                # In a thread: the main one may hold what this needs. The other one, should it get stuck.
                threading.Thread(target=part, args=(worker, 128 + number), daemon=True).start()
                threading.Thread(target=end, args=(128 + number,), daemon=True).start()
            except RuntimeError:  # the limit of threads
                os._exit(128 + number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handle)

    settings = loaded.settings
    gone = threading.Event()
    ways_out = [Leaving.DETACH] if settings.stop_mode == "detach" else [Leaving.DRAIN, Leaving.STOP_JOBS]
    _stand_firm()
    ask_for(failpoint_request())
    with build.worker(settings, Polling(settings.timeout_job, enough, exit_when_idle), emit) as worker:
        on_signal(worker)
        emit("started", message=f"asking {settings.api_url} for jobs", path_base=settings.path_base)
        try:
            worker.run()
        except ConfigError as error:
            if not isinstance(error.__cause__, SourceRefused):
                raise
            wait_s = refusals.another(worker.base.path)
            why = f"{str(error).rstrip('.')}; {_signs_in_with(loaded)}"
            how = f"waiting {wait_s:g} s before leaving, so that restarts do not lock the account; Ctrl-C: leave now"
            emit("refused", level="error", message=f"{why}; {how}")
            gone.wait(wait_s)
            raise ConfigError(why) from error
        finally:
            if worker.welcomed:
                refusals.forget(worker.base.path)
        if worker.running:  # detached from a job in the middle of a call: the journal bears that
            emit("stopped", message="stopped; the next start goes on with the jobs in hand")
            bars.close(within_s=0.3)
            os._exit(0)
        left = "; the next start goes on with the jobs in hand" if worker.detached else "; nothing is left running"
        emit("stopped", message="stopped" if worker.unfinished else f"stopped{left}")
        unanswered = not worker.welcomed and not worker.left_by_signal
        return 1 if unanswered or (once and worker.worker_faults) else 0


def _signs_in_with(loaded: Loaded) -> str:
    """Where that came from which was refused, for a person."""
    if loaded.settings.access_token is not None:
        return f"ACCESS_TOKEN is from {loaded.layers['access_token']}"
    return f"PASSWORD is from {loaded.layers['password']}, USERNAME from {loaded.layers['username']}"


def _stand_firm() -> None:
    """Where the machine lets us: be the last to be killed for memory, and run before the jobs when it is busy.

    A heartbeat that starves loses the job (DESIGN.md, Threads). Needs root or the capability, and is no loss without.
    """
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-500")
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -5)


def _broker(settings: Settings, emit: Emit) -> None:
    from jobfetcher import build_broker

    def end(_number: int, _frame: object) -> None:
        settings.broker_socket.unlink(missing_ok=True)
        os._exit(0)  # at once: what it has to remember is written, and jobs are the engine's

    with build_broker.broker(settings, emit) as ready:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)
        ready.serve()


def _resources(as_json: bool, env_file: Path | None) -> int:
    from jobfetcher import build
    from jobfetcher.resources import detect
    from jobfetcher.show import print_json, print_table, resources_record, resources_rows

    notes: list[str] = []

    def note(name: str, /, level: str = "info", **fields: object) -> None:
        if name == "job_users" or (level != "info" and name != "gpu_trouble"):  # which the reading below says as well
            notes.append(str(fields["message"]))

    settings = _load({}, env_file, server=False).settings
    with closing(build.make_engine(settings, "", note)) as engine:
        machine = build.look_at_machine(settings, engine, note)
        notes += filter(None, [engine.open_network()])  # `run` says it when its first container gets the network
    notes += detect.read_gpus(settings.gpus).problems
    budget = machine.budget
    record = resources_record(machine.inventory, budget.free(), budget.slots, notes, machine.engine, machine.disks)
    if as_json:
        print_json(record)
    else:
        print_table(resources_rows(record))
    return 0


def main() -> None:
    """Entry point of the command `jobfetcher`.

    Names on disk are UTF-8, whatever LANG says: with a locale of another encoding the interpreter starts anew in its
    UTF-8 mode, as the same process, for the encoding of file names is chosen once and for all when it starts.
    """
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode and sys.executable:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606 - itself
    _hold_standard_streams()
    try:
        app()
    finally:
        try:
            sys.stderr.flush()
        except OSError:  # a pipe that nobody reads: the interpreter would try again, fail, and change the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _hold_standard_streams() -> None:
    """Where a service or a shell (`2>&-`) closed one of them, the next file that is opened would get its number, and
    what is said would go into that: the journal, say. Nothing is said then, and the worker works."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115 - for good
