"""Job specifications, valid and hostile: a job that the journal can keep, or one readable refusal (B15, B16)."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobfetcher.core.errors import JobfetcherError, SourceUnavailable
from jobfetcher.core.job import Job, parse_file_ref, parse_job_id, parse_job_path
from jobfetcher.core.text import clean
from jobfetcher.sources.worker_api.client import BODY_BYTES
from jobfetcher.sources.worker_api.reply import Reply
from jobfetcher.sources.worker_api.wire import parse_specs
from tests.fuzz.hostile import attempt, fuzz, texts, values

SEVEN = parse_job_id("7")

_plain = st.text("abcXYZ019_-. é", min_size=1, max_size=12)
_paths = st.lists(_plain.filter(lambda name: name not in {".", ".."}), min_size=1, max_size=4).map("/".join)
_numbers = st.none() | st.integers(0, 10**6) | st.floats(0, 10**6) | st.integers(0, 10**6).map(str)

valid_specs = st.fixed_dictionaries(
    {
        "app": st.fixed_dictionaries(
            {
                "cmd": st.none() | st.lists(_plain, max_size=4),
                "env": st.none() | st.dictionaries(_plain, _plain, max_size=4),
            }
        ),
        "handler": st.fixed_dictionaries(
            {
                "image_url": _plain,
                "entrypoint": values,
                "files_down": st.none() | st.dictionaries(_paths, _paths.map("s3://bucket/{}".format), max_size=1),
                "files_up": st.none() | st.dictionaries(st.sampled_from(["output", "log", "artifact"]), _paths),
            }
        ),
        "meta": st.dictionaries(_plain, values, max_size=3),
        "hardware": st.none()
        | st.fixed_dictionaries(
            {
                "cpu_cores": _numbers,
                "memory": _numbers,
                "gpu_mem": _numbers,
                "gpu_model": st.none() | _plain,
                "gpu_archi": st.none() | _plain,
            }
        ),
    }
)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in `value`, with each of its keys."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


@st.composite
def broken_specs(draw: st.DrawFn) -> Any:
    """A valid specification in which a few things are replaced, removed, renamed or added."""
    spec = {"root": draw(valid_specs)}
    for _ in range(draw(st.integers(1, 4))):
        holder, key = draw(st.sampled_from(list(_places(spec))))
        match draw(st.sampled_from(["replace", "remove", "rename", "add"])):
            case "remove" if holder is not spec:
                del holder[key]
            case "rename" if isinstance(holder, dict) and holder is not spec:
                holder[draw(texts)] = holder.pop(key)
            case "add" if isinstance(holder, dict):
                holder[draw(texts)] = draw(values)
            case _:
                holder[key] = draw(values)
    return spec["root"]


def read(raw: Any) -> Job | None:
    """The job, checked to be one that can be kept; or None after one harmless line that says why not."""
    try:
        job = parse_specs(SEVEN, raw)
    except ValueError as refused:
        said = str(refused)
        assert said
        assert said == clean(said, 400)
        return None
    text = job.model_dump_json()
    assert Job.model_validate_json(text) == job
    assert json.loads(text)["id"] == "7"
    for file in job.inputs:
        assert parse_job_path(file.path) == file.path
        assert parse_file_ref(file.ref) == file.ref
    for tree in job.outputs:
        assert parse_job_path(tree.path) == tree.path
    return job


@pytest.mark.fault("B16")
@fuzz(500)
@given(valid_specs)
def test_a_valid_specification_is_a_job(raw: Any) -> None:
    job = read(raw)
    assert job is not None
    assert job.image == raw["handler"]["image_url"]
    assert list(job.command or []) == (raw["app"]["cmd"] or [])
    assert job.env == (raw["app"]["env"] or {})
    assert {file.path: file.ref for file in job.inputs} == (raw["handler"]["files_down"] or {})
    assert {tree.kind.value: tree.path for tree in job.outputs} == (raw["handler"]["files_up"] or {})


@pytest.mark.fault("B16", "T1", "T2", "T9")
@fuzz(1_000)
@given(broken_specs())
def test_a_broken_specification_is_a_job_or_one_readable_line(raw: Any) -> None:
    read(raw)


def _overwritten(spec: Any, at: int, by: bytes) -> bytes:
    text = json.dumps(spec).encode()
    return text[:at] + by + text[at + len(by) :]


@pytest.mark.fault("B15", "B12")
@fuzz(1_000)
@given(
    st.binary(max_size=200)
    | values.map(lambda value: json.dumps(value).encode())
    | st.tuples(
        valid_specs.map(lambda spec: json.dumps(spec).encode()), st.integers(0, 500), st.binary(max_size=4)
    ).map(lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] + len(parts[2]) :])
)
def test_any_body_is_json_or_an_answer_that_nobody_can_use(body: bytes) -> None:
    raw = attempt(Reply(200, body, {}).json)
    if isinstance(raw, JobfetcherError):
        assert isinstance(raw, SourceUnavailable)
        assert str(raw) == clean(str(raw))
        return
    json.dumps(raw, allow_nan=False)  # what is read can be written again
    read(raw)


def _filled(head: str, unit: str, tail: str, count: int = BODY_BYTES) -> bytes:
    """`unit` again and again, comma-separated, at most `count` times and in the largest body that is read."""
    room = BODY_BYTES - len(head) - len(tail)
    count = min(count, room // (len(unit) + 1))
    return (head + ",".join(unit.replace("N", str(number)) for number in range(count))[:room] + tail).encode()


_COMMAND = ('{"7":{"handler":{"image_url":"b"},"app":{"cmd":[', "]}}}")
_FILES = ('{"7":{"handler":{"image_url":"b","files_down":{', "}}}}")


#: Made only when they are used: together they are 40 MiB.
BODIES: dict[str, Callable[[], bytes]] = {
    "lists": lambda: _filled(_COMMAND[0], "[]", _COMMAND[1]),
    "some lists": lambda: _filled(_COMMAND[0], "[]", _COMMAND[1], 24_000),
    "words": lambda: _filled(_COMMAND[0], '""', _COMMAND[1]),
    "one word": lambda: _filled(_COMMAND[0], '"' + "x" * 4_000_000 + '"', _COMMAND[1], 1),
    "files": lambda: _filled(_FILES[0], '"aN":"b"', _FILES[1]),
    "bad files": lambda: _filled(_FILES[0], '"aN":1', _FILES[1], 49_000),
    "meta": lambda: _filled('{"7":{"meta":{', '"aN":1', "}}}"),
    "deep lists": lambda: b"[" * BODY_BYTES,
    "deep objects": lambda: b'{"a":' * (BODY_BYTES // 5),
    "a number": lambda: b"9" * BODY_BYTES,
}


@pytest.mark.fault("B15")
@pytest.mark.parametrize("name", BODIES)
def test_the_largest_bodies_cost_little_memory_and_time(name: str) -> None:
    """A few MiB of JSON can be a thousand MiB of objects and errors, if they are all made."""
    body = BODIES[name]()
    assert len(body) <= BODY_BYTES
    tracemalloc.start()
    began = time.process_time()
    try:
        raw = attempt(Reply(200, body, {}).json)
        if not isinstance(raw, JobfetcherError):
            read(raw["7"])
        took, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50 * 2**20
    assert took < 10
