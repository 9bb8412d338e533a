"""Jobs from queue to end on the real engine: what goes in, what comes out, how each end is told."""

import hashlib
import json
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import docker
import pytest

from tests.support.mounts import needs_root, tmpfs
from tests.support.services import wait_until
from tests.support.worker import DEADLINE_S, UNTIL_LET_GO, Lab, running_worker, work

pytestmark = pytest.mark.docker

ALL_STATES = ["preprocessing", "running", "postprocessing"]
OWN_LOGS = {"log/jobfetcher/container.log", "log/jobfetcher/provenance.json"}

INPUTS = {
    "data/raw/day 1/cell.pgm": bytes(range(256)) * 700,
    "data/Größe-µ-細胞.txt": "ünïcode\n".encode(),
    "empty": b"",
}

#: By kind and path below the job directory.
OUTPUTS = {
    "output": {"out/a/b/deep.bin": b"deep", "out/0": b"", "out/two words.txt": b"2", "out/-dash": b"-"},
    "log": {"logs/it's quoted.log": b"q", "logs/100%25 & ?#.log": b"p"},
    "artifact": {"model/Größe-細胞.pt": b"u", "model/a+b=c;d.pt": b"s"},
}


def digest_of(content: bytes, like: str) -> str:
    """The digest of `content`, named and made as `like` is."""
    name = like.partition(":")[0]
    return f"{name}:{hashlib.new(name, content, usedforsecurity=False).hexdigest()}"


def shell(path: str) -> str:
    """The path as one word of the shell."""
    return "'" + path.replace("'", "'\\''") + "'"


@pytest.mark.parametrize(
    "lab",
    [
        {"file_mode": "signed", "upload_method": "post"},
        {"file_mode": "signed", "upload_method": "put"},
        {"file_mode": "local", "upload_method": "post"},
        {"file_mode": "local", "upload_method": "put"},
        {"nested_headers": True, "conflict_500": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
    indirect=True,
)
@pytest.mark.fault("C15")
def test_files_go_in_and_all_kinds_come_out(lab: Lab) -> None:
    made = {path: content for tree in OUTPUTS.values() for path, content in tree.items()}
    job = lab.submit(
        "mkdir -p /files/out/a/b &&",
        *(f"printf %s {shell(content.decode())} > {shell(f'/files/{path}')} &&" for path, content in made.items()),
        "cp -r /files/data /files/empty /files/out/",
        files_down={path: lab.server.put_input(path, content) for path, content in INPUTS.items()},
        files_up={"output": "out", "log": "logs/", "artifact": "model"},
    )
    work(lab.settings())
    assert lab.ended(job) == ("finished", "")
    assert lab.server.updates(job) == [*ALL_STATES, "finished"]
    wanted = {f"{kind}/{path}": content for kind, tree in OUTPUTS.items() for path, content in tree.items()}
    wanted |= {f"output/out/{path}": content for path, content in INPUTS.items()}
    stored = lab.server.results(job)
    assert {name: stored[name] for name in stored.keys() - OWN_LOGS} == wanted
    assert stored.keys() >= OWN_LOGS


@pytest.mark.parametrize(
    "lab",
    [{"upload_method": "post"}, {"upload_method": "put"}, {"file_mode": "local"}],
    ids=lambda settings: "-".join(settings.values()),
    indirect=True,
)
@pytest.mark.fault("C15")
def test_a_name_with_a_double_quote_is_kept(lab: Lab) -> None:
    names = {'out/say "hi".txt', "out/say %22hi%22.txt", "out/back\\slash"}
    job = lab.submit(
        *(f"printf %s {shell(name)} > {shell(f'/files/{name}')};" for name in names), files_up={"output": "out"}
    )
    work(lab.settings())
    assert lab.ended(job) == ("finished", "")
    stored = lab.server.results(job)
    assert {name: stored[name] for name in stored.keys() - OWN_LOGS} == {
        f"output/{name}": name.encode() for name in names
    }


def test_fragments_are_joined_and_env_is_given(lab: Lab) -> None:
    job = lab.submit(
        "mkdir -p /files/out/new &&",
        "cat $(find /files/data -name '*.txt' | head -n 1) > /files/out/x;",
        'printf "%s|" "$GREETING" "$SPACED" "$EMPTY-" > /files/out/env',
        env={"GREETING": "hello $HOME", "SPACED": "a  b\nc", "EMPTY": ""},
        files_down={"data/in/1.txt": lab.server.put_input("1.txt", b"found")},
        files_up={"output": "out"},
    )
    work(lab.settings())
    assert lab.ended(job)[0] == "finished"
    stored = lab.server.results(job)
    assert stored["output/out/x"] == b"found"
    assert stored["output/out/env"] == b"hello $HOME|a  b\nc|-|"


def test_an_output_of_a_dot_is_everything_the_job_has(lab: Lab) -> None:
    job = lab.submit(
        "mkdir /files/sub && echo made > /files/sub/b && echo top > /files/c",
        files_down={"in/a": lab.server.put_input("a", b"brought")},
        files_up={"output": "."},
    )
    work(lab.settings())
    assert lab.ended(job) == ("finished", "")
    results = lab.server.results(job)
    outputs = {name: body for name, body in results.items() if name.startswith("output/")}
    assert outputs == {"output/in/a": b"brought", "output/sub/b": b"made\n", "output/c": b"top\n"}
    record = json.loads(results["log/jobfetcher/provenance.json"])
    assert record["labels"] == {"entrypoint": "fit", "image_name": "decode", "image_version": "latest"}


@pytest.fixture
def image_with_entrypoint(lab: Lab, engine: docker.APIClient) -> str:
    """busybox with an entry point, a command, a variable and a working directory of its own. Untagged with the lab."""
    changes = [
        'ENTRYPOINT ["/bin/sh", "-c", "echo entry $0 $MINE in $PWD > /files/out/said"]',
        'CMD ["own command"]',
        "ENV MINE=baked",
        "WORKDIR /var",
    ]
    container = engine.create_container(lab.image)
    repository = f"jobfetcher-test/entrypoint-{container['Id'][:12]}"  # another run beside this one makes one, too
    engine.commit(container["Id"], repository=repository, tag="1", changes="\n".join(changes))
    engine.remove_container(container["Id"])
    return f"{repository}:1"


def test_entry_point_command_and_working_directory(
    lab: Lab, engine: docker.APIClient, image_with_entrypoint: str
) -> None:
    up = {"output": "out"}
    own, with_command = b"entry own command baked in /var\n", b"entry /bin/sh baked in /var\n"
    jobs = {
        lab.submit(image=image_with_entrypoint, files_up=up): own,
        lab.submit("replaced", image=image_with_entrypoint, files_up=up): with_command,
        lab.submit("x", image=image_with_entrypoint, entrypoint=None, files_up=up): with_command,
        lab.submit("x", image=image_with_entrypoint, entrypoint="", files_up=up): with_command,
        lab.submit("x", image=image_with_entrypoint, entrypoint="env MINE=set", files_up=up): with_command,
    }
    try:
        work(lab.settings(), jobs=len(jobs))
    finally:
        engine.remove_image(image_with_entrypoint)
    for job, said in jobs.items():
        assert lab.ended(job) == ("finished", "")
        assert lab.server.results(job)["output/out/said"] == said


@pytest.mark.fault("T17")
def test_a_failure_quotes_the_last_lines_and_keeps_the_outputs(lab: Lab) -> None:
    job = lab.submit(
        "exec >&2; echo partial > /files/out/partial; echo first line;",
        r"printf 'reading <b>cell.pgm</b>\n\033[31mno such & layer\033[0m\n';",
        "exit 3",
        files_up={"output": "out"},
    )
    work(lab.settings())
    state, details = lab.ended(job)
    assert state == "error"
    said = r"first line | reading (b)cell.pgm(/b) | \x1b[31mno such + layer\x1b[0m"
    assert details == f"exit code 3; it last printed: {said}"
    assert lab.server.updates(job) == [*ALL_STATES, "error"]
    stored = lab.server.results(job)
    assert stored.keys() == {"output/out/partial", *OWN_LOGS}
    assert stored["output/out/partial"] == b"partial\n"
    printed = b"first line\nreading <b>cell.pgm</b>\n\x1b[31mno such & layer\x1b[0m\n"
    assert stored["log/jobfetcher/container.log"] == printed


def test_a_success_that_printed_nothing_has_its_logs_too(lab: Lab) -> None:
    job = lab.submit("true")
    work(lab.settings())
    assert lab.ended(job) == ("finished", "")
    stored = lab.server.results(job)
    assert stored.keys() == OWN_LOGS
    assert stored["log/jobfetcher/container.log"] == b""


def test_provenance_says_how_the_job_was_run(lab: Lab, engine: docker.APIClient) -> None:
    content = b"pixels" * 1000
    file_id = lab.server.put_input("cell.pgm", content)
    job = lab.submit(
        "wc -c /files/data/cell.pgm && exit 4",
        env={"SETTING": "value-of-a-variable"},
        files_down={"data/cell.pgm": file_id},
        hardware={"cpu_cores": 1, "memory": 64},
    )
    work(lab.settings())
    text = lab.server.results(job)["log/jobfetcher/provenance.json"].decode()
    record = json.loads(text)
    assert record["job"] == str(job)
    assert record["image"]["id"] == engine.images(lab.image)[0]["Id"]
    assert record["image"]["reference"].endswith(lab.image)
    assert record["command"] == ["/bin/sh", "-c", "wc -c /files/data/cell.pgm && exit 4"]
    (listed,) = record["inputs"]
    assert (listed["path"], listed["source"], listed["size"]) == ("data/cell.pgm", file_id, len(content))
    assert listed["digest"] == digest_of(content, like=listed["digest"])
    limits = record["limits"]
    assert (limits["cpu_cores"], limits["memory_mib"], limits["network"]) == (1, 64, "none")
    assert record["gpus"] == []
    assert (record["exit"]["class"], record["exit"]["code"]) == ("failure", 4)
    began, ended = (datetime.fromisoformat(record["exit"][name]) for name in ("started_at", "finished_at"))
    # Two programs of the engine write them: for a short run the end may be noted as before the beginning.
    assert abs((ended - began).total_seconds()) < 60
    assert record["seconds"].keys() >= {"stage_in", "prepare", "run"}
    assert "SETTING" in record["environment"]
    for secret in ("value-of-a-variable", "mock-token", "signature=", str(lab.base)):
        assert secret not in text


def test_a_running_job_beats_regularly(lab: Lab) -> None:
    job = lab.submit(UNTIL_LET_GO)
    with running_worker(lab.settings(timeout_status="0.2"), lambda taken, idle_s: taken == 1) as running:
        lab.server.wait_for_state(job, "running")
        running.heard.wait_for("run")

        def beats() -> list[float]:
            events = lab.server.events("update", job)
            return [event["time"] for event in events if event["state"] == "running"]

        wait_until(lambda: len(beats()) >= 8, "some keep-alives", DEADLINE_S)
        assert running.heard.all("heartbeat_failed") == []
        lab.let_go(job)
        running.join()
    said = beats()
    gaps = sorted(later - earlier for earlier, later in pairwise(said))
    # 0.2 s with a tenth of jitter either way; the middle one, since a busy machine may stretch a few
    assert 0.15 < gaps[len(gaps) // 2] < 1.0
    assert all(not event["details"] for event in lab.server.events("update", job))  # S11: beats say nothing
    assert lab.ended(job)[0] == "finished"


def test_the_end_is_noticed_long_before_the_next_heartbeat(lab: Lab) -> None:
    job = lab.submit("sleep 0.3")
    work(lab.settings(timeout_status="30"))
    times = {event["state"]: event["time"] for event in lab.server.events("update", job)}
    assert list(times) == [*ALL_STATES, "finished"]
    assert times["finished"] - times["running"] < 5  # the interval of heartbeats is 30 s


@needs_root
def test_a_base_behind_a_link_on_a_disk_without_exec_works_and_says_so(lab: Lab, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "64m", "noexec") as disk:
        (disk / "base").mkdir(mode=0o700)
        linked = replace(lab, base=tmp_path / "link")
        linked.base.symlink_to(disk / "base")
        job = linked.submit("echo linked > /files/out/said", files_up={"output": "out"})
        heard = work(linked.settings(cache_size="0"))  # the disk is too small for the cache of some runs (TESTS_WITH)
        assert linked.ended(job) == ("finished", "")
        assert linked.server.results(job)["output/out/said"] == b"linked\n"
        [told] = heard.messages("noexec")
        assert f"{disk}/base is on a disk that is mounted noexec" in told


@pytest.mark.fault("E9")
def test_a_crash_is_told_with_its_signal(lab: Lab) -> None:
    job = lab.submit("sh -c 'kill -SEGV $$'")
    work(lab.settings())
    state, details = lab.ended(job)
    assert state == "error"
    assert details.startswith("exit code 139 (SIGSEGV)")
