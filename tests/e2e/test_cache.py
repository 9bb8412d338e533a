"""The input cache with a whole worker on the real engine: what a second job with the same input costs, and gets."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from tests.support import mounts
from tests.support.worker import Heard, Lab, work

pytestmark = pytest.mark.docker

MIB = 1024**2

#: Hands out what it got, then does to its own copy what a job may do.
COPY_AND_CHANGE = ("cp /files/data/in.bin /files/out/got;", "printf changed >> /files/data/in.bin;")
COPY_AND_EMPTY = ("cp /files/data/in.bin /files/out/got;", ": > /files/data/in.bin")


def run_job(lab: Lab, *cmd: str, file_id: str, **settings: str) -> tuple[bytes, dict[str, object], Heard]:
    """One job with that input, by a worker of its own: what the job got, its provenance record, what was told."""
    job = lab.submit(*cmd, files_down={"data/in.bin": file_id}, files_up={"output": "out"})
    heard = work(lab.settings(**{"cache_size": "64MiB", **settings}))
    assert lab.ended(job) == ("finished", "")
    stored = lab.server.results(job)
    return stored["output/out/got"], json.loads(stored["log/jobfetcher/provenance.json"]), heard


def traffic(lab: Lab, name: str = "inputs/in.bin") -> tuple[int, int, int]:
    """Requests that fetched the input, requests that were answered with 304, and bytes of it that were sent."""
    counts = lab.server.traffic()[name]
    return counts["gets"], counts["unchanged"], counts["sent"]


@pytest.mark.parametrize(
    ("lab", "conditional"),
    [({"file_mode": "signed"}, True), ({"file_mode": "local"}, False)],
    ids=["signed", "local"],
    indirect=["lab"],
)
def test_the_same_input_again_moves_no_byte_of_it_where_the_server_can_say_that_it_is_the_same(
    lab: Lab, conditional: bool
) -> None:
    """A local-disk server looks at no If-None-Match and sends it anew; what the job gets is right all the same."""
    content = os.urandom(5 * MIB + 11)
    file_id = lab.server.put_input("in.bin", content)
    sha256 = f"sha256:{hashlib.sha256(content).hexdigest()}"
    for turn, change in enumerate((COPY_AND_CHANGE, COPY_AND_EMPTY, COPY_AND_CHANGE)):
        got, record, _ = run_job(lab, *change, file_id=file_id)
        assert got == content
        assert sha256 in json.dumps(record)
        times = 1 if conditional else turn + 1
        assert traffic(lab) == (times, turn if conditional else 0, times * len(content))


@pytest.mark.parametrize("slots", [1, 3])
def test_jobs_of_one_worker_share_an_input(lab: Lab, slots: int) -> None:
    """One after the other, or side by side, where the first fetches it for all."""
    content = os.urandom(MIB)
    down = {"data/in.bin": lab.server.put_input("in.bin", content), "again": lab.server.put_input("other.bin", b"x")}
    jobs = [lab.submit(*COPY_AND_CHANGE, files_down=down, files_up={"output": "out"}) for _ in range(3)]
    work(lab.settings(cache_size="64MiB", max_jobs=str(slots)), jobs=3)
    for job in jobs:
        assert lab.ended(job) == ("finished", "")
        assert lab.server.results(job)["output/out/got"] == content
    assert traffic(lab) == (1, 2, len(content))
    assert traffic(lab, "inputs/other.bin") == (1, 2, 1)


def test_an_object_that_changed_is_fetched_anew(lab: Lab) -> None:
    old, new = os.urandom(MIB), os.urandom(MIB + 1)
    file_id = lab.server.put_input("in.bin", old)
    assert run_job(lab, *COPY_AND_CHANGE, file_id=file_id)[0] == old
    lab.server.put_input("in.bin", new)
    assert run_job(lab, *COPY_AND_CHANGE, file_id=file_id)[0] == new
    assert traffic(lab) == (2, 0, len(old) + len(new))
    assert run_job(lab, *COPY_AND_CHANGE, file_id=file_id)[0] == new
    assert traffic(lab) == (2, 1, len(old) + len(new))
    assert len(list((lab.base / "cache").iterdir())) == 1


@pytest.mark.fault("C7")
def test_an_object_that_is_gone_is_missing_though_it_is_kept(lab: Lab) -> None:
    file_id = lab.server.put_input("in.bin", b"content")
    run_job(lab, *COPY_AND_CHANGE, file_id=file_id)
    (lab.server.data_dir / "files/inputs/in.bin").rename(lab.server.data_dir / "files/inputs/in.bin.old")
    job = lab.submit("true", files_down={"data/in.bin": file_id})
    work(lab.settings(cache_size="64MiB"))
    state, details = lab.ended(job)
    assert state == "error"
    assert "not found" in details


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
@pytest.mark.fault("C3")
def test_a_damaged_entry_is_fetched_again(lab: Lab, damage: str) -> None:
    content = os.urandom(MIB + 5)
    file_id = lab.server.put_input("in.bin", content)
    run_job(lab, *COPY_AND_CHANGE, file_id=file_id)
    [entry] = (lab.base / "cache").iterdir()
    data = bytearray(entry.read_bytes())
    if damage == "flipped":
        data[MIB // 2] ^= 0x10
    else:
        del data[MIB // 2 if damage == "cut" else 0 :]
    entry.write_bytes(data)
    assert run_job(lab, *COPY_AND_CHANGE, file_id=file_id)[0] == content
    gets, _, sent = traffic(lab)
    assert (gets, sent) == (2, 2 * len(content))
    assert run_job(lab, *COPY_AND_CHANGE, file_id=file_id)[0] == content
    assert traffic(lab)[2] == 2 * len(content)


@mounts.needs_root
@pytest.mark.fault("D2")
def test_a_full_disk_of_the_cache_does_not_hurt_a_job(lab: Lab, tmp_path: Path) -> None:
    content = os.urandom(6 * MIB)
    file_id = lab.server.put_input("in.bin", content)
    lab.base.mkdir(mode=0o700)
    with mounts.ext4(tmp_path / "disk", 32) as disk, mounts.bind(disk, lab.base / "cache"):
        filler = mounts.fill(disk, leave=MIB)
        got, _, heard = run_job(lab, *COPY_AND_CHANGE, file_id=file_id)
        assert got == content
        [message] = heard.messages("cache_not_used")
        assert "No space left" in message
        filler.unlink()
        for _ in range(2):  # another disk than that of the jobs: copied, not cloned
            assert run_job(lab, *COPY_AND_CHANGE, file_id=file_id)[0] == content
    assert traffic(lab) == (2, 1, 2 * len(content))


def test_no_cache_unless_it_was_asked_for(lab: Lab) -> None:
    file_id = lab.server.put_input("in.bin", b"content")
    for _ in range(2):
        run_job(lab, *COPY_AND_CHANGE, file_id=file_id, cache_size="0")
    assert traffic(lab) == (2, 0, 2 * len(b"content"))
    assert not (lab.base / "cache").exists()
