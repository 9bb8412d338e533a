"""The Docker engine behind `core.ports.Engine`.

Named by `build.py` only. Promises: create and start are safe to repeat, for a container is found again by its name and
labels (FAULTS.md J2, A3); a container's end is noticed at once, in the engine's own wait call; an exit that an engine's
restart may have caused is not genuine (E1: `vouch`); no call blocks for longer than its deadline (E2, E3); nothing that
is not ours, by name and label, is ever touched (E10).
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import math
import os
import re
import shutil
import signal
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from jobfetcher.core.errors import JobFault, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.failpoints import failpoint
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import JobId
from jobfetcher.core.ports import Emit, PullProgress, PullWaits
from jobfetcher.core.run import Exit, Image, RunSpec, Written
from jobfetcher.core.text import clean
from jobfetcher.engine import give_back, proof, vouch
from jobfetcher.engine.api import (
    DEFAULT_URL,
    LOOK_UP_S,
    WORK_S,
    EngineApi,
    Line,
    NotFound,
    Refused,
    Unreachable,
    Version,
)
from jobfetcher.engine.box import box
from jobfetcher.engine.flavour import Flavour, Limit, docker_flavour, podman_flavour
from jobfetcher.engine.flood import Restraint
from jobfetcher.engine.guard import Guard, bridge_of
from jobfetcher.engine.images import ImagePolicy, Images
from jobfetcher.engine.measure import written
from jobfetcher.engine.polling import runs
from jobfetcher.engine.printed import Frames, missing, time_of
from jobfetcher.engine.registries import Egress
from jobfetcher.engine.run_spec import (
    LABEL_ATTEMPT,
    LABEL_INSTANCE,
    LABEL_JOB,
    OWN_NETWORK,
    BoxPolicy,
    against_image,
)
from jobfetcher.engine.sayings import (
    ARGUMENTS,
    INIT_BROKEN,
    INIT_FAILED,
    NO_COMMAND,
    TOO_LONG,
    Policy,
    cannot_run,
    init_fault,
    start_fault,
    with_cure,
)
from jobfetcher.engine.unseen import end_unseen
from jobfetcher.engine.volumes import leads_inside

#: How often create and start are tried when the engine's answer is lost, and the pauses between, in seconds.
_PAUSES_S = (0.5, 1.0, 2.0)

#: How long a running job waits for an engine that went away, and the longest pause between tries (FAULTS.md E1, E3).
RECONNECT_S = 1800.0
_RECONNECT_PAUSE_S = 15.0

#: After so long a wait the engine is asked anew whether the container runs, in seconds (FAULTS.md E2).
_CROSS_CHECK_S = 30.0

#: `docker restart` starts a container again 0.3 s after its end. It is looked for so often, after so many seconds each
#: time: the machine may be busy (FAULTS.md E11).
_RESTART_LOOKS, _RESTART_PAUSE_S = 10, 0.5

#: What it printed first is looked for after this pause, which grows while it prints nothing, in seconds.
_LOOK_S, _LOOK_MAX_S = 2.0, 60.0

#: What an engine itself says for an exit code that it does not know.
_UNKNOWN_CODE = 255

#: The exit code of a program that was ended by KILL.
_KILLED = 128 + signal.SIGKILL

#: How long giving back the files of one job may take, in seconds: generous, since a job may leave a million.
_OWN_TIMEOUT_S = 600.0

#: Most that `last_lines` keeps of what a container printed, in bytes.
_LAST_BYTES = 64 * 1024

#: The line with which an init says that it cannot start a program is not longer than this, in bytes.
_LINE_BYTES = 8 * 1024

T = TypeVar("T")

#: What an engine says when an image that is named by its id is not there (any more).
_IMAGE_GONE = re.compile(r"no such image", re.IGNORECASE)

#: When its disk is not mounted for limits on layers (moby, daemon/graphdriver/overlay2).
_NO_LAYER_LIMIT = re.compile(r"storage-opt|pquota", re.IGNORECASE)

#: And when it is the container.
_CONTAINER_GONE = re.compile(r"no such container|no container with (?:name|id)", re.IGNORECASE)

#: What an engine says when a name is taken: Docker with 409, Podman with 500.
_NAME_TAKEN = re.compile(r"\bname\b.* (?:is )?already in use", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine says of itself. Memory in MiB; the engine may have less than this machine (a virtual machine)."""

    name: str
    version: str
    api_version: str
    architecture: str
    cgroup_version: str
    cpu_cores: int
    memory_mib: int
    runtimes: tuple[str, ...]
    root_dir: str
    pulls_by_proxy: bool = False


class DockerEngine:
    """One engine, seen by one worker (`instance`). Thread-safe. Connects on first use.

    `policy`: what jobs get, for the worker's own box that gives files back (`own`).
    `guard`: what keeps jobs on the own network from services of the machine; None: nothing does.
    `reconnect_s`: how long a running job waits for an engine that went away before its worker is declared at fault.
    `look_up_s`, `work_s`: see `EngineApi`. `clock`, `now` and `sleep`: time passing, the time of day, and a pause.
    """

    def __init__(
        self,
        instance: str,
        *,
        url: str = DEFAULT_URL,
        images: ImagePolicy | None = None,
        policy: BoxPolicy | None = None,
        guard: Guard | None = None,
        emit: Emit = lambda *_, **__: None,
        reconnect_s: float = RECONNECT_S,
        look_up_s: float = LOOK_UP_S,
        work_s: float = WORK_S,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.api = EngineApi(url, look_up_s=look_up_s, work_s=work_s)
        self.instance = instance
        self.reconnect_s = reconnect_s
        self.clock = clock
        self.now = now
        self.sleep = sleep
        self.emit = emit
        self._images = Images(self.api, images or ImagePolicy(), emit)
        self._policy = policy or BoxPolicy()
        self._guard = guard
        self._network_lock = threading.Lock()
        self._helpers: set[str] = set()
        self._proofs: set[str] = set()
        #: Containers that are paused because they print without end.
        self._held: set[str] = set()
        self._flavour: tuple[Version, Flavour] | None = None

    def check(self) -> None:
        """Raise ConfigError or WorkerFault unless an engine answers here that can run jobs."""
        self.api.check()
        self.flavour()

    def flavour(self) -> Flavour:
        """How this engine is spoken to: asked once, and again of an engine that took its place. Raises WorkerFault."""
        with self.api.calling("describe itself"):
            version = self.api.version
            if self._flavour is None or self._flavour[0] is not version:
                if version.podman:
                    found = podman_flavour(version.podman, self.api.ask("GET", "/libpod/info").json())
                else:
                    found = docker_flavour(self.api.ask("GET", "/info").json())
                self._flavour = version, found
            return self._flavour[1]

    def describe(self) -> EngineInfo:
        """What the engine is. Raises WorkerFault when it does not answer."""
        with self.api.calling("describe itself"):
            version, info = self.api.ask("GET", "/version").json(), self.api.ask("GET", "/info").json()
        platform, flavour = version.get("Platform") or {}, self.flavour()
        return EngineInfo(
            name=flavour.kind or str(platform.get("Name") or "Docker Engine"),
            version=str(version["Version"]),
            api_version=str(version["ApiVersion"]),
            architecture=str(version["Arch"]),
            cgroup_version=str(info.get("CgroupVersion", "1")),
            cpu_cores=int(info["NCPU"]),
            memory_mib=int(info["MemTotal"]) // (1024 * 1024),
            runtimes=tuple(sorted(info.get("Runtimes") or ())),
            root_dir=str(info.get("DockerRootDir", "")),
            pulls_by_proxy=Egress.of(info).is_proxied,
        )

    def close(self) -> None:
        """Let go of what this worker holds back, and close idle connections."""
        for container in list(self._held):  # whoever comes next does it else
            with contextlib.suppress(WorkerFault):
                self.unpause(container)
        self.api.close()

    def pause(self, container: str) -> bool:
        """Pause a container of ours; False where that cannot be: it has ended, or its engine or runtime pauses none.

        Where the answer is lost it may be paused all the same, so it is known as such before it is asked.
        """
        self._held.add(container)
        with self.api.calling("pause a container"):
            try:
                self.api.ask("POST", f"/containers/{container}/pause", timeout_s=self.api.work_s)
            except Refused:
                self._held.discard(container)
                return False
        return True

    def unpause(self, container: str) -> None:
        """Have it go on; one that is gone, or was not paused, is left as it is."""
        with self.api.calling("unpause a container"), contextlib.suppress(Refused):
            self.api.ask("POST", f"/containers/{container}/unpause", timeout_s=self.api.work_s)
        self.forget_held(container)

    def forget_held(self, container: str) -> None:
        """It is not paused any more, or gone."""
        self._held.discard(container)

    def prepare(self, reference: str, halt: Halt, progress: PullProgress, waits: PullWaits | None = None) -> Image:
        return self._images.prepare(reference, halt, progress, waits)

    def start(self, spec: RunSpec, before_start: Callable[[str], None] | None = None) -> DockerContainer:
        """See `Engine.start`. Raises JobFault(CANNOT_START), WorkerFault(GPU, DISK, ENGINE or INTERRUPTED); then
        nothing is left.

        A program that the image does not have is found by docker-init, after the start: see `DockerContainer.wait`.
        """
        flavour = self.flavour()
        if spec.gpu_uuids and not flavour.gives_gpus:
            raise WorkerFault(WorkerReason.GPU, f"{flavour.name} hands out no GPU")
        config = box(spec, self._network_mode(spec.network), flavour)
        container, ours = self._persist(lambda: self._create(spec, config))
        try:
            if spec.volumes:
                self._refuse_links(container, spec.volumes)
            if ours:
                container.watch(flavour.told_before_start)
            if before_start is not None:
                before_start(container.id)
            tries = itertools.count()
            # Whoever created it just now knows that it was not started before; of one that was adopted our caller does.
            self._persist(lambda: self._start(container, spec, look=not ours, again=next(tries) > 0))
        except Unreachable:
            raise  # whether it runs is unknown: it stays, to be found by its labels
        except (JobFault, WorkerFault):
            with contextlib.suppress(WorkerFault):
                container.remove()
            raise
        return container

    def find(self, job_id: JobId) -> DockerContainer | None:
        """See `Engine.find`. Of several attempts, the newest."""

        def age(summary: Mapping[str, Any]) -> tuple[int, int]:
            attempt = str(summary["Labels"].get(LABEL_ATTEMPT, ""))
            return int(summary["Created"]), int(attempt) if attempt.isdecimal() else 0

        newest = max(self._ours(job_id), key=age, default=None)
        return self._listed(newest) if newest else None

    def reap(self, known: frozenset[JobId], *, older_than_s: float = 0.0) -> list[str]:
        """See `Engine.reap`. One that cannot be removed does not save the others; its fault is raised after them."""
        removed: list[str] = []
        failed: WorkerFault | None = None
        working = set(self._helpers)  # some of them may be done, and gone, when the list is gone through
        for summary in self._ours():
            name = _name(summary)
            if summary["Labels"].get(LABEL_JOB) in known or name in working | self._helpers:
                continue
            if older_than_s and self.now() - float(summary["Created"]) < older_than_s:
                continue
            try:
                self._listed(summary).remove()
                removed.append(name)
            except WorkerFault as fault:
                failed = fault
        if failed is not None:
            raise failed
        return removed

    def forget_image(self, image_id: str, reference: str) -> bool:
        return self._images.forget(image_id, reference)

    def own(self, host_path: str) -> None:
        """See `Engine.own`. Raises WorkerFault(DISK) naming the directory that is left, WorkerFault(ENGINE)."""
        name = f"jobfetcher-{self.instance}-own-{uuid.uuid4().hex[:12]}"
        self._helpers.add(name)
        try:
            left = self._give_back(host_path, name)
        except Unreachable:
            raise
        except give_back.NoProgram as fault:
            left = str(fault)
        except (JobFault, WorkerFault) as fault:  # it could not be started, or somebody removed it
            why = f"the files in {host_path} cannot be given back to the worker's user now: {fault}"
            raise WorkerFault(WorkerReason.ENGINE, why) from fault
        finally:
            self._helpers.discard(name)
        if left:
            raise WorkerFault(WorkerReason.DISK, f"{host_path} has files of other users that are left behind: {left}")

    def cannot_own(self) -> str:
        """Why `own` can never work on this engine, as a sentence; nothing where it can. Raises WorkerFault."""
        with self.api.calling("say its architecture"):
            try:
                give_back.helper(self.api.version.architecture)
            except give_back.NoProgram as fault:
                return str(fault)
        return ""

    def _give_back(self, host_path: str, name: str) -> str:
        """What could not be given back, and why; nothing when all was. Raises JobFault and WorkerFault."""
        flavour = self.flavour()
        helper, spec = self._create_helper(host_path, name, flavour)
        try:
            self._start(helper, spec)
            end = helper.wait(_OWN_TIMEOUT_S)
            if end is None:
                return f"it takes longer than {_OWN_TIMEOUT_S:g} s"
            if end.code not in {0, give_back.FAILED} or end.error:  # its init's word, or somebody killed it
                why = end.error or f"the helper ended with exit code {end.code}"
                raise WorkerFault(WorkerReason.ENGINE, why)
            return "" if end.code == 0 else give_back.in_words(helper.last_lines(6))
        finally:
            helper.remove()

    def _create_helper(self, host_path: str, name: str, flavour: Flavour) -> tuple[DockerContainer, RunSpec]:
        """The helper's container, and once more where somebody removed its image just now (`docker image prune -a`)."""
        # An engine without root rights shows its own user's files as root's: to any other they would be given away.
        owner = "0:0" if flavour.rootless else f"{os.getuid()}:{os.getgid()}"
        again = True
        while True:
            image_id = give_back.find_or_import(self.api)
            spec = give_back.spec(self._policy, image_id=image_id, host_path=host_path, owner=owner, name=name)
            spec = replace(spec, labels={LABEL_INSTANCE: self.instance})
            with self.api.calling("create a helper"):
                try:
                    return DockerContainer(self, self.api.create(give_back.config(spec, flavour), name)), spec
                except Refused as error:
                    if not (again and isinstance(error, NotFound) and _IMAGE_GONE.search(error.said)):
                        raise start_fault(error.said, spec) from error
            again = False

    def prove(self, spec: RunSpec, folder: Path) -> bool:
        """See `Engine.prove`. Raises ConfigError, WorkerFault(GPU, DISK or ENGINE)."""
        for lost in list(self._proofs):  # the engine was away before it was removed
            DockerContainer(self, lost).remove()
            self._proofs.discard(lost)
        name = f"jobfetcher-{self.instance}-proof-{uuid.uuid4().hex[:12]}"
        spec = replace(spec, name=name, labels={LABEL_INSTANCE: self.instance})
        if spec.image_id:
            if (image := self._images.known(spec.image_id)) is None:
                return False  # it tells nothing
            spec = against_image(spec, image)
        self._helpers.add(name)
        self._proofs.add(name)
        try:
            network_mode = self._network_mode(spec.network)
            flavour = self.flavour()
            seen = proof.prove(self.api, spec, lambda spec: box(spec, network_mode, flavour), folder)
            self._proofs.discard(name)
            return seen
        except Unreachable:
            raise
        except WorkerFault as fault:
            raise with_cure(fault) from fault
        finally:
            self._helpers.discard(name)

    def _persist(self, call: Callable[[], T]) -> T:
        """Repeat a call that is safe to repeat, while the engine's answer is lost."""
        for pause in _PAUSES_S:
            try:
                return call()
            except Unreachable as fault:
                if fault.setup:
                    raise
            self.sleep(pause)
        return call()

    def _create(self, spec: RunSpec, config: dict[str, Any]) -> tuple[DockerContainer, bool]:
        """The container, and whether it was made just now."""
        failpoint("before:create")
        with self.api.calling("create a container"):
            try:
                created = self.api.create(config, spec.name)
            except NotFound as error:
                if not _IMAGE_GONE.search(error.said):
                    raise start_fault(error.said, spec) from error
                why = "its image was removed from this machine before the job could start"
                raise WorkerFault(WorkerReason.INTERRUPTED, why) from error
            except Refused as error:
                if "StorageOpt" in config["HostConfig"] and _NO_LAYER_LIMIT.search(error.said):
                    self._limit_no_layers(error)
                    del config["HostConfig"]["StorageOpt"]
                    return self._create(spec, config)
                if error.status != http.client.CONFLICT and not _NAME_TAKEN.search(error.said):
                    raise start_fault(error.said, spec) from error
                created = None
        failpoint("after:create")
        return (self._adopt(spec), False) if created is None else (DockerContainer(self, created), True)

    def _limit_no_layers(self, error: Refused) -> None:
        """This engine cannot hold a container's layer to a size after all; the worker's own counting does."""
        assert self._flavour is not None  # noqa: S101 - a container's configuration was made for it
        self._flavour = self._flavour[0], replace(self._flavour[1], limits_layers=False)
        why = clean(error.said, 200)
        self.emit("no_layer_limit", level="debug", message=f"the engine holds no layer to JOB_DISK_LIMIT: {why}")

    def _adopt(self, spec: RunSpec) -> DockerContainer:
        """The container that has our name already: an earlier create whose answer was lost, or a stranger."""
        found = self.api.inspect(spec.name)
        if found is None or found["State"]["Status"] in {"removing", "dead"}:
            raise WorkerFault(WorkerReason.ENGINE, f"a container named {spec.name} is just being removed")
        labels = found["Config"].get("Labels") or {}
        if any(labels.get(name) != value for name, value in spec.labels.items()):
            raise WorkerFault(
                WorkerReason.ENGINE, f"a container named {spec.name} exists and is not ours; remove or rename it"
            )
        return DockerContainer(self, str(found["Id"]))

    def _start(self, container: DockerContainer, policy: Policy, *, look: bool = False, again: bool = False) -> None:
        """Start it. `look`: unless it runs, or has run. `again`: an answer to this was lost, and whether it runs or has
        run is asked for; one that the engine calls new may have run all the same: an engine that was killed while it
        started a container may not have come to note it. So such a one is never started again."""
        if look or again:
            found = self.api.inspect(container.id)
            if found is None:
                raise _removed()
            if found["State"]["Status"] != "created":
                return
            if again:
                container.is_new = True
                raise WorkerFault(
                    WorkerReason.INTERRUPTED, "the engine was lost while it started the job, which may have run"
                )
        with self.api.calling("start a container"):
            try:
                self.api.ask("POST", f"/containers/{container.id}/start", timeout_s=self.api.work_s)
            except NotFound as error:
                if not _CONTAINER_GONE.search(error.said):  # a network that is not there, say
                    raise start_fault(error.said, policy) from error
                raise WorkerFault(
                    WorkerReason.INTERRUPTED, "the job's container was removed before it was started"
                ) from error
            except Refused as error:
                raise start_fault(error.said, policy) from error

    def _refuse_links(self, container: DockerContainer, volumes: Iterable[str]) -> None:
        """Raise JobFault where a volume lies in /files after all, by a link in the image: its files would be lost."""
        paths = [PurePosixPath(volume) for volume in volumes]
        for folder in sorted({str(folder) for path in paths for folder in (path, *path.parents)} - {"/"}):
            if leads_inside(target := self.api.link_target(container.id, folder)):
                raise JobFault(
                    JobReason.CANNOT_START,
                    f"the container cannot start, its image declares a volume at {clean(folder, 200)} or below, "
                    f"which is a link to {clean(target, 200)} (VOLUME); outputs there would be lost",
                )

    def _ours(self, job_id: JobId | None = None) -> list[Mapping[str, Any]]:
        """This worker's containers. A label may come from an image (LABEL), so the name must be ours as well."""
        labels = [f"{LABEL_INSTANCE}={self.instance}"] + ([f"{LABEL_JOB}={job_id}"] if job_id else [])
        with self.api.calling("list containers"):
            filters = json.dumps({"label": labels})
            found = self.api.ask("GET", "/containers/json", all="1", filters=filters).json()
        prefix = f"jobfetcher-{self.instance}-{job_id}-" if job_id else f"jobfetcher-{self.instance}-"
        return [summary for summary in found if _name(summary).startswith(prefix)]

    def _listed(self, summary: Mapping[str, Any]) -> DockerContainer:
        return DockerContainer(self, str(summary["Id"]), is_new=summary.get("State") == "created")

    def _network_mode(self, network: str | None) -> str:
        if network is None:
            return "none"
        if network != OWN_NETWORK:
            return network
        return self.flavour().own_network or self._own_network()

    def _own_network(self) -> str:
        """The id of the bridge network for jobs, made when there is none. Containers on it do not see each other.

        By id, because two workers that make it at the same moment may make two of that name; both take the older one.
        """
        options = self.flavour().network_options
        with self._network_lock, self.api.calling("make the network for jobs"):
            if not (found := self._own_networks()):
                wanted = {"Name": OWN_NETWORK, "Driver": "bridge", "Options": dict(options), "CheckDuplicate": True}
                try:
                    self.api.ask("POST", "/networks/create", timeout_s=self.api.work_s, body=wanted)
                    found = self._own_networks()
                except Refused:
                    if not (found := self._own_networks()):  # else another worker was faster
                        raise
            oldest = _oldest(found)
        if oldest is None or not options.items() <= (oldest.get("Options") or {}).items():
            raise WorkerFault(
                WorkerReason.ENGINE,
                f"the network {OWN_NETWORK} lets containers see each other; remove it "
                f"(docker network rm {OWN_NETWORK}), and the worker makes its own",
            )
        if self._guard is not None and self._is_guarded():
            self._guard.hold(bridge_of(oldest["Id"], oldest.get("Options") or {}))
        return str(oldest["Id"])

    def open_network(self) -> str:
        """Why jobs will reach services of the machine, as a sentence; nothing where they will not, or where the owner
        wants no guard. Makes nothing. Raises WorkerFault."""
        if self._guard is None or self._policy.network != OWN_NETWORK or not self._is_guarded():
            return ""
        with self.api.calling("look for the network for jobs"):
            found = _oldest(self._own_networks())
        return self._guard.why_not(bridge_of(found["Id"], found.get("Options") or {}) if found else "")

    def _is_guarded(self) -> bool:
        """Not an engine without root rights: its bridges are in a network namespace where no service of the machine is.
        Podman names its bridges otherwise, and does not say how in this API."""
        return not self.flavour().rootless and not self.flavour().kind

    def _own_networks(self) -> list[Mapping[str, Any]]:
        networks = self.api.ask("GET", "/networks", filters=json.dumps({"name": [OWN_NETWORK]})).json()
        return [network for network in networks if network["Name"] == OWN_NETWORK]


def _oldest(networks: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return min(networks, key=lambda network: (network["Created"], network["Id"]), default=None)


@dataclass(slots=True)
class _Absence:
    """An engine that does not answer: since when, when it is tried again, and after which pause the time after that."""

    since: float
    due: float = 0.0
    pause_s: float = 1.0

    def failed(self, now: float) -> None:
        self.due = now + self.pause_s
        self.pause_s = min(self.pause_s * 2, _RECONNECT_PAUSE_S)


class DockerContainer:
    """One container of ours. `wait` is for one thread; the rest is safe from any."""

    def __init__(self, engine: DockerEngine, container_id: str, *, is_new: bool = False) -> None:
        self._engine = engine
        #: The engine calls it new, while an earlier process or engine may have started it.
        self.is_new = is_new
        self._api = engine.api
        self._id = container_id
        self._absence: _Absence | None = None
        #: Its log: whether it was seen from its begin on, when it printed first, and when that is looked at next.
        self._watched = False
        self._printed_first = ""
        self._look_at, self._look_pause_s = 0.0, _LOOK_S
        #: How much it prints; None: its engine does not say, or cannot pause it.
        self._restraint: Restraint | None = Restraint(engine.clock())
        self._pausing = threading.Lock()
        #: It was made before this process knew of it.
        self._adopted = True
        self._stopped = False
        #: When the run that is waited for was started, as far as it was asked for while it ran; its exit code if one
        #: connection saw it end, and whether that one is sure to have seen that run.
        self._started: str | None = None
        self._seen_end: int | None = None
        self._present = False
        #: The connection on which the engine says when it ends, and when it is asked anew whether it runs.
        self._line: Line | None = None
        self._cross_check_at = 0.0
        self._hang_up: Callable[[], object] = lambda: None

    @property
    def id(self) -> str:
        return self._id

    def wait(self, timeout_s: float) -> Exit | None:
        """See `Container.wait`. While the engine is away it is tried again, for `reconnect_s` over all calls in a row.

        May take one look-up's deadline longer than `timeout_s` where the engine is frozen. `Exit.error` says so where
        the program was never run, because the image does not have it.
        """
        clock = self._engine.clock
        deadline = clock() + timeout_s
        while True:
            if self._absence and (pause := self._absence.due - clock()) > 0:
                self._engine.sleep(min(pause, max(deadline - clock(), 0)))
                if clock() >= deadline:
                    return None
                continue
            try:
                looks = self._restraint is not None and not self._stopped
                until = min(deadline, self._restraint.due) if self._restraint is not None and looks else deadline
                end = self._wait(min(max(until - clock(), 0.01), _CROSS_CHECK_S))
                self._absence = None
            except WorkerFault:  # no answer, or an engine in such trouble that it answers with an error
                end = None
                self._absence = self._absence or _Absence(clock())
                if clock() - self._absence.since > self._engine.reconnect_s:
                    raise
                self._absence.failed(clock())
            if end is None and self._absence is None:
                self._look_at_begin()
                self._hold_back()
            if end or clock() >= deadline:
                return end

    def watch(self, told_before_start: bool) -> None:
        """Before its start: have the engine say when it ends, which no later question can tell so surely (`vouch`).

        Where that fails, `wait` asks as it does for a container that an earlier process started; `told_before_start`:
        whether this engine can do that (`flavour`).
        """
        self._watched, self._adopted = True, False
        if not told_before_start:
            return
        with contextlib.suppress(WorkerFault), self._api.calling("watch a container"):
            self._listen("next-exit", self._api.new_line())

    def _listen(self, condition: str, line: Line) -> Line:
        """Have the engine say on `line`, which is this container's from here on, when it ends."""
        try:
            line.begin_wait(self._id, condition)
        except BaseException:
            line.close()
            raise
        self._line = line
        self._cross_check_at = self._engine.clock() + _CROSS_CHECK_S
        self._hang_up = weakref.finalize(self, line.close)  # also of one that is never waited for
        return line

    def _wait(self, timeout_s: float) -> Exit | None:
        """Its end; None while it runs. Whether it runs and how it ends is said on one connection: see `vouch`."""
        if self._line is not None and self._engine.clock() >= self._cross_check_at:
            self._forget_line()
        with self._api.calling("wait for a container"):
            try:
                if line := self._line or self._line_if_running():
                    self._seen_end = line.ended(timeout_s)
                    if self._seen_end is None:
                        self._started = self._started or str(self._inspect()["State"]["StartedAt"])
                        return None
                    self._present = self._started is not None
            except BaseException:
                self._forget_line()
                raise
        self._forget_line()
        return self._exit()

    def _forget_line(self) -> None:
        if self._line is not None:
            self._line = None
            self._hang_up()

    def _line_if_running(self) -> Line | None:
        if self._seen_end is not None:
            return None
        line = self._api.new_line(self._engine.flavour().line)
        try:
            state = self._state(line)
        except BaseException:
            line.close()
            raise
        if not runs(state) or self._is_another_run(state):
            line.close()
            return None
        if not (self._adopted and state.get("Paused")) or self._let_go_if_held():
            self._adopted = False
        try:
            return self._listen("not-running", line)
        except NotFound:
            raise _removed() from None

    def _exit(self) -> Exit:
        """How it ended, and whether that can be believed: asked on a connection made after the end was seen."""
        with self._api.one_line("say how a container ended") as line:
            state = self._state(line)
            # What the wait told comes first: the record is set to 0 while a container is started again.
            code = int(state["ExitCode"]) if self._seen_end is None else self._seen_end
            memory, genuine = self._vouched(line, state, code)
        # The signal may have been the first half of a `docker restart`, or of a `podman rm --force`.
        killed = code == _KILLED and not state.get("OOMKilled") and self._engine.flavour().seen_killed_when_removed
        looks = _RESTART_LOOKS if (memory.signalled or killed) and not self._stopped else 0
        while looks and not self._runs_again(state):
            looks -= 1
            self._engine.sleep(_RESTART_PAUSE_S)
            with self._api.one_line("say whether a container was started again") as line:
                state = self._state(line)
        if self._runs_again(state):
            code = _UNKNOWN_CODE if self._seen_end is None else self._seen_end
            return Exit(code, genuine=False, started_at=self._started or "", finished_at=str(state["FinishedAt"]))
        error, of_the_machine = self._init_error(code)
        return Exit(
            code=code,
            oom_killed=bool(state.get("OOMKilled")) or self._surely_for_memory(code, memory),
            # Never started: the 0 that the engine gives it means nothing.
            genuine=genuine and state["Status"] != "created",
            started_at=str(state["StartedAt"]),
            finished_at=str(state["FinishedAt"]),
            error=clean(str(state.get("Error") or ""), 300) or error,
            stopped_for=WorkerReason.ENGINE if of_the_machine else None,
        )

    def _vouched(self, line: Line, state: Mapping[str, Any], code: int) -> tuple[vouch.Memory, bool]:
        """What the engine remembers of it, and whether its exit code can be believed.

        Asked for in two parts: its own events are enough for nearly every container, and come in 0.5 ms. All events and
        /info, for which an engine runs other programs, take 40 ms of processor time.
        """
        genuine = partial(vouch.genuine, code=code, present=self._present, by_us=self._stopped)
        # Until a moment in the past, which ends the answer, while a moment that is 0 leaves nothing out of it (moby,
        # daemon/events/events.go). An engine that reads it otherwise answers with nothing, and the second part decides.
        flavour = self._engine.flavour()
        filters = json.dumps({**flavour.remembered_filters, "container": [self._id]})
        try:
            memory = vouch.Memory.of(line.events(**flavour.remembered, filters=filters), self._id)
        except Refused:  # it is told to keep no events, which others than Docker can be
            if flavour.ends_containers:
                raise
            memory = vouch.Memory()
        if not flavour.ends_containers:
            return memory, genuine(memory, older=True)
        sure = genuine(memory, older=False)
        if sure or not genuine(memory, older=True):  # the engine's age would change nothing
            return memory, sure
        info: Any = line.get("/info")
        bridge = line.get("/networks/bridge")
        # Up to this moment, by the engine's own clock: so it answers at once, and does not wait for more to happen.
        until = f"{vouch.when(info['SystemTime']).timestamp():.6f}"
        memory = vouch.Memory.of(line.events(since="0", until=until, filters=json.dumps(vouch.FILTERS)), self._id)
        older = bridge is not None and vouch.engine_is_older(
            bridge["Created"], bool(info["LiveRestoreEnabled"]), state["StartedAt"], state["FinishedAt"]
        )
        return memory, genuine(memory, older=older)

    def _surely_for_memory(self, code: int, memory: vouch.Memory) -> bool:
        """Whether an engine that never says so (`flavour`) saw a job end that was killed for memory: by KILL, which
        neither came from us nor through the engine, under a limit on memory."""
        flavour = self._engine.flavour()
        silent = not flavour.tells_out_of_memory and Limit.MEMORY not in flavour.missing
        return silent and code == _KILLED and not memory.signalled and not self._stopped

    def _state(self, line: Line) -> Mapping[str, Any]:
        found = line.get(f"/containers/{self._id}/json")
        if found is None or found["State"]["Status"] in {"removing", "dead"}:
            raise _removed()
        state: Mapping[str, Any] = found["State"]
        if self._started is None and state["Status"] != "created":
            self._started = str(state["StartedAt"])
        return state

    def _runs_again(self, state: Mapping[str, Any]) -> bool:
        """Of a container whose end was seen: whether a person started it again (FAULTS.md E11)."""
        return runs(state) or self._is_another_run(state)

    def _is_another_run(self, state: Mapping[str, Any]) -> bool:
        return self._started not in {None, state["StartedAt"]}

    def _init_error(self, code: int) -> tuple[str, bool]:
        """Why the program was never run, as far as the engine's init says so, and whether that init is the reason."""
        if code in {1, 126, 127}:
            with contextlib.suppress(WorkerFault):
                said = self._short_log()
                if TOO_LONG.fullmatch(said.rpartition("\n")[2]):  # not even the init could be run, by the job's doing
                    return ARGUMENTS, False
                if broken := INIT_BROKEN.fullmatch(said):
                    return str(init_fault(broken["why"])), True
                if failed := INIT_FAILED.match(said.rpartition("\n")[2]):
                    program = failed["program"] or self._program()
                    return cannot_run(program, failed["why"]) if program else NO_COMMAND, False
        return "", False

    def _short_log(self) -> str:
        """What it printed, if that is little: an init that cannot start its program prints a line, and that is all.

        Not by asking for the last line: Podman loses what of that was printed by a write before.
        """
        printed = b""
        with self._printed("all") as frames:
            for piece in frames:
                printed += piece
                if len(printed) > _LINE_BYTES:
                    return ""
        return "\n".join(printed.decode(errors="replace").splitlines())

    def _program(self) -> str:
        """What the init of Podman was to start: `catatonit -- PROGRAM ARGUMENTS`. Podman 5 starts even nothing: ``."""
        said = [str(word) for word in self._inspect().get("Args") or ()]
        return next(iter(said[said.index("--") + 1 :] if "--" in said else said), "what it was to start")

    def is_paused(self) -> bool:
        """See `Container.is_paused`. Not one that is held back: that is ours, and passes."""
        held = self._restraint is not None and self._restraint.held
        return bool(self._inspect()["State"]["Paused"]) and not held

    def written(self) -> Written:
        """See `Container.written`."""
        with self._api.calling("measure a container"):
            try:
                return written(self._api, self._id)
            except NotFound:
                raise _removed() from None

    def stop(self, grace_s: float) -> None:
        """See `Container.stop`. Raises WorkerFault(ENGINE) when it runs on, KILL or not (FAULTS.md E5)."""
        self._stopped = True
        failed: WorkerFault | None = None
        try:
            with self._pausing:
                if self._restraint is not None and self._restraint.held:  # what is paused hears no TERM
                    self._engine.unpause(self._id)
            self._stop(grace_s)
        except WorkerFault as fault:
            failed = fault
        found = self._api.inspect(self._id)  # whatever was answered: an engine may give up on a process that cannot die
        if failed and found is not None and found["State"]["Paused"]:  # Podman stops nothing that is paused
            self._engine.unpause(self._id)
            self._stop(grace_s)
            found = self._api.inspect(self._id)
        if found is not None and runs(found["State"]):
            why = f"the container {found['Name'].removeprefix('/')} was told to end and still runs"
            raise WorkerFault(WorkerReason.ENGINE, f"{why}: {failed}" if failed else why) from failed

    def _stop(self, grace_s: float) -> None:
        with self._api.calling("stop a container"):
            try:
                # It answers when the container has ended: after the grace and a KILL. Not running: nothing is done.
                self._api.ask(
                    "POST",
                    f"/containers/{self._id}/stop",
                    timeout_s=grace_s + self._api.work_s,
                    t=str(math.ceil(grace_s)),
                )
            except NotFound:
                return

    def save_logs(self, path: Path) -> None:
        """See `Container.save_logs`. Gone: an empty file. Raises WorkerFault(ENGINE or DISK)."""
        note = self._restraint.note() if self._restraint is not None else ""
        try:
            with self._printed("all") as frames, path.open("wb") as file:
                for piece in frames:
                    file.write(piece)
            if self._printed_first or frames.may_lack_its_begin:
                note += self._missing_begin()
            if note:
                put_before(path, note)
        except OSError as error:
            raise WorkerFault(WorkerReason.DISK, f"the job's log cannot be written: {error}") from error

    def _missing_begin(self) -> str:
        """The line that says so, if the first thing kept is not known to be the first that it printed."""
        with self._printed("all", timestamps="1") as frames:
            kept_since = time_of(frames)
        if not kept_since or kept_since == self._printed_first or (found := self._api.inspect(self._id)) is None:
            return ""
        return missing(kept_since, str(found["State"]["StartedAt"]), sure=bool(self._printed_first))

    def _look_at_begin(self) -> None:
        """While its log is short: when it printed first. Not of one that an earlier process started, for its log may
        have been long before."""
        if not self._watched or self._printed_first or self._engine.clock() < self._look_at:
            return
        self._look_at = self._engine.clock() + self._look_pause_s
        self._look_pause_s = min(2 * self._look_pause_s, _LOOK_MAX_S)
        with contextlib.suppress(WorkerFault), self._printed("all", timestamps="1") as frames:
            pieces = iter(frames)
            first = time_of(pieces)
            for _ in pieces:  # to its end
                if frames.may_lack_its_begin:
                    self._watched = False
                    return
            self._printed_first = first

    def _hold_back(self) -> None:
        """Pause it for a while where it prints without end, and have it go on afterwards (`flood`)."""
        restraint, now = self._restraint, self._engine.clock()
        if restraint is None or self._stopped or now < restraint.due:
            return
        if not self._engine.flavour().floods_cost_it:
            self._restraint = None
            return
        try:
            if restraint.held:
                self._engine.unpause(self._id)
                restraint.let_go(self._engine.clock())
            elif restraint.floods(self._time_of("1"), partial(self._time_of, "all"), now):
                name = self._inspect()["Name"].removeprefix("/")
                with self._pausing:  # not while it is being stopped
                    if self._is_being_stopped():
                        return
                    restraint.hold(self._engine.clock())  # first: the answer may be lost, and it be paused
                    if not self._engine.pause(self._id):
                        self._restraint = None
                        return
                if restraint.times == 1:
                    what = f"the container {name} prints without end and is paused again and again"
                    self._engine.emit("held_back", level="warning", message=what)
        except (JobFault, WorkerFault):  # gone, or its engine is: the next wait says so
            restraint.put_off(self._engine.clock())

    def _is_being_stopped(self) -> bool:
        return self._stopped  # by another thread

    def _time_of(self, tail: str) -> str:
        """When the first of its last so many lines was printed; nothing where there is none."""
        with self._printed(tail, timestamps="1") as frames:
            return time_of(frames)

    def _let_go_if_held(self) -> bool:
        """It is paused when it comes to us: if it prints without end, an earlier process of this worker paused it and
        was killed meanwhile. False where the engine did not answer, so that it is to be asked again."""
        try:
            with self._printed("all") as frames:
                for _ in frames:
                    pass
                if frames.may_lack_its_begin:
                    self._engine.unpause(self._id)
        except WorkerFault:
            return False
        return True

    def last_lines(self, count: int) -> str:
        """See `Container.last_lines`. Gone: nothing."""
        kept: deque[bytes] = deque()
        size = 0
        with self._printed(str(count)) as frames:
            for piece in frames:
                kept.append(piece)
                size += len(piece)
                while size - len(kept[0]) >= _LAST_BYTES:
                    size -= len(kept.popleft())
        text = b"".join(kept)[-_LAST_BYTES:].decode(errors="replace")
        return "\n".join(text.splitlines()[-count:])

    def remove(self) -> None:
        with self._api.calling("remove a container"):
            self._api.remove(self._id)
        self._engine.forget_held(self._id)
        if self.is_new and (left := end_unseen(self._id)):
            what = f"processes {', '.join(map(str, left))} of a job's container run on, and the engine knows nothing of"
            self._engine.emit("unseen", level="error", message=f"{what} them; end them, with root's rights (kill -9)")

    def _inspect(self) -> Mapping[str, Any]:
        found = self._api.inspect(self._id)
        if found is None:
            raise _removed()
        return found

    @contextlib.contextmanager
    def _printed(self, tail: str, **more: str) -> Iterator[Frames]:
        """What it printed, stdout and stderr in order, piece by piece; gone: nothing."""
        with contextlib.closing(self._log(tail, more)) as chunks:
            yield Frames(chunks)

    def _log(self, tail: str, more: Mapping[str, str]) -> Generator[bytes, None, None]:
        path, work_s = f"/containers/{self._id}/logs", self._api.work_s
        with self._api.calling("read a container's log"):
            try:
                with self._api.reading(path, timeout_s=work_s, stdout="1", stderr="1", tail=tail, **more) as answer:
                    yield from iter(partial(answer.read1, 64 * 1024), b"")
            except NotFound:
                return


def put_before(path: Path, line: str) -> None:
    """Make `line` the first of a file, which stays as it is where there is no room for that."""
    whole = path.with_name(f"{path.name}.whole")
    try:
        with path.open("rb") as old, whole.open("wb") as new:
            new.write(line.encode())
            shutil.copyfileobj(old, new, 1024 * 1024)
        whole.rename(path)
    except OSError:
        whole.unlink(missing_ok=True)


def _removed() -> JobFault:
    return JobFault(JobReason.REMOVED_OUTSIDE, "container removed from outside")


def _name(summary: Mapping[str, Any]) -> str:
    return str((summary.get("Names") or ["/"])[0]).removeprefix("/")
