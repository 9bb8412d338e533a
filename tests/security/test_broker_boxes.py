"""The broker takes every container that the worker makes, and makes the same: `box` under many specs (T11, T33)."""

import json
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobfetcher.broker import boxes
from jobfetcher.broker.boxes import Machine, Policy
from jobfetcher.broker.talk import Refusal, strict_json
from jobfetcher.core.errors import JobFault
from jobfetcher.core.job import Job, JobId
from jobfetcher.core.machine import Gpu, Share
from jobfetcher.core.run import Image, RunSpec
from jobfetcher.engine import give_back, proof
from jobfetcher.engine.box import box
from jobfetcher.engine.flavour import DOCKER, Flavour, Limit
from jobfetcher.engine.run_spec import LABEL_INSTANCE, BoxPolicy, against_image, build_proof_spec, build_run_spec

pytestmark = pytest.mark.fault("T33")

INSTANCE, BASE, IMAGE = "abcd1234", "/srv/worker", f"sha256:{'1' * 64}"
GPUS = tuple(Gpu(f"GPU-{n}1111111-2222-3333-4444-555555555555", "any", 1000, "8.6") for n in range(4))

_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
_env_names = st.one_of(
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_.]{0,10}", fullmatch=True),
    st.sampled_from(
        ["NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "LD_PRELOAD", "LD_LIBRARY_PATH", "LD_X", "DOCKER_HOST"]
    ),
)
_values = st.one_of(_text, st.sampled_from(["all", "compute,utility", "/usr/lib:rel", "a=b", ""]))

policies = st.builds(
    BoxPolicy,
    cap_add=st.sampled_from([(), ("NET_RAW",), ("SYS_PTRACE", "NET_RAW")]),
    shm_mib=st.sampled_from([None, 0, 64, 4096]),
    pids_limit=st.integers(16, 10_000),
    network=st.sampled_from([None, "jobfetcher", "corp"]),
    runtime=st.sampled_from([None, "runsc"]),
    user=st.sampled_from([None, "1000:1000"]),
    read_only=st.booleans(),
    own_filter=st.booleans(),
    layer_mib=st.sampled_from([None, 1000]),
)
images = st.builds(
    Image,
    id=st.just(IMAGE),
    reference=st.just("any"),
    digest=st.none(),
    architecture=st.just("amd64"),
    volumes=st.lists(st.sampled_from(["/data", "/files/a", "/files/a/b c", "/files/é", "/var/x"]), unique=True).map(
        tuple
    ),
    own_init=st.sampled_from(["", "entry point", "command"]),
    labels=st.lists(_text.filter(bool), max_size=5, unique=True).map(tuple),
    env=st.lists(st.builds("{}={}".format, _env_names, _values), max_size=6).map(tuple),
)
shares = st.builds(
    Share,
    cpu_cores=st.one_of(st.floats(0.01, 64), st.sampled_from([0.1, 1.9, 2.0, 7.3])),
    memory_mib=st.integers(1, 100_000),
    gpus=st.lists(st.sampled_from(GPUS), max_size=3, unique=True).map(tuple),
)
jobs = st.builds(
    Job,
    id=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}", fullmatch=True).map(JobId),
    image=st.just("any"),
    command=st.lists(_text.filter(bool), max_size=3).map(tuple),
    env=st.dictionaries(_env_names, _values, max_size=6),
)
flavours = st.sampled_from(
    [
        DOCKER,
        Flavour(takes_filter=False, limits_layers=True),
        Flavour(missing=frozenset({Limit.CORES})),
        Flavour(missing=frozenset({Limit.MEMORY})),
    ]
)


def remade(
    name: str,
    sent: dict[str, Any],
    policy: BoxPolicy,
    flavour: Flavour,
    image: Image | None,
    network: str,
    own_image: Literal["", "proof", "helper"] = "",
) -> boxes.Made:
    """What the broker makes of what a worker sends as JSON."""
    body = strict_json(json.dumps(sent).encode())
    return boxes.make(
        name,
        body,
        boxes.read(body),
        policy=Policy(INSTANCE, BASE, policy),
        machine=Machine(64, 200_000, flavour),
        image=lambda: image or pytest.fail("no image is asked for"),
        own_image=own_image,
        client="1000:1000",
        network_mode=network,
    )


def job_spec(job: Job, share: Share, image: Image, policy: BoxPolicy, attempt: int = 1) -> RunSpec:
    return build_run_spec(
        job,
        share,
        image=image,
        files_host_path=f"{BASE}/jobs/{job.id}/files",
        attempt=attempt,
        instance=INSTANCE,
        policy=policy,
    )


@given(job=jobs, share=shares, image=images, policy=policies, flavour=flavours, attempt=st.integers(0, 1000))
def test_every_job_is_made_again_as_it_is(
    job: Job, share: Share, image: Image, policy: BoxPolicy, flavour: Flavour, attempt: int
) -> None:
    try:
        spec = job_spec(job, share, image, policy, attempt)
    except JobFault:
        return  # it is no container of the worker's either
    network = policy.network or "none"
    sent = box(spec, network, flavour)
    made = remade(spec.name, sent, policy, flavour, image, network)
    assert made.config == sent
    assert list(made.config["Labels"].items()) == list(sent["Labels"].items())
    assert ["/".join((BASE, *way)) for way in made.ways] == [one["Source"] for one in sent["HostConfig"]["Mounts"]]


@given(share=shares, policy=policies, flavour=flavours, init=st.booleans(), with_gpus=st.booleans())
def test_the_workers_own_box_is_made_again_as_it_is(
    share: Share, policy: BoxPolicy, flavour: Flavour, init: bool, with_gpus: bool
) -> None:
    spec = build_proof_spec(share, files_host_path=f"{BASE}/proof", policy=policy)
    name = f"jobfetcher-{INSTANCE}-proof-0123456789ab"
    command = ("/sbin/docker-init", "-h") if init else ("/files/proof-0123456789abcdef",)
    spec = replace(spec, name=name, labels={LABEL_INSTANCE: INSTANCE}, image_id=IMAGE, command=command)
    sent = box(spec if with_gpus else replace(spec, gpu_uuids=()), policy.network or "none", flavour)
    made = remade(name, sent, policy, flavour, None, policy.network or "none", "proof")
    assert (made.config, made.ways) == (sent, (("proof",),))


@given(share=shares, image=images, policy=policies)
def test_the_question_for_gpus_is_made_again_as_it_is(share: Share, image: Image, policy: BoxPolicy) -> None:
    """By the worker's own code for it, up to what it sends."""
    spec = build_proof_spec(share, files_host_path=f"{BASE}/proof", policy=policy)
    name = f"jobfetcher-{INSTANCE}-proof-0123456789ab"
    spec = against_image(replace(spec, name=name, labels={LABEL_INSTANCE: INSTANCE}, image_id=IMAGE), image)
    sent: list[dict[str, Any]] = []

    class Api:
        """Takes what is sent, and ends the matter there."""

        def calling(self, doing: str) -> Any:
            return __import__("contextlib").nullcontext()

        def create(self, config: dict[str, Any], name: str) -> str:
            sent.append(config)
            raise KeyboardInterrupt

    network = policy.network or "none"
    with pytest.raises(KeyboardInterrupt):
        proof._prove_gpus(Api(), spec, lambda spec: box(spec, network))  # type: ignore[arg-type]
    assert remade(name, sent[0], policy, DOCKER, image, network).config == sent[0]


@given(policy=policies, remapped=st.booleans(), way=st.sampled_from([("jobs", "7"), ("jobs", "7", "files")]))
def test_the_helper_is_made_again_as_it_is(policy: BoxPolicy, remapped: bool, way: tuple[str, ...]) -> None:
    name, flavour = f"jobfetcher-{INSTANCE}-own-0123456789ab", Flavour(remapped=remapped)

    def sent_for(owner: str, path: str) -> dict[str, Any]:
        spec = give_back.spec(policy, image_id=IMAGE, host_path=path, owner=owner, name=name)
        return give_back.config(replace(spec, labels={LABEL_INSTANCE: INSTANCE}), flavour)

    path = "/".join((BASE, *way))
    sent = sent_for("1000:1000", path)
    made = remade(name, sent, policy, flavour, None, "none", "helper")
    assert (made.config, made.ways) == (sent, (way,))
    for other in ("0:0", "1000:0", "1001:1000"):
        with pytest.raises(Refusal, match="Cmd"):
            remade(name, sent_for(other, path), policy, flavour, None, "none", "helper")
    for elsewhere in (BASE, f"{BASE}/jobs", f"{BASE}/jobs/", f"{BASE}/jobs/..", f"{BASE}/jobs/7/parts", "/", "/etc"):
        with pytest.raises(Refusal, match="the directory of one job"):
            remade(name, sent_for("1000:1000", elsewhere), policy, flavour, None, "none", "helper")
    with pytest.raises(Refusal, match="none of a job's"):  # on an image of a job
        remade(name, sent, policy, flavour, None, "none")


@given(share=shares, policy=policies, uuid=st.sampled_from([gpu.uuid for gpu in GPUS]))
def test_a_gpu_that_the_owner_keeps_is_not_given(share: Share, policy: BoxPolicy, uuid: str) -> None:
    share = replace(share, gpus=(Gpu(uuid, "", 0, ""),))
    job = Job(id=JobId("7"), image="any")
    image = Image(IMAGE, "any", None, "amd64")
    spec = job_spec(job, share, image, policy)
    body = strict_json(json.dumps(box(spec, "none")).encode())
    with pytest.raises(Refusal, match="is no GPU that may be given"):
        boxes.make(
            spec.name,
            body,
            boxes.read(body),
            policy=Policy(INSTANCE, BASE, policy, gpus=frozenset({"GPU-another"})),
            machine=Machine(64, 200_000, DOCKER),
            image=lambda: image,
            own_image="",
            client="1000:1000",
            network_mode="none",
        )
