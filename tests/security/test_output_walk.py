"""What a job leaves behind can neither make the worker read outside its directory nor delete outside it."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobfetcher import tree
from jobfetcher.core.errors import JobFault
from jobfetcher.core.halt import Halt
from jobfetcher.core.run import Stored
from jobfetcher.staging import Progress, stage_out
from jobfetcher.testing.fake_source import FakeSource
from jobfetcher.testing.fake_transfer import FakeTransfer
from jobfetcher.tree import Changed, Found, Skipped
from jobfetcher.workspace import Workspace
from tests.support.jobs import make_job
from tests.support.mounts import bind, needs_root, tmpfs
from tests.support.trees import descend, fingerprint, names_in, open_descriptors

CANARY = b"canary: this lies outside"

_FLIPS = 5_000


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path / "job")
    made.create()
    (made.files / "out").mkdir()
    return made


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder beside the job's with a canary in it; it must be the same afterwards."""
    folder = tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    (folder / "canary").write_bytes(CANARY)
    (folder / "sub" / "canary").write_bytes(CANARY)
    before = fingerprint(folder)
    yield folder
    assert fingerprint(folder) == before


def send(workspace: Workspace, start: str = "out") -> tuple[dict[str, bytes], str]:
    """Upload the job's outputs; what was stored, and the sentence about what was not."""
    job, source, transfer = make_job(outputs={"output": start}), FakeSource(), FakeTransfer()
    lease = source.resume("t", job.id)
    marks: list[Stored] = []
    sent = stage_out(job, lease, workspace, transfer, halt=Halt(), have={}, mark=marks.append, progress=Progress())
    return {name.rpartition("/")[2]: content for name, content in transfer.objects.items()}, sent.sentence()


def _link_to_file(out: Path, outside: Path) -> None:
    (out / "villain").symlink_to(outside / "canary")


def _relative_link(out: Path, outside: Path) -> None:
    (out / "villain").symlink_to(os.path.relpath(outside / "canary", out))


def _link_to_folder(out: Path, outside: Path) -> None:
    (out / "villain").symlink_to(outside)


def _link_to_root(out: Path, outside: Path) -> None:
    (out / "villain").symlink_to("/")


def _chain(out: Path, outside: Path) -> None:
    (out / "villain").symlink_to("second")
    (out / "second").symlink_to("third")
    (out / "third").symlink_to(outside / "canary")


def _loop(out: Path, outside: Path) -> None:
    (out / "villain").symlink_to("again")
    (out / "again").symlink_to("villain")


def _self(out: Path, outside: Path) -> None:
    (out / "villain").symlink_to(".")


def _proc_root(out: Path, outside: Path) -> None:
    (out / "villain").symlink_to("/proc/self/root" + str(outside / "canary"))


def _proc_environ(out: Path, outside: Path) -> None:
    (out / "villain").symlink_to("/proc/self/environ")


def _proc_cwd(out: Path, outside: Path) -> None:
    (out / "villain").symlink_to("/proc/self/cwd")


def _dev_zero(out: Path, outside: Path) -> None:
    (out / "villain").symlink_to("/dev/zero")


def _dangling(out: Path, outside: Path) -> None:
    (out / "villain").symlink_to("nowhere")


def _inner(out: Path, outside: Path) -> None:
    (out / "villain").symlink_to("honest")


def _fifo(out: Path, outside: Path) -> None:
    os.mkfifo(out / "villain")


def _socket(out: Path, outside: Path) -> None:
    folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{folder}/villain")  # a socket's path has at most 107 bytes
    finally:
        os.close(folder)


def _device(out: Path, outside: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may make a device")
    os.mknod(out / "villain", stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero


def _block_device(out: Path, outside: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may make a device")
    os.mknod(out / "villain", stat.S_IFBLK | 0o666, os.makedev(7, 0))


VILLAINS: list[Callable[[Path, Path], None]] = [
    _link_to_file,
    _relative_link,
    _link_to_folder,
    _link_to_root,
    _chain,
    _loop,
    _self,
    _proc_root,
    _proc_environ,
    _proc_cwd,
    _dev_zero,
    _dangling,
    _inner,
    _fifo,
    _socket,
    _device,
    _block_device,
]


@pytest.mark.fault("T4")
@pytest.mark.fault("F11")
@pytest.mark.parametrize("plant", VILLAINS, ids=lambda plant: plant.__name__.strip("_"))
@pytest.mark.parametrize("folder", ["out", "out/deep/er"])
def test_what_is_no_file_is_named_and_not_sent(
    workspace: Workspace, outside: Path, plant: Callable[[Path, Path], None], folder: str
) -> None:
    out = workspace.files / folder
    out.mkdir(parents=True, exist_ok=True)
    (out / "honest").write_bytes(b"result")
    plant(out, outside)
    before = open_descriptors()
    started = time.monotonic()
    stored, sentence = send(workspace)
    assert time.monotonic() - started < 1  # no open waited for a writer (F11)
    assert stored == {"honest": b"result"}
    assert f"{folder}/villain is a " in sentence
    assert open_descriptors() == before


@pytest.mark.fault("T4")
@pytest.mark.parametrize("plant", VILLAINS, ids=lambda plant: plant.__name__.strip("_"))
def test_an_output_folder_may_be_a_villain_itself(
    workspace: Workspace, outside: Path, plant: Callable[[Path, Path], None]
) -> None:
    (workspace.files / "honest").mkdir()
    plant(workspace.files, outside)
    assert send(workspace, "villain")[0] == {}
    stored, sentence = send(workspace, "villain/sub")
    assert stored == {}
    assert "link or a file" in sentence


@pytest.mark.fault("T4")
def test_a_hard_link_counts_once_per_name(workspace: Workspace) -> None:
    (workspace.files / "out" / "a").write_bytes(b"same")
    os.link(workspace.files / "out" / "a", workspace.files / "out" / "b")
    assert send(workspace)[0] == {"a": b"same", "b": b"same"}


@pytest.mark.fault("T4")
def test_a_sparse_terabyte_is_found_with_its_size_and_never_read_here(workspace: Workspace) -> None:
    with (workspace.files / "out" / "sparse").open("wb") as file:
        try:
            file.truncate(1 << 40)
        except OSError:
            pytest.skip("this filesystem takes no file of 1 TiB")
    [found] = tree.walk(workspace.files, ("out",))
    assert isinstance(found, Found)
    assert found.size == 1 << 40


@pytest.mark.fault("T4")
def test_five_thousand_folders_in_one_another_are_bounded_and_removable(workspace: Workspace) -> None:
    descend(workspace.files / "out", "d" * 100, 5000, CANARY)
    (workspace.files / "out" / "honest").write_bytes(b"result")
    before = open_descriptors()
    stored, sentence = send(workspace)
    assert stored == {"honest": b"result"}
    assert f"more than {tree.MAX_DEPTH} folders deep" in sentence
    workspace.remove()
    assert names_in(workspace.path.parent) == []
    assert open_descriptors() == before


@pytest.mark.fault("T4")
@needs_root
def test_another_filesystem_is_not_entered(workspace: Workspace) -> None:
    with tmpfs(workspace.files / "out" / "mounted", "1m") as mounted:
        (mounted / "file").write_bytes(CANARY)
        stored, sentence = send(workspace)
    assert stored == {}
    assert "out/mounted is on another filesystem" in sentence


def test_names_that_are_no_text_are_told_not_lost(workspace: Workspace) -> None:
    (workspace.files / "out" / "honest").write_bytes(b"result")
    os.close(os.open(os.fsencode(workspace.files / "out") + b"/\xff\xfe", os.O_CREAT))
    with pytest.raises(JobFault, match=r"was not uploaded: its name is not UTF-8"):
        send(workspace)


@pytest.mark.fault("T4", "N10")
@pytest.mark.parametrize("seed", range(60))
def test_a_tree_of_everything_gives_its_honest_files_only(workspace: Workspace, outside: Path, seed: int) -> None:
    dice = random.Random(seed)  # noqa: S311 - a game, the same in every run
    folders, honest = [workspace.files / "out"], dict[str, bytes]()
    for number in range(30):
        at = dice.choice(folders)
        match dice.choice(["file", "empty", "folder", "hard", "villain", "villain"]):
            case "folder" if len(at.parts) < 40:
                folders.append(at / f"folder{number}")
                folders[-1].mkdir(mode=dice.choice([0o700, 0o755, 0o777]))
            case "hard" if honest:
                name = dice.choice(sorted(honest))
                os.link(next(workspace.files.rglob(name)), at / f"hard{number}")
                honest[f"hard{number}"] = honest[name]
            case "villain":
                (fresh := at / f"villains{number}").mkdir()  # some of them need a second name beside their own
                dice.choice(VILLAINS)(fresh, outside)
                folders.append(fresh)
            case kind:
                honest[f"file{number}"] = b"" if kind == "empty" else dice.randbytes(100)
                (at / f"file{number}").write_bytes(honest[f"file{number}"])
    before = open_descriptors()
    stored, _ = send(workspace)
    assert stored == honest
    assert open_descriptors() == before
    workspace.remove()
    assert names_in(workspace.path.parent) == ["outside"]


# -- swapped while it is read ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def flipping(path: Path, make: list[Callable[[Path], object]]) -> Iterator[list[int]]:
    """While inside, `path` is replaced again and again by what the functions make in turn; counts the flips."""
    stop, flips = threading.Event(), [0]
    spare = path.with_name(path.name + ".spare")

    def flip() -> None:
        while not stop.is_set():
            for build in make:
                # The test may delete either name at any moment; a folder replaces no link, and a link no folder.
                with contextlib.suppress(OSError):
                    build(spare)
                with contextlib.suppress(OSError):
                    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
                with contextlib.suppress(OSError):
                    spare.rename(path)
                    flips[0] += 1

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        yield flips
    finally:
        stop.set()
        thread.join()


@pytest.mark.fault("T5")
def test_a_file_swapped_for_a_link_is_never_followed(workspace: Workspace, outside: Path) -> None:
    path = workspace.files / "out" / "file"
    path.write_bytes(b"result")
    [found] = tree.walk(workspace.files, ("out", "file"))
    assert isinstance(found, Found)
    opened = refused = 0
    deadline = time.monotonic() + 60
    with flipping(path, [_write, lambda spare: spare.symlink_to(outside / "canary")]) as flips:
        while flips[0] < _FLIPS and time.monotonic() < deadline:
            try:
                with tree.open_file(workspace.files, found.parts) as file:
                    content = file.read()
            except (Changed, FileNotFoundError):
                refused += 1
            else:
                assert content == b"result"
                opened += 1
    assert flips[0] >= _FLIPS
    assert opened
    assert refused


@pytest.mark.fault("T5")
def test_a_folder_swapped_for_a_link_is_never_entered(workspace: Workspace, outside: Path) -> None:
    path = workspace.files / "out" / "folder"
    path.mkdir()
    for number in range(20):
        (workspace.files / "out" / f"steady{number}").write_bytes(b"result")
    walks = entered = turned_away = 0
    deadline = time.monotonic() + 60
    with flipping(path, [lambda spare: spare.symlink_to(outside), lambda spare: spare.mkdir()]) as flips:
        while flips[0] < _FLIPS // 2 and time.monotonic() < deadline:
            walks += 1
            steady = 0
            for item in tree.walk(workspace.files, ("out",)):
                assert item.parts[-1] != "canary", item
                steady += item.parts[-1].startswith("steady")
                if isinstance(item, Skipped):
                    turned_away += 1
                else:
                    entered += 1
            assert steady == 20  # a name that comes and goes hides no other one
    assert flips[0] >= _FLIPS // 2
    assert walks
    assert turned_away


#: Exchanges two names for ever, or until it is killed: the kernel does it at once, so that neither is ever missing.
_EXCHANGE = """
import ctypes, os, sys
exchange = ctypes.CDLL(None, use_errno=True).renameat2
one, other = map(os.fsencode, sys.argv[1:3])
for _ in range(int(sys.argv[3])):
    if exchange(-100, one, -100, other, 2):  # AT_FDCWD, RENAME_EXCHANGE
        raise OSError(ctypes.get_errno(), "renameat2")
"""


@pytest.mark.fault("T5", "N10")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_hundred_thousand_exchanges_with_a_link_leak_nothing(workspace: Workspace, outside: Path, kind: str) -> None:
    """By another process, as a container that lives on would do it: between any two calls of ours."""
    out = workspace.files / "out"
    swapped, link = out / "swapped", out / "link"
    if kind == "file":
        swapped.write_bytes(b"result")
        link.symlink_to(outside / "canary")
    else:
        swapped.mkdir()
        (swapped / "honest").write_bytes(b"result")
        link.symlink_to(outside)
    good = turned_away = 0
    command = [sys.executable, "-c", _EXCHANGE, str(swapped), str(link), "100000"]
    with subprocess.Popen(command) as exchanging:
        while exchanging.poll() is None:
            for item in tree.walk(workspace.files, ("out",)):
                try:
                    if isinstance(item, Skipped):
                        raise Changed(item.parts, item.why)
                    with tree.open_file(workspace.files, item.parts) as file:
                        assert file.read() == b"result"
                    good += 1
                except Changed:
                    turned_away += 1
    assert exchanging.returncode == 0
    assert good
    assert turned_away


@pytest.mark.fault("T5")
def test_a_removal_with_a_folder_that_turns_into_a_link_stays_inside(workspace: Workspace, outside: Path) -> None:
    jobs = workspace.path.parent
    for _ in range(100):
        (jobs / "victim" / "folder").mkdir(parents=True)
        with flipping(
            jobs / "victim" / "folder", [lambda spare: spare.symlink_to(outside), lambda spare: spare.mkdir()]
        ):
            for _ in range(5):
                with contextlib.suppress(OSError):
                    tree.remove(jobs, "victim")
                (jobs / "victim").mkdir(exist_ok=True)
        tree.remove(jobs, "victim")
    assert (outside / "canary").read_bytes() == CANARY


def _write(path: Path) -> object:
    return path.write_bytes(b"result")


# -- removal stays inside --------------------------------------------------------------------------------------------


@pytest.mark.fault("T3")
def test_removal_deletes_links_and_not_what_they_point_to(workspace: Workspace, outside: Path) -> None:
    (workspace.files / "link").symlink_to(outside)
    (workspace.files / "up").symlink_to("../../outside")
    (workspace.files / "file").symlink_to(outside / "canary")
    os.link(outside / "canary", workspace.files / "hard")
    workspace.remove()
    assert names_in(workspace.path.parent) == ["outside"]


@pytest.mark.fault("T3")
@needs_root
@pytest.mark.parametrize("where", ["files/mounted", ""])
@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_removal_never_crosses_a_mount_point(tmp_path: Path, outside: Path, where: str, kind: str) -> None:
    jobs = tmp_path / "jobs"
    (jobs / "7" / "files" if where else jobs).mkdir(parents=True)
    at = jobs / "7" / where
    with tmpfs(at, "1m") if kind == "tmpfs" else bind(outside, at) as mounted:
        if kind == "tmpfs":
            (mounted / "canary").write_bytes(CANARY)
        with pytest.raises(OSError, match="mount point"):
            tree.remove(jobs, "7")
        assert (mounted / "canary").read_bytes() == CANARY
    tree.remove(jobs, "7")
    assert names_in(jobs) == []


@pytest.mark.fault("T3")
@needs_root
def test_all_but_the_mount_point_is_deleted(tmp_path: Path) -> None:
    files = tmp_path / "7" / "files"
    files.mkdir(parents=True)
    for number in range(20):
        (files / f"{number}").touch()
    with tmpfs(files / "10x", "1m"):
        with pytest.raises(OSError, match="mount point"):
            tree.remove(tmp_path, "7")
        assert names_in(files) == ["10x"]
