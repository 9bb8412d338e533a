"""The demo: mock API, real worker, real engine, real image. Run by `make demo` as `python -m demo.run`.

Uploads a microscope image and the program that measures the cell in it, submits a job, lets one worker run it, prints
the job's states as they pass, fetches the results into build/demo/results and compares them with what is known of the
image. Exit code 0 only when they agree. All processes it started are gone when it ends, also after Ctrl-C.
"""

import contextlib
import csv
import io
import os
import shutil
import signal
import socket
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
WORK = HERE.parent / "build" / "demo"
RESULTS = WORK / "results"
BIN = Path(sys.executable).parent
TOKEN = "mock-token"  # noqa: S105 -- the documented token of a server that lives for this demo and listens on loopback
DEADLINE_S = 120.0
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
        _prepare_directory()
        image = _job_image()
        with _server() as api:
            job = _submit(api, image)
            print(f"job       {job}: segment.sh on cell.pgm, in {image}")
            _run_worker(api, job)
            return _report(_fetch_results(api, job))
    except DemoError as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo stopped", file=sys.stderr)
        return 130


def _stop_by_signal(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _prepare_directory() -> None:
    if WORK.exists():
        shutil.rmtree(WORK)
    RESULTS.mkdir(parents=True)


def _job_image() -> str:
    try:
        with contextlib.closing(docker.APIClient(**kwargs_from_env())) as client:
            return ensure_busybox_image(client)
    except (DockerException, OSError) as error:
        raise DemoError(f"no job image: {error}") from error


@contextlib.contextmanager
def _server() -> Iterator[httpx.Client]:
    """mock_api as a process of its own, and a client that speaks to it as the job's user."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log = WORK / "server.log"
    environment = {**_environment(), "MOCK_API_DATA_DIR": str(WORK / "server")}
    command = [sys.executable, "-m", "mock_api", "--host", "127.0.0.1", "--port", str(port)]
    with (
        _process(command, log, environment) as process,
        httpx.Client(base_url=url, timeout=10, trust_env=False) as client,
    ):
        _wait(lambda: _answers(client), process, log, "the server answers", 30)
        print(f"server    {url} (mock_api), log {_shown(log)}")
        yield client


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


def _run_worker(api: httpx.Client, job: int) -> None:
    """One worker that takes one job; prints every state that the server records, with the time since the submission."""
    log = WORK / "worker.log"
    settings = {
        "API_URL": str(api.base_url).rstrip("/"),
        "ACCESS_TOKEN": TOKEN,
        "PATH_BASE": str(WORK / "worker"),
        "TIMEOUT_JOB": "1",
    }
    (WORK / "worker").mkdir(mode=0o700)
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


def _fetch_results(api: httpx.Client, job: int) -> dict[str, Path]:
    """Every stored file of the job, below build/demo/results under its own name; returns name to path."""
    stored = {}
    for file in _call(api, "GET", f"/user/jobs/{job}/files").json()["files"]:
        path = RESULTS / file["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_call(api, "GET", f"/user/jobs/{job}/files/{quote(file['name'])}").content)
        stored[file["name"]] = path
    return stored


def _report(stored: dict[str, Path]) -> int:
    """Print where the results are and what they say; 0 when they are what is known of the image."""
    for wanted in ("output/out/measurements.csv", "output/out/mask.pgm", "log/log/segment.log"):
        if wanted not in stored:
            raise DemoError(f"the job stored no {wanted}, only: {', '.join(sorted(stored)) or 'nothing'}")
    mask_png = RESULTS / "mask.png"
    width, height, mask = _read_pgm(stored["output/out/mask.pgm"].read_bytes())
    mask_png.write_bytes(_png(width, height, mask))

    print(f"results   {_shown(RESULTS)}/")
    for path in sorted(stored.values()):
        print(f"            {path.relative_to(RESULTS)}  {path.stat().st_size} bytes")
    print("            mask.png  the mask as a picture to look at\n")

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
    """Width, height and pixels of a binary PGM as segment.sh writes it: three header lines, no comments."""
    try:
        kind, size, maximum, pixels = content.split(b"\n", 3)
        width, height = map(int, size.split())
    except ValueError as error:
        raise DemoError("out/mask.pgm is not a picture") from error
    if (kind, maximum, len(pixels)) != (b"P5", b"255", width * height):
        raise DemoError("out/mask.pgm is not a picture of the size that it says")
    return width, height, pixels


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
        raise DemoError(f"{method} {path}: {error}. See {_shown(WORK / 'server.log')}") from error


def _environment() -> dict[str, str]:
    """This environment less every setting of the worker and of the server that somebody may have in it."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("JOBFETCHER_", "MOCK_API_"))}


@contextlib.contextmanager
def _process(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process with its output in `log`, ended with the block.

    In a session of its own, so that Ctrl-C reaches it once, through here; in build/demo, so that no .env of the
    checkout is read. A worker finishes its job on the first signal and gives it up on the second.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            cwd=WORK,
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
