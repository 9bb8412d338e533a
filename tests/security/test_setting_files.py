"""Files that say what the worker does, and who else might change or read them (T32): a table over modes and owners."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from jobfetcher import owners
from jobfetcher.core.errors import ConfigError
from jobfetcher.settings import load
from tests.support.mounts import needs_root, tmpfs
from tests.support.transfers import Authority

pytestmark = pytest.mark.fault("T32")

OTHER, STAFF = 1234, 50
EVERYBODY, GROUP, ANOTHER = "can be changed by everybody", "can be changed by its group", "belongs to another user"
READ = "can be read by everybody"


class Row(NamedTuple):
    owner: int
    group: int
    mode: int
    refused: bool
    warned: tuple[str, ...]


#: What is said of a secret in a file of that owner, group and mode.
TABLE = [
    Row(0, 0, 0o600, False, ()),
    Row(0, 0, 0o400, False, ()),
    Row(0, 0, 0o640, False, ()),
    Row(0, STAFF, 0o640, False, ()),
    Row(0, 0, 0o660, False, ()),
    Row(0, STAFF, 0o660, False, (GROUP,)),
    Row(0, 0, 0o644, False, (READ,)),
    Row(0, STAFF, 0o664, False, (GROUP, READ)),
    Row(0, 0, 0o602, True, ()),
    Row(0, 0, 0o666, True, ()),
    Row(0, 0, 0o777, True, ()),
    Row(OTHER, OTHER, 0o600, False, (ANOTHER,)),
    Row(OTHER, OTHER, 0o664, False, (ANOTHER, READ)),
    Row(OTHER, STAFF, 0o660, False, (GROUP, ANOTHER)),
    Row(OTHER, OTHER, 0o666, True, ()),
]


def check_row(row: Row, path: Path, ask: Callable[[], list[str]], wanted: tuple[str, ...]) -> None:
    path.chmod(row.mode)
    os.chown(path, row.owner, row.group)
    if row.refused:
        with pytest.raises(ConfigError, match=f"{path} {EVERYBODY}.*chmod go-w") as refused:
            ask()
        assert len(str(refused.value).splitlines()) == 1
        return
    said = [one for one in ask() if str(path) in one]
    assert [why for why in (GROUP, ANOTHER, READ) if any(why in one for one in said)] == list(wanted)
    assert len(said) == len(wanted)
    assert "canary" not in "".join(said)


@needs_root
@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.owner}-{row.group}-{row.mode:o}")
@pytest.mark.parametrize("setting", ["PASSWORD_FILE", "ACCESS_TOKEN_FILE", "CA_FILE", "JOB_SIGNING_KEYS", "docker"])
def test_a_file_that_a_setting_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, authority: Authority, row: Row, setting: str
) -> None:
    path = tmp_path / "config.json"
    environ = {"API_URL": "https://jobs.example.org", "ACCESS_TOKEN": "t", "USERNAME": "w"}
    content = "canary"
    if setting == "docker":
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
        content = "{}"
    elif setting == "CA_FILE":
        content = authority.file.read_text()
    if setting == "ACCESS_TOKEN_FILE":
        del environ["ACCESS_TOKEN"]
    if setting != "docker":
        environ[setting] = str(path)
    path.write_text(content)
    is_secret = setting in {"PASSWORD_FILE", "ACCESS_TOKEN_FILE"}
    wanted = tuple(why for why in row.warned if why != READ or is_secret)
    check_row(row, path, lambda: list(load(environ=dict(environ), env_file=None).warnings), wanted)


@needs_root
@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.owner}-{row.group}-{row.mode:o}")
def test_the_file_of_settings_itself(tmp_path: Path, row: Row) -> None:
    """It is looked at before it is read; whether it has a secret that others may read is said as ever (T10)."""
    path = tmp_path / "worker.env"
    path.write_text("API_URL=https://jobs.example.org\nACCESS_TOKEN=canary\n")

    def ask() -> list[str]:
        return [one for one in load(environ={}, env_file=path).warnings if "holds a secret" not in one]

    check_row(row, path, ask, tuple(why for why in row.warned if why != READ))


@needs_root
@pytest.mark.parametrize(("mode", "owner"), [(0o777, 0), (0o757, 0), (0o777, OTHER)])
def test_who_may_change_the_directory_may_change_the_file(tmp_path: Path, mode: int, owner: int) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    path = folder / "secret"
    path.write_text("canary")
    path.chmod(0o600)
    folder.chmod(mode)
    os.chown(folder, owner, owner)
    with pytest.raises(ConfigError, match=f"X: {folder} {EVERYBODY}"):
        list(owners.check(path, "X"))
    folder.chmod(mode | stat.S_ISVTX)  # as the system's temporary one: there nobody replaces another one's file
    assert [ANOTHER in one for one in owners.check(path, "X")] == [True] * (owner == OTHER)


@needs_root
def test_a_link_counts_and_what_it_leads_to(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.write_text("canary")
    real.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to("second")
    (tmp_path / "second").symlink_to(real)
    assert list(owners.check(link)) == []
    os.chown(tmp_path / "second", OTHER, OTHER, follow_symlinks=False)
    [said] = owners.check(link)
    assert f"{tmp_path}/second {ANOTHER} ({OTHER})" in said
    real.chmod(0o666)
    with pytest.raises(ConfigError, match=f"{real} {EVERYBODY}"):
        list(owners.check(link))


@needs_root
def test_every_file_of_a_directory_of_certificates_counts(tmp_path: Path) -> None:
    folder = tmp_path / "certificates"
    folder.mkdir()
    for name in "ab":
        (folder / name).touch(0o644)
    assert list(owners.check(folder, "CA_FILE")) == []
    (folder / "b").chmod(0o646)
    with pytest.raises(ConfigError, match=f"CA_FILE: {folder}/b {EVERYBODY}"):
        list(owners.check(folder, "CA_FILE"))


@needs_root
def test_what_nobody_can_write_through_this_mount_goes_on_working(tmp_path: Path) -> None:
    """Docker Desktop shows every file of Windows as mode 0777; README mounts `.env` read-only."""
    with tmpfs(tmp_path / "disk", "1m", "mode=755") as disk:
        (disk / "env").write_text("canary")
        (disk / "env").chmod(0o777)
        with pytest.raises(ConfigError, match=EVERYBODY):
            list(owners.check(disk / "env"))
    with tmpfs(tmp_path / "sealed", "1m", "ro,mode=777") as disk:
        [said] = owners.check(disk)
        assert "though not through this read-only mount" in said


def test_what_is_not_there_is_no_business_of_this_check(tmp_path: Path) -> None:
    assert list(owners.check(tmp_path / "missing", "X", secret=True)) == []


@pytest.mark.parametrize(("kind", "refused"), [("ext4", True), ("vfat", False), ("9p", False), ("fuseblk", False)])
def test_where_a_disk_knows_no_modes_nobody_is_told_to_change_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, refused: bool
) -> None:
    """A Windows drive in WSL2 shows 0777 for every file, and chmod does nothing there. The kind is put in."""
    file = tmp_path / ".env"
    file.touch()
    file.chmod(0o777)
    device = file.stat().st_dev
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"22 1 {os.major(device)}:{os.minor(device)} / / rw - {kind} /dev/sda1 rw\n")
    known = owners._knows_no_modes
    monkeypatch.setattr(owners, "_knows_no_modes", lambda device: known(device, mounts))
    if refused:
        with pytest.raises(ConfigError, match="can be changed by everybody"):
            list(owners.check(file))
    else:
        [said, *_] = owners.check(file)
        assert "knows no modes; keep it on one that does" in said
        assert "chmod" not in said
