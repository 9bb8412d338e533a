"""wire: the server's job JSON, as odd as servers send it, becomes a Job or one readable refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobfetcher.core.job import Job, parse_job_id
from jobfetcher.core.phases import Phase
from jobfetcher.core.text import clean
from jobfetcher.sources.worker_api.wire import STATUS_OF_PHASE, parse_specs

SEVEN = parse_job_id("7")


def spec(**sections: Any) -> dict[str, Any]:
    return {"handler": {"image_url": "busybox"}} | sections


def parse(raw: Any) -> Job:
    return parse_specs(SEVEN, raw)


def test_a_full_spec_is_read() -> None:
    job = parse(
        {
            "app": {"cmd": ["mkdir -p /files/out &&", "prog"], "env": {"A": "b"}},
            "handler": {
                "image_url": "busybox",
                "image_name": "n",
                "image_version": "v",
                "entrypoint": "fit",
                "files_down": {"data/a.tif": "s3://b/a.tif"},
                "files_up": {"output": "out/", "log": "logs", "artifact": "out"},
            },
            "meta": {"job_id": 12, "date_created": "2024-01-01", "more": {"a": [1]}},
            "hardware": {"cpu_cores": 2, "memory": 1024, "gpu_model": "RTX", "gpu_archi": "8.6", "gpu_mem": 4000},
        }
    )
    assert (job.id, job.image, job.command) == ("7", "busybox", ("mkdir -p /files/out &&", "prog"))
    assert job.labels == {"entrypoint": "fit", "image_name": "n", "image_version": "v"}
    assert job.user_job_id == "12"
    assert [(file.path, file.ref) for file in job.inputs] == [("data/a.tif", "s3://b/a.tif")]
    assert [(str(tree.kind), tree.path) for tree in job.outputs] == [
        ("output", "out"),
        ("log", "logs"),
        ("artifact", "out"),
    ]
    assert (job.needs.cpu_cores, job.needs.memory_mib, job.needs.gpu_mem_mib) == (2, 1024, 4000)


@pytest.mark.parametrize(
    "raw",
    [
        spec(),
        spec(app=None, hardware=None, meta=None),
        spec(app={}, hardware={}),
        spec(app={"cmd": None, "env": None}),
        spec(app={"cmd": [], "env": {}}),
        spec(handler={"image_url": "busybox", "files_down": None, "files_up": None, "entrypoint": None}),
        spec(hardware=dict.fromkeys(["cpu_cores", "memory", "gpu_model", "gpu_archi", "gpu_mem"])),
        spec(hardware={"cpu_cores": 0, "memory": 0, "gpu_model": "", "gpu_archi": ""}),
        spec(something={"new": 1}),
    ],
)
@pytest.mark.fault("B16")
def test_nulls_and_absences_and_unknown_fields_mean_nothing(raw: Any) -> None:
    assert parse(raw) == Job(id=SEVEN, image="busybox")


@pytest.mark.fault("B16")
def test_numbers_may_come_as_text_and_text_as_numbers() -> None:
    needs = parse(spec(hardware={"cpu_cores": "2", "memory": "1024.4", "gpu_mem": "0", "gpu_archi": 8.6})).needs
    assert (needs.cpu_cores, needs.memory_mib, needs.gpu_mem_mib, needs.gpu_archi) == (2, 1024, 0, "8.6")
    assert needs.gpu is True
    assert parse(spec(hardware={"gpu_mem": 0})).needs.gpu is False


@pytest.mark.parametrize("label", ["fit", "", "/bin/sh -c", "sh -c 'an open quote", "a\0b\x1b", 7, ["fit"], {}, None])
def test_a_label_decides_nothing_whatever_it_is(label: object) -> None:
    job = parse(spec(handler={"image_url": "busybox", "entrypoint": label, "image_name": label}))
    assert job.model_copy(update={"labels": {}}) == Job(id=SEVEN, image="busybox")
    assert all("\0" not in text and "\x1b" not in text for text in job.labels.values())


@pytest.mark.fault("S22")
@pytest.mark.parametrize(
    ("meta", "known_as"),
    [
        ({"job_id": 12}, "12"),
        ({"job_id": "run 5\n"}, "run 5\\x0a"),
        ({"job_id": 10**100}, "1" + "0" * 78 + "…"),
        ({"job_id": None}, None),
        ({"job_id": True}, None),
        ({"job_id": ""}, None),
        ({"job_id": [1]}, None),
        ({}, None),
        (None, None),
        ("12", None),
    ],
)
def test_what_the_user_calls_the_job_is_known_where_it_is_said(meta: object, known_as: str | None) -> None:
    assert parse(spec(meta=meta)).user_job_id == known_as


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.fault("B16")
@pytest.mark.parametrize(
    ("raw", "where"),
    [
        (None, "job"),
        ("busybox", "job"),
        ([], "job"),
        ({}, "handler"),
        ({"handler": None}, "handler"),
        ({"handler": {}}, "handler.image_url"),
        ({"handler": {"image_url": None}}, "handler.image_url"),
        ({"handler": {"image_url": 7}}, "handler.image_url"),
        ({"handler": {"image_url": ""}}, "image"),
        (spec(app={"cmd": "prog --in x"}), "app.cmd"),
        (spec(app={"cmd": [1]}), "app.cmd.0"),
        (spec(app={"env": {"A": None}}), "app.env.A"),
        (spec(app={"env": ["A=b"]}), "app.env"),
        (spec(app={"cmd": nested(200)}), "app.cmd.0"),
        (spec(hardware={"memory": "lots"}), "hardware.memory"),
        (spec(hardware={"memory": -1}), "hardware.memory"),
        (spec(hardware={"cpu_cores": "inf"}), "hardware.cpu_cores"),
        (spec(hardware={"gpu_mem": [1]}), "hardware.gpu_mem"),
        (spec(hardware={"gpu_model": "\ud800"}), "needs.gpu_model"),
        (spec(handler={"image_url": "b", "files_down": {"../x": "s3://b/k"}}), "inputs.0.path"),
        (spec(handler={"image_url": "b", "files_down": {"x": ""}}), "inputs.0.ref"),
        (spec(handler={"image_url": "b", "files_down": {"x": 5}}), "handler.files_down.x"),
        (spec(handler={"image_url": "b", "files_up": {"output": "/etc"}}), "outputs.0.path"),
        (spec(handler={"image_url": "b", "files_up": {"other": "x"}}), "outputs.0.kind"),
        (spec(app={"cmd": ["a\0b"]}), "command.0"),
        (spec(app={"cmd": ["\ud800"]}), "command.0"),
        (spec(app={"env": {"A=B": "c"}}), "env.A=B"),
    ],
)
def test_what_cannot_be_run_is_one_line_that_names_the_field(raw: Any, where: str) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        parse(raw)
    text = str(refused.value)
    assert text.startswith(f"{where}")
    assert text.isprintable()
    assert len(text) <= 400


def test_every_phase_has_a_word() -> None:
    assert set(STATUS_OF_PHASE) == set(Phase)
    assert set(STATUS_OF_PHASE.values()) == {"preprocessing", "running", "postprocessing"}


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_maybe = st.none() | _json


@pytest.mark.fault("B16")
@settings(max_examples=300)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "app": _maybe | st.fixed_dictionaries({}, optional={"cmd": _maybe, "env": _maybe}),
            "handler": _maybe
            | st.fixed_dictionaries(
                {"image_url": _maybe | st.just("busybox")},
                optional={"entrypoint": _maybe, "files_down": _maybe, "files_up": _maybe},
            ),
            "hardware": _maybe
            | st.fixed_dictionaries(
                {}, optional=dict.fromkeys(["cpu_cores", "memory", "gpu_model", "gpu_archi", "gpu_mem"], _maybe)
            ),
            "meta": _maybe,
        },
    )
    | _json
)
def test_anything_at_all_is_a_job_that_can_be_journaled_or_a_refusal(raw: Any) -> None:
    try:
        job = parse(raw)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
    assert refusal == clean(refusal, 400)
    if refusal:
        return
    assert Job.model_validate_json(job.model_dump_json()) == job
    json.loads(job.model_dump_json())
