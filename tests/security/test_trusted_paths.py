"""PATH_BASE inside somebody else's directory: he renames, he plants links, and reaches nothing (T26).

The other user is a process of his own, without our rights, that swaps directories in a loop (`swapping`). What he would
have us write to, give away or mount is a copy of what a worker has: same names, root's, and never touched by us.
"""

import contextlib
import os
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

import docker
import pytest

from jobfetcher import refusals, tree
from jobfetcher.build import find_instance
from jobfetcher.core.errors import ConfigError, WorkerFault, WorkerReason
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import JobId
from jobfetcher.core.machine import Inventory
from jobfetcher.core.run import Ending, Outcome
from jobfetcher.engine.run_spec import BoxPolicy, build_run_spec
from jobfetcher.engine.second_name import ROOM, second_name, sees
from jobfetcher.journal import Journal
from jobfetcher.leftovers import LeftBehind
from jobfetcher.pinned import connect, is_pinned, pinned, shown
from jobfetcher.resources.budget import Budget
from jobfetcher.runner import Rules, Runner
from jobfetcher.self_test import FOLDER
from jobfetcher.testing.fake_engine import FakeEngine, Script
from jobfetcher.testing.fake_source import FakeSource
from jobfetcher.testing.fake_transfer import FakeTransfer
from jobfetcher.trusted import SUBFOLDER
from jobfetcher.worker import Leaving
from jobfetcher.workspace import Base
from tests.security.test_data_dir import NOBODY, in_child_as_nobody, shared
from tests.support.jobs import Emitted, make_job
from tests.support.mounts import needs_root
from tests.support.trees import fingerprint, names_in, open_descriptors
from tests.support.worker import UNTIL_LET_GO, Lab, running_worker, wait_until_running, work

__all__ = ["shared"]

pytestmark = [needs_root, pytest.mark.fault("T26")]

OTHER = 1234

#: What the other user does until his standard input is closed, with `base`, the worker's, and `evil`, his own, which
#: has links to what a worker has elsewhere (`victim`). He prints how often he did it.
SWAP = """
    import os, select, sys
    turns = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        os.rename("base", "held")
        for planted in ("evil", "link"):
            os.rename(planted, "base")
            select.select([sys.stdin], [], [], 0.0002)
            os.rename("base", planted)
        os.rename("held", "base")
        select.select([], [], [], 0.0002)
        turns += 1
    print(turns)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory of the other user, and in it a victim of root's that he would have us change."""
    victim = tmp_path / "victim"
    make_victim(victim)
    (tmp_path / "evil").mkdir()
    for name in names_in(victim):
        (tmp_path / "evil" / name).symlink_to(victim / name)
    (tmp_path / "link").symlink_to(victim)
    tmp_path.chmod(0o755)
    for path in (tmp_path, tmp_path / "evil", *(tmp_path / "evil").iterdir(), tmp_path / "link"):
        os.chown(path, OTHER, OTHER, follow_symlinks=False)
    return tmp_path


def make_victim(victim: Path) -> None:
    """What a worker has, as root's own in another place."""
    for number in range(1, 4):
        (victim / "jobs" / str(number) / "files").mkdir(parents=True)
        (victim / "jobs" / str(number) / "files" / "in").write_text("precious")
    for folder in ("cache", "quarantine", FOLDER, f"jobs/1/files/{FOLDER}"):
        (victim / folder).mkdir()
    for name in ("lock", "journal.db", "journal.db-wal", "journal.db-shm", "refused.json", "secret"):
        (victim / name).write_text("precious")


def becoming(uid: int, folder: Path) -> None:
    """In a child: go there, and be that user."""
    os.chdir(folder)
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


@contextlib.contextmanager
def swapping(home: Path) -> Iterator[None]:
    """The other user at work for the length of the block; afterwards all lies where it was. He did it often."""
    with subprocess.Popen(
        ["/usr/bin/python3", "-c", textwrap.dedent(SWAP)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(becoming, OTHER, home),
    ) as other:
        try:
            yield
        finally:
            said, errors = other.communicate(timeout=30)
    assert not errors
    assert int(said) > 20


@contextlib.contextmanager
def untouched(home: Path) -> Iterator[None]:
    """What is the other user's and the victim's is at the end what it was."""

    def look() -> list[object]:
        return [fingerprint(home / "victim"), fingerprint(home / "evil"), stat.S_IMODE(home.stat().st_mode)]

    before = look()
    yield
    assert look() == before


# -- the way there ----------------------------------------------------------------------------------------------------


def test_a_base_of_ones_own_is_called_by_its_path(tmp_path: Path) -> None:
    with Base(tmp_path / "base") as base:
        assert base.path == base.real == tmp_path / "base"
        assert base.foreign == ""


def test_a_base_in_a_directory_of_another_user_is_held_open(home: Path) -> None:
    before = open_descriptors()
    with Base(home / "base") as base:
        assert is_pinned(base.path)
        assert base.real == home / "base"
        assert base.foreign == f"{home} belongs to {OTHER}"
        assert shown(base.path / "jobs") == str(home / "base" / "jobs")
        assert (base.real.stat().st_uid, stat.S_IMODE(base.real.stat().st_mode)) == (0, 0o700)
        assert names_in(base.path) == names_in(base.real) == ["jobs", "lock"]
        assert base.filesystem
        (home / "base").rename(home / "elsewhere")
        make_victim(home / "base")
        base.job(JobId("7")).create()
        assert names_in(home / "elsewhere" / "jobs" / "7") == ["files", "logs", "parts"]
        assert shown(base.path) == str(home / "elsewhere")
        moved = base.quarantine("7", "why")
        assert names_in(home / "elsewhere" / "quarantine") == [moved.name, f"{moved.name}.WHY.txt"]
    assert open_descriptors() == before


def test_a_journal_goes_nowhere_else(home: Path) -> None:
    """SQLite follows links by itself, and would open what lies at the real path now."""
    with Base(home / "base") as base, untouched(home):
        (home / "base").rename(home / "elsewhere")
        (home / "link").rename(home / "base")
        with contextlib.closing(Journal(base.path / "journal.db")) as journal:
            journal.claim(JobId("7"), "t", make_job())
            ours = names_in(home / "elsewhere")
        (home / "base").rename(home / "link")
        assert [name for name in ours if name.startswith("journal.db")] == [
            "journal.db",
            "journal.db-shm",
            "journal.db-wal",
        ]
        with contextlib.closing(Journal(base.path / "journal.db")) as journal:
            assert [record.id for record in journal.records()] == ["7"]
    with contextlib.closing(Journal(home / "elsewhere" / "journal.db")) as journal:
        assert not journal.damage


def test_a_database_that_cannot_be_held_to_its_directory_is_not_opened(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where SQLite is built into the interpreter, its functions may have no names."""

    def missing() -> str:
        raise OSError("this Python's SQLite cannot be kept from following links")

    monkeypatch.setattr("jobfetcher.pinned._registered", missing)
    with Base(home / "base") as base, pytest.raises(ConfigError, match="cannot be kept from following links"):
        Journal(base.path / "journal.db")


def test_a_damaged_journal_is_put_aside_in_the_directory_that_is_held(home: Path) -> None:
    with Base(home / "base") as base:
        with contextlib.closing(Journal(base.path / "journal.db")) as journal:
            journal.claim(JobId("7"), "t", make_job())
        with (home / "base" / "journal.db").open("r+b") as file:
            file.truncate(1000)
        with untouched(home):
            (home / "base").rename(home / "elsewhere")
            (home / "evil").rename(home / "base")
            with contextlib.closing(Journal(base.path / "journal.db")) as journal:
                assert f"the old file is in {home}/elsewhere/quarantine/journal-" in journal.damage
            (home / "base").rename(home / "evil")
        assert len(names_in(home / "elsewhere" / "quarantine")) == 1


def test_a_worker_without_root_holds_its_directory_as_well(shared: Path) -> None:
    (shared / "home" / "nobody").mkdir(parents=True)
    for name in ("home", "home/nobody"):
        (shared / name).chmod(0o755)
    os.chown(shared / "home" / "nobody", NOBODY, NOBODY)
    os.chown(shared / "home", OTHER, OTHER)
    said = in_child_as_nobody(AS_NOBODY, str(shared / "home" / "nobody" / "base"))
    assert said.splitlines() == [f"{shared}/home belongs to {OTHER}", "True", "journal.db"]


AS_NOBODY = f"""
    import contextlib
    sys.path[:0] = {sys.path!r}
    from pathlib import Path
    from jobfetcher.pinned import is_pinned
    from jobfetcher.journal import Journal
    from jobfetcher.workspace import Base
    import _sqlite3
    try:
        with Base(Path(sys.argv[1])) as base:
            print(base.foreign)
            print(is_pinned(base.path))
            with contextlib.closing(Journal(base.path / "journal.db")):
                print(*sorted(one.name for one in base.real.iterdir() if one.name.endswith(".db")))
    finally:
        pass
"""


def test_a_path_is_pinned_where_it_is_right_below(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.closing(connect(pinned(descriptor) / "a.db")) as database:
            database.execute("CREATE TABLE one (two)")
        assert names_in(tmp_path) == ["a.db"]
    finally:
        os.close(descriptor)
    assert shown("nothing to see") == "nothing to see"
    assert shown("/proc/self/fd/987654/x") == "/proc/self/fd/987654/x"


def test_the_note_of_a_refusal_goes_nowhere_else(home: Path) -> None:
    with Base(home / "base") as base, untouched(home):
        (home / "base").rename(home / "elsewhere")
        (home / "link").rename(home / "base")
        refusals.another(base.path)
        (home / "base").rename(home / "link")
        assert "refused.json" in names_in(home / "elsewhere")
        refusals.forget(base.path)


@pytest.mark.parametrize(
    ("owner", "group", "mode", "outcome"),
    [
        (0, 0, 0o755, "own"),
        (0, 0, 0o775, "own"),
        (0, 0, 0o1777, "own"),
        (0, 100, 0o1775, "own"),
        (0, 100, 0o775, "refused"),
        (0, 0, 0o757, "refused"),
        (OTHER, OTHER, 0o755, "held"),
        (OTHER, OTHER, 0o700, "held"),
        (OTHER, OTHER, 0o775, "held"),
        (OTHER, OTHER, 0o1777, "held"),
        (OTHER, 100, 0o775, "refused"),
        (OTHER, OTHER, 0o777, "refused"),
    ],
)
@pytest.mark.parametrize("depth", [1, 3])
def test_every_directory_above_is_looked_at(
    tmp_path: Path, owner: int, group: int, mode: int, outcome: str, depth: int
) -> None:
    above = tmp_path / "above"
    below = above.joinpath(*"abc"[: depth - 1])
    below.mkdir(parents=True)
    os.chown(above, owner, group)
    above.chmod(mode)
    before = stat.S_IMODE(above.stat().st_mode)
    if outcome == "refused":
        for _ in range(2):
            with pytest.raises(ConfigError, match=f"{above} can be changed by"):
                Base(below / "base")
            (below / "base").mkdir(exist_ok=True)  # and so is one that is there already
        assert list((below / "base").iterdir()) == []
    else:
        with Base(below / "base") as base:
            assert bool(base.foreign) == is_pinned(base.path) == (outcome == "held")
    assert stat.S_IMODE(above.stat().st_mode) == before


# -- PATH_BASE itself -------------------------------------------------------------------------------------------------


def test_an_empty_directory_of_another_user_becomes_the_workers(tmp_path: Path) -> None:
    """As `docker run -v $HOME/jobs:/data` brings it along."""
    (tmp_path / "base").mkdir(mode=0o755)
    os.chown(tmp_path / "base", OTHER, OTHER)
    with Base(tmp_path / "base") as base:
        now = base.real.stat()
        assert (now.st_uid, stat.S_IMODE(now.st_mode), base.foreign) == (0, 0o700, "")


def test_beside_the_things_of_another_user_the_worker_has_a_directory_of_its_own(tmp_path: Path) -> None:
    theirs = tmp_path / "base"
    theirs.mkdir(mode=0o755)
    (theirs / "holiday.jpg").touch()
    os.chown(theirs, OTHER, OTHER)
    for _ in range(2):
        with Base(theirs) as base:
            assert base.real == theirs / SUBFOLDER
            assert base.foreign == f"{theirs} belongs to {OTHER}"
            assert names_in(base.path) == ["jobs", "lock"]
    now = theirs.stat()
    assert (now.st_uid, stat.S_IMODE(now.st_mode)) == (OTHER, 0o755)
    assert names_in(theirs) == ["holiday.jpg", SUBFOLDER]


def test_a_planted_directory_of_that_name_is_refused(tmp_path: Path) -> None:
    theirs = tmp_path / "base"
    (theirs / SUBFOLDER).mkdir(parents=True)
    (theirs / "holiday.jpg").touch()
    os.chown(theirs, OTHER, OTHER)
    os.chown(theirs / SUBFOLDER, OTHER, OTHER)
    with pytest.raises(ConfigError, match=f"{theirs}/{SUBFOLDER} belongs to another user"):
        Base(theirs)
    (theirs / SUBFOLDER).rmdir()
    (theirs / SUBFOLDER).symlink_to("/etc")
    before = stat.S_IMODE(Path("/etc").stat().st_mode)
    with pytest.raises(ConfigError, match="cannot be used"):
        Base(theirs)
    assert stat.S_IMODE(Path("/etc").stat().st_mode) == before


def test_an_earlier_workers_journal_is_not_lost_out_of_sight(tmp_path: Path) -> None:
    theirs = tmp_path / "base"
    theirs.mkdir()
    for name in ("journal.db", "holiday.jpg"):
        (theirs / name).touch()
    os.chown(theirs, OTHER, OTHER)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=f"`chown root {theirs}`, or move") as refused:
        Base(theirs)
    assert len(str(refused.value).splitlines()) == 1
    assert not (theirs / SUBFOLDER).exists()
    assert len(os.listdir("/proc/self/fd")) == before


@needs_root
def test_a_worker_in_a_container_sees_that_its_directory_was_moved_on_the_host(tmp_path: Path) -> None:
    """A bind mount, as of a volume: whoever owns the directory above it moves it, and puts another in its place."""
    theirs, seen_here = tmp_path / "home" / "jobs", tmp_path / "data"
    for folder in (theirs, seen_here):
        folder.mkdir(parents=True)
    subprocess.run(["mount", "--bind", theirs, seen_here], check=True)
    try:
        with Base(seen_here) as base:
            undone: list[str] = []
            base.job(JobId("7")).create()
            with base.unmoved(JobId("7"), partial(undone.append, "before")):
                pass
            moved = pytest.raises(WorkerFault, match=r"was moved from \S+/home/jobs to \S+/home/moved")
            with moved as fault, base.unmoved(JobId("7"), partial(undone.append, "container removed")):
                theirs.rename(theirs.with_name("moved"))
            assert undone == ["container removed"]
            assert fault.value.reason is WorkerReason.DISK
            with pytest.raises(WorkerFault, match="no job is taken any more"):
                base.check_room()
    finally:
        subprocess.run(["umount", seen_here], check=True)


def test_where_others_lead_the_way_no_helper_of_roots_gives_files_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker without root's rights: the owner of a directory above puts a link in the place of a leftover, and the
    helper would give the victim's files to the worker's user."""
    theirs = tmp_path / "home"
    theirs.mkdir()
    os.chown(theirs, OTHER, OTHER)
    with Base(theirs / "base") as base:
        assert base.foreign
        assert base.cannot_own() == ""  # root mounts what it holds open, and owns all files by itself
        base.watches_way = True
        assert f"{theirs} belongs to {OTHER}, who could have the files of anybody" in base.cannot_own()
        left = base.path / "jobs" / "3"
        left.mkdir()
        monkeypatch.setattr(tree, "remove", _denied)
        with pytest.raises(LeftBehind) as named:
            base.remove("3")
        assert f"rm -r {theirs / 'base' / 'jobs' / '3'}" in str(named.value)
        assert "/proc/self" not in f"{named.value} {base.left.words()}"


def _denied(*_: object) -> None:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("name", ["jobs", "cache", "quarantine", "proof", "lock", "journal.db", "journal.db-wal"])
def test_what_another_user_put_there_is_refused(tmp_path: Path, name: str) -> None:
    base = tmp_path / "base"
    base.mkdir()
    if name.startswith(("lock", "journal")):
        (base / name).touch()
    else:
        (base / name).mkdir()
    os.chown(base / name, OTHER, OTHER)
    os.chown(base, OTHER, OTHER)
    with pytest.raises(ConfigError, match=rf"{base}/{name} belongs to another user.*chown -R root {base}"):
        Base(base)
    assert base.stat().st_uid == OTHER  # as it was: a worker of that user may go on with it
    os.chown(base / name, 0, 0)
    with Base(base):
        pass


def test_a_file_with_another_name_elsewhere_is_not_written_over(tmp_path: Path) -> None:
    base, precious = tmp_path / "base", tmp_path / "precious"
    base.mkdir()
    precious.write_text("keep me")
    os.link(precious, base / "lock")
    with pytest.raises(ConfigError, match="has another name elsewhere"):
        Base(base)
    assert precious.read_text() == "keep me"


# -- many jobs, and somebody who swaps directories --------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1000])
def test_a_thousand_jobs_while_directories_are_swapped(home: Path, jobs: int) -> None:
    """All that a job's way touches, but for the engine: journal, staging, quarantine, self-test, and removal."""
    with Base(home / "base", reserve_mib=0) as base:
        with untouched(home), swapping(home), contextlib.closing(Journal(base.path / "journal.db")) as journal:
            engine = FakeEngine(lambda spec: Script(acts=copy))
            ended = run_jobs(base, journal, jobs, engine, PurePosixPath(base.path))  # the engine runs in this process
            assert journal.records() == []
        assert [outcome.ending for outcome in ended] == [Ending.FINISHED] * jobs
        assert names_in(base.path / "jobs") == []
        assert names_in(home / "base" / "jobs") == []


def copy(files: Path) -> None:
    """What a job does."""
    (files / "out" / "copy").write_bytes((files / "in").read_bytes())


def run_jobs(base: Base, journal: Journal, count: int, engine: FakeEngine, host_base: PurePosixPath) -> list[Outcome]:
    """So many jobs with an input and an output each, source and transfer in memory as well."""
    source, transfer = FakeSource("http://files.invalid"), FakeTransfer()
    transfer.objects["http://files.invalid/b/in"] = b"input"
    budget = Budget(
        Inventory(4.0, 4096), slots=1, memory_in_use_mib=lambda: 0, read_gpus=lambda: (), reserve_memory_mib=0
    )
    runner = Runner(
        base=base,
        host_base=host_base,
        journal=journal,
        transfer=transfer,
        engine=engine,
        build_spec=partial(build_run_spec, instance="i", policy=BoxPolicy()),
        rules=Rules(beat_interval_s=3600.0),
        emit=Emitted(),
    )
    ended = []
    for number in range(1, count + 1):
        job = make_job(id=str(number), inputs={"in": "b/in"}, outputs={"output": "out"})
        source.put(job)
        lease = source.resume("t", job.id)
        journal.claim(job.id, lease.token, job)
        outcome = runner.run(lease, job, budget.reserve(job.needs), Halt())
        assert outcome is not None
        ended.append(outcome)
    return ended


# -- what the engine mounts -------------------------------------------------------------------------------------------


@pytest.mark.docker
def test_the_engine_mounts_what_is_held_whatever_is_swapped(home: Path, lab: Lab, engine: docker.APIClient) -> None:
    """The real engine: a job that got the victim's directory would read and change it."""
    with untouched(home), running_worker(lab.settings(timeout_job="0.05")) as worker:
        worker.heard.wait_for("machine")
        with swapping(home):
            jobs = [
                lab.submit("cat /files/*; echo changed >/files/in; ls /files", files_up={"output": "out"})
                for _ in "abcdef"
            ]
            for job in jobs:
                lab.server.wait_for_state(job, "finished", "error")
        said = [lab.ended(job)[0] for job in jobs]
        held = lab.submit(UNTIL_LET_GO)
        wait_until_running(lab, held)
        [container] = lab.containers()
        [mount] = engine.inspect_container(container["Id"])["Mounts"]
        assert mount["Source"] == f"{ROOM}/{find_instance(str(lab.base))}/jobs/{held}/files"
        lab.let_go(held)
        lab.server.wait_for_state(held, "finished")
    assert said == ["finished"] * len(jobs)
    assert "precious" not in "".join(str(lab.server.results(job)) for job in jobs)
    [warning] = worker.heard.messages("foreign_base")
    assert f"{home} belongs to {OTHER}" in warning
    assert not (ROOM / find_instance(str(lab.base))).exists()


@pytest.mark.docker
def test_a_container_that_runs_on_is_adopted_by_its_second_name(home: Path, lab: Lab) -> None:
    with running_worker(lab.settings(stop_mode="detach")) as worker:
        job = lab.submit(f"{UNTIL_LET_GO}; mkdir /files/out; echo done >/files/out/it", files_up={"output": "out"})
        wait_until_running(lab, job)
        worker.leave(Leaving.DETACH)
        worker.join()
    lab.let_go(job)
    work(lab.settings(), jobs=0)
    assert lab.ended(job)[0] == "finished"
    assert lab.server.results(job)["output/out/it"] == b"done\n"


def test_a_second_name_is_found_again_and_goes(tmp_path: Path) -> None:
    room = tmp_path / "room"
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "lock").touch()
    (tmp_path / "other").mkdir()
    base, other = (os.open(tmp_path / name, os.O_RDONLY | os.O_DIRECTORY) for name in ("base", "other"))
    try:
        (tmp_path / "base").rename(tmp_path / "moved")
        with second_name(base, "a", room) as first:
            assert first == room / "a"
            assert names_in(first) == ["lock"]
            with second_name(base, "a", room) as again:  # as after a kill
                assert again == first
            with second_name(base, "a", room) as left, second_name(other, "a", room) as replaced:
                assert left == replaced
                assert names_in(room / "a") == []
        assert not (room / "a").exists()
        room.chmod(0o777)
        with second_name(base, "a", room) as loose:
            assert loose is None
    finally:
        os.close(base)
        os.close(other)


@pytest.mark.docker
def test_only_an_engine_on_this_machine_says_what_it_sees(tmp_path: Path, engine: docker.APIClient) -> None:
    assert sees("unix:///var/run/docker.sock", tmp_path)
    assert not sees("unix:///var/run/docker.sock", tmp_path / "missing")
    assert not sees("tcp://127.0.0.1:1", tmp_path)
    assert not sees(f"unix://{tmp_path}/nobody.sock", tmp_path)


@pytest.mark.parametrize("when", ["before", "during"])
@pytest.mark.parametrize("planted", ["evil", "link"])
def test_where_the_real_path_must_be_mounted_it_is_looked_at(home: Path, when: str, planted: str) -> None:
    """A worker in a container, or without the right to mount: seen, undone at once, and no job is taken any more."""

    def swap() -> None:
        (home / "base").rename(home / "held")
        (home / planted).rename(home / "base")

    undone: list[str] = []
    with Base(home / "base", reserve_mib=0) as base:
        base.watches_way = True
        base.job(JobId("1")).create()
        with base.unmoved(JobId("1"), lambda: undone.append("before")):
            base.check_room()
        if when == "before":
            swap()
        with (
            pytest.raises(
                WorkerFault, match=f"another directory was put in the place of {home}/base.*{OTHER}"
            ) as fault,
            base.unmoved(JobId("1"), lambda: undone.append("undone")),
        ):
            swap()
        assert fault.value.reason is WorkerReason.DISK
        assert undone == (["undone"] if when == "during" else [])
        (home / "base").rename(home / planted)
        (home / "held").rename(home / "base")
        with pytest.raises(WorkerFault, match="start the worker anew"):  # also when all lies again as it did
            base.check_room()
    with Base(home / "base", reserve_mib=0) as base:
        base.check_room()


def test_a_job_whose_mount_was_led_elsewhere_is_removed_and_given_back(home: Path) -> None:
    def acts(files: Path) -> None:
        (home / "base").rename(home / "held")
        (home / "evil").rename(home / "base")

    with Base(home / "base", reserve_mib=0) as base, contextlib.closing(Journal(base.path / "journal.db")) as journal:
        base.watches_way = True
        engine = FakeEngine(lambda spec: Script(acts=acts, held=True))
        [outcome] = run_jobs(base, journal, 1, engine, host_base=PurePosixPath(base.real))
        assert outcome.ending is Ending.WORKER_FAILED
        assert outcome.reason is WorkerReason.DISK
        assert engine.containers == []
        assert names_in(home / "held" / "jobs") == []
