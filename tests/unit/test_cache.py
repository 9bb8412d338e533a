"""The input cache: what it finds, delivers, keeps and lets go; damage, kills, full disks, and several jobs at once."""

import contextlib
import hashlib
import os
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jobfetcher.core.errors import WorkerFault, WorkerReason
from jobfetcher.core.run import Stored
from jobfetcher.core.urls import Method, SignedRequest
from jobfetcher.transfer import cache as module
from jobfetcher.transfer.cache import Cache, Entry, clear
from tests.support import mounts
from tests.support.services import require_program
from tests.support.worker import Heard

MIB = 1024**2
NOTE = 1024
ETAG = '"1b2m"'
CONTENT = bytes(range(256)) * 1300 + b"end"  # more than one block, and no whole number of them
SECRET = "0123456789abcdef"


def request(path: str = "/bucket/in.bin", query: str = "", origin: str = "https://store.example.org") -> SignedRequest:
    return SignedRequest(Method.GET, f"{origin}{path}{query and '?'}{query}")


def stored(content: bytes, etag: str = ETAG, algorithm: str = "sha256") -> Stored:
    digest = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    return Stored("in.bin", len(content), f"{algorithm}:{digest}", etag)


class Box:
    """A cache below a directory, and what a download does with it."""

    def __init__(self, folder: Path, limit: int = 64 * MIB, room_for: Callable[[int], None] = lambda size: None):
        self.folder = folder
        self.path = folder / "cache"
        self.heard = Heard()
        self.cache = Cache(self.path, limit, self.heard, room_for=room_for)

    def keep(self, content: bytes, path: str = "/bucket/in.bin", etag: str = ETAG, algorithm: str = "sha256") -> None:
        part = self.folder / f"part-{threading.get_ident()}"
        part.write_bytes(content)
        self.cache.keep(request(path), part, stored(content, etag, algorithm))
        part.unlink()

    def find(self, path: str = "/bucket/in.bin") -> Entry:
        found = self.cache.find(request(path))
        assert found is not None
        return found

    def take(self, entry: Entry, check: Callable[[], None] = lambda: None) -> tuple[str, bytes]:
        with self.out() as fd:
            digest = self.cache.take(entry, fd, check)
            return digest, os.pread(fd, 2**30, 0)

    def kept(self, *paths: str) -> list[bool]:
        return [self.cache.find(request(path)) is not None for path in paths]

    @contextlib.contextmanager
    def out(self) -> Iterator[int]:
        fd = os.open(self.folder / f"out-{threading.get_ident()}", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            yield fd
        finally:
            os.close(fd)

    def entry(self, path: str = "/bucket/in.bin") -> Path:
        """The file of an entry."""
        return self.path / module._name(request(path))

    def disk(self) -> int:
        """Bytes of disk that the files in the cache take."""
        return sum(entry.stat().st_blocks * 512 for entry in self.path.iterdir())


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


@pytest.fixture
def cloner(tmp_path: Path) -> Iterator[Path]:
    """A filesystem that can clone."""
    mkfs = require_program("mkfs.btrfs", "btrfs-progs")
    backing, path = tmp_path / "backing", tmp_path / "btrfs"
    with mounts.tmpfs(backing, "260m"):
        image = backing / "image"
        with image.open("wb") as file:
            file.truncate(256 * MIB)
        subprocess.run([mkfs, "-q", str(image)], check=True, stdout=subprocess.DEVNULL)
        path.mkdir()
        subprocess.run(["mount", "-o", "loop", str(image), str(path)], check=True)
        try:
            yield path
        finally:
            subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextlib.contextmanager
def cloning(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each clone that was tried worked."""
    tried: list[bool] = []
    clone = module._clone

    def seen(source: int, target: int) -> bool:
        tried.append(clone(source, target))
        return tried[-1]

    with monkeypatch.context() as patch:
        patch.setattr(module, "_clone", seen)
        yield tried


# -- what it finds and delivers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
@pytest.mark.parametrize("content", [CONTENT, b"", b"x", bytes(3 * MIB)], ids=["odd", "empty", "one", "zeros"])
def test_what_was_kept_is_found_and_delivered(box: Box, content: bytes, algorithm: str) -> None:
    assert box.cache.find(request()) is None
    box.keep(content, algorithm=algorithm)
    found = box.find()
    assert (found.etag, found.size) == (ETAG, len(content))
    assert box.take(found) == (stored(content, algorithm=algorithm).digest, content)
    assert box.heard.all() == []


def test_a_later_process_finds_it(tmp_path: Path) -> None:
    Box(tmp_path).keep(CONTENT)
    later = Box(tmp_path)
    assert later.take(later.find())[1] == CONTENT


def test_a_new_version_takes_the_place_of_the_old(box: Box) -> None:
    box.keep(CONTENT)
    old = box.find()
    box.keep(b"new", etag='"2"')
    assert box.find().etag == '"2"'
    assert box.take(old) == ("", b"")  # found before it was replaced
    assert box.take(box.find())[1] == b"new"
    assert len(list(box.path.iterdir())) == 1


def test_the_same_again_is_not_written_again(box: Box) -> None:
    box.keep(CONTENT)
    before = box.entry().stat().st_ino
    box.keep(CONTENT)
    assert box.entry().stat().st_ino == before


@pytest.mark.parametrize("etag", ["", 'W/"1"', "bare", '"two" "tags"', '"' + "x" * 201 + '"', '"line\nbreak"'])
def test_only_a_strong_etag_is_good(box: Box, etag: str) -> None:
    box.keep(CONTENT, etag=etag)
    assert box.cache.find(request()) is None
    assert not box.path.exists()


def test_the_longest_etag_fits(box: Box) -> None:
    etag = '"' + "\\" * 200 + '"'
    box.keep(CONTENT, etag=etag)
    assert box.find().etag == etag


def test_a_job_may_write_to_what_it_got(box: Box) -> None:
    box.keep(CONTENT)
    with box.out() as fd:
        box.cache.take(box.find(), fd, lambda: None)
        os.pwrite(fd, b"changed", 0)
        os.ftruncate(fd, 10)
    assert box.take(box.find())[1] == CONTENT


SIGNED = [
    f"X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential={SECRET}&X-Amz-Date=1&X-Amz-Expires=600"
    f"&X-Amz-SignedHeaders=host&X-Amz-Security-Token={SECRET}&X-Amz-Signature={SECRET}",
    f"AWSAccessKeyId={SECRET}&Signature={SECRET}&x-amz-security-token={SECRET}&Expires=17",
    f"X-Goog-Algorithm=G&X-Goog-Credential={SECRET}&X-Goog-Date=1&X-Goog-Expires=6&X-Goog-Signature={SECRET}",
    f"GoogleAccessId={SECRET}&Expires=17&Signature={SECRET}",
    f"sv=2&st=1&se=2&sr=b&sp=r&sks=b&skoid=1&sktid=2&skt=3&ske=4&skv=5&sig={SECRET}",
    f"expires=17.5&signature={SECRET}",
]


@pytest.mark.parametrize("query", SIGNED)
@pytest.mark.fault("T10")
def test_a_signature_is_not_part_of_the_key_and_is_not_written_down(box: Box, query: str) -> None:
    part = box.folder / "part"
    part.write_bytes(CONTENT)
    box.cache.keep(request(query=query), part, stored(CONTENT))
    assert box.cache.find(request(query=query.replace(SECRET, "another").replace("17", "99"))) is not None
    assert box.cache.find(request()) is not None
    assert box.cache.find(request(query=f"versionId=3&{query}")) is None
    [file] = box.path.iterdir()
    assert SECRET.encode() not in file.read_bytes()
    assert b"store.example.org" not in file.read_bytes()


@pytest.mark.parametrize(
    "other",
    [
        request("/bucket/IN.bin"),
        request("/bucket/in.bin/"),
        request("/bucket//in.bin"),
        request("/bucket/in%2Ebin"),
        request(origin="http://store.example.org"),
        request(origin="https://store.example.org:8443"),
        request(origin="https://other.example.org"),
        request(query="versionId=1"),
        request(query="partNumber=1&X-Amz-Signature=1"),
        request(query="sp=1&sig=1"),  # no `sv`: not Azure's
        request(query="Expires=1&Signature=1"),  # without a key's name: nobody's we know
        request(query="X-Amz-Date=1"),
        request(query="signature=1"),
    ],
)
def test_another_object_is_never_found(box: Box, other: SignedRequest) -> None:
    box.keep(CONTENT)
    assert box.cache.find(other) is None


def test_the_same_address_written_otherwise_is_found(box: Box) -> None:
    box.keep(CONTENT)
    assert box.cache.find(request(origin="https://STORE.example.org:443")) is not None
    assert box.cache.find(request(query="")) is not None


@pytest.mark.parametrize("url", ["", "ftp://x/y", "https://[::1/x", "https://x:99999/y"])
def test_an_address_that_is_none_is_not_found_and_not_kept(box: Box, url: str) -> None:
    bad = SignedRequest(Method.GET, url)
    assert box.cache.find(bad) is None
    part = box.folder / "part"
    part.write_bytes(CONTENT)
    box.cache.keep(bad, part, stored(CONTENT))
    assert not box.path.exists()


# -- who may read it ---------------------------------------------------------------------------------------------------


@pytest.mark.fault("T21")
def test_modes(box: Box) -> None:
    box.path.mkdir(mode=0o755)
    box.path.chmod(0o755)
    box.keep(CONTENT)
    assert stat.S_IMODE(box.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(box.entry().stat().st_mode) == 0o600


@pytest.mark.fault("T5")
def test_links_are_not_followed(box: Box, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    box.path.symlink_to(elsewhere)
    box.keep(CONTENT)
    assert list(elsewhere.iterdir()) == []
    assert len(box.heard.messages("cache_not_used")) == 1
    box.path.unlink()
    box.keep(CONTENT)
    box.entry().rename(tmp_path / "stolen")
    box.entry().symlink_to(tmp_path / "stolen")
    assert box.cache.find(request()) is None
    box.keep(CONTENT)
    assert not box.entry().is_symlink()
    assert box.take(box.find())[1] == CONTENT


@pytest.mark.fault("F11")
def test_a_fifo_in_the_place_of_an_entry_keeps_nobody_waiting(box: Box) -> None:
    box.path.mkdir()
    os.mkfifo(box.entry())
    assert box.cache.find(request()) is None


# -- damage ------------------------------------------------------------------------------------------------------------


def flip(at: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[at] ^= 1

    return change


def cut(size: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        del data[size:]

    return change


DAMAGE = {
    "first bit": flip(0),
    "last bit": flip(len(CONTENT) - 1),
    "a bit of the digest": flip(len(CONTENT) + 300),
    "cut in the note": cut(len(CONTENT) + NOTE - 1),
    "cut before the note": cut(len(CONTENT)),
    "cut in the middle": cut(len(CONTENT) // 2),
    "cut to nothing": cut(0),
    "a byte too much": lambda data: data.insert(5, 0),
    "a hole": lambda data: data.__setitem__(slice(4096, 8192), bytes(4096)),
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.fault("C3")
def test_a_damaged_entry_is_never_delivered_and_goes(box: Box, change: Callable[[bytearray], None]) -> None:
    box.keep(CONTENT)
    entry = box.find()
    data = bytearray(box.entry().read_bytes())
    change(data)
    box.entry().write_bytes(data)
    assert box.take(entry) == ("", b"")
    assert box.cache.find(request()) is None
    assert not box.entry().exists()
    box.keep(CONTENT)
    assert box.take(box.find())[1] == CONTENT


def test_an_entry_that_is_gone_is_said_to_be(box: Box) -> None:
    box.keep(CONTENT)
    entry = box.find()
    box.entry().unlink()
    assert box.take(entry) == ("", b"")


def test_the_file_of_another_entry_is_not_believed(box: Box) -> None:
    box.keep(CONTENT)
    box.keep(b"another", "/other")
    box.entry("/other").replace(box.entry())
    assert box.cache.find(request()) is None


HOSTILE = {
    "no JSON": b"\xff" * 40,
    "an array": b"[1]",
    "deep": b"[" * 1000,
    "no fields": b"{}",
    "a list of fields": b'{"version":1,"name":"NAME","etag":"\\"1\\"","size":"7","digest":"sha256:DIGEST"}',
    "a size that is a float": b'{"version":1,"name":"NAME","etag":"\\"1\\"","size":7.0,"digest":"sha256:DIGEST"}',
    "a negative size": b'{"version":1,"name":"NAME","etag":"\\"1\\"","size":-1,"digest":"sha256:DIGEST"}',
    "a weak tag": b'{"version":1,"name":"NAME","etag":"W/\\"1\\"","size":7,"digest":"sha256:DIGEST"}',
    "a tag of two lines": b'{"version":1,"name":"NAME","etag":"\\"1\\r\\nX: y\\"","size":7,"digest":"sha256:DIGEST"}',
    "another hash": b'{"version":1,"name":"NAME","etag":"\\"1\\"","size":7,"digest":"crc32:00000000"}',
    "another version": b'{"version":2,"name":"NAME","etag":"\\"1\\"","size":7,"digest":"sha256:DIGEST"}',
    "a field more": b'{"version":1,"name":"NAME","etag":"\\"1\\"","size":7,"digest":"sha256:DIGEST","a":1}',
}


@pytest.mark.parametrize("note", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.fault("T22")
def test_a_note_is_read_strictly(box: Box, note: bytes) -> None:
    content = b"content"
    good = b'{"version":1,"name":"NAME","etag":"\\"1\\"","size":7,"digest":"sha256:DIGEST"}'
    box.path.mkdir()
    for text, found in ((good, True), (note, False)):
        name, digest = box.entry().name.encode(), hashlib.sha256(content).hexdigest().encode()
        text = text.replace(b"NAME", name).replace(b"DIGEST", digest)
        box.entry().write_bytes(content + text.ljust(NOTE)[:NOTE])
        assert (box.cache.find(request()) is not None) == found


# -- interruptions -----------------------------------------------------------------------------------------------------


class Enough(Exception):
    """What a check raises."""


def test_a_check_that_raises_ends_a_take_with_an_empty_file(box: Box) -> None:
    box.keep(CONTENT)
    calls = iter([None, Enough()])

    def check() -> None:
        if error := next(calls):
            raise error

    with box.out() as fd:
        with pytest.raises(Enough):
            box.cache.take(box.find(), fd, check)
        assert os.fstat(fd).st_size == 0
    assert box.take(box.find())[1] == CONTENT


def test_a_check_that_raises_ends_a_keep_with_nothing(box: Box) -> None:
    part = box.folder / "part"
    part.write_bytes(CONTENT)

    def check() -> None:
        raise Enough

    with pytest.raises(Enough):
        box.cache.keep(request(), part, stored(CONTENT), check=check)
    assert list(box.path.iterdir()) == []


KILLED = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    from jobfetcher.core.run import Stored
    from jobfetcher.core.urls import Method, SignedRequest
    from jobfetcher.transfer.cache import Cache

    folder, url, size, digest = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    calls = 0

    def dying(call, at):
        def wrapper(*args, **kwargs):
            global calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **kwargs)
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return wrapper

    at = 0
    while True:
        at += 1
        child = os.fork()
        if not child:
            for name in ("open", "pwrite", "rename"):
                setattr(os, name, dying(getattr(os, name), at))
            cache = Cache(folder / f"cache-{at}", 2**26, print, room_for=lambda size: None)
            cache.keep(SignedRequest(Method.GET, url), folder / "part", Stored("in", size, digest, '"2"'))
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
    print(at - 1)
""")


def check_kills(folder: Path) -> None:
    """Kill a process before and after each call that a keep makes, over an older version of the entry."""
    old, new = b"old content", CONTENT
    (folder / "part").write_bytes(new)
    most = 40
    for at in range(1, most):
        before = Box(folder)
        before.keep(old, etag='"1"')
        before.path.rename(folder / f"cache-{at}")
    arguments = [str(folder), request().url, str(len(new)), stored(new).digest]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=True)
    kills = int(done.stdout)
    assert 10 <= kills < most
    found = []
    for at in range(1, kills + 1):
        (folder / f"cache-{at}").rename(folder / "cache")
        after = Box(folder)
        entry = after.find()
        digest, content = after.take(entry)
        assert (digest, content) == (stored(content).digest, old if entry.etag == '"1"' else new)
        found.append(content)
        after.keep(b"next", "/next")
        assert len(list(after.path.iterdir())) == 2  # nothing unfinished is left
        after.path.rename(folder / f"done-{at}")
    assert found == sorted(found, key=lambda content: content == new)  # old, and from one moment on new
    assert set(found) == {old, new}


@pytest.mark.fault("A2")
def test_killed_anywhere_in_a_keep(tmp_path: Path) -> None:
    check_kills(tmp_path)


# -- room --------------------------------------------------------------------------------------------------------------


def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    box = Box(tmp_path, limit=4 * MIB)
    size = MIB - 64 * 1024  # four fit
    for name in "abcd":
        box.keep(os.urandom(size), f"/{name}")
    box.take(box.find("/a"))
    box.keep(os.urandom(size), "/e")
    assert box.kept("/a", "/b", "/c", "/d", "/e") == [True, False, True, True, True]
    box.keep(os.urandom(2 * size), "/f")
    assert box.kept("/a", "/c", "/d", "/e", "/f") == [True, False, False, True, True]
    assert box.disk() <= 4 * MIB


def test_last_use_outlives_the_process(tmp_path: Path) -> None:
    first = Box(tmp_path, limit=3 * MIB)
    for age, name in enumerate("abc"):
        first.keep(os.urandom(MIB - 8192), f"/{name}")
        os.utime(first.entry(f"/{name}"), (10**9 + age, 10**9 + age))
    first.take(first.find("/a"))
    later = Box(tmp_path, limit=3 * MIB)
    later.keep(os.urandom(MIB - 8192), "/d")
    assert later.kept("/a", "/b", "/c", "/d") == [True, False, True, True]


def test_a_smaller_limit_is_kept_from_the_next_file_on(tmp_path: Path) -> None:
    large = Box(tmp_path)
    for name in range(8):
        large.keep(os.urandom(MIB), f"/{name}")
    small = Box(tmp_path, limit=3 * MIB)
    small.keep(os.urandom(MIB), "/new")
    assert small.disk() <= 3 * MIB
    assert small.kept("/0", "/7", "/new") == [False, True, True]


def test_a_file_larger_than_the_limit_is_not_kept_and_that_is_said_once(tmp_path: Path) -> None:
    box = Box(tmp_path, limit=MIB)
    box.keep(b"small", "/small")
    for _ in range(3):
        box.keep(bytes(MIB), "/large")
    assert box.kept("/small", "/large") == [True, False]
    assert len(box.heard.messages("cache_not_used")) == 1
    assert "larger than CACHE_SIZE" in box.heard.messages("cache_not_used")[0]


def test_the_number_of_entries_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_ENTRIES", 5)
    box = Box(tmp_path)
    for name in range(8):
        box.keep(b"x", f"/{name}")
    assert box.kept(*(f"/{name}" for name in range(8))) == [False] * 3 + [True] * 5


def test_tens_of_thousands_of_entries(tmp_path: Path) -> None:
    box = Box(tmp_path, limit=20 * MIB)
    box.keep(CONTENT)
    for number in range(20_000):
        (box.path / hashlib.sha256(b"%d" % number).hexdigest()).touch()
    later = Box(tmp_path, limit=20 * MIB)
    later.keep(b"new", "/new")
    assert later.kept("/bucket/in.bin", "/new") == [True, True]
    later.keep(bytes(19 * MIB), "/large")
    assert later.kept("/new", "/large") == [True, True]
    assert later.disk() <= 20 * MIB


def no_room(free: Callable[[], int]) -> Callable[[int], None]:
    def room_for(size: int) -> None:
        if size > free():
            raise WorkerFault(WorkerReason.DISK, "more does not fit (RESERVE_DISK)")

    return room_for


def test_the_reserve_of_the_disk_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EVICT_AT_ONCE", 1)
    small = Box(tmp_path, room_for=no_room(lambda: 4 * MIB - small.disk() + 512 * 1024))
    for name in range(6):
        small.keep(os.urandom(MIB), f"/{name}")
    assert small.kept("/0", "/1", "/2", "/3", "/4", "/5") == [False, False, True, True, True, True]
    assert small.heard.all() == []
    small.cache.make_room(3 * MIB)
    assert small.kept("/3", "/4", "/5") == [False, False, True]
    with pytest.raises(WorkerFault, match="RESERVE_DISK"):
        small.cache.make_room(5 * MIB)


def test_where_nothing_may_be_written_nothing_is_kept_and_that_is_said_once_while_it_is_so(tmp_path: Path) -> None:
    free = 0
    box = Box(tmp_path, room_for=no_room(lambda: free))
    for _ in range(3):
        box.keep(CONTENT)
    assert box.cache.find(request()) is None
    assert list(box.path.iterdir()) == []
    assert len(box.heard.messages("cache_not_used")) == 1
    free = MIB
    box.keep(CONTENT)
    assert box.find().size == len(CONTENT)
    free = 0
    box.keep(CONTENT, "/other")
    assert len(box.heard.messages("cache_not_used")) == 2


@mounts.needs_root
@pytest.mark.fault("D2")
def test_a_full_disk_of_the_cache(tmp_path: Path) -> None:
    with mounts.ext4(tmp_path / "disk", 32) as disk:
        box = Box(tmp_path)
        box.path.symlink_to(disk)  # so that the part lies on another disk
        box.cache = Cache(disk / "cache", 64 * MIB, box.heard, room_for=lambda size: None)
        filler = mounts.fill(disk, leave=MIB)
        for _ in range(2):
            box.keep(os.urandom(4 * MIB))
        assert box.cache.find(request()) is None
        assert [path.name for path in (disk / "cache").iterdir()] == []
        [message] = box.heard.messages("cache_not_used")
        assert "No space left" in message
        filler.unlink()
        box.keep(CONTENT)
        assert box.take(box.find())[1] == CONTENT


@mounts.needs_root
@pytest.mark.fault("D2")
def test_a_full_disk_of_the_job_is_the_workers_fault(box: Box, tmp_path: Path) -> None:
    box.keep(os.urandom(4 * MIB))
    with mounts.ext4(tmp_path / "disk", 32) as disk:
        mounts.fill(disk, leave=MIB)
        fd = os.open(disk / "part", os.O_RDWR | os.O_CREAT)
        try:
            with pytest.raises(WorkerFault) as caught:
                box.cache.take(box.find(), fd, lambda: None)
            assert caught.value.reason is WorkerReason.DISK
            assert os.fstat(fd).st_size == 0
        finally:
            os.close(fd)
    assert box.take(box.find())[0] != ""  # the entry is not to blame


@mounts.needs_root
@pytest.mark.fault("D6")
def test_a_disk_that_went_read_only(tmp_path: Path) -> None:
    image = mounts.make_ext4(tmp_path / "image", 32)
    with mounts.mounted_ext4(image, tmp_path / "disk") as disk:
        box = Box(disk)
        box.keep(CONTENT)
        mounts.break_ext4(disk)
        part = tmp_path / "part"
        part.write_bytes(b"more")
        for _ in range(2):
            box.cache.keep(request("/more"), part, stored(b"more"))
        assert len(box.heard.messages("cache_not_used")) == 1
        fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
        try:
            assert box.cache.take(box.find(), fd, lambda: None) == stored(CONTENT).digest
        finally:
            os.close(fd)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    box = Box(tmp_path)
    for _ in range(2):
        box.keep(CONTENT)
    assert box.cache.find(request()) is None
    assert len(box.heard.messages("cache_not_used")) == 1


def test_a_part_that_is_not_as_it_was_said_to_be(box: Box) -> None:
    part = box.folder / "part"
    part.write_bytes(b"short")
    box.cache.keep(request(), part, stored(CONTENT))
    box.cache.keep(request(), box.folder / "none", stored(CONTENT))
    assert box.cache.find(request()) is None
    assert list(box.path.iterdir()) == []


def test_a_cache_that_was_deleted_by_a_person_is_begun_again(box: Box) -> None:
    box.keep(CONTENT)
    clear(box.path)
    assert not box.path.exists()
    clear(box.path)
    box.keep(CONTENT)
    assert box.take(box.find())[1] == CONTENT


def test_clear_leaves_what_is_not_ours(box: Box) -> None:
    box.keep(CONTENT)
    (box.path / "new-1").touch()
    (box.path / "notes.txt").touch()
    clear(box.path)
    assert [path.name for path in box.path.iterdir()] == ["notes.txt"]


# -- clones ------------------------------------------------------------------------------------------------------------


@mounts.needs_root
def test_clones_where_the_filesystem_has_them(cloner: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(40 * MIB) + b"odd"

    def free() -> int:
        os.sync()  # btrfs counts what is written
        room = os.statvfs(cloner)
        return room.f_bavail * room.f_frsize

    box = Box(cloner, room_for=no_room(lambda: 0))  # a clone takes no room
    part = cloner / "part"
    part.write_bytes(content)
    before = free()
    with cloning(monkeypatch) as tried, box.out() as fd:
        box.cache.keep(request(), part, stored(content))
        assert box.cache.take(box.find(), fd, lambda: None) == stored(content).digest
        assert os.fstat(fd).st_size == len(content)
        assert tried == [True, True]
        assert before - free() < 4 * MIB
        for file in (part, Path(f"/proc/self/fd/{fd}")):  # what a job does to its copy
            with file.open("r+b") as written:
                written.write(b"changed")
    assert box.take(box.find()) == (stored(content).digest, content)
    data = bytearray(box.entry().read_bytes())
    data[20 * MIB] ^= 1
    entry = box.find()
    box.entry().write_bytes(data)
    assert box.take(entry) == ("", b"")


@mounts.needs_root
def test_killed_anywhere_in_a_keep_that_clones(cloner: Path) -> None:
    check_kills(cloner)


@mounts.needs_root
def test_room_that_is_free_only_after_a_sync(cloner: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EVICT_AT_ONCE", 1)
    wanted = 0

    def free() -> int:
        room = os.statvfs(cloner)
        return room.f_bavail * room.f_frsize

    box = Box(cloner, room_for=no_room(lambda: free() - wanted))
    size = 10 * MIB
    for name in range(3):
        box.keep(os.urandom(size), f"/{name}")
    os.sync()
    wanted = free() + size // 2
    box.cache.make_room(0)
    assert box.kept("/0", "/1", "/2") == [False, True, True]


# -- several jobs at once ----------------------------------------------------------------------------------------------


def test_several_jobs_at_once(tmp_path: Path) -> None:
    box = Box(tmp_path, limit=3 * MIB)
    contents = {f"/{name}": os.urandom(300_000 + name) for name in range(16)}
    start = threading.Barrier(8)

    def job(number: int) -> int:
        delivered = 0
        start.wait(10)
        for turn in range(60):
            path = f"/{(number * 7 + turn * 5) % len(contents)}"
            found = box.cache.find(request(path))
            if found is not None:
                digest, content = box.take(found)
                assert (digest, content) in {("", b""), (stored(contents[path]).digest, contents[path])}
                delivered += bool(digest)
            else:
                box.keep(contents[path], path)
        return delivered

    with ThreadPoolExecutor(8) as pool:
        delivered = list(pool.map(job, range(8)))
    assert sum(delivered) > 0
    assert box.heard.all() == []
    assert box.disk() <= 3 * MIB
    assert all(not path.name.startswith("new-") for path in box.path.iterdir())
    box.keep(bytes(3 * MIB - 64 * 1024), "/all")  # so the books are right: all but this can go
    assert box.kept("/all") == [True]
