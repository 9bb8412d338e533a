"""The filter of system calls that jobs run under: what it closes, and that real programs run (FAULTS.md T11)."""

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from jobfetcher.build import make_box
from jobfetcher.engine.flavour import DOCKER, Flavour, docker_flavour, podman_flavour
from jobfetcher.engine.run_spec import BoxPolicy
from jobfetcher.engine.seccomp import security_option
from jobfetcher.settings import load
from tests.support.boxes import DockerBench, docker_bench

pytestmark = pytest.mark.fault("T11")

ROOT = Path(__file__).resolve().parents[2]
PROFILE = ROOT / "jobfetcher" / "engine" / "seccomp.json"

OURS = BoxPolicy(network=None)

#: Makes each call once and prints what came of it, by name. Of 64-bit x86, and of its 32-bit calls one, by `int 0x80`.
PROBE = r"""
import ctypes, errno, json, mmap, struct
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    ctypes.set_errno(0)
    return "ok" if libc.syscall(number, *arguments) != -1 else errno.errorcode[ctypes.get_errno()]
answers = {name: call(*numbers) for name, numbers in json.loads(CALLS).items()}
low = dict(flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40)  # MAP_32BIT
code, given = mmap.mmap(-1, 4096, prot=7, **low), mmap.mmap(-1, 4096, prot=3, **low)
code.write(bytes.fromhex("53b86600000089fb89f1cd805bc3"))  # socketcall(edi, esi)
given.write(struct.pack("III", 40, 1, 0))
place = lambda mapped: ctypes.addressof(ctypes.c_char.from_buffer(mapped))
answer = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_uint)(place(code))(1, place(given))
answers["socketcall"] = "ok" if answer >= 0 else errno.errorcode[-answer]
print(json.dumps(answers))
"""

CLOSED: Mapping[str, tuple[list[int], str]] = {
    "io_uring_setup": ([425, 0, 0], "ENOSYS"),
    "io_uring_enter": ([426, 0, 0, 0, 0, 0], "ENOSYS"),
    "io_uring_register": ([427, 0, 0, 0, 0], "ENOSYS"),
    "socket AF_VSOCK": ([41, 40, 1, 0], "EPERM"),
    "socket AF_ALG": ([41, 38, 5, 0], "EPERM"),
    "socket AF_PACKET": ([41, 17, 3, 0], "EPERM"),
    "add_key": ([248, 0, 0, 0, 0, 0], "EPERM"),
    "request_key": ([249, 0, 0, 0, 0], "EPERM"),
    "keyctl": ([250, 0, 0, 0, 0, 0], "EPERM"),
    "userfaultfd": ([323, 0], "EPERM"),
    "bpf": ([321, 0, 0, 0], "EPERM"),
    "perf_event_open": ([298, 0, 0, 0, 0, 0], "EPERM"),
    "unshare NEWUSER": ([272, 0x10000000], "EPERM"),
    "clone NEWUSER": ([56, 0x10000011, 0, 0, 0, 0], "EPERM"),
    "clone NEWNS": ([56, 0x00020011, 0, 0, 0, 0], "EPERM"),
    "clone3": ([435, 0, 0], "ENOSYS"),
    "setns": ([308, 0, 0], "EPERM"),
    "mount": ([165, 0, 0, 0, 0, 0], "EPERM"),
    "umount2": ([166, 0, 0], "EPERM"),
    "pivot_root": ([155, 0, 0], "EPERM"),
    "fsopen": ([430, 0, 0], "EPERM"),
    "open_tree": ([428, 0, 0, 0], "EPERM"),
    "kexec_load": ([246, 0, 0, 0, 0], "EPERM"),
    "init_module": ([175, 0, 0, 0], "EPERM"),
    "finit_module": ([313, 0, 0, 0], "EPERM"),
    "ptrace": ([101, 0, 0, 0, 0], "EPERM"),
    "personality": ([135, 0x40000], "EPERM"),
    "modify_ldt": ([154, 0, 0, 0], "ENOSYS"),
    "open_by_handle_at": ([304, 0, 0, 0], "EPERM"),
    "get_mempolicy": ([239, 0, 0, 0, 0, 0], "EPERM"),
    "syslog": ([103, 3, 0, 0], "EPERM"),
    "ioctl FSSETXATTR": ([16, 0, 0x401C5820, 0], "EPERM"),
    "ioctl FSSETXATTR with a bit that the kernel does not see": ([16, 0, 0x1_401C5820, 0], "EPERM"),
    "nobody knows it": ([999], "ENOSYS"),
}

OPEN: Mapping[str, list[int]] = {
    "socket AF_UNIX": [41, 1, 1, 0],
    "socket AF_INET": [41, 2, 1, 0],
    "socket AF_INET6": [41, 10, 1, 0],
    "socket AF_NETLINK": [41, 16, 3, 0],
    "pidfd_open": [434, 1, 0],
    "ioctl FIOCLEX": [16, 0, 0x5451],
    "ioctl FIONCLEX": [16, 0, 0x5450],
}

#: What programs of scientists are made of.
PROGRAM = r"""
import asyncio, concurrent.futures, ctypes, multiprocessing, multiprocessing.shared_memory, os, pathlib, select, signal
import socket, sqlite3, ssl, subprocess, tempfile, threading, time

def square(x): return x * x

if __name__ == "__main__":
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(square, range(100))) == 328350
    for way in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(way).Pool(3) as pool:
            assert sum(pool.map(square, range(100))) == 328350
    shared = multiprocessing.shared_memory.SharedMemory(create=True, size=2**20)
    shared.buf[:4] = b"abcd"; shared.close(); shared.unlink()
    assert subprocess.run("echo hello | tr a-z A-Z", shell=True, capture_output=True).stdout == b"HELLO\n"
    left, right = socket.socketpair()
    left.send(b"x"); assert right.recv(1) == b"x"
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    async def tick():
        done = await asyncio.create_subprocess_exec("true")
        await asyncio.gather(*(asyncio.sleep(0.01) for _ in range(10)), done.wait())
    asyncio.run(tick())
    with tempfile.TemporaryDirectory() as folder:
        base = sqlite3.connect(pathlib.Path(folder, "x.db"))
        base.execute("PRAGMA journal_mode=WAL"); base.execute("CREATE TABLE t (x)"); base.commit()
        with open(pathlib.Path(folder, "a"), "wb") as a:
            a.write(b"x" * 10**6)
        with open(pathlib.Path(folder, "a"), "rb") as a, open(pathlib.Path(folder, "b"), "wb") as b:
            assert os.sendfile(b.fileno(), a.fileno(), 0, 10**6) == 10**6
            os.copy_file_range(a.fileno(), b.fileno(), 10, 0, 0)
    os.sched_setaffinity(0, os.sched_getaffinity(0)); os.nice(1); os.getrandom(8); os.memfd_create("x")
    signal.signal(signal.SIGALRM, lambda *_: None); signal.setitimer(signal.ITIMER_REAL, 0.01); signal.pause()
    select.epoll().close(); ssl.create_default_context()
    print("all runs")
"""


@pytest.fixture(scope="module")
def python_bench(base_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerBench]:
    with docker_bench(base_python, tmp_path_factory.mktemp("python") / "files") as ready:
        yield ready


@pytest.fixture(scope="module")
def probe(python_bench: DockerBench) -> Callable[[BoxPolicy], Mapping[str, str]]:
    """What the calls are answered with in a job's box."""
    calls = {name: numbers for name, (numbers, _) in CLOSED.items()} | dict(OPEN)
    (python_bench.files / "probe.py").write_text(f"CALLS = {json.dumps(calls)!r}\n{PROBE}")

    def ask(policy: BoxPolicy) -> Mapping[str, str]:
        end, printed = python_bench.run(python_bench.spec("python3 /files/probe.py", policy=policy, memory_mib=256))
        assert end.code == 0, printed
        answers: Mapping[str, str] = json.loads(printed)
        return answers

    return ask


@pytest.mark.docker
def test_what_is_closed_is_closed_and_the_rest_is_open(probe: Callable[[BoxPolicy], Mapping[str, str]]) -> None:
    expected = {name: answer for name, (_, answer) in CLOSED.items()} | dict.fromkeys(OPEN, "ok")
    assert probe(OURS) == expected | {"socketcall": "ENOSYS"}


@pytest.mark.docker
def test_a_capability_opens_what_needs_it(probe: Callable[[BoxPolicy], Mapping[str, str]]) -> None:
    answers = probe(BoxPolicy(("SYS_PTRACE", "NET_RAW"), network=None))
    assert (answers["ptrace"], answers["socket AF_PACKET"]) == ("ok", "ok")
    assert (answers["socket AF_VSOCK"], answers["mount"]) == ("EPERM", "EPERM")


@pytest.mark.docker
def test_the_engines_own_filter_stays_where_the_owner_wants_it(
    probe: Callable[[BoxPolicy], Mapping[str, str]],
) -> None:
    answers = probe(BoxPolicy(network=None, own_filter=False))
    assert answers["mount"] == "EPERM"
    assert answers != probe(OURS)  # or it would not be worth its while


@pytest.mark.docker
def test_programs_run_under_it(python_bench: DockerBench) -> None:
    (python_bench.files / "program.py").write_text(PROGRAM)
    end, printed = python_bench.run(python_bench.spec("python3 /files/program.py", memory_mib=512))
    assert (end.code, printed.splitlines()[-1:]) == (0, ["all runs"]), printed


def test_the_shipped_filter_is_what_its_script_makes() -> None:
    found = importlib.util.spec_from_file_location("seccomp_profile", ROOT / "scripts" / "seccomp_profile.py")
    assert found is not None
    assert found.loader is not None
    script: Any = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    shipped = json.loads(PROFILE.read_text())
    names = {name for rule in shipped["syscalls"] for name in rule["names"]}
    assert script.profile(names) == shipped
    assert len(names) > 400


def test_no_call_is_both_allowed_and_closed() -> None:
    rules = json.loads(PROFILE.read_text())["syscalls"]
    always = {
        name: rule["action"]
        for rule in rules
        if not rule.get("includes") and not rule.get("excludes") and not rule.get("args")
        for name in rule["names"]
    }
    assert sum(len(rule["names"]) for rule in rules if rule["names"][0] in always) == len(always)
    for rule in rules:
        if rule.get("includes") or rule.get("args"):
            assert not always.keys() & set(rule["names"])


@pytest.mark.parametrize(
    ("said", "takes"),
    [
        (["name=seccomp,profile=default"], True),
        (["name=apparmor", "name=seccomp,profile=builtin"], True),
        (["name=seccomp,profile=unconfined"], True),
        (["name=seccomp,profile=/etc/docker/ours.json"], False),  # the owner's own, for all containers
        (["name=apparmor"], False),  # the kernel filters none, and the engine would refuse one
    ],
)
def test_which_engines_get_it(said: list[str], takes: bool) -> None:
    flavour: Flavour = docker_flavour({"SecurityOptions": said})
    assert flavour.takes_filter is takes
    assert DOCKER.takes_filter
    assert not podman_flavour("5.4.2", {}).takes_filter


def test_the_setting_decides() -> None:
    for value, own in (("jobfetcher", True), ("default", False)):
        loaded = load(environ={"JOB_SECCOMP": value}, server=False)
        assert make_box(loaded.settings).own_filter is own


def test_it_is_small_for_inspect_repeats_it() -> None:
    assert len(security_option()) < 14_000
