"""The table of what a worker may ask of the engine, and what is looked at before each (FAULTS.md T33).

Used by `server`. One row is one call that the worker's rooms make (`engine`): method, path, the parameters it may have
and their values, and the function that looks and asks. What is in no row is refused with 403, and so are upgrades,
`exec`, `attach`, `build` and all the rest of an engine's API without being named here. Each function asks the engine in
words of its own, made from what was read, on the connection that belongs to this client's.

Whose a container is says the engine, not the client: by its label and its name, looked up by whatever the client called
it, and from then on by its id, which never comes to mean another one.
"""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from jobfetcher.broker import answers, boxes
from jobfetcher.broker.boxes import Machine, Policy
from jobfetcher.broker.ledger import Ledger
from jobfetcher.broker.pins import Pins, Way
from jobfetcher.broker.talk import (
    Answer,
    Engine,
    Gone,
    Peer,
    Refusal,
    Reply,
    Request,
    json_reply,
    refusal_reply,
    strict_json,
)
from jobfetcher.core.errors import JobfetcherError
from jobfetcher.core.run import Image
from jobfetcher.core.text import clean
from jobfetcher.engine import give_back, proof
from jobfetcher.engine.flavour import docker_flavour
from jobfetcher.engine.image_config import acting_env, label_keys
from jobfetcher.engine.images import means, own_init
from jobfetcher.engine.references import Reference, allowed, parse_reference
from jobfetcher.engine.run_spec import LABEL_INSTANCE, LABEL_JOB, OWN_NETWORK
from jobfetcher.engine.volumes import MOUNT_POINT
from jobfetcher.engine.vouch import FILTERS

_MIB = 1024 * 1024

#: The version that may stand before a path; the client learns it from the engine.
_VERSIONED = re.compile(r"(?P<version>/v1\.\d{1,3})?(?P<path>/.*)")

_ID = r"(?P<container>[0-9a-f]{64}|jobfetcher-[A-Za-z0-9_.-]{1,200})"
_ANY_ID = r"(?P<container>[0-9a-f]{64}|[0-9a-f]{12}|jobfetcher-[A-Za-z0-9_.-]{1,200})"
_IMAGE_ID = r"(?P<image>sha256:[0-9a-f]{64})"

#: An archive with nothing in it, of which the empty image is made (`engine.proof`): two blocks of zeros and padding.
_EMPTY_ARCHIVE = bytes(10240)

#: Names of images that are our own, which no registry is asked for.
_OUR_IMAGES = frozenset({"docker.io/library/jobfetcher-proof", f"docker.io/library/{give_back.NAME}"})

#: Most images whose configuration is kept.
_IMAGES_KEPT = 256

#: A line of a pull's progress is a small object; more than this without a line end is none.
_LINE_MAX = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ImageRules:
    """Of the machine owner's settings: ALLOWED_IMAGES (none: every image), and whether any may be pulled."""

    allowed: tuple[str, ...] = ()
    pulls: bool = True


@dataclass(frozen=True, slots=True)
class Call:
    """One request on its way: the parts of its path, and both sides. `version`: as it stood in the path."""

    request: Request
    version: str
    parts: Mapping[str, str]
    engine: Engine
    client: Peer

    @property
    def query(self) -> Mapping[str, str]:
        """Its parameters, which the row has checked."""
        return self.request.query

    def ask(
        self, method: str, path: str, query: Mapping[str, str] | None = None, body: bytes | None = None, **headers: str
    ) -> Answer:
        """Ask the engine, below the same version. Raises Gone."""
        return self.engine.ask(method, f"{self.version}{path}", query, body, **headers)

    def find(self, path: str, query: Mapping[str, str] | None = None) -> Any:
        """What GET answers, parsed. Raises Complaint where the engine answers with an error, and Gone."""
        answer = self.ask("GET", path, query)
        said = self.engine.whole(answer)
        if answer.status != http.client.OK:
            raise Complaint(answer.status, said)
        try:
            return json.loads(said)
        except ValueError as error:
            raise Gone("the engine's answer is no JSON") from error

    def passed(self, answer: Answer) -> Reply:
        """An answer as the engine gave it, read whole."""
        return Reply(answer.status, self.engine.whole(answer), {"Content-Type": _type_of(answer)})

    def streamed(self, answer: Answer, pieces: Iterator[bytes] | None = None) -> Reply:
        """An answer as it comes; an error is passed whole."""
        if answer.status != http.client.OK:
            return self.passed(answer)
        found = self.engine.pieces(answer) if pieces is None else pieces
        return Reply(answer.status, headers={"Content-Type": _type_of(answer)}, pieces=found)


class Complaint(Exception):
    """The engine refused a question of the broker's own; the client gets to hear it as it is."""

    def __init__(self, status: int, said: bytes) -> None:
        super().__init__(status)
        self.reply = Reply(status, said, {"Content-Type": "application/json"})


@dataclass(frozen=True, slots=True)
class Row:
    """`params`: what each parameter must match; `needs`: those that must be there. `body`: it may have one."""

    method: str
    path: str
    does: Callable[[Rules, Call], Reply]
    params: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    body: bool = False


class Rules:
    """What one broker lets pass. Thread-safe. `connect` opens another connection to the engine; it raises OSError."""

    def __init__(
        self,
        policy: Policy,
        images: ImageRules,
        ledger: Ledger,
        pins: Pins,
        connect: Callable[[Peer], Engine],
    ) -> None:
        self._policy = policy
        self._images = images
        self._ledger = ledger
        self._pins = pins
        self._connect = connect
        self._lock = threading.Lock()
        self._machine: Machine | None = None
        self._known: dict[str, Image] = {}
        self._networks: set[str] = set()
        self._pinned: set[str] = set()

    def engine_lost(self) -> None:
        """Another engine may answer next: what the last one said of itself is asked again."""
        self._machine = None

    def reply(self, request: Request, engine: Engine, client: Peer) -> Reply:
        """What a client gets for a request. Raises Refusal, and Gone where the engine's side ended."""
        found = _VERSIONED.fullmatch(request.path)
        path = found["path"] if found else ""
        for row in ROWS:
            matched = re.fullmatch(row.path, path) if row.method == request.method else None
            if found is None or matched is None:
                continue
            for name, value in request.query.items():
                if name not in row.params or not re.fullmatch(row.params[name], value, re.DOTALL):
                    raise Refusal(403, f"{request.method} {row_words(path)}: the parameter {clean(name, 40)} is not so")
            for name in row.needs:
                if name not in request.query:
                    raise Refusal(403, f"{request.method} {row_words(path)}: the parameter {name} must be there")
            if request.body and not row.body:
                raise Refusal(403, f"{request.method} {row_words(path)} has no body")
            call = Call(request, found["version"] or "", matched.groupdict(), engine, client)
            try:
                return row.does(self, call)
            except Complaint as complaint:
                return complaint.reply
        raise Refusal(403, f"{request.method} {row_words(path or request.path)} is not among what a worker asks")

    # -- the engine itself --------------------------------------------------------------------------------------------

    def ping(self, call: Call) -> Reply:
        answer = call.ask("GET", "/_ping")
        kept = {
            name: answer.headers[name.lower()] for name in ("Api-Version", "Ostype") if name.lower() in answer.headers
        }
        return Reply(answer.status, call.engine.whole(answer), {"Content-Type": "text/plain", **kept})

    def version(self, call: Call) -> Reply:
        return json_reply(200, answers.version(call.find("/version")))

    def info(self, call: Call) -> Reply:
        return json_reply(200, answers.info(call.find("/info")))

    def events(self, call: Call) -> Reply:
        wanted = _filters(call.query)
        containers = wanted.pop("container", [])
        if set(wanted) - set(FILTERS) or any(set(wanted[name]) - set(FILTERS[name]) for name in wanted):
            raise Refusal(403, "events: only of containers, and only create, start, kill and die")
        if containers:
            wanted["container"] = [self._container(call, one) for one in containers[:1]]
        query = {"since": "0", "until": call.query["until"], "filters": json.dumps({**FILTERS, **wanted})}
        answer = call.ask("GET", "/events", query)
        said = call.engine.whole(answer)
        if answer.status != http.client.OK:
            raise Complaint(answer.status, said)
        found = answers.events(said, self._policy.instance, self._ledger.containers)
        return Reply(200, found, {"Content-Type": "application/json"})

    def disk_usage(self, call: Call) -> Reply:
        ours = self._ours(call, {})
        query = {name: call.query[name] for name in ("type",) if name in call.query}
        return json_reply(200, answers.volumes(call.find("/system/df", query), ours))

    # -- containers ---------------------------------------------------------------------------------------------------

    def containers(self, call: Call) -> Reply:
        wanted = _filters(call.query)
        labels = wanted.pop("label", [])
        ours = f"{LABEL_INSTANCE}={self._policy.instance}"
        others = [one for one in labels if one != ours]
        job = rf"{re.escape(LABEL_JOB)}(=[A-Za-z0-9_.-]{{1,128}})?"
        if wanted or ours not in labels or any(not re.fullmatch(job, one) for one in others):
            raise Refusal(403, f"containers are listed by the label {ours}, and by that of a job")
        return json_reply(200, self._ours(call, {"label": others}))

    def inspect(self, call: Call) -> Reply:
        """Of one that is not ours it is told whether PATH_BASE is mounted there, and nothing of one where it is not."""
        wanted = call.parts["container"]
        query = {name: call.query[name] for name in ("size",) if name in call.query}
        found = call.find(f"/containers/{wanted}/json", query)
        if answers.is_ours(found, self._policy.instance):
            self._ledger.is_ours(str(found["Id"]), str(found["Name"]).removeprefix("/"))
            return json_reply(200, found)
        if mounted := answers.mounts_over(found, self._policy.host_base):
            return json_reply(200, mounted)
        return refusal_reply(404, f"No such container: {wanted}")

    def create(self, call: Call) -> Reply:
        name = call.query["name"]
        body = strict_json(call.request.body)
        asked = boxes.read(body)
        made = boxes.make(
            name,
            body,
            asked,
            policy=self._policy,
            machine=self._engine_facts(call),
            image=lambda: self._image(call, asked.image),
            own_image=self._own_image(call, asked.image),
            client=call.client.user,
            network_mode=self._network(call, asked.host.network),
        )
        if self._is_taken(call, name):  # its mounts are not to be touched
            return refusal_reply(409, f"Conflict. The container name {name} is already in use")
        if missing := self._pin(name, made.ways):
            return missing
        config = made.mounted_from(self._pins.places(name, len(made.ways)))
        limit = {"size": f"{self._policy.box.layer_mib}m"}
        status, said = 0, b""
        if made.unlimited_layer and self._engine_facts(call).flavour.limits_layers:
            limited = {**config, "HostConfig": {**config["HostConfig"], "StorageOpt": limit}}
            status, said = self._create(call, name, limited)
        if status in {0, 400, 500} and (not status or self._cannot_limit_layers(said)):
            status, said = self._create(call, name, config)
            self._cannot_limit_layers(said)
        if status == http.client.CREATED:
            self._ledger.is_ours(str(json.loads(said)["Id"]), name)
        else:
            self._unpin(name)
        return Reply(status, said, {"Content-Type": "application/json"})

    def _create(self, call: Call, name: str, config: Mapping[str, Any]) -> tuple[int, bytes]:
        body = json.dumps(config).encode()
        answer = call.ask("POST", "/containers/create", {"name": name}, body, Content_Type="application/json")
        return answer.status, call.engine.whole(answer)

    def _cannot_limit_layers(self, said: bytes) -> bool:
        """Whether the engine says that its disk holds no limits on layers; then none is tried again (`docker`)."""
        if not re.search(rb"(?i)storage-opt|pquota", said) or self._machine is None:
            return False
        self._machine = replace(self._machine, flavour=replace(self._machine.flavour, limits_layers=False))
        return True

    def start(self, call: Call) -> Reply:
        container = self._container(call, call.parts["container"])
        name = self._ledger.name_of(container) or ""
        if name not in self._pinned and (missing := self._pin_again(call, container, name)):
            return missing
        reply = call.passed(call.ask("POST", f"/containers/{container}/start"))
        self._unpin(name)  # it has mounts of its own now, or none
        return reply

    def wait(self, call: Call) -> Reply:
        container = self._container(call, call.parts["container"])
        query = {"condition": call.query.get("condition", "not-running")}
        return call.streamed(call.ask("POST", f"/containers/{container}/wait", query))

    def stop(self, call: Call) -> Reply:
        container = self._container(call, call.parts["container"])
        return call.passed(call.ask("POST", f"/containers/{container}/stop", {"t": call.query.get("t", "10")}))

    def pause(self, call: Call) -> Reply:
        container = self._container(call, call.parts["container"])
        return call.passed(call.ask("POST", f"/containers/{container}/pause"))

    def unpause(self, call: Call) -> Reply:
        container = self._container(call, call.parts["container"])
        return call.passed(call.ask("POST", f"/containers/{container}/unpause"))

    def remove(self, call: Call) -> Reply:
        container = self._container(call, call.parts["container"])
        reply = call.passed(call.ask("DELETE", f"/containers/{container}", {"v": "1", "force": "1"}))
        if name := self._ledger.name_of(container):
            self._unpin(name)
        return reply

    def logs(self, call: Call) -> Reply:
        container = self._container(call, call.parts["container"])
        return call.streamed(call.ask("GET", f"/containers/{container}/logs", dict(call.query)))

    def link(self, call: Call) -> Reply:
        container = self._container(call, call.parts["container"])
        answer = call.ask("HEAD", f"/containers/{container}/archive", {"path": call.query["path"]})
        stat = answer.headers.get("x-docker-container-path-stat")
        headers = {} if stat is None else {"X-Docker-Container-Path-Stat": stat}
        return Reply(answer.status, headers={**headers, "Content-Length": "0"}, bodiless=True)

    # -- images -------------------------------------------------------------------------------------------------------

    def images(self, call: Call) -> Reply:
        return json_reply(200, answers.image_ids(call.find("/images/json", {"all": "1"})))

    def image(self, call: Call) -> Reply:
        wanted = call.parts["image"]
        if wanted.startswith("sha256:") or wanted == proof.IMAGE or wanted.startswith(f"{give_back.NAME}:"):
            found = call.find(f"/images/{wanted}/json")
            if wanted != proof.IMAGE and not self._helper(call).is_this(found):
                self._accept(found)
            return json_reply(200, found)
        reference = self._reference(wanted)
        found = call.find(f"/images/{reference}/json")
        self._ledger.tell(str(found["Id"]), str(reference))
        return json_reply(200, found)

    def pull_or_import(self, call: Call) -> Reply:
        return self._import(call) if "fromSrc" in call.query else self._pull(call)

    def load(self, call: Call) -> Reply:
        """The helper's image, of our own copy: what the client sends is only compared."""
        ours = self._helper(call)
        if call.request.body != ours.archive:
            raise Refusal(403, f"only the worker's own helper is loaded ({ours.name})")
        return call.passed(
            call.ask("POST", "/images/load", {"quiet": "1"}, ours.archive, Content_Type="application/x-tar")
        )

    def forget(self, call: Call) -> Reply:
        """Only what we brought, and only while nobody else gave it a name."""
        image = call.parts["image"]
        reference = self._ledger.brought_as(image)
        if reference is None:
            return refusal_reply(409, "this worker did not bring that image, so it does not remove it")
        found = call.find(f"/images/{image}/json")
        names = [*(found.get("RepoTags") or ()), *(found.get("RepoDigests") or ())]
        if not all(means(parse_reference(reference), str(name)) for name in names):
            return refusal_reply(409, "that image has another name as well, so it is not removed")
        reply = call.passed(call.ask("DELETE", f"/images/{image}", {"noprune": "1"}))
        if reply.status == http.client.OK:
            self._ledger.forget(image)
        return reply

    # -- networks -----------------------------------------------------------------------------------------------------

    def networks(self, call: Call) -> Reply:
        if "filters" in call.query and _filters(call.query) != {"name": [OWN_NETWORK]}:
            raise Refusal(403, f"networks are looked for by the name {OWN_NETWORK}")
        query = {"filters": json.dumps({"name": [OWN_NETWORK]})} if "filters" in call.query else {}
        return json_reply(200, answers.networks(call.find("/networks", query)))

    def bridge(self, call: Call) -> Reply:
        return json_reply(200, answers.bridge(call.find("/networks/bridge")))

    def make_network(self, call: Call) -> Reply:
        if self._policy.box.network != OWN_NETWORK:
            raise Refusal(403, "jobs have another network here (JOB_NETWORK), so none is made")
        flavour = self._engine_facts(call).flavour
        wanted = {
            "Name": OWN_NETWORK,
            "Driver": "bridge",
            "Options": dict(flavour.network_options),
            "CheckDuplicate": True,
        }
        if where := boxes.difference(wanted, strict_json(call.request.body)):
            raise Refusal(403, f"networks/create: {where}")
        body = json.dumps(wanted).encode()
        return call.passed(call.ask("POST", "/networks/create", body=body, Content_Type="application/json"))

    # -- what they share ----------------------------------------------------------------------------------------------

    def _container(self, call: Call, wanted: str) -> str:
        """The id of a container that is ours. Raises Refusal for another, and Complaint where there is none."""
        if self._ledger.name_of(wanted) is not None:
            return wanted
        if not re.fullmatch(_ID, wanted):
            raise Refusal(403, "a container is called by its id, or by a name of this worker's")
        found = call.find(f"/containers/{wanted}/json")
        if not answers.is_ours(found, self._policy.instance):
            raise Refusal(403, f"the container {clean(wanted, 80)} is not this worker's")
        container = str(found["Id"])
        self._ledger.is_ours(container, str(found["Name"]).removeprefix("/"))
        return container

    def _ours(self, call: Call, more: Mapping[str, list[str]]) -> list[Mapping[str, Any]]:
        labels = [f"{LABEL_INSTANCE}={self._policy.instance}", *more.get("label", [])]
        found = call.find("/containers/json", {"all": "1", "filters": json.dumps({"label": labels})})
        return answers.containers(found, self._policy.instance)

    def _is_taken(self, call: Call, name: str) -> bool:
        answer = call.ask("GET", f"/containers/{name}/json")
        call.engine.whole(answer)
        return answer.status == http.client.OK

    def _engine_facts(self, call: Call) -> Machine:
        if (machine := self._machine) is None:
            said = call.find("/info")
            architecture = str(call.find("/version").get("Arch"))
            machine = Machine(float(said["NCPU"]), int(said["MemTotal"]) // _MIB, docker_flavour(said), architecture)
            self._machine = machine
        return machine

    def _network(self, call: Call, wanted: str) -> str:
        """The network that a job's container is to have, as the client calls ours by its id. Raises Refusal."""
        network = self._policy.box.network
        if network != OWN_NETWORK:
            return network or "none"
        if wanted == "none":  # the helper has none, whatever jobs have
            return wanted
        if wanted not in self._networks:
            if not re.fullmatch(r"[0-9a-f]{64}", wanted):
                raise Refusal(
                    403, f"create: HostConfig.NetworkMode is the id of the network {OWN_NETWORK} (JOB_NETWORK)"
                )
            found = call.find(f"/networks/{wanted}")
            options = self._engine_facts(call).flavour.network_options
            if found.get("Name") != OWN_NETWORK or not options.items() <= (found.get("Options") or {}).items():
                raise Refusal(
                    403, f"create: HostConfig.NetworkMode is another network than {OWN_NETWORK} (JOB_NETWORK)"
                )
            self._networks.add(wanted)
        return wanted

    def _reference(self, text: str) -> Reference:
        """A name of an image that jobs may run. Raises Refusal."""
        try:
            reference = parse_reference(text)
        except ValueError as error:
            raise Refusal(403, f"{clean(text, 100)} is no name of an image: {error}") from None
        if str(reference) != text:
            raise Refusal(403, f"the image {clean(text, 100)} must be called {reference}")
        if reference.repository in _OUR_IMAGES:
            raise Refusal(403, f"the image {reference} is the worker's own, and in no registry")
        if self._images.allowed and not allowed(reference, self._images.allowed):
            raise Refusal(403, f"the image {reference} is not among ALLOWED_IMAGES of this broker", is_attempt=False)
        return reference

    def _accept(self, found: Mapping[str, Any]) -> None:
        """See that an image may be run that is asked for by its id. Raises Refusal."""
        image = str(found["Id"])
        if self._ledger.was_told_of(image) or not self._images.allowed:
            return
        for name in [*(found.get("RepoTags") or ()), *(found.get("RepoDigests") or ())]:
            try:
                reference = parse_reference(str(name))
            except ValueError:
                continue
            if allowed(reference, self._images.allowed):
                self._ledger.tell(image, str(reference))
                return
        raise Refusal(403, f"the image {image[:19]} has no name that is among ALLOWED_IMAGES of this broker")

    def _image(self, call: Call, image_id: str) -> Image:
        """What of an image a container's configuration depends on. Raises Refusal, Complaint where it is gone."""
        if image_id in self._known:
            return self._known[image_id]
        found = call.find(f"/images/{image_id}/json")
        self._accept(found)
        config = found.get("Config") or {}
        try:
            image = Image(
                image_id,
                image_id,
                None,
                "",
                volumes=tuple(sorted(config.get("Volumes") or ())),
                own_init=own_init(config),
                labels=label_keys(config),
                env=acting_env(config),
            )
        except JobfetcherError as error:
            raise Refusal(403, f"create: {clean(str(error), 200)}", is_attempt=False) from None
        with self._lock:
            if len(self._known) >= _IMAGES_KEPT:
                self._known.clear()
            self._known[image_id] = image
        return image

    def _own_image(self, call: Call, image_id: str) -> Literal["", "proof", "helper"]:
        """Which of the worker's own images this is, where the container's name says that it is one."""
        name = call.query["name"]
        try:
            if "-proof-" in name and call.find(f"/images/{proof.IMAGE}/json")["Id"] == image_id:
                return "proof"
            if "-own-" in name and self._helper(call).is_this(call.find(f"/images/{image_id}/json")):
                return "helper"
        except Complaint:
            pass
        return ""

    def _helper(self, call: Call) -> give_back.Helper:
        """The image of the program that gives files back. Raises Refusal where there is none for this machine."""
        try:
            return give_back.helper(self._engine_facts(call).architecture)
        except JobfetcherError as error:
            raise Refusal(403, str(error), is_attempt=False) from None

    def _pin(self, name: str, ways: Sequence[Way]) -> Reply | None:
        """Have the mounts of a container lead where they say; an engine's answer where that cannot be."""
        try:
            self._pins.add(name, ways)
        except OSError as error:
            self._pins.remove(name)
            why = "bind source path does not exist" if isinstance(error, FileNotFoundError) else "no plain directory"
            said = f'invalid mount config for type "bind": {why}: {self._policy.host_base}/{"/".join(ways[0])}'
            return refusal_reply(400, f"{said} ({error.strerror})")
        self._pinned.add(name)
        return None

    def _pin_again(self, call: Call, container: str, name: str) -> Reply | None:
        """The same for one that was made by a broker before this one, from its own mounts."""
        found = call.find(f"/containers/{container}/json")
        job = str((found["Config"].get("Labels") or {}).get(LABEL_JOB, ""))
        targets = [str(mount["Target"]) for mount in found["HostConfig"].get("Mounts") or ()]
        ways: list[Way] = []
        for place, target in zip(self._pins.places(name, len(targets)), targets, strict=True):
            sources = [mount["Source"] for mount in found["HostConfig"]["Mounts"] if mount["Target"] == target]
            if sources != [place]:  # made without a broker, before there was one: it leads where it says, as it did
                return None
            inner = target.removeprefix(MOUNT_POINT).strip("/")
            ways.append(("jobs", job, "files", *(inner.split("/") if inner else ())) if job else ("proof",))
        if "-own-" in name:  # which directory that was, a broker before this one knew; the worker makes another box
            return refusal_reply(409, f"the box {name} was made by a broker that has ended")
        return self._pin(name, ways) if ways else None

    def _unpin(self, name: str) -> None:
        self._pinned.discard(name)
        self._pins.remove(name)

    def _import(self, call: Call) -> Reply:
        """The empty image, of an archive of our own: what the client sends is only looked at."""
        if dict(call.query) != {"fromSrc": "-", "repo": proof.IMAGE}:
            raise Refusal(403, f"only the worker's own empty image is imported ({proof.IMAGE})")
        if any(call.request.body) or len(call.request.body) > len(_EMPTY_ARCHIVE):
            raise Refusal(403, f"the image {proof.IMAGE} has nothing in it")
        answer = call.ask("POST", "/images/create", dict(call.query), _EMPTY_ARCHIVE, Content_Type="application/x-tar")
        return call.passed(answer)

    def _pull(self, call: Call) -> Reply:
        if not self._images.pulls:
            raise Refusal(403, "nothing is pulled here (PULL_POLICY=never)", is_attempt=False)
        repository, tag = call.query.get("fromImage", ""), call.query.get("tag", "")
        reference = self._reference(f"{repository}{'@' if ':' in tag else ':'}{tag}")
        credentials = call.request.headers.get("x-registry-auth", "e30=")
        if not re.fullmatch(r"[A-Za-z0-9+/_=-]*", credentials):
            raise Refusal(403, "X-Registry-Auth is base64")
        query = {"fromImage": reference.repository, "tag": reference.digest or str(reference.tag)}
        answer = call.ask("POST", "/images/create", query, X_Registry_Auth=credentials)
        return call.streamed(answer, self._followed(call, answer, reference))

    def _followed(self, call: Call, answer: Answer, reference: Reference) -> Iterator[bytes]:
        """A pull's progress, and note what it brought: what was not here before the first layer was spoken of."""
        before: set[str] | None = None
        line = b""
        for piece in call.engine.pieces(answer):
            if before is None:
                *lines, line = (line + piece).split(b"\n")
                line = b"" if len(line) > _LINE_MAX else line
                if any(_speaks_of_layer(one) for one in lines):
                    before = {one["Id"] for one in self._aside(call, "/images/json", {"all": "1"})}
            yield piece
        if before is not None:
            try:
                image = str(self._aside(call, f"/images/{reference}/json")["Id"])
            except Complaint:  # it did not arrive
                return
            self._ledger.tell(image, str(reference))
            if image not in before:
                self._ledger.brought(image, str(reference))

    def _aside(self, call: Call, path: str, query: Mapping[str, str] | None = None) -> Any:
        """What GET answers on another connection, while this one is busy. Raises Complaint, Gone."""
        try:
            with closing(self._connect(call.client)) as engine:
                return Call(call.request, call.version, {}, engine, call.client).find(path, query)
        except OSError as error:
            raise Gone(str(error)) from error


def _filters(query: Mapping[str, str]) -> dict[str, list[str]]:
    """The parameter `filters`: lists of words by name. Raises Refusal."""
    found = strict_json(query.get("filters", "{}").encode())
    if not isinstance(found, dict) or not all(
        isinstance(words, list) and all(isinstance(word, str) for word in words) for words in found.values()
    ):
        raise Refusal(403, "filters are lists of words")
    return found


def _speaks_of_layer(line: bytes) -> bool:
    """Whether a line of a pull's progress shows that the registry has something that is not here (`images`)."""
    try:
        report = json.loads(line)
    except ValueError:
        return False
    return (
        isinstance(report, dict) and bool(report.get("id")) and not str(report.get("status")).startswith("Pulling from")
    )


def _type_of(answer: Answer) -> str:
    found = answer.headers.get("content-type", "")
    return found if re.fullmatch(r"[A-Za-z0-9./;=+ -]{1,100}", found) else "application/octet-stream"


def row_words(path: str) -> str:
    """A path as it is named in a sentence."""
    return clean(path, 80)


_SECONDS = r"\d{1,10}(\.\d{1,9})?"

#: What a worker asks, and nothing else.
ROWS: tuple[Row, ...] = (
    Row("GET", "/_ping", Rules.ping),
    Row("GET", "/version", Rules.version),
    Row("GET", "/info", Rules.info),
    # `until` ends the answer; without it the engine would go on telling.
    Row("GET", "/events", Rules.events, {"since": "0", "until": _SECONDS, "filters": ".{2,2000}"}, ("until",)),
    Row("GET", "/system/df", Rules.disk_usage, {"type": "volume"}),
    Row("GET", "/containers/json", Rules.containers, {"all": "1", "filters": ".{2,2000}"}, ("filters",)),
    Row("POST", "/containers/create", Rules.create, {"name": r"[A-Za-z0-9_.-]{1,200}"}, ("name",), body=True),
    Row("GET", f"/containers/{_ANY_ID}/json", Rules.inspect, {"size": "1"}),
    Row("POST", f"/containers/{_ID}/start", Rules.start),
    Row("POST", f"/containers/{_ID}/wait", Rules.wait, {"condition": "not-running|next-exit|removed"}),
    Row("POST", f"/containers/{_ID}/stop", Rules.stop, {"t": r"\d{1,6}"}),
    Row("POST", f"/containers/{_ID}/pause", Rules.pause),
    Row("POST", f"/containers/{_ID}/unpause", Rules.unpause),
    Row("DELETE", f"/containers/{_ID}", Rules.remove, {"v": "1", "force": "1"}, ("v", "force")),
    Row(
        "GET",
        f"/containers/{_ID}/logs",
        Rules.logs,
        {"stdout": "1", "stderr": "1", "tail": r"all|\d{1,6}", "timestamps": "1"},
    ),
    # What a link in the container leads to: no file of it is read.
    Row("HEAD", f"/containers/{_ID}/archive", Rules.link, {"path": "/.{0,4096}"}, ("path",)),
    Row("GET", "/images/json", Rules.images, {"all": "1"}),
    Row("GET", "/images/(?P<image>.{1,400})/json", Rules.image),
    Row(
        "POST",
        "/images/create",
        Rules.pull_or_import,
        {"fromImage": ".{1,300}", "tag": ".{1,200}", "fromSrc": "-", "repo": ".{1,100}"},
        body=True,
    ),
    Row("POST", "/images/load", Rules.load, {"quiet": "1"}, ("quiet",), body=True),
    Row("DELETE", f"/images/{_IMAGE_ID}", Rules.forget, {"noprune": "1"}, ("noprune",)),
    Row("GET", "/networks", Rules.networks, {"filters": ".{2,200}"}),
    Row("GET", "/networks/bridge", Rules.bridge),
    Row("POST", "/networks/create", Rules.make_network, body=True),
)
