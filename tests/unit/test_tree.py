"""tree: placing, walking, reading and removing, on ordinary trees. Hostile ones are in tests/security."""

import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from jobfetcher import tree
from jobfetcher.tree import MAX_DEPTH, Changed, Found, Skipped
from tests.support.trees import descend, names_in, open_descriptors


def found(root: Path, *start: str) -> dict[str, int]:
    return {"/".join(item.parts): item.size for item in tree.walk(root, start) if isinstance(item, Found)}


def test_a_file_is_placed_with_its_folders_for_any_user(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    source = tmp_path / "part"
    source.write_bytes(b"content")
    mask = os.umask(0o077)
    try:
        tree.place(source, root, ("a", "b", "c.bin"))
    finally:
        os.umask(mask)
    assert (root / "a/b/c.bin").read_bytes() == b"content"
    assert not source.exists()
    modes = [oct((root / name).stat().st_mode & 0o777) for name in ("a", "a/b", "a/b/c.bin")]
    assert modes == ["0o777", "0o777", "0o666"]


def test_placing_again_replaces_the_file(tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        (tmp_path / "part").write_bytes(content)
        tree.place(tmp_path / "part", tmp_path, ("x", "file"))
    assert (tmp_path / "x/file").read_bytes() == b"new"


def test_a_file_is_never_placed_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "target").write_text("safe")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(outside)
    (root / "file").symlink_to(outside / "target")
    part = tmp_path / "part"
    part.write_text("evil")
    with pytest.raises(NotADirectoryError):
        tree.place(part, root, ("link", "x"))
    tree.place(part, root, ("file",))  # the link itself is replaced
    assert not (root / "file").is_symlink()
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"target": "safe"}


def test_a_folder_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o700)
    with tree.opened(tmp_path, ("a", "b"), create=True):
        pass
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700


def test_a_walk_finds_every_file_once(tmp_path: Path) -> None:
    sizes = {"a": 1, "sub/b": 2, "sub/deep/er/c": 3, "empty": 0}
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "nothing/in/here").mkdir(parents=True)
    assert found(tmp_path) == sizes
    assert found(tmp_path, "sub") == {"sub/b": 2, "sub/deep/er/c": 3}
    assert found(tmp_path, "sub", "b") == {"sub/b": 2}
    assert list(tree.walk(tmp_path, ("missing",))) == []
    assert list(tree.walk(tmp_path, ("sub", "missing", "deeper"))) == []


def test_a_walk_below_a_file_or_link_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("/etc")
    for start in (("file", "x"), ("link", "passwd")):
        [item] = tree.walk(tmp_path, start)
        assert item == Skipped(start, "one of its folders is a link or a file")


def test_a_file_that_disappears_does_not_hide_the_others(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / "out" / str(number)).mkdir(parents=True)
        (tmp_path / "out" / str(number) / "file").touch()
    (tmp_path / "out" / "gone").touch()
    seen: list[str] = []
    lost: list[Skipped] = []
    for item in tree.walk(tmp_path, ("out",)):
        # While the walk holds the list of folders, one of them goes away.
        if not seen and isinstance(item, Found) and item.parts[-1] == "file":
            for victim in range(50):
                if (tmp_path / "out" / str(victim)) != tmp_path / "/".join(item.parts[:-1]) and victim % 2:
                    (tmp_path / "out" / str(victim) / "file").unlink()
                    (tmp_path / "out" / str(victim)).rmdir()
        if isinstance(item, Found) and item.parts[-1] == "file":
            seen.append(item.parts[1])
        elif isinstance(item, Skipped):
            lost.append(item)
    assert set(seen) >= {str(number) for number in range(0, 50, 2)}
    assert {item.why for item in lost} == {"disappeared while its folder was read"}


def test_a_found_file_is_read_and_another_in_its_place_is_not(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "file"
    path.parent.mkdir()
    path.write_bytes(b"content")
    [item] = tree.walk(tmp_path, ())
    assert isinstance(item, Found)
    with tree.open_file(tmp_path, item.parts) as file:
        assert file.read() == b"content"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        tree.open_file(tmp_path, item.parts)
    path.symlink_to("/etc/passwd")
    with pytest.raises(Changed, match="sub/file is not a file any more"):
        tree.open_file(tmp_path, item.parts)
    path.unlink()
    path.mkdir()
    with pytest.raises(Changed, match="not a file any more"):
        tree.open_file(tmp_path, item.parts)


def test_a_reader_opens_what_was_found_in_whatever_order_and_nothing_else(tmp_path: Path) -> None:
    for name in ("a/deep/1", "a/deep/2", "a/3", "4"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    items = {"/".join(item.parts): item for item in tree.walk(tmp_path, ()) if isinstance(item, Found)}
    assert len(items) == 4
    with tree.Reader(tmp_path) as reader:
        for name in ("a/deep/1", "a/deep/2", "4", "a/3", "a/deep/1", "4"):
            file = reader.reopen(items[name])
            assert os.read(file, 100) == name.encode()
            os.close(file)
        before = open_descriptors()
        for name, content, mtime_ns in (
            ("a/deep/2", "longer than it was", items["a/deep/2"].mtime_ns),
            ("a/3", "a/3", 7),
        ):
            (tmp_path / name).write_text(content)
            os.utime(tmp_path / name, ns=(7, mtime_ns))
            with pytest.raises(Changed, match=f"{name} was written to"):
                reader.reopen(items[name])
        assert open_descriptors() == before
        shutil.rmtree(tmp_path / "a")
        with pytest.raises(FileNotFoundError):
            reader.reopen(items["a/deep/1"])
        (tmp_path / "a" / "deep").mkdir(parents=True)
        (tmp_path / "a" / "deep" / "1").write_text("a/deep/1")
        os.utime(tmp_path / "a" / "deep" / "1", ns=(7, items["a/deep/1"].mtime_ns))
        os.close(reader.reopen(items["a/deep/1"]))
        shutil.rmtree(tmp_path / "a")
        (tmp_path / "a").symlink_to("/etc")
        with pytest.raises(Changed, match="a/deep/1 is not a file any more"):
            reader.reopen(items["a/deep/1"])


def test_a_reader_says_what_else_is_wrong_and_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    [item] = tree.walk(tmp_path, ())
    assert isinstance(item, Found)
    before = open_descriptors()
    with tree.Reader(tmp_path) as reader:
        os.close(reader.reopen(item))
        assert len(open_descriptors()) == len(before) + 1
        with pytest.raises(OSError, match="File name too long") as error:
            reader.open(("x" * 300,))
        assert not isinstance(error.value, Changed)
    with pytest.raises(OSError, match="nothing is read there any more"):
        reader.reopen(item)
    assert open_descriptors() == before


def test_the_modification_time_is_told_exactly(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    os.utime(tmp_path / "a", ns=(5, 1_700_000_000_123_456_789))
    assert list(tree.walk(tmp_path, ())) == [Found(("a",), 0, 1_700_000_000_123_456_789)]


def test_folders_beyond_the_depth_are_reported_and_not_entered(tmp_path: Path) -> None:
    descend(tmp_path, "d", MAX_DEPTH + 5, b"too deep")
    [item] = tree.walk(tmp_path, ())
    assert isinstance(item, Skipped)
    assert len(item.parts) == MAX_DEPTH + 1
    assert item.why == f"is more than {MAX_DEPTH} folders deep"


def test_a_whole_tree_is_removed_whatever_it_holds(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (victim / "a/b").mkdir(parents=True)
    for number in range(3000):
        (victim / "a" / f"{number}").touch()
    (victim / "link").symlink_to(tmp_path)
    (victim / "dangling").symlink_to("nowhere")
    os.mkfifo(victim / "fifo")
    (victim / "locked").mkdir()
    (victim / "locked" / "file").touch()
    (victim / "locked").chmod(0o500 if os.geteuid() else 0)
    (tmp_path / "neighbour").touch()
    if os.geteuid():
        (victim / "locked").chmod(0o700)
    tree.remove(tmp_path, "victim")
    assert names_in(tmp_path) == ["neighbour"]


def test_removing_what_is_missing_or_a_single_file_or_link_is_fine(tmp_path: Path) -> None:
    tree.remove(tmp_path, "missing")
    (tmp_path / "file").touch()
    (tmp_path / "kept").touch()
    (tmp_path / "link").symlink_to("kept")
    tree.remove(tmp_path, "file")
    tree.remove(tmp_path, "link")
    assert names_in(tmp_path) == ["kept"]


def du(root: Path) -> int:
    """What du(1) says of a folder's content, in bytes: an independent count, hard links once."""
    said = subprocess.run(["du", "-s", "-x", "--block-size=1", str(root)], capture_output=True, text=True, check=True)
    return int(said.stdout.split()[0]) - root.stat().st_blocks * 512


def test_disk_usage_is_what_du_counts(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/file").write_bytes(b"x" * 100_000)
    (tmp_path / "small").write_bytes(b"x")
    with (tmp_path / "sparse").open("wb") as sparse:
        sparse.truncate(1 << 40)  # a terabyte that takes nothing
    for number in range(3):
        os.link(tmp_path / "a/file", tmp_path / f"a/b/link{number}")
    (tmp_path / "to-the-outside").symlink_to("/usr")
    os.mkfifo(tmp_path / "fifo")
    assert 100_000 < tree.disk_usage(tmp_path) < 200_000
    assert tree.disk_usage(tmp_path) == du(tmp_path)


def test_disk_usage_sees_what_lies_deeper_than_the_walk_goes(tmp_path: Path) -> None:
    descend(tmp_path, "d", 3 * MAX_DEPTH + 7, b"x" * 1_000_000)
    before = open_descriptors()
    assert tree.disk_usage(tmp_path) > 1_000_000
    assert tree.disk_usage(tmp_path) == du(tmp_path)
    assert open_descriptors() == before


def test_disk_usage_bears_that_everything_vanishes(tmp_path: Path) -> None:
    assert tree.disk_usage(tmp_path / "missing") == 0
    (tmp_path / "link").symlink_to("/usr")
    assert tree.disk_usage(tmp_path / "link") == 0
    root = tmp_path / "root"
    done = threading.Event()

    def churn() -> None:
        while not done.is_set():
            for number in range(20):
                (root / str(number) / "x").mkdir(parents=True, exist_ok=True)
                (root / str(number) / "x/file").write_bytes(b"x" * 5000)
            shutil.rmtree(root)

    churning = threading.Thread(target=churn)
    churning.start()
    try:
        sizes, deadline = [0], time.monotonic() + 20
        while (len(sizes) < 300 or len(set(sizes)) < 5) and time.monotonic() < deadline:
            sizes.append(tree.disk_usage(root))
    finally:
        done.set()
        churning.join()
    assert len(set(sizes)) >= 5  # it did change under the count
    assert max(sizes) < 3 * 20 * (8192 + 2 * 4096)  # and nothing was counted that was never there


def test_a_link_to_an_open_file_is_the_file_that_was_read(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "old/file").write_bytes(b"content")
    (tmp_path / "old/file").chmod(0o4755)
    with (tmp_path / "old/file").open("rb") as file:
        (tmp_path / "old/file").unlink()
        (tmp_path / "old/file").symlink_to("/etc/passwd")
        (tmp_path / "old/again").write_bytes(b"other")
        with pytest.raises(FileNotFoundError):  # it has no name any more, so it can have no second one
            tree.link(file, tmp_path / "new", ("file",))
    with (tmp_path / "old/again").open("rb") as file:
        (tmp_path / "old/again").rename(tmp_path / "old/moved")
        tree.link(file, tmp_path / "new", ("deep", "file"))
    assert (tmp_path / "new/deep/file").read_bytes() == b"other"
    assert (tmp_path / "new/deep/file").samefile(tmp_path / "old/moved")
    modes = [oct((tmp_path / "new" / name).stat().st_mode & 0o7777) for name in ("deep", "deep/file")]
    assert modes == ["0o777", "0o666"]


def test_descriptors_are_closed_after_half_a_walk_too(tmp_path: Path) -> None:
    descend(tmp_path, "d", 20, b"x")
    for number in range(20):
        (tmp_path / f"{number}").touch()
    before = open_descriptors()
    walk = tree.walk(tmp_path, ())
    next(walk)
    walk.close()  # type: ignore[attr-defined]  # a generator, promised as an iterator only
    with pytest.raises(NotADirectoryError), tree.opened(tmp_path, ("0", "x")):
        pass
    assert open_descriptors() == before


@pytest.mark.fault("N8")
def test_a_folder_of_many_folders_is_walked_and_removed_whole(tmp_path: Path) -> None:
    """The names of more than a few folders are not kept: the walk reads such a folder twice."""
    names = [f"{number}/file" for number in range(1_300)] + ["1/more/file", "file", "another"]
    for name in names:
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).touch()
    walked = ["/".join(item.parts) for item in tree.walk(tmp_path / "root", ()) if isinstance(item, Found)]
    assert sorted(walked) == sorted(names)
    assert {walked[0], walked[1]} == {"file", "another"}  # a folder's own files first
    tree.remove(tmp_path, "root")
    assert list(tmp_path.iterdir()) == []


def test_what_is_nested_too_deeply_is_removed_whatever_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    for number in range(5):
        descend(tmp_path / "root", f"d{number}", 3 * MAX_DEPTH + 7, b"x")
    (tmp_path / "another").mkdir()
    tree.remove(tmp_path, "root")
    assert [entry.name for entry in tmp_path.iterdir()] == ["another"]
