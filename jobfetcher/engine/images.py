"""Images: is it allowed, is it here, bring it, does it fit this machine.

Used by `docker` for `Engine.prepare`. Promises: what is returned was checked, and is named by its id, so no tag can
move between the check and the run (FAULTS.md T14); a pull has no total limit, but ends when nothing moves for a while
or when the job must end; a missing or denied image fails at once (E6), a registry out of reach is tried again (E7).
The engine is asked to pull only from where it may (`registries`), and of what a registry answers a job's details get
which of a few known things it means: its words go into this worker's log alone (T25), for a job can have the engine ask
whom it likes, and would read the answers of others there.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import posixpath
import re
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, Literal
from urllib.parse import urlencode

from jobfetcher.core.errors import JobFault, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.failpoints import failpoint
from jobfetcher.core.halt import Halt
from jobfetcher.core.ports import Emit, PullProgress, PullWaits
from jobfetcher.core.run import Image
from jobfetcher.core.text import clean, unnumbered
from jobfetcher.engine.api import EngineApi, NotFound, Refused
from jobfetcher.engine.image_config import acting_env, label_keys
from jobfetcher.engine.references import Reference, allowed, parse_reference
from jobfetcher.engine.registries import Egress, RegistryRules
from jobfetcher.engine.volumes import inner_folders

#: Longest line of progress that is read, in bytes: one is a small JSON object.
_LINE_MAX = 1024 * 1024

#: So much of what a registry says is read, in characters: searching a MiB that it wrote for that can take minutes.
_SAID_MAX = 4096

#: Longest pause between two tries at a registry, in seconds (FAULTS.md J8).
_PAUSE_MAX_S = 60.0

#: Where an image is here, with `newer`: a registry that says nothing for so long is out of reach, and so long it is not
#: asked again, in seconds. An engine gives up a registry that does not even take the connection after 15 s.
_PATIENCE_S, _REST_S = 60.0, 300.0

#: What an engine says of its proxies is believed for so long, in seconds: asking costs it some 20 ms.
_EGRESS_S = 60.0

#: Of so many images it is remembered what was said last.
_SAYINGS_KEPT = 64

#: An empty object, as the engine wants credentials.
_NO_CREDENTIALS = "e30="

#: Programs that refuse to be any process but the first one: s6-overlay, busybox and sysvinit, and their kind.
_INITS = frozenset({"init", "systemd", "openrc-init", "runit-init", "s6-overlay-suexec"})

#: What an engine of one architecture also runs.
_ALSO_RUNS = {"amd64": {"386"}, "arm64": {"arm"}}

#: What engines and registries say, in the order in which they are looked for. Docker Hub has the same words for a
#: missing repository and a private one ("pull access denied, repository does not exist or may require 'docker login'").
_SAYINGS: tuple[tuple[re.Pattern[str], JobReason | WorkerReason, str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), reason, sentence)
    for pattern, reason, sentence in (
        (r"no space left on device", WorkerReason.DISK, "the engine's disk is full while pulling {image}"),
        (r"no matching manifest for", JobReason.IMAGE_ARCHITECTURE, "image {image} is not made for this machine"),
        (r"toomanyrequests|too many requests", WorkerReason.REGISTRY, "the registry of {image} asks to come later"),
        (
            r"(?<!permission )denied|forbidden|unauthorized|authentication required|no basic auth credentials",
            JobReason.IMAGE_DENIED,
            "the registry does not give image {image} to this worker, or does not have it",
        ),
        (
            r"manifest unknown|name unknown|(?:manifest for|repository) .* not found|404 page not found|: not found",
            JobReason.IMAGE_MISSING,
            "the registry does not have image {image}",
        ),
        (
            r"dial tcp|connection refused|connection reset|no such host|i/o timeout|handshake timeout|\bEOF\b"
            r"|unreachable|no route to host|deadline exceeded|request canceled|proxyconnect",
            WorkerReason.REGISTRY,
            "the registry of {image} is out of reach",
        ),
        (
            r"x509: |tls: ",
            WorkerReason.REGISTRY,
            "the engine does not trust the certificate of the registry of {image}",
        ),
    )
)

#: What else a registry says is its trouble, and is tried again.
_UNKNOWN = "image {image} cannot be pulled now, the registry's answer is not known"

#: Platforms that are named to people (`go tool dist list`); what else an image says of itself are its author's words.
_PLATFORM = re.compile(
    r"(?:(?:linux|windows|freebsd|darwin|wasip1)/)?"
    r"(?:386|amd64|arm|arm64|loong64|mips(?:64)?(?:le)?|ppc64(?:le)?|riscv64|s390x|wasm)"
)


class PullPolicy(StrEnum):
    """When the registry is asked. An image named by digest is never asked for twice: it cannot change.

    ALWAYS and NEWER ask for each job, which is one request (HEAD, in new engines) and no download where nothing has
    changed. ALWAYS runs only what the registry has, and waits for one that is out of reach. NEWER lets nobody wait for
    a registry while an image of that name is here, and runs one that was made here and was never in a registry.
    """

    NEWER = "newer"
    ALWAYS = "always"
    IF_NOT_PRESENT = "if-not-present"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class ImagePolicy:
    """What the machine's owner says about images.

    `allowed`: globs on the normalised reference (see `references.allowed`); none: every image. `inactivity_s`: a pull
    during which nothing is heard for so long is cut. `registry_budget_s`: how long a registry out of reach is tried.
    `docker_config`: the file with credentials; None: where `docker login` puts it. `registries`: which of them may be
    asked; None: every one, for tools whose images no stranger names.
    """

    allowed: tuple[str, ...] = ()
    pull: PullPolicy = PullPolicy.NEWER
    inactivity_s: float = 300.0
    registry_budget_s: float = 1800.0
    docker_config: str | None = None
    registries: RegistryRules | None = None


@dataclass(frozen=True, slots=True)
class _Pull:
    """Who hears of a pull: `progress` of its bytes, and `begins` when the registry has something that is not here,
    before it is."""

    progress: PullProgress
    begins: Callable[[], None]


class Images:
    """The images of one engine. Thread-safe; the same image is prepared by one thread at a time.

    `emit` hears `image_cached` (a cached image is used, the registry being away or refusing it), `registry_back`, and
    with `registry_said` the words that go nowhere else.
    """

    def __init__(
        self, api: EngineApi, policy: ImagePolicy, emit: Emit, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._api = api
        self._policy = policy
        self._emit = emit
        self._clock = clock
        self._lock = threading.Lock()
        #: Registries that were out of reach, or refused us, while an image was here, and when they are asked again.
        self._away: dict[str, float] = {}
        #: What the registry of each image said last.
        self._said: dict[str, str] = {}
        #: How the engine reaches registries, and until when that is believed.
        self._egress, self._egress_until = Egress(), -math.inf
        self._busy: weakref.WeakValueDictionary[str, threading.Lock] = weakref.WeakValueDictionary()

    def prepare(self, reference: str, halt: Halt, progress: PullProgress, waits: PullWaits | None = None) -> Image:
        """The image on this machine, checked. See `Engine.prepare` for the errors.

        A cached image is used where the registry is out of reach (`always`: after the whole budget), and with `newer`
        also where the registry does not give it: because it was made here and never was in that registry, or because
        this worker's credentials are not taken any more. An image that came from a registry which now says that it does
        not have it is not run by either: its tag was taken away.
        """
        halt.check()
        wanted = self._parse(reference)
        with self._alone(str(wanted), halt):
            cached = self._find(wanted)
            if self._asks(wanted, cached is not None):
                before = self._ids() if cached is None else None

                def begins() -> None:  # where nothing has changed, that costs more than all the rest
                    nonlocal before
                    before = self._ids() if before is None else before

                found = self._refresh(wanted, cached, halt, _Pull(progress, begins), waits or _nobody_waits)
                return self._check(wanted, found, pulled=before is not None and found["Id"] not in before)
            if cached is None:
                raise WorkerFault(WorkerReason.POLICY, f"image {wanted} is not on this machine, and PULL_POLICY=never")
            return self._check(wanted, cached)

    def known(self, image_id: str) -> Image | None:
        """Of an image on this machine, by its id, what must not come along. None: it is gone, or no job can have it."""
        with self._api.calling("inspect an image"):
            try:
                config = self._api.ask("GET", f"/images/{image_id}/json").json().get("Config") or {}
                return Image(image_id, image_id, None, "", labels=label_keys(config), env=acting_env(config))
            except (NotFound, JobFault):
                return None

    def forget(self, image_id: str, reference: str) -> bool:
        """See `Engine.forget_image`; `reference` is what `prepare` named it.

        One whose tag has moved on has no name left, and goes as well: nobody else names it. The engine itself refuses
        what a container uses, running or not, and what other images stand on.
        """
        wanted = parse_reference(reference)
        with self._api.calling("remove an image"):
            try:
                found = self._api.ask("GET", f"/images/{image_id}/json").json()
                names = [*(found.get("RepoTags") or ()), *(found.get("RepoDigests") or ())]
                if not all(means(wanted, str(name)) for name in names):
                    return False
                # noprune: what it was built on, if it was built here after all, is not ours.
                self._api.ask("DELETE", f"/images/{image_id}", timeout_s=self._api.work_s, noprune="1")
            except NotFound:
                return True
            except Refused as error:
                if error.status == http.client.CONFLICT:
                    return False
                raise
            return True

    def _asks(self, wanted: Reference, here: bool) -> bool:
        """Whether the registry is asked."""
        match self._policy.pull:
            case PullPolicy.ALWAYS | PullPolicy.NEWER:
                return not here or wanted.digest is None
            case PullPolicy.IF_NOT_PRESENT:
                return not here
            case PullPolicy.NEVER:
                return False

    def _parse(self, reference: str) -> Reference:
        try:
            wanted = parse_reference(reference)
        except ValueError as error:
            raise JobFault(
                JobReason.IMAGE_MISSING, f"{clean(reference, 200)!r} is not an image reference: {error}"
            ) from None
        if self._policy.allowed and not allowed(wanted, self._policy.allowed):
            # The owner of this machine says no; another worker may run it.
            raise WorkerFault(WorkerReason.POLICY, f"image {wanted} is not among the ALLOWED_IMAGES of this worker")
        return wanted

    @contextlib.contextmanager
    def _alone(self, key: str, halt: Halt) -> Iterator[None]:
        with self._lock:
            lock = self._busy.setdefault(key, threading.Lock())
        while not lock.acquire(timeout=0.5):  # another job pulls it; look up twice a second whether this one must end
            halt.check()
        try:
            yield
        finally:
            lock.release()

    def _find(self, wanted: Reference) -> Mapping[str, Any] | None:
        with self._api.calling("inspect an image"):
            try:
                found: Mapping[str, Any] = self._api.ask("GET", f"/images/{wanted}/json").json()
            except NotFound:
                return None
            return found

    def _ids(self) -> set[str]:
        """The images on this machine, those without a name too: what is among them was not pulled by us."""
        with self._api.calling("list images"):
            return {str(image["Id"]) for image in self._api.ask("GET", "/images/json", all="1").json()}

    def _found(self, wanted: Reference) -> Mapping[str, Any]:
        found = self._find(wanted)
        if found is None:
            raise WorkerFault(WorkerReason.ENGINE, f"image {wanted} was pulled, but is not on this machine any more")
        return found

    def _check(self, wanted: Reference, found: Mapping[str, Any], *, pulled: bool = False) -> Image:
        with self._api.calling("say its architecture"):
            ours = self._api.version.architecture
        # An image that does not say what it is for is an old import, made on this machine.
        theirs = str(found.get("Architecture") or ours)
        if found.get("Os", "linux") != "linux":
            theirs = f"{found['Os']}/{theirs}"
        if theirs != ours and theirs not in _ALSO_RUNS.get(ours, ()):
            shown = theirs if _PLATFORM.fullmatch(theirs) else "for another kind of machine"
            raise JobFault(JobReason.IMAGE_ARCHITECTURE, f"image is {shown}, this worker is {ours}")
        config = found.get("Config") or {}
        volumes = tuple(sorted(config.get("Volumes") or ()))
        inner_folders(volumes)  # what no container can have is told before anything of it is on record
        return Image(
            id=str(found["Id"]),
            reference=str(wanted),
            digest=_digest(wanted, found),
            architecture=theirs,
            size_bytes=int(found.get("Size") or 0),
            pulled=pulled,
            volumes=volumes,
            own_init=own_init(config),
            labels=label_keys(config),
            env=acting_env(config),
        )

    def _refresh(
        self,
        wanted: Reference,
        cached: Mapping[str, Any] | None,
        halt: Halt,
        pull: _Pull,
        waits: PullWaits,
    ) -> Mapping[str, Any]:
        """Pull, again while the registry is out of reach and the budget lasts; then what is cached, if anything."""
        lenient = cached if self._policy.pull is PullPolicy.NEWER else None
        if lenient is not None and self._clock() < self._away.get(wanted.domain, 0.0):
            return lenient
        try:
            if lenient is None:
                self._pull(wanted, halt, pull, waits)
            else:
                self._pull_once(wanted, halt, pull, min(_PATIENCE_S, self._policy.inactivity_s))
            failpoint("after:pull")
        except JobFault as fault:
            if lenient is not None and _was_made_here(wanted, lenient):
                self._emit("image_cached", level="debug", message=f"using the image {wanted}, which was made here")
            elif lenient is not None and fault.reason is JobReason.IMAGE_DENIED:
                self._use_cached(wanted, fault, rests=True)
            elif cached is not None:
                self._log(wanted, fault)
                why = f"{fault} (PULL_POLICY=if-not-present would use the local image)"
                raise JobFault(fault.reason, why) from fault
            else:
                self._log(wanted, fault)
                raise
            return lenient
        except WorkerFault as fault:
            # `newer` runs what is here where the registry may not be asked: nothing of a stranger's is asked for that.
            is_refused = fault.reason is WorkerReason.POLICY and lenient is not None
            if cached is None or not (is_refused or fault.reason is WorkerReason.REGISTRY):
                self._log(wanted, fault)
                raise
            self._use_cached(wanted, fault, rests=lenient is not None)
            return cached
        if self._away.pop(wanted.domain, None) is not None:
            self._emit("registry_back", message=f"the registry {wanted.domain} answers again")
        return self._found(wanted)

    def _use_cached(self, wanted: Reference, fault: JobFault | WorkerFault, *, rests: bool) -> None:
        """Say so, once while a registry is away or refuses us (FAULTS.md J10)."""
        known = rests and wanted.domain in self._away
        if rests:
            self._away[wanted.domain] = self._clock() + _REST_S
        said = f" (it said: {words})" if (words := _words(fault)) else ""
        message = f"using the local image of {wanted}: {fault}{said}"
        self._emit("image_cached", level="debug" if known else "warning", message=message)

    def _log(self, wanted: Reference, fault: JobFault | WorkerFault) -> None:
        """A registry's own words, for this machine's owner alone; once while they stay the same (FAULTS.md J10)."""
        words = _words(fault)
        known = self._said.get(str(wanted)) == unnumbered(words)
        if not words or known:
            return
        while len(self._said) >= _SAYINGS_KEPT:
            self._said.pop(next(iter(self._said)), None)
        self._said[str(wanted)] = unnumbered(words)
        self._emit(
            "registry_said", level="warning", message=f"pulling image {wanted}, the engine or registry said: {words}"
        )

    def _judge(self, wanted: Reference, halt: Halt) -> None:
        """Raise WorkerFault unless its registry may be asked (`RegistryRules.check`). Raises Stopped."""
        if (rules := self._policy.registries) is None:
            return
        if self._clock() >= self._egress_until:
            with self._api.calling("say how it reaches registries"):
                self._egress = Egress.of(self._api.ask("GET", "/info").json())
            self._egress_until = self._clock() + _EGRESS_S
        judged, refused, egress = threading.Event(), list[Exception](), self._egress

        def judge() -> None:
            try:
                rules.check(wanted, egress)
            except Exception as error:  # it is raised below
                refused.append(error)
            finally:
                judged.set()

        # In a thread: nothing ends a look-up, which takes half a minute where no name server answers, but a job that
        # must end has no time for it (FAULTS.md B17).
        with halt.waking(judged.set):
            threading.Thread(target=judge, name="registry-name", daemon=True).start()
            judged.wait()
        halt.check()
        for error in refused:
            raise error

    def _pull(self, wanted: Reference, halt: Halt, pull: _Pull, waits: PullWaits) -> None:
        give_up = self._clock() + self._policy.registry_budget_s
        pause = 1.0
        while True:
            halt.check()
            try:
                return self._pull_once(wanted, halt, pull, self._policy.inactivity_s)
            except WorkerFault as fault:
                if fault.reason is not WorkerReason.REGISTRY or self._clock() + pause > give_up:
                    raise
                self._log(wanted, fault)
                waits(str(fault), give_up - self._clock())
            halt.wait(pause)
            pause = min(pause * 2, _PAUSE_MAX_S)

    def _pull_once(self, wanted: Reference, halt: Halt, pull: _Pull, inactivity_s: float) -> None:
        self._judge(wanted, halt)
        # The API takes a digest where it takes a tag.
        query = urlencode({"fromImage": wanted.repository, "tag": wanted.digest or wanted.tag})
        headers = {"X-Registry-Auth": self._credentials(wanted)}
        with (
            self._api.calling("pull an image"),
            contextlib.closing(self._api.line(inactivity_s)) as line,
            halt.waking(partial(_hang_up, line.sock)),
        ):
            try:
                line.request("POST", f"/v{self._api.version.api}/images/create?{query}", headers=headers)
                with line.getresponse() as answer:
                    if answer.status != http.client.OK:
                        raise _fault(wanted, _message(answer.read(_LINE_MAX)))
                    _follow(wanted, answer, pull)
            except TimeoutError:
                raise WorkerFault(
                    WorkerReason.REGISTRY,
                    f"pulling image {wanted} was cut: nothing moved for {inactivity_s:g} s",
                ) from None
            except (OSError, ValueError, http.client.HTTPException):
                halt.check()  # then it was we who hung up
                raise
            halt.check()

    def _credentials(self, wanted: Reference) -> str:
        """What `docker login` keeps for this registry, read afresh, as the engine wants it; none: empty credentials."""
        if self._policy.docker_config is not None and not os.path.lexists(self._policy.docker_config):
            return _NO_CREDENTIALS
        from docker import auth  # it takes 0.1 s and 15 MiB to load, and most machines have logged in nowhere
        from docker.errors import DockerException

        try:
            config = auth.load_config(self._policy.docker_config)
            found = auth.resolve_authconfig(config, wanted.domain)
        except (DockerException, ValueError, OSError) as error:
            raise WorkerFault(
                WorkerReason.REGISTRY, f"the docker config's credentials cannot be read: {clean(str(error), 200)}"
            ) from error
        return auth.encode_header(found or {}).decode()


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        sock.shutdown(socket.SHUT_RDWR)


def _follow(wanted: Reference, answer: http.client.HTTPResponse, pull: _Pull) -> None:
    """Read a pull's progress, one JSON object a line, to its end; raise what it reports as an error."""
    layers: dict[str, tuple[int, int]] = {}
    begun = False
    while line := answer.readline(_LINE_MAX):
        if not line.strip():
            continue
        report = json.loads(line)
        if not isinstance(report, dict):
            raise ValueError("a line of progress is no object")
        if "error" in report or "errorDetail" in report:
            raise _fault(wanted, str(report.get("error") or report.get("errorDetail")))
        # Of an image that is up to date no layer is spoken of: only the tag, `Pulling from`, and its digest.
        if not begun and report.get("id") and not str(report.get("status")).startswith("Pulling from"):
            begun = True
            pull.begins()
        if _note(layers, report):
            pull.progress(sum(done for done, _ in layers.values()), sum(total for _, total in layers.values()))


def _note(layers: dict[str, tuple[int, int]], report: Mapping[str, Any]) -> bool:
    """Enter one line into the bytes known of each layer; True if it changed them. Unpacking is not counted again."""
    layer, detail = str(report.get("id", "")), report.get("progressDetail")
    current, total = (detail.get("current", 0), detail.get("total")) if isinstance(detail, dict) else (0, None)
    match report.get("status"):
        case "Downloading" if isinstance(current, int) and isinstance(total, int):
            layers[layer] = (current, total)
        case "Download complete" if layer in layers:
            layers[layer] = (layers[layer][1], layers[layer][1])
        case _:
            return False
    return True


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")


def _fault(wanted: Reference, said: str) -> JobFault | WorkerFault:
    """What a failed pull means, in our own words; what was said is kept with it (`_words`). What nobody here has seen
    before is the registry's trouble: it is tried again."""
    said = said[:_SAID_MAX]
    words = _without_name(wanted, said)
    reason, sentence = next(
        ((reason, sentence) for pattern, reason, sentence in _SAYINGS if pattern.search(words)),
        (WorkerReason.REGISTRY, _UNKNOWN),
    )
    message = f"{sentence.format(image=wanted)} (its words are in the log of the worker)"
    fault = JobFault(reason, message) if isinstance(reason, JobReason) else WorkerFault(reason, message)
    fault.add_note(clean(said, 300))
    return fault


def _words(fault: JobFault | WorkerFault) -> str:
    """What the engine or a registry said, kept apart from the message, which goes to the job's user (FAULTS.md T25)."""
    return "; ".join(getattr(fault, "__notes__", ()))


def _without_name(wanted: Reference, said: str) -> str:
    """What was said, without the image's own name, which may spell anything, such as `lab/denied:forbidden`."""
    path = re.escape(wanted.path.removeprefix("library/"))
    tag = f"|(?<=[:/]){re.escape(wanted.tag)}(?![A-Za-z0-9_.-])" if wanted.tag else ""
    return re.sub(rf"(?:(?<=/)|(?<=for )|(?<=repository ))(?:library/)?{path}(?![a-z0-9_.-]){tag}", "IMAGE", said)


def means(wanted: Reference, name: str) -> bool:
    """Whether a name that an image has came with `wanted`: itself, or the digest that the engine notes with a pull."""
    try:
        known = parse_reference(name)
    except ValueError:
        return False
    return known == wanted or (wanted.digest is None and known.tag is None and known.repository == wanted.repository)


def own_init(config: Mapping[str, Any]) -> Literal["", "entry point", "command"]:
    """What of an image is a program that must be process 1, by the names such programs have."""
    entry_point, command = config.get("Entrypoint") or (), config.get("Cmd") or ()
    if entry_point:
        return "entry point" if posixpath.basename(str(entry_point[0])) in _INITS else ""
    return "command" if command and posixpath.basename(str(command[0])) in _INITS else ""


def _was_made_here(wanted: Reference, found: Mapping[str, Any]) -> bool:
    """Whether it was built or loaded on this machine: the engine notes a digest of what it pulled or pushed."""
    return not any(means(wanted, str(digest)) for digest in found.get("RepoDigests") or ())


def _digest(wanted: Reference, found: Mapping[str, Any]) -> str | None:
    """`repository@sha256:...` as the registry knows it. The engine lists one per repository, in its short spelling."""
    for text in found.get("RepoDigests") or ():
        with contextlib.suppress(ValueError):
            known = parse_reference(str(text))
            if known.repository == wanted.repository and (wanted.digest or known.digest) == known.digest:
                return str(known)
    return None


def _nobody_waits(why: str, for_s: float) -> None:
    """For a caller who does not ask what a pull waits for."""
