"""The composition root: settings in, a worker out. The only room that names concrete classes.

Everything is opened in the order in which it is needed and closed in the reverse one, whatever goes wrong.
"""

from __future__ import annotations

import hashlib
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from pydantic import ValidationError

from jobfetcher.certificates import read_certificates
from jobfetcher.core.addresses import OwnHost
from jobfetcher.core.errors import ConfigError, SourceUnavailable
from jobfetcher.core.job import Job
from jobfetcher.core.machine import Gpu, Inventory, Share
from jobfetcher.core.ports import Emit
from jobfetcher.core.run import Image, RunSpec
from jobfetcher.core.urls import UrlPolicy
from jobfetcher.engine import users
from jobfetcher.engine.api import DEFAULT_URL
from jobfetcher.engine.docker import DockerEngine, EngineInfo
from jobfetcher.engine.flavour import Flavour
from jobfetcher.engine.guard import Guard
from jobfetcher.engine.host_path import check_host_path, find_host_path, runs_inside
from jobfetcher.engine.images import ImagePolicy, PullPolicy
from jobfetcher.engine.registries import RegistryRules
from jobfetcher.engine.run_spec import OWN_NETWORK, BoxPolicy, build_proof_spec, build_run_spec, dropped_env
from jobfetcher.engine.second_name import second_name, sees
from jobfetcher.housekeeping import Housekeeper
from jobfetcher.journal import Journal
from jobfetcher.resources import detect
from jobfetcher.resources.budget import Budget, auto_slots, check_shares
from jobfetcher.runner import BuildSpec, Rules, Runner
from jobfetcher.self_test import FOLDER, SelfTest
from jobfetcher.settings import Settings, docker_config
from jobfetcher.show import machine_words
from jobfetcher.sources.worker_api.auth import Auth, CognitoAuth, CognitoPool, StaticToken
from jobfetcher.sources.worker_api.client import Client
from jobfetcher.sources.worker_api.nonces import Nonces
from jobfetcher.sources.worker_api.pool_pin import PoolPin
from jobfetcher.sources.worker_api.reply import Reply, failure
from jobfetcher.sources.worker_api.signing import Rules as SigningRules
from jobfetcher.sources.worker_api.signing import Verifier, read_keys
from jobfetcher.sources.worker_api.source import BEAT_WITHIN_S, Filter, WorkerApi
from jobfetcher.telemetry.logs import redact
from jobfetcher.transfer.cache import Cache
from jobfetcher.transfer.cache import clear as clear_cache
from jobfetcher.transfer.exchange import NetSettings
from jobfetcher.transfer.guard import resolve
from jobfetcher.transfer.presigned import PresignedTransfer
from jobfetcher.watching import Limits
from jobfetcher.worker import Polling, Worker
from jobfetcher.workspace import Base, Watched, check_base, check_reserve, engines_disk, own_root

#: A heartbeat has at least so long to be answered, in seconds, however often it is sent.
_LEAST_BEAT_S = 2.0

#: Memory limit of the box in which this machine tests itself, in MiB: a virtual machine (kata) starts in so much.
_PROOF_MIB = 512

#: FAULTS.md F10: one job that moves eight files at a time is at home in so many open files.
_LEAST_FILES = 64


def make_own_host(settings: Settings) -> OwnHost:
    """The API's host. One for the whole worker: all who speak to it, or because of it, must see the same change."""
    return OwnHost(settings.origin.host, resolve, is_proven=settings.origin.scheme == "https")


def make_source(
    settings: Settings, emit: Emit, own: OwnHost | None = None, *, base: Callable[[], Path] | None = None
) -> WorkerApi:
    """The worker API, signed in lazily. Close it when done.

    `base`: PATH_BASE, once it is open, where it is noted which signed jobs were taken; None: only this process knows.
    """
    for proxy in settings.proxies.addresses:
        redact(unquote(urlsplit(proxy).password or ""))
    trust = read_certificates(settings.ca_file)
    client = Client(
        settings.api_url,
        ca_file=None if trust.file is None else str(trust.file),
        ca_pem=trust.pem,
        proxy=settings.proxies,
        own=own or make_own_host(settings),
    )
    client.auth = make_auth(settings, client, emit, base or (lambda: settings.path_base))
    return WorkerApi(
        client,
        make_policy(settings),
        wanted=Filter(groups=settings.groups, older_than_s=settings.older_than),
        emit=emit,
        signatures=make_verifier(settings, base),
        # One that takes longer than the interval would eat the next one.
        beat_within_s=min(BEAT_WITHIN_S, max(_LEAST_BEAT_S, settings.timeout_status)),
    )


def make_verifier(settings: Settings, base: Callable[[], Path] | None) -> Verifier | None:
    """What checks signatures of jobs, where the owner wants them signed."""
    if settings.job_signing_keys is None:
        return None
    api = urlsplit(settings.api_url)
    rules = SigningRules(
        audience=frozenset(settings.job_signing_audience or (f"{api.scheme}://{api.netloc}",)),
        tags="tags" in settings.job_signing_allow,
        version_1="version-1" in settings.job_signing_allow,
        every_input=settings.job_signing_inputs == "required",
    )
    return Verifier(read_keys(settings.job_signing_keys), rules, Nonces(base))


def make_auth(settings: Settings, client: Client, emit: Emit, base: Callable[[], Path]) -> Auth:
    """A fixed token if one is set, else sign-in; every secret is kept out of the log from here on. `base`: where it is
    kept where the password goes."""
    if settings.access_token is not None:
        redact(settings.access_token.get_secret_value())
        again = None if settings.access_token_path is None else settings.read_access_token
        return StaticToken(settings.access_token.get_secret_value(), again, on_token=redact)
    assert settings.username is not None  # noqa: S101 - settings check that one of the two ways is there
    assert settings.password is not None  # noqa: S101
    redact(settings.password.get_secret_value())

    def find_pool() -> CognitoPool:
        reply = client.ask("/access_info")
        if reply.status != 200:
            raise failure(reply, "the question where to sign in (/access_info; is API_URL right?)")
        try:
            pool = CognitoPool.model_validate(_member(reply.json(), "cognito"))
        except ValidationError:
            raise SourceUnavailable(
                f"{client.base_url}/access_info does not say where to sign in; is API_URL the address of a worker API?"
            ) from None
        return pin.check(pool)

    def post(url: str, headers: dict[str, str], body: bytes) -> Reply:
        return client.send("POST", url, (), headers, body)

    username, tokens = settings.username, count()
    pin = PoolPin(base, settings.api_url, settings.cognito_pool)

    def on_token(token: str) -> None:
        redact(token)
        pin.keep()
        if next(tokens) == 0:
            emit("signed_in", message=f"signed in as {username}")

    return CognitoAuth(
        username,
        settings.password.get_secret_value(),
        pool=find_pool,
        post=post,
        endpoint=settings.aws_endpoint_url,
        on_token=on_token,
    )


def make_policy(settings: Settings) -> UrlPolicy:
    """Where files may be fetched from and sent to."""
    return UrlPolicy(settings.origin, frozenset(host.lower() for host in settings.storage_allow))


def make_cache(settings: Settings, base: Base, emit: Emit) -> Cache | None:
    """Inputs that are kept for later jobs, if the owner wants that; else what was kept is removed."""
    path = base.path / "cache"
    if not settings.cache_size:
        clear_cache(path)
        return None
    cache = Cache(path, settings.cache_size * 2**20, emit, room_for=base.room_for)
    base.also_spare(cache.make_room)
    return cache


def make_transfer(settings: Settings, cache: Cache | None = None, own: OwnHost | None = None) -> PresignedTransfer:
    """Moves files by presigned requests. Close it when done."""
    _check_encoding()
    trust = read_certificates(settings.ca_file)
    return PresignedTransfer(
        make_policy(settings),
        concurrency=settings.transfers,
        ranges=settings.transfer_ranges,
        bandwidth_limit=settings.bandwidth_limit * 2**20 or None,
        cache=cache,
        own=own or make_own_host(settings),
        net=NetSettings(ca_file=trust.file, ca_pem=trust.pem, proxy=settings.proxies),
    )


def make_engine(settings: Settings, instance: str, emit: Emit, own: OwnHost | None = None) -> DockerEngine:
    """The container engine, not connected yet. Commands that pull nothing may know no server."""
    if own is None and settings.api_url:
        own = make_own_host(settings)
    images = ImagePolicy(
        allowed=settings.allowed_images,
        pull=PullPolicy(settings.pull_policy),
        docker_config=docker_config(),
        registries=None if own is None else make_registry_rules(settings, own),
    )
    url = settings.docker_host or DEFAULT_URL
    guard = Guard(emit) if settings.job_network_guard == "auto" else None
    return DockerEngine(instance, url=url, images=images, policy=make_box(settings), guard=guard, emit=emit)


def make_registry_rules(settings: Settings, own: OwnHost) -> RegistryRules:
    """Which registries the engine is asked to pull from."""
    allow = frozenset(entry.lower() for entry in settings.registry_allow)
    return RegistryRules(own, resolve, allow=allow, images=settings.allowed_images)


def make_box(settings: Settings) -> BoxPolicy:
    """What the machine's owner lets every job have."""
    network = {"bridge": OWN_NETWORK, "none": None}.get(settings.job_network, settings.job_network)
    return BoxPolicy(
        cap_add=settings.job_cap_add,
        shm_mib=settings.job_shm_size,
        pids_limit=settings.job_pids_limit,
        network=network,
        runtime=settings.job_runtime,
        user=settings.job_user,
        read_only=settings.job_read_only,
        own_filter=settings.job_seccomp == "jobfetcher",
        layer_mib=settings.job_disk_limit or None,
    )


def make_build_spec(settings: Settings, instance: str, emit: Emit) -> BuildSpec:
    """What a job gets, by the owner's policy; says which of its environment variables are not passed on."""
    policy = make_box(settings)

    def build_spec(job: Job, share: Share, *, image: Image, files_host_path: str, attempt: int) -> RunSpec:
        dropped = ", ".join(dropped_env(job.env, gpus=bool(share.gpus)))
        if dropped:
            emit("env_dropped", level="warning", job=job.id, message=f"not passed on to the job: {dropped}")
        return build_run_spec(
            job,
            share,
            image=image,
            files_host_path=files_host_path,
            attempt=attempt,
            instance=instance,
            policy=policy,
        )

    return build_spec


def make_self_test(
    settings: Settings, engine: DockerEngine, inventory: Inventory, base: Base, host_base: str, gpus: detect.GpuProbe
) -> SelfTest:
    """What shows that this machine can run a job."""
    policy = make_box(settings)

    def make_spec(held: Sequence[Gpu]) -> RunSpec:
        share = Share(min(1.0, inventory.cpu_cores), min(_PROOF_MIB, inventory.memory_mib), tuple(held))
        return build_proof_spec(share, files_host_path=f"{host_base}/{FOLDER}", policy=policy)

    return SelfTest(engine=engine, make_spec=make_spec, base=base.path, gpus=gpus)


def make_budget(settings: Settings, inventory: Inventory, gpus: detect.GpuProbe) -> Budget:
    """The machine's accounts."""
    return Budget(
        inventory,
        slots=settings.max_jobs or auto_slots(inventory, gpu_unasked=settings.gpu_unasked == "give"),
        memory_in_use_mib=detect.memory_in_use_mib,
        read_gpus=gpus,
        reserve_cpus=settings.reserve_cpus,
        reserve_memory_mib=settings.reserve_memory,
        prefetch=settings.prefetch,
        gpu_unasked=settings.gpu_unasked == "give",
    )


def check_machine(settings: Settings, inventory: Inventory, emit: Emit) -> None:
    """Raise ConfigError, naming the setting, for what this machine does not have. What its engine does not have is
    found by its own box (self_test)."""
    slots = settings.max_jobs or 1
    if remark := check_shares(inventory, slots, settings.reserve_cpus, settings.reserve_memory):
        emit("many_jobs", level="warning", message=remark)
    if (settings.job_shm_size or 0) > inventory.memory_mib:
        raise ConfigError(
            f"JOB_SHM_SIZE={settings.job_shm_size}MiB is more than this machine's memory, {inventory.memory_mib} MiB"
        )


class Machine(NamedTuple):
    """The settings as the engine allows them, the engine, what it and this machine have, the accounts of that, and the
    disks that jobs fill: that of PATH_BASE first, then the engine's, if it is another that can be seen."""

    settings: Settings
    engine: EngineInfo
    inventory: Inventory
    gpus: detect.GpuProbe
    budget: Budget
    disks: tuple[Watched, ...]


def look_at_machine(settings: Settings, engine: DockerEngine, emit: Emit) -> Machine:
    """What jobs may have here now: all that `run` and `resources` say of the machine, so that both say the same.

    Makes nothing, not even PATH_BASE. `emit` hears what the owner should know. Raises ConfigError, naming the setting,
    for what the machine or the engine does not have; what only a container shows is found by `self_test`.
    """
    if (files := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < _LEAST_FILES:
        raise ConfigError(f"a worker needs {_LEAST_FILES} open files, and this one may have {files} (ulimit -n)")
    _check_encoding()
    engine.check()
    settings = _as_the_engine_allows(settings, engine.flavour(), emit)
    make_box(settings)
    info = engine.describe()
    inventory = _engines_part(detect.detect(settings.gpus), info)
    check_machine(settings, inventory, emit)
    base = settings.path_base
    check_base(base, reserve_mib=settings.reserve_disk, cache_mib=settings.cache_size)
    if runs_inside(engine.api):
        engines = own_root(base)
    else:  # its directory is not there where the engine runs in a machine of its own
        engines = engines_disk(Path(info.root_dir) if info.root_dir else None)
    if engines is not None:
        check_reserve(engines.path, settings.reserve_disk)
    gpus = detect.GpuProbe(settings.gpus, emit)
    budget = make_budget(settings, inventory, gpus)
    budget.offer()  # takes the readings
    disks = (Watched(base, str(base)), *([] if engines is None else [engines]))
    return Machine(settings, info, inventory, gpus, budget, disks)


def find_instance(host_base: str) -> str:
    """This worker's name on its engine: the same at every start, another for every PATH_BASE of the machine."""
    return hashlib.sha256(host_base.encode()).hexdigest()[:8]


@contextmanager
def worker(settings: Settings, polling: Polling, emit: Emit) -> Iterator[Worker]:
    """A worker ready to run, everything it holds, closed at the end.

    Raises ConfigError for what only a person can change: no engine, wrong PATH_HOST_BASE, PATH_BASE in use.
    """
    os.umask(0o077)  # the journal, the lock and logs are nobody else's business
    with ExitStack() as opened:
        # First all that may be wrong with the settings: until they are accepted nothing is made, not even PATH_BASE.
        finder = make_engine(settings, "", emit)
        opened.callback(finder.close)
        settings, info, inventory, gpus, budget, disks = look_at_machine(settings, finder, emit)
        own = make_own_host(settings)

        def kept_in() -> Path:  # asked when the first job is, which is after PATH_BASE was opened below
            return base.path

        source = make_source(settings, emit, own, base=kept_in)
        opened.callback(source.close)
        base = opened.enter_context(
            Base(settings.path_base, reserve_mib=settings.reserve_disk, cache_mib=settings.cache_size)
        )
        if base.foreign:  # FAULTS.md T26
            why = "who could put another directory in its place; the worker holds it open, which he cannot change"
            better = "better is a place below directories of root's, such as /var/lib/jobfetcher"
            emit("foreign_base", level="warning", message=f"PATH_BASE: {base.foreign}, {why}; {better}")
        if base.filesystem.startswith("nfs"):  # FAULTS.md F7
            why = "a lock and a journal there are no safer than its server; PATH_BASE should be on a local disk"
            emit("network_disk", level="warning", message=f"{base.real} is on a network ({base.filesystem}): {why}")
        if base.is_noexec:
            why = "a job cannot run a program that it puts into /files; mount that disk with exec, or choose another"
            emit("noexec", level="warning", message=f"{base.real} is on a disk that is mounted noexec: {why}")
        if settings.job_disk_limit and base.limit_jobs(settings.job_disk_limit):
            held = (
                f"the kernel holds each job's directory to JOB_DISK_LIMIT={settings.job_disk_limit}MiB (project quota)"
            )
            emit("quota", message=held)
        if settings.path_host_base is None:
            host_base = find_host_path(finder.api, str(base.real))
        else:
            host_base = check_host_path(finder.api, str(settings.path_host_base.expanduser()), str(base.real))
        engine = make_engine(settings, find_instance(host_base), emit, own)
        host_base = _mounted_from(base, host_base, finder, settings, opened)
        opened.callback(engine.close)
        if os.geteuid() != 0:  # FAULTS.md E13
            if not base.cannot_own():
                base.left.also_own(lambda name: engine.own(f"{host_base}/jobs/{name}"))
            if why := base.cannot_own() or engine.cannot_own():
                message = f"what a job's root user writes can neither be sent nor deleted by this worker: {why}"
                emit("no_helper", level="warning", message=message)
        journal = Journal(base.path / "journal.db")
        opened.callback(journal.close)
        transfer = make_transfer(settings, make_cache(settings, base, emit), own)
        opened.callback(transfer.close)
        for disk in disks[1:]:
            base.also_watch(disk)
        emit("machine", message=machine_words(info, budget.free(), budget.slots, disks))
        if not settings.allowed_images and not info.pulls_by_proxy:  # FAULTS.md T25: what the worker cannot close
            what = "a job may name an image of any public registry, and the engine follows where that leads its sign-in"
            emit("pulls_anywhere", message=f"{what}; ALLOWED_IMAGES, or a proxy of the engine's, closes that (README)")
        self_test = make_self_test(settings, engine, inventory, base, host_base, gpus)
        runner = Runner(
            base=base,
            host_base=PurePosixPath(host_base),
            journal=journal,
            transfer=transfer,
            engine=engine,
            build_spec=make_build_spec(settings, engine.instance, emit),
            rules=Rules(
                beat_interval_s=settings.timeout_status,
                limits=Limits(settings.stop_grace, settings.max_runtime, settings.job_disk_limit),
                stop_after_silence_s=settings.stop_after_silence or None,
                worker_fault_is_error=settings.on_worker_fault == "error",
                # Where nothing is given back, this worker is all there is, and nobody waits for the job elsewhere.
                prefetch_hold_s=settings.prefetch_hold if settings.on_worker_fault == "release" else None,
            ),
            emit=emit,
            gone_gpus=lambda held, image_id: detect.gone(held) or self_test.lost(held, image_id),
        )
        yield Worker(
            source=source,
            engine=engine,
            budget=budget,
            base=base,
            journal=journal,
            runner=runner,
            housekeeper=Housekeeper(engine, base, journal, emit, keep_s=settings.image_keep),
            self_test=self_test,
            polling=polling,
            emit=emit,
        )


def _mounted_from(base: Base, host_base: str, engine: DockerEngine, settings: Settings, opened: ExitStack) -> str:
    """What the engine's mounts name: `host_base`, or where others might lead that elsewhere a second name (T26).

    Where there can be none, a path that others might change is looked at before and after each start of a container.
    """
    if not base.foreign:
        return host_base
    if not runs_inside(engine.api):
        second = opened.enter_context(second_name(base.descriptor, find_instance(host_base)))
        if second is not None and sees(settings.docker_host or DEFAULT_URL, second):
            return str(second)
    base.watches_way = True
    return host_base


def _check_encoding() -> None:
    """Names of files come from servers and jobs as UTF-8 and must be that on disk, whatever LANG says. The command sees
    to it (cli.main); who uses the package otherwise may not have."""
    if (encoding := sys.getfilesystemencoding()) != "utf-8":
        raise ConfigError(f"file names would be {encoding} here (LANG, LC_ALL) and not UTF-8; set PYTHONUTF8=1")


def _as_the_engine_allows(settings: Settings, engine: Flavour, emit: Emit) -> Settings:
    """The settings, without GPUs where the engine hands out none. Says at the start what the engine cannot do for jobs.

    Raises ConfigError for what the owner asks of it in vain.
    """
    if settings.job_runtime and not engine.takes_runtime:
        raise ConfigError(
            f"JOB_RUNTIME={settings.job_runtime} has no effect here: {engine.name} has one runtime for all containers. "
            "Leave JOB_RUNTIME out, and name that runtime in containers.conf (runtime, below [engine])"
        )
    gpus = not engine.gives_gpus and bool(detect.read_gpus(settings.gpus).gpus)
    for note in engine.notes(own_network=settings.job_network == "bridge", gpus=gpus):
        emit("engine_limits", level="warning", message=note)
    for note in users.notes(engine, settings.job_user):
        emit("job_users", level="warning" if settings.job_user else "info", message=note)
    return settings if engine.gives_gpus else settings.model_copy(update={"gpus": "none"})


def _engines_part(inventory: Inventory, engine: EngineInfo) -> Inventory:
    """What of the machine the engine has: less than all where it runs in a virtual machine of its own."""
    return replace(
        inventory,
        cpu_cores=min(inventory.cpu_cores, float(engine.cpu_cores)),
        memory_mib=min(inventory.memory_mib, engine.memory_mib),
    )


def _member(data: object, name: str) -> object:
    return data.get(name) if isinstance(data, dict) else None
