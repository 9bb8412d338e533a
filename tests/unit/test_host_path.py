"""Where the data directory lies on the engine's host, from texts of /proc and a stub of the engine's inspect."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jobfetcher.core.errors import ConfigError
from jobfetcher.engine.host_path import check_host_path, find_host_path, own_ids, runs_inside

ME, OTHER = "a1" * 32, "b2" * 32

IN_A_CONTAINER = f"""\
812 735 0:52 / / rw,relatime - overlay overlay rw
820 812 0:55 / /proc rw - proc proc rw
835 812 8:1 /data/jobs /work rw,relatime - ext4 /dev/sda1 rw
836 812 8:1 /var/lib/docker/containers/{ME}/resolv.conf /etc/resolv.conf rw - ext4 /dev/sda1 rw
837 812 8:1 /var/lib/docker/containers/{ME}/hostname /etc/hostname rw - ext4 /dev/sda1 rw
"""
ON_A_HOST = f"""\
24 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
90 24 0:44 / /var/lib/docker/containers/{OTHER}/mounts/shm rw shared:40 - tmpfs shm rw
"""


class Engine:
    """Knows these containers, by id, short id or name."""

    def __init__(self, *containers: Mapping[str, Any]) -> None:
        self._containers = containers

    def inspect(self, container: str) -> Mapping[str, Any] | None:
        for known in self._containers:
            if known["Id"].startswith(container) or known.get("Name") == f"/{container}":
                return known
        return None


def container(*mounts: tuple[str, str, str]) -> Mapping[str, Any]:
    return {
        "Id": ME,
        "Mounts": [{"Type": kind, "Source": source, "Destination": to} for kind, source, to in mounts],
    }


MOUNTED = container(
    ("bind", "/data", "/"),
    ("bind", "/data/jobs", "/work"),
    ("volume", "/var/lib/docker/volumes/v/_data", "/work/volume"),
    ("bind", "/elsewhere", "/workshop"),
    ("tmpfs", "", "/work/tmp"),
)


def test_own_ids_are_read_from_mounts_cgroups_and_the_host_name() -> None:
    v1 = f"12:memory:/docker/{ME}\n1:name=systemd:/docker/{ME}\n"
    systemd = f"0::/system.slice/docker-{ME}.scope\n"
    assert own_ids(IN_A_CONTAINER, "0::/\n", "lab-pc") == [ME]
    assert own_ids("", v1, "lab-pc") == own_ids("", systemd, "lab-pc") == [ME]
    assert own_ids("", "0::/\n", ME[:12]) == [ME[:12]]
    assert own_ids(ON_A_HOST, "0::/user.slice/user-1000.slice\n", "lab-pc") == []


def test_on_bare_metal_the_path_is_itself(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert find_host_path(Engine(), str(tmp_path / "link"), []) == str(tmp_path.resolve())


@pytest.mark.fault("E12")
@pytest.mark.parametrize(
    ("path", "host"),
    [
        ("/work", "/data/jobs"),
        ("/work/deep/er", "/data/jobs/deep/er"),
        ("/workshop/x", "/elsewhere/x"),
        ("/working", "/data/working"),
        ("/work/volume/x", "/var/lib/docker/volumes/v/_data/x"),
    ],
)
def test_in_a_container_the_deepest_mount_says_where(path: str, host: str) -> None:
    assert find_host_path(Engine(MOUNTED), path, [ME]) == host
    assert find_host_path(Engine(MOUNTED), path, [ME[:12]]) == host


@pytest.mark.fault("E12")
@pytest.mark.parametrize("me", [container(), container(("tmpfs", "", "/work"))])
def test_a_path_that_is_not_on_the_host_is_refused(me: Mapping[str, Any]) -> None:
    with pytest.raises(ConfigError, match="docker run -v HOST_DIRECTORY:/work"):
        find_host_path(Engine(me), "/work", [ME])


def test_another_container_called_like_this_host_is_not_this_one(tmp_path: Path) -> None:
    namesake = {"Id": OTHER, "Name": f"/{ME[:12]}", "Mounts": []}
    assert find_host_path(Engine(namesake), str(tmp_path), [ME[:12]]) == str(tmp_path)


@pytest.mark.fault("E12")
def test_a_wrong_path_host_base_is_refused(tmp_path: Path) -> None:
    assert check_host_path(Engine(MOUNTED), "/data/jobs/", "/work", [ME]) == "/data/jobs"
    with pytest.raises(ConfigError, match="PATH_HOST_BASE is /data/job, but PATH_BASE is mounted from /data/jobs"):
        check_host_path(Engine(MOUNTED), "/data/job", "/work", [ME])

    (tmp_path / "same").symlink_to(tmp_path)
    assert check_host_path(Engine(), str(tmp_path / "same"), str(tmp_path), []) == str(tmp_path)
    for wrong in (tmp_path.parent, tmp_path / "none"):
        with pytest.raises(ConfigError, match="PATH_HOST_BASE is"):
            check_host_path(Engine(), str(wrong), str(tmp_path), [])


def test_a_container_that_the_engine_does_not_know_cannot_be_checked() -> None:
    assert check_host_path(Engine(), "/data/jobs", "/work", [ME]) == "/data/jobs"


def test_whether_this_runs_in_a_container_of_that_engine() -> None:
    assert runs_inside(Engine(MOUNTED), [ME])
    assert not runs_inside(Engine(MOUNTED), [OTHER])  # of another engine
    assert not runs_inside(Engine(MOUNTED), [])
