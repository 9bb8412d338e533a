"""The demo: mock API, real worker, real engine, real image. Run by `make demo` as `python -m demo.run`.

Uploads a microscope image and the program that measures the cell in it, submits a job, lets one worker run it, prints
the job's states as they pass, fetches the results into build/demo/results and compares them with what is known of the
image. Exit code 0 only when they agree. All processes it started are gone when it ends, also after Ctrl-C. A second
demo beside it takes build/demo-2, and so on; ports are whatever is free.
"""

import contextlib
import csv
import fcntl
import io
import itertools
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import docker
import httpx
from docker.errors import DockerException
from docker.utils import kwargs_from_env

from demo.busybox_image import ensure_busybox_image

HERE = Path(__file__).parent
BUILD = HERE.parent / "build"
BIN = Path(sys.executable).parent
TOKEN = "mock-token"  # noqa: S105 -- the documented token of a server that lives for this demo and listens on loopback
DEADLINE_S = 120.0
BAR_PIXELS = 10
MICROMETRES_PER_PIXEL = "0.107"

# What is known of the image (README.md here): name in measurements.csv, words, value.
EXPECTED = [
    ("otsu_threshold", "Otsu threshold (grey value)", "122"),
    ("pixels_above_threshold", "pixels above it", "11746"),
    ("area_above_threshold", "area (square micrometres)", "134.5"),
    ("diameter_above_threshold", "equivalent diameter (micrometres)", "13.09"),
]
ALSO_FOUND = [
    ("objects", "sets of connected pixels"),
    ("cell_centroid_x", "cell's centre, column"),
    ("cell_centroid_y", "cell's centre, row"),
]


class DemoError(Exception):
    """The demo cannot go on; the text says why and what to look at."""


def main() -> int:
    """Run the demo; returns the exit code."""
    signal.signal(signal.SIGTERM, _stop_by_signal)
    try:
        with _directory() as work:
            image = _job_image()
            with _server(work) as api:
                job = _submit(api, image)
                print(f"job       {job}: segment.sh on cell.pgm, in {image}")
                _run_worker(work, api, job)
                results = work / "results"
                return _report(results, _fetch_results(results, api, job))
    except DemoError as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo stopped", file=sys.stderr)
        return 130


def _stop_by_signal(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    """An empty directory that no other demo uses while the block runs: build/demo, or the next one that is free.

    The lock lies beside it and goes with the process, however that ends; the results stay until the next demo.
    """
    BUILD.mkdir(exist_ok=True)
    for number in itertools.count(1):
        name = "demo" if number == 1 else f"demo-{number}"
        with (BUILD / f".{name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            work = BUILD / name
            if work.exists():
                shutil.rmtree(work)
            (work / "results").mkdir(parents=True)
            yield work
            return


def _job_image() -> str:
    try:
        with contextlib.closing(docker.APIClient(**kwargs_from_env())) as client:
            return ensure_busybox_image(client)
    except (DockerException, OSError) as error:
        raise DemoError(f"no job image: {error}") from error


@contextlib.contextmanager
def _server(work: Path) -> Iterator[httpx.Client]:
    """mock_api as a process of its own, on a port that it finds, and a client that speaks to it as the job's user."""
    log = work / "server.log"
    environment = {**_environment(), "MOCK_API_DATA_DIR": str(work / "server")}
    command = [sys.executable, "-m", "mock_api", "--host", "127.0.0.1", "--port", "0"]
    with _process(command, log, environment) as process:
        _wait(lambda: _url_in(log) is not None, process, log, "the server says its address", 30)
        with httpx.Client(base_url=_url_in(log) or "", timeout=10, trust_env=False) as client:
            _wait(lambda: _answers(client), process, log, "the server answers", 30)
            print(f"server    {client.base_url} (mock_api), log {_shown(log)}")
            yield client


def _url_in(log: Path) -> str | None:
    """The address that the server says it listens on, once it has said it."""
    found = re.search(r"^mock API on (\S+) ", log.read_text(errors="replace"), re.MULTILINE)
    return found[1] if found else None


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/access_info").is_success
    except httpx.TransportError:
        return False


def _submit(api: httpx.Client, image: str) -> int:
    inputs = {
        name: _call(api, "PUT", f"/user/files/demo/{name}", content=(HERE / name).read_bytes()).json()["file_id"]
        for name in ("cell.pgm", "segment.sh")
    }
    job = {
        "app": {"cmd": ["cd /files &&", f"sh segment.sh cell.pgm out log {MICROMETRES_PER_PIXEL}"]},
        "handler": {"image_url": image, "files_down": inputs, "files_up": {"output": "out", "log": "log"}},
    }
    return int(_call(api, "POST", "/user/jobs", json=job).json()["job_id"])


def _run_worker(work: Path, api: httpx.Client, job: int) -> None:
    """One worker that takes one job; prints every state that the server records, with the time since the submission."""
    log = work / "worker.log"
    settings = {
        "API_URL": str(api.base_url).rstrip("/"),
        "ACCESS_TOKEN": TOKEN,
        "PATH_BASE": str(work / "worker"),
        "TIMEOUT_JOB": "1",
        "JOB_NETWORK_GUARD": "off",  # a demonstration leaves the machine's firewall alone
    }
    (work / "worker").mkdir(mode=0o700)
    print(f"worker    jobfetcher run --once, log {_shown(log)}")
    with _process([str(BIN / "jobfetcher"), "run", "--once"], log, {**_environment(), **settings}) as process:
        shown = 0

        def ended() -> bool:
            nonlocal shown
            ending = process.poll() is not None  # asked first, so that what it said last is still shown
            states = _states(api, job)
            for after_s, state in states[shown:]:
                print(f"          {after_s:6.2f} s  {state}")
            shown = len(states)
            return ending

        _wait(ended, None, log, "the worker ends", DEADLINE_S)
    state = _call(api, "GET", f"/user/jobs/{job}").json()
    if process.returncode or state["state"] != "finished":
        told = state.get("details") or "no details"
        raise DemoError(
            f"the job is {state['state']} ({told}), the worker's exit code {process.returncode}. "
            f"Last lines of {_shown(log)}:\n{_tail(log)}"
        )


def _states(api: httpx.Client, job: int) -> list[tuple[float, str]]:
    """(seconds since the submission, state) of every change of state, heartbeats left out."""
    history = _call(api, "GET", f"/user/jobs/{job}").json()["history"]
    changes: list[tuple[float, str]] = []
    for entry in history:
        if not changes or changes[-1][1] != entry["state"]:
            changes.append((entry["time"] - history[0]["time"], entry["state"]))
    return changes


def _fetch_results(results: Path, api: httpx.Client, job: int) -> dict[str, Path]:
    """Every stored file of the job, below `results` under its own name; returns name to path."""
    stored = {}
    for file in _call(api, "GET", f"/user/jobs/{job}/files").json()["files"]:
        path = results / file["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_call(api, "GET", f"/user/jobs/{job}/files/{quote(file['name'])}").content)
        stored[file["name"]] = path
    return stored


def _report(results: Path, stored: dict[str, Path]) -> int:
    """Print where the results are and what they say; 0 when they are what is known of the image."""
    for wanted in ("output/out/measurements.csv", "output/out/mask.pgm", "log/log/segment.log"):
        if wanted not in stored:
            raise DemoError(f"the job stored no {wanted}, only: {', '.join(sorted(stored)) or 'nothing'}")
    width, height, mask = _read_pgm(stored["output/out/mask.pgm"].read_bytes())
    (results / "result.png").write_bytes(
        _side_by_side(_read_pgm((HERE / "cell.pgm").read_bytes()), (width, height, mask))
    )

    print(f"results   {_shown(results)}/")
    for path in sorted(stored.values()):
        print(f"            {path.relative_to(results)}  {path.stat().st_size} bytes")
    print("            result.png  to look at: the picture, and beside it what the job took for the cell\n")

    found = {
        row["quantity"]: row["value"]
        for row in csv.DictReader(io.StringIO(stored["output/out/measurements.csv"].read_text()))
    }
    checks = [(words, found.get(name, "missing"), value) for name, words, value in EXPECTED]
    checks.append(("white pixels in the mask", str(mask.count(255)), found.get("cell_pixels", "missing")))
    print(f"{'':36}{'found':>8}{'expected':>10}")
    for words, value, expected in checks:
        print(f"{words:36}{value:>8}{expected:>10}  {'ok' if value == expected else 'WRONG'}")
    for name, words in ALSO_FOUND:
        print(f"{words:36}{found.get(name, 'missing'):>8}")
    right = all(value == expected for _, value, expected in checks)
    print("\nThe measurements are what is known of this image." if right else "\nThe measurements are WRONG.")
    return 0 if right else 1


def _read_pgm(content: bytes) -> tuple[int, int, bytes]:
    """Width, height and pixels of a binary PGM of 8 bits, as segment.sh writes it and as the demo's image is one."""
    header = re.match(rb"P5\n(?:#[^\n]*\n)*(\d+) (\d+)\n255\n", content)
    if header is None:
        raise DemoError("out/mask.pgm is not a picture")
    width, height, pixels = int(header[1]), int(header[2]), content[header.end() :]
    if len(pixels) != width * height:
        raise DemoError("out/mask.pgm is not a picture of the size that it says")
    return width, height, pixels


def _side_by_side(left: tuple[int, int, bytes], right: tuple[int, int, bytes]) -> bytes:
    """A PNG of two pictures of one size, with a white bar between them."""
    if left[:2] != right[:2]:
        raise DemoError(f"out/mask.pgm is of {right[0]} x {right[1]} pixels, the image of {left[0]} x {left[1]}")
    width, height = left[:2]
    rows = (
        left[2][y * width : (y + 1) * width] + b"\xff" * BAR_PIXELS + right[2][y * width : (y + 1) * width]
        for y in range(height)
    )
    return _png(2 * width + BAR_PIXELS, height, b"".join(rows))


def _png(width: int, height: int, grey: bytes) -> bytes:
    """A PNG file of 8-bit grey pixels (PNG specification, section 5): signature, IHDR, IDAT, IEND."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + grey[y * width : (y + 1) * width] for y in range(height))  # 0: the row is not filtered
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _call(api: httpx.Client, method: str, path: str, **request: Any) -> httpx.Response:
    try:
        return api.request(method, path, **request).raise_for_status()
    except httpx.HTTPError as error:
        raise DemoError(f"{method} {path}: {error}. The server's log is beside the worker's") from error


def _environment() -> dict[str, str]:
    """This environment less every setting of the worker and of the server that somebody may have in it."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("JOBFETCHER_", "MOCK_API_"))}


@contextlib.contextmanager
def _process(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process with its output in `log`, ended with the block.

    In a session of its own, so that Ctrl-C reaches it once, through here; beside its log, so that no .env of the
    checkout is read. A worker finishes its job on the first signal and gives it up on the second.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            cwd=log.parent,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        try:
            for patience_s in (5.0, 25.0):
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience_s)
        finally:  # also when Ctrl-C comes again
            process.kill()
            process.wait()


def _wait(
    ready: Callable[[], bool], process: subprocess.Popen[bytes] | None, log: Path, what: str, timeout_s: float
) -> None:
    """Poll `ready` until it is true; DemoError when `process` ends before that, or after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if process is not None and process.poll() is not None:
            raise DemoError(f"a process ended with code {process.returncode} before {what}:\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise DemoError(f"{what}: not within {timeout_s:g} s. Last lines of {_shown(log)}:\n{_tail(log)}")
        time.sleep(0.05)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def _shown(path: Path) -> str:
    return str(path.relative_to(HERE.parent))


if __name__ == "__main__":
    sys.exit(main())
