"""A worker with JOB_SIGNING_KEYS runs what was signed, as it was signed, under the id it was signed for (T15)."""

from __future__ import annotations

import base64
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from jobfetcher.core.errors import ConfigError
from jobfetcher.core.job import parse_job_id
from jobfetcher.core.text import clean
from jobfetcher.sources.worker_api.signing import Keys, read_keys, sign, verify
from jobfetcher.sources.worker_api.wire import parse_specs
from tests.fuzz.hostile import fuzz, values
from tests.support.worker import Lab, work

SEVEN, EIGHT = parse_job_id("7"), parse_job_id("8")
OURS, THEIRS = bytes(range(32)), bytes(range(32, 64))

Specs = dict[str, Any]


def public(private: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


KEYS: Keys = {"lab": public(OURS), "old": public(bytes(32))}


def specs() -> Specs:
    return {
        "app": {"cmd": ["prog --in", "/files/in/a"], "env": {"A": "b", "Ü": "ä"}},
        "handler": {
            "image_url": "registry.example/decode@sha256:" + "0" * 64,
            "image_name": "decode",
            "entrypoint": "fit",
            "files_down": {"in/a": "s3://bucket/a", "in/b": "s3://bucket/b"},
            "files_up": {"output": "out", "log": "log"},
        },
        "hardware": {"memory": 1024, "cpu_cores": None},
        "meta": {"job_id": 7, "date_created": "2024-01-01"},
    }


def signed(job: str = "7", private: bytes = OURS, key: str = "lab") -> Specs:
    made = specs()
    made["meta"]["signature"] = sign(private, key, parse_job_id(job), made)
    return made


@pytest.mark.fault("T15")
def test_a_signed_job_is_taken_and_only_under_its_own_id() -> None:
    verify(KEYS, SEVEN, signed())
    verify(KEYS, SEVEN, signed(private=bytes(32), key="old"))
    with pytest.raises(ValueError, match="belongs to another job"):
        verify(KEYS, EIGHT, signed())


@pytest.mark.fault("T15")
def test_the_signed_bytes_are_what_the_docstring_says() -> None:
    """Written out by hand here, because servers in other languages have to make the same bytes."""
    text = (
        '{"cmd":["prog --in","/files/in/a"],"env":{"A":"b","Ü":"ä"},'
        '"files_down":{"in/a":"s3://bucket/a","in/b":"s3://bucket/b"},"files_up":{"log":"log","output":"out"},'
        f'"image":"registry.example/decode@sha256:{"0" * 64}","job_id":"7"}}'
    )
    value = base64.b64encode(Ed25519PrivateKey.from_private_bytes(OURS).sign(text.encode())).decode()
    assert sign(OURS, "lab", SEVEN, specs()) == {"key": "lab", "value": value}
    bare = '{"cmd":null,"env":null,"files_down":null,"files_up":null,"image":"b","job_id":"7"}'
    value = base64.b64encode(Ed25519PrivateKey.from_private_bytes(OURS).sign(bare.encode())).decode()
    verify(
        KEYS, SEVEN, {"app": None, "handler": {"image_url": "b"}, "meta": {"signature": {"key": "lab", "value": value}}}
    )


def test_what_a_server_adds_or_says_otherwise_does_not_matter() -> None:
    made = signed()
    made["meta"]["date_created"] = "2030-01-01"
    made["hardware"] = None
    made["handler"] |= {"entrypoint": "train", "image_name": "another"}  # labels: nothing of them runs
    made["more"] = {"new": [1]}
    made["handler"] = dict(reversed(made["handler"].items()))
    verify(KEYS, SEVEN, json.loads(json.dumps(made)))


CHANGES: dict[str, Callable[[Specs], object]] = {
    "image": lambda made: made["handler"].update(image_url="registry.example/evil"),
    "tag instead of digest": lambda made: made["handler"].update(image_url="registry.example/decode"),
    "command": lambda made: made["app"]["cmd"].append("; rm -rf /"),
    "command joined": lambda made: made["app"].update(cmd=[" ".join(made["app"]["cmd"])]),
    "no command": lambda made: made["app"].update(cmd=None),
    "command removed": lambda made: made["app"].pop("cmd"),
    "no app": lambda made: made.update(app=None),
    "variable added": lambda made: made["app"]["env"].update(LD_PRELOAD="/files/in/a"),
    "variable changed": lambda made: made["app"]["env"].update(A="c"),
    "no variables": lambda made: made["app"].update(env={}),
    "another input": lambda made: made["handler"]["files_down"].update({"in/a": "s3://bucket/evil"}),
    "inputs swapped": lambda made: made["handler"].update(
        files_down={"in/a": "s3://bucket/b", "in/b": "s3://bucket/a"}
    ),
    "input added": lambda made: made["handler"]["files_down"].update({"in/c": "s3://bucket/c"}),
    "input renamed": lambda made: made["handler"]["files_down"].update(x=made["handler"]["files_down"].pop("in/a")),
    "another output": lambda made: made["handler"]["files_up"].update(output="in"),
    "output removed": lambda made: made["handler"].update(files_up=None),
}


@pytest.mark.fault("T15")
@pytest.mark.parametrize("change", CHANGES)
def test_a_job_that_was_changed_after_signing_is_refused(change: str) -> None:
    made = signed()
    before = parse_specs(SEVEN, copy.deepcopy(made))
    CHANGES[change](made)
    assert parse_specs(SEVEN, copy.deepcopy(made)) != before  # it would run something else
    with pytest.raises(ValueError, match="it was changed"):
        verify(KEYS, SEVEN, made)


def _no_signature(made: Specs) -> None:
    del made["meta"]["signature"]


def _rewrite(made: Specs, change: Callable[[str], str]) -> None:
    made["meta"]["signature"]["value"] = change(made["meta"]["signature"]["value"])


SIGNATURES: dict[str, tuple[Callable[[Specs], object], str]] = {
    "none": (_no_signature, "not signed"),
    "null": (lambda made: made["meta"].update(signature=None), "not signed"),
    "no meta": (lambda made: made.update(meta=None), "not signed"),
    "meta a list": (lambda made: made.update(meta=[made["meta"]]), "not signed"),
    "a string": (lambda made: made["meta"].update(signature="trust me"), "not signed"),
    "no value": (lambda made: made["meta"]["signature"].pop("value"), "not signed"),
    "value a number": (lambda made: made["meta"]["signature"].update(value=1), "not signed"),
    "value a list": (lambda made: made["meta"]["signature"].update(value=["x"]), "not signed"),
    "no key": (lambda made: made["meta"]["signature"].pop("key"), "not signed"),
    "key a list": (lambda made: made["meta"]["signature"].update(key=["lab"]), "not signed"),
    "unknown key": (lambda made: made["meta"]["signature"].update(key="evil\r\n"), "does not know"),
    "another known key": (lambda made: made["meta"]["signature"].update(key="old"), "was changed"),
    "empty": (lambda made: made["meta"]["signature"].update(value=""), "was changed"),
    "zeros": (lambda made: made["meta"]["signature"].update(value="A" * 86 + "=="), "was changed"),
    "no base64": (lambda made: made["meta"]["signature"].update(value="ä" * 88), "was changed"),
    "too long": (lambda made: made["meta"]["signature"].update(value="A" * 10**7), "was changed"),
    "cut": (
        lambda made: made["meta"]["signature"].update(value=made["meta"]["signature"]["value"][:-4]),
        "was changed",
    ),
    "followed by more": (
        lambda made: made["meta"]["signature"].update(value=made["meta"]["signature"]["value"] + "AAAA"),
        "was changed",
    ),
    "by somebody else": (lambda made: made["meta"].update(signature=sign(THEIRS, "lab", SEVEN, made)), "was changed"),
    "elsewhere": (lambda made: made.update(signature=made["meta"].pop("signature")), "not signed"),
}


@pytest.mark.fault("T15", "T22")
@pytest.mark.parametrize("case", SIGNATURES)
def test_a_job_without_a_good_signature_is_refused(case: str) -> None:
    made = signed()
    change, said = SIGNATURES[case]
    change(made)
    with pytest.raises(ValueError, match=said) as refused:
        verify(KEYS, SEVEN, made)
    assert str(refused.value) == clean(str(refused.value), 300)


@pytest.mark.fault("T15")
@fuzz(200)
@given(values | st.fixed_dictionaries({"meta": values, "handler": values, "app": values}), values)
def test_nothing_made_up_is_taken(raw: Any, value: Any) -> None:
    for made in (raw, {**signed(), "handler": value}, {**signed(), "app": value}):
        with pytest.raises(ValueError, match="sign"):
            verify(KEYS, SEVEN, made)


@pytest.mark.fault("T15")
def test_a_job_too_deep_to_be_written_is_refused() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    made = signed()
    made["app"]["cmd"] = deep
    with pytest.raises(ValueError, match="was changed"):
        verify(KEYS, SEVEN, made)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "keys"
    path.write_text(text)
    return path


@pytest.mark.fault("T15")
def test_keys_are_read_from_a_file(tmp_path: Path) -> None:
    lines = [f"{name} {base64.b64encode(key).decode()}" for name, key in KEYS.items()]
    assert read_keys(write(tmp_path, "# our keys\n\n" + "\n".join(lines) + "\n")) == KEYS


@pytest.mark.fault("T15")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no key in"),
        ("# only words\n\n", "no key in"),
        ("lab\n", "line 1"),
        ("# x\nlab AAAA\n", "line 2"),
        ("lab not-base64\n", "line 1"),
        (f"lab {'A' * 43}= more\n", "line 1"),
        ("lab " + "A" * 86 + "==\n", "line 1"),
    ],
)
def test_a_file_that_is_no_list_of_keys_stops_the_worker(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_keys(write(tmp_path, text))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "not-there")


def test_the_library_is_imported_only_where_it_is_needed() -> None:
    check = "import sys, jobfetcher.sources.worker_api.signing; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.fault("T15")
def test_without_the_library_a_worker_with_keys_does_not_start(tmp_path: Path) -> None:
    path = write(tmp_path, f"lab {base64.b64encode(KEYS['lab']).decode()}\n")
    check = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from pathlib import Path\n"
        "from jobfetcher.core.errors import ConfigError\n"
        "from jobfetcher.sources.worker_api.signing import read_keys\n"
        "try: read_keys(Path(sys.argv[1]))\n"
        "except ConfigError as error: sys.exit(f'refused: {error}')\n"
    )
    said = subprocess.run([sys.executable, "-c", check, str(path)], capture_output=True, text=True, check=False).stderr
    assert "refused: JOB_SIGNING_KEYS needs the extra `signing`" in said
    # what is asked for is in the lock file by its hash, and no registry is asked for our name
    assert said.rstrip().endswith(" type: pip install --require-hashes --only-binary :all: -r requirements/worker.txt")


# -- through a whole worker -------------------------------------------------------------------------------------------


@pytest.mark.docker
@pytest.mark.fault("T15")
def test_a_worker_with_keys_runs_signed_jobs_and_no_others(lab: Lab, tmp_path: Path) -> None:
    def submit(change: Callable[[Specs], object], signed_for: int | None) -> int:
        """A job of the command below, signed for that id, then changed."""
        made: Specs = {
            "app": {"cmd": ["echo ran > /files/out/ran"], "env": None},
            "handler": {"image_url": lab.image, "files_up": {"output": "out"}},
            "meta": {},
        }
        if signed_for is not None:
            made["meta"]["signature"] = sign(OURS, "lab", parse_job_id(str(signed_for)), made)
        change(made)
        return lab.server.submit(made)

    def nothing(_: Specs) -> None:
        """It stays as it was signed."""

    first = submit(nothing, None)  # ids are handed out one after the other
    good = submit(nothing, first + 1)
    replayed = submit(nothing, first + 1)
    changed = submit(lambda made: made["app"].update(cmd=["echo evil > /files/out/ran"]), first + 3)
    assert [good, replayed, changed] == [first + 1, first + 2, first + 3]
    keys = write(tmp_path, f"lab {base64.b64encode(KEYS['lab']).decode()}\n")
    heard = work(lab.settings(job_signing_keys=str(keys)), jobs=4)
    assert [lab.server.state(job) for job in (first, good, replayed, changed)] == [
        "error",
        "finished",
        "error",
        "error",
    ]
    assert lab.server.results(good)["output/out/ran"] == b"ran\n"
    assert "not signed" in lab.ended(first)[1]
    assert [job for job in (first, replayed, changed) if lab.server.results(job)] == []
    assert "belongs to another job" in lab.ended(replayed)[1]
    assert "it was changed" in lab.ended(changed)[1]
    assert len(heard.all("run")) == 1  # one container in all


@pytest.mark.docker
@pytest.mark.fault("T15")
def test_a_worker_whose_keys_cannot_be_read_does_not_start(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no key in"):
        work(lab.settings(job_signing_keys=str(write(tmp_path, "# none yet\n"))))
    assert lab.server.events("poll") == []
