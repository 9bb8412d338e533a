"""A worker that was wholly taken over, at the broker's socket: what it asks, and what arrives at the engine (T33)."""

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from jobfetcher.broker import boxes
from jobfetcher.broker.ledger import Ledger
from jobfetcher.broker.pins import Pins
from jobfetcher.broker.rules import ImageRules, Rules
from jobfetcher.broker.server import Broker, connect
from jobfetcher.core.job import Job, JobId
from jobfetcher.core.machine import Share
from jobfetcher.core.run import Image
from jobfetcher.engine import proof
from jobfetcher.engine.api import EngineApi
from jobfetcher.engine.box import box
from jobfetcher.engine.run_spec import OWN_NETWORK, BoxPolicy, build_run_spec
from tests.support.broker import Told
from tests.support.counting_engine import CountingEngine, counting_engine
from tests.support.mounts import needs_root

pytestmark = [pytest.mark.fault("T33"), needs_root]

INSTANCE = "abcd1234"
HOST_BASE = "/srv/worker"
IMAGE, PROOF, STRANGE, LABELLED = (f"sha256:{number * 64}" for number in "1234")
NETWORK, BRIDGE = "a" * 64, "b" * 64
OURS, OTHER, LABEL_ONLY = "c" * 64, "d" * 64, "e" * 64
NAME = f"jobfetcher-{INSTANCE}-7-1"
POLICY = BoxPolicy()


def _container(identity: str, name: str, labels: dict[str, str]) -> dict[str, Any]:
    return {
        "Id": identity,
        "Name": f"/{name}",
        "State": {"Status": "running", "Running": True},
        "Config": {"Labels": labels, "Env": ["SECRET=word"]},
        "HostConfig": {"Mounts": []},
        "Mounts": [{"Type": "bind", "Source": "/etc", "Destination": "/x"}],
    }


def _image(identity: str, *names: str, **config: Any) -> dict[str, Any]:
    return {"Id": identity, "RepoTags": list(names), "RepoDigests": [], "Config": config, "Os": "linux"}


def _both(path: str, *names: str, found: Any) -> dict[str, Any]:
    return {path.format(name): found for name in names}


#: What is on the machine: a job of ours, other people's containers, one of which has our label, images, networks.
THERE: dict[str, Any] = {
    "/version": {"ApiVersion": "1.41", "Arch": "amd64", "Os": "linux"},
    "/info": {"NCPU": 4, "MemTotal": 8 * 2**30, "SecurityOptions": ["name=seccomp,profile=default"], "Name": "host"},
    **_both("/containers/{}/json", OURS, NAME, found=_container(OURS, NAME, {"jobfetcher.instance": INSTANCE})),
    **_both("/containers/{}/json", OTHER, OTHER[:12], "database", found=_container(OTHER, "database", {})),
    f"/containers/{LABEL_ONLY}/json": _container(LABEL_ONLY, "stranger", {"jobfetcher.instance": INSTANCE}),
    **_both("/images/{}/json", IMAGE, "docker.io/lab/tool:1", found=_image(IMAGE, "lab/tool:1")),
    **_both("/images/{}/json", STRANGE, "docker.io/other/thing:1", found=_image(STRANGE, "other/thing:1")),
    **_both("/images/{}/json", PROOF, proof.IMAGE, found=_image(PROOF, proof.IMAGE)),
    f"/images/{LABELLED}/json": _image(LABELLED, "lab/labelled:1", Labels={"traefik.enable": "true"}),
    f"/networks/{NETWORK}": {
        "Name": OWN_NETWORK,
        "Driver": "bridge",
        "Options": {"com.docker.network.bridge.enable_icc": "false"},
    },
    f"/networks/{BRIDGE}": {"Name": "bridge", "Driver": "bridge", "Options": {}},
}


class Taken:
    """A worker that was taken over: whatever it sends, byte by byte, and how it was answered."""

    def __init__(self, path: Path, engine: CountingEngine, told: Told) -> None:
        self.path = path
        self.engine = engine
        self.told = told

    def send(self, content: bytes) -> bytes:
        """All that comes back for these bytes, which are all there is."""
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(20)
            line.connect(str(self.path))
            with contextlib.suppress(OSError):  # it may be hung up on before it has said all
                line.sendall(content)
                line.shutdown(socket.SHUT_WR)
            found = b""
            with contextlib.suppress(ConnectionError):
                while piece := line.recv(65536):
                    found += piece
        return found

    def ask(self, method: str, target: str, body: Any = None, *headers: str) -> int:
        """The status of the answer to one request."""
        content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"{method} {target} HTTP/1.1", "Host: localhost", *headers]
        if content:
            lines += [f"Content-Length: {len(content)}", "Content-Type: application/json"]
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(20)
            line.connect(str(self.path))
            line.sendall("\r\n".join([*lines, "", ""]).encode() + content)
            with contextlib.closing(http.client.HTTPResponse(line, method=method)) as answer:
                answer.begin()
                answer.read()
                return answer.status


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that is short enough for sockets, with the directories of one job in it."""
    folder = tmp_path_factory.mktemp("broker")
    (folder / "base" / "jobs" / "7" / "files").mkdir(parents=True)
    (folder / "base" / "proof").mkdir()
    return folder


@pytest.fixture(scope="module")
def taken(place: Path) -> Iterator[Taken]:
    """One broker for all attacks, with an engine behind it that counts."""
    told = Told()
    policy = boxes.Policy(INSTANCE, HOST_BASE, POLICY, gpus=frozenset())
    pins = Pins(place / "base", INSTANCE, place / "mounts")
    pins.open()
    with counting_engine(place, THERE) as engine:
        connected: Callable[..., Any] = lambda client: connect(engine.url, client)  # noqa: E731
        rules = Rules(policy, ImageRules(("docker.io/lab/*",)), Ledger(), pins, connected)
        with Broker(place / "broker.sock", frozenset(), rules, connected, told, told_at_once=1e6) as broker:
            thread = threading.Thread(target=broker.serve)
            thread.start()
            yield Taken(place / "broker.sock", engine, told)
            broker.close()
            thread.join()
    pins.remove(NAME)


def job_box(**changes: Any) -> dict[str, Any]:
    """What a worker sends for a job; `changes` of Env, of the image, and of the command."""
    spec = build_run_spec(
        Job(id=JobId("7"), image="lab/tool:1", command=("echo hello",), env={"MODE": "fast"}),
        Share(1.0, 64, ()),
        image=Image(IMAGE, "docker.io/lab/tool:1", None, "amd64"),
        files_host_path=f"{HOST_BASE}/jobs/7/files",
        attempt=1,
        instance=INSTANCE,
        policy=POLICY,
    )
    made: dict[str, Any] = json.loads(json.dumps(box(spec, NETWORK)))
    for path, value in changes.items():
        *way, last = path.split("__")
        part = made
        for name in way:
            part = part[name]
        part[last] = value
    return made


def mount(source: str = f"{HOST_BASE}/jobs/7/files", target: str = "/files", kind: str = "bind", **more: Any) -> Any:
    return {"HostConfig__Mounts": [{"Type": kind, "Source": source, "Target": target, **more}]}


def host(**fields: Any) -> dict[str, Any]:
    return {f"HostConfig__{name}": value for name, value in fields.items()}


#: Fields of a create that open the box, or that the box does not have.
FIELDS: list[dict[str, Any]] = [
    host(Privileged=True),
    host(Privileged=False),
    host(Binds=["/:/host"]),
    host(Binds=[f"{HOST_BASE}/jobs/7/files:/files"]),
    host(Binds=["name:/data"]),
    host(VolumesFrom=["database"]),
    host(VolumeDriver="local"),
    host(Devices=[{"PathOnHost": "/dev/sda", "PathInContainer": "/dev/sda", "CgroupPermissions": "rwm"}]),
    host(DeviceCgroupRules=["a *:* rwm"]),
    host(DeviceRequests=[{"Count": -1, "Capabilities": [["gpu"]]}]),
    host(DeviceRequests=[{"DeviceIDs": ["all"], "Capabilities": [["gpu"]]}]),
    host(DeviceRequests=[{"DeviceIDs": ["0"], "Capabilities": [["gpu"]]}]),
    host(DeviceRequests=[{"DeviceIDs": ["GPU-11111111-2222-3333-4444-555555555555"], "Capabilities": [["gpu"]]}]),
    host(DeviceRequests=[{"Driver": "cdi", "DeviceIDs": ["vendor.com/x=all"], "Capabilities": [["gpu"]]}]),
    host(PidMode="host"),
    host(PidMode="container:database"),
    host(UTSMode="host"),
    host(IpcMode="host"),
    host(IpcMode="shareable"),
    host(IpcMode="container:database"),
    host(UsernsMode="host"),
    host(CgroupParent="/"),
    host(CgroupParent="system.slice"),
    host(CgroupnsMode="host"),
    host(Cgroup="container:database"),
    host(Sysctls={"kernel.core_pattern": "|/files/x"}),
    host(Sysctls={"net.ipv4.ip_forward": "1"}),
    host(SecurityOpt=[]),
    host(SecurityOpt=None),
    host(SecurityOpt=["seccomp=unconfined"]),
    host(SecurityOpt=["no-new-privileges", "seccomp=unconfined"]),
    host(SecurityOpt=["no-new-privileges", "apparmor=unconfined"]),
    host(SecurityOpt=["no-new-privileges", "label=disable"]),
    host(SecurityOpt=["no-new-privileges", "systempaths=unconfined"]),
    host(SecurityOpt=["no-new-privileges=false"]),
    host(GroupAdd=["0"]),
    host(GroupAdd=["docker"]),
    host(OomScoreAdj=-1000),
    host(OomKillDisable=True),
    host(Runtime="runc-debug"),
    host(Runtime="nvidia"),
    host(AutoRemove=True),
    host(RestartPolicy={"Name": "always"}),
    host(RestartPolicy={"Name": "no", "MaximumRetryCount": 5}),
    host(PortBindings={"80/tcp": [{"HostPort": "80"}]}),
    host(PublishAllPorts=True),
    host(ExtraHosts=["registry:10.0.0.1"]),
    host(Links=["database:db"]),
    host(Dns=["10.0.0.1"]),
    host(DnsOptions=["ndots:5"]),
    host(DnsSearch=["corp"]),
    host(Tmpfs={"/run": "exec,suid"}),
    host(MaskedPaths=[]),
    host(ReadonlyPaths=[]),
    host(StorageOpt={"size": "1T"}),
    host(LogConfig={"Type": "syslog", "Config": {"syslog-address": "tcp://10.0.0.1:514"}}),
    host(LogConfig={"Type": "gelf", "Config": {"gelf-address": "udp://10.0.0.1:1"}}),
    host(LogConfig={"Type": "json-file", "Config": {}}),
    host(LogConfig={"Type": "none", "Config": {}}),
    host(NetworkMode="host"),
    host(NetworkMode="bridge"),
    host(NetworkMode=BRIDGE),
    host(NetworkMode="container:database"),
    host(NetworkMode="f" * 64),
    host(NetworkMode="default"),
    host(NetworkMode=""),
    host(CapAdd=["SYS_ADMIN"]),
    host(CapAdd=["ALL"]),
    host(CapAdd=[*job_box()["HostConfig"]["CapAdd"], "NET_RAW"]),
    host(CapDrop=[]),
    host(CapDrop=None),
    host(Capabilities=["CAP_SYS_ADMIN"]),
    host(Ulimits=[]),
    host(Ulimits=[{"Name": "core", "Soft": -1, "Hard": -1}]),
    host(PidsLimit=-1),
    host(PidsLimit=0),
    host(PidsLimit=1_000_000),
    host(PidsLimit=None),
    host(Memory=0),
    host(Memory=-1),
    host(Memory=2**50),
    host(Memory=64 * 2**20 + 1),
    host(MemorySwap=-1),
    host(MemorySwap=2**50),
    host(MemorySwappiness=100),
    host(MemoryReservation=1),
    host(KernelMemory=1),
    host(NanoCpus=0),
    host(NanoCpus=10**15),
    host(NanoCpus=-1),
    host(CpuShares=100_000),
    host(CpuPeriod=100),
    host(CpuQuota=-1),
    host(CpuRealtimePeriod=1_000_000),
    host(CpuRealtimeRuntime=950_000),
    host(CpusetCpus="0"),
    host(CpusetMems="0"),
    host(BlkioWeight=1000),
    host(BlkioDeviceWriteBps=[{"Path": "/dev/sda", "Rate": 1}]),
    host(ShmSize=2**50),
    host(ReadonlyRootfs=True),
    host(Init=False),
    host(InitPath="/files/init"),
    host(ContainerIDFile="/etc/x"),
    host(ConsoleSize=[1, 1]),
    host(Isolation="process"),
    host(Annotations={"run.oci.keep_original_groups": "1"}),
    host(privileged=True),
    {"HostConfig": None},
    {"HostConfig": []},
    mount("/"),
    mount("/etc"),
    mount("/var/run/docker.sock"),
    mount("/var/run/docker.sock", "/files/docker.sock"),
    mount(HOST_BASE),
    mount(f"{HOST_BASE}/"),
    mount(f"{HOST_BASE}/jobs"),
    mount(f"{HOST_BASE}/jobs/7"),
    mount(f"{HOST_BASE}/jobs/8/files"),
    mount(f"{HOST_BASE}/jobs/7/files/../../../.."),
    mount(f"{HOST_BASE}/jobs/7/files/."),
    mount(f"{HOST_BASE}//jobs/7/files"),
    mount(f"{HOST_BASE}/jobs/7/files/"),
    mount(f"{HOST_BASE}x/jobs/7/files"),
    mount("srv/worker/jobs/7/files"),
    mount(""),
    mount(target="/"),
    mount(target="/etc"),
    mount(target="/files/../etc"),
    mount(kind="volume", source="name"),
    mount(kind="volume", source="", VolumeOptions={"DriverConfig": {"Name": "local", "Options": {"device": "/"}}}),
    mount(kind="tmpfs"),
    mount(kind="npipe"),
    mount(kind="image"),
    mount(BindOptions={"Propagation": "rshared"}),
    mount(BindOptions={"NonRecursive": True}),
    mount(BindOptions={"CreateMountpoint": True}),
    mount(ReadOnly=False),
    mount(Consistency="default"),
    {"HostConfig__Mounts": []},
    {"HostConfig__Mounts": None},
    {"HostConfig__Mounts": [*job_box()["HostConfig"]["Mounts"], {"Type": "bind", "Source": "/", "Target": "/host"}]},
    {"HostConfig__Mounts": 2 * job_box()["HostConfig"]["Mounts"]},
    {"User": "0"},
    {"User": "1000"},
    {"Entrypoint": ["/bin/sh"]},
    {"Entrypoint": []},
    {"Cmd": ["/bin/sh"]},
    {"Cmd": ["/bin/bash", "-c", "id"]},
    {"Cmd": "id"},
    {"Healthcheck": {"Test": ["CMD-SHELL", "id"]}},
    {"StopSignal": "SIGKILL"},
    {"StopTimeout": 100_000},
    {"Tty": True},
    {"OpenStdin": True},
    {"AttachStdin": True},
    {"Volumes": {"/data": {}}},
    {"ExposedPorts": {"80/tcp": {}}},
    {"WorkingDir": "/files"},
    {"Hostname": "host"},
    {"Domainname": "corp"},
    {"MacAddress": "02:42:ac:11:00:02"},
    {"NetworkDisabled": True},
    {"Shell": ["/bin/sh"]},
    {"OnBuild": ["RUN id"]},
    {"NetworkingConfig": {"EndpointsConfig": {"bridge": {}}}},
    {"NetworkingConfig": {"EndpointsConfig": {"corp": {"IPAMConfig": {"IPv4Address": "10.0.0.9"}}}}},
    {"Platform": "linux/arm64"},
    {"Labels": {}},
    {"Labels": {"jobfetcher.instance": "other000", "jobfetcher.job": "7", "jobfetcher.attempt": "1"}},
    {"Labels": {**job_box()["Labels"], "traefik.enable": "true"}},
    {"Labels": {**job_box()["Labels"], "traefik.enable": ""}},
    {"Labels": {**job_box()["Labels"], "jobfetcher.job": "8"}},
    {"Labels": {**job_box()["Labels"], "jobfetcher.attempt": "2"}},
    {"Env": ["MODE=fast", "NVIDIA_VISIBLE_DEVICES=all"]},
    {"Env": ["MODE=fast"]},
    {"Env": ["MODE=fast", "NVIDIA_VISIBLE_DEVICES=void", "NVIDIA_DRIVER_CAPABILITIES=all"]},
    {"Env": ["NVIDIA_VISIBLE_DEVICES=void", "NVIDIA_VISIBLE_DEVICES=all"]},
    {"Env": ["MODE=fast", "NVIDIA_VISIBLE_DEVICES=void", "NVIDIA_MIG_CONFIG_DEVICES=all"]},
    {"Env": ["MODE=fast", "NVIDIA_VISIBLE_DEVICES=void", "DOCKER_HOST=tcp://10.0.0.1"]},
    {"Env": ["PATH"]},
    {"Env": None},
    {"Image": "docker.io/lab/tool:1"},
    {"Image": "lab/tool"},
    {"Image": STRANGE},
    {"Image": LABELLED},
    {"Image": f"sha256:{'9' * 64}"},
    {"Image": ""},
    {"Image": PROOF},
    {"image": IMAGE},
]

_OTHERS = [OTHER, OTHER[:12], "database", LABEL_ONLY, "jobfetcher", f"jobfetcher-{'f' * 8}-7-1"]

#: What a container can be asked for that is somebody else's.
_THEIRS = [
    ("POST", "/containers/{}/start"),
    ("POST", "/containers/{}/stop?t=1"),
    ("POST", "/containers/{}/wait?condition=removed"),
    ("POST", "/containers/{}/pause"),
    ("POST", "/containers/{}/unpause"),
    ("DELETE", "/containers/{}?v=1&force=1"),
    ("GET", "/containers/{}/logs?stdout=1&stderr=1&tail=all"),
    ("HEAD", "/containers/{}/archive?path=/etc/shadow"),
    ("GET", "/containers/{}/json"),
]

#: What no worker asks, of its own containers neither.
_NEVER = [
    ("POST", "/containers/{}/exec"),
    ("POST", "/containers/{}/attach?stream=1"),
    ("GET", "/containers/{}/attach/ws"),
    ("POST", "/containers/{}/kill?signal=KILL"),
    ("POST", "/containers/{}/restart"),
    ("POST", "/containers/{}/rename?name=database"),
    ("POST", "/containers/{}/update"),
    ("POST", "/containers/{}/resize?h=1&w=1"),
    ("GET", "/containers/{}/archive?path=/"),
    ("PUT", "/containers/{}/archive?path=/"),
    ("GET", "/containers/{}/export"),
    ("GET", "/containers/{}/top"),
    ("GET", "/containers/{}/stats"),
    ("GET", "/containers/{}/changes"),
    ("POST", "/containers/{}/copy"),
    ("POST", "/containers/{}/checkpoints"),
    ("GET", "/containers/{}/logs?stdout=1&follow=1"),
    ("GET", "/containers/{}/logs?stdout=1&since=0"),
    ("DELETE", "/containers/{}?v=1&force=1&link=1"),
    ("DELETE", "/containers/{}"),
    ("POST", "/containers/{}/wait?condition=sometime"),
    ("POST", "/containers/{}/start?checkpoint=x"),
    ("POST", "/containers/{}/start?detachKeys=x"),
    ("POST", "/containers/{}/stop?t=-1"),
    ("POST", "/containers/{}/stop?signal=SIGSTOP"),
    ("POST", "/commit?container={}&repo=lab/tool"),
]

#: Everything else of an engine.
_ELSEWHERE = [
    ("POST", f"/exec/{OURS}/start"),
    ("POST", f"/exec/{OURS}/resize"),
    ("GET", f"/exec/{OURS}/json"),
    ("POST", "/containers/prune"),
    ("GET", "/containers/json"),
    ("GET", "/containers/json?all=1"),
    ("GET", "/containers/json?all=1&filters={}"),
    ("GET", f"/containers/json?filters={quote(json.dumps({'label': ['jobfetcher.instance']}))}"),
    ("GET", f"/containers/json?filters={quote(json.dumps({'label': ['jobfetcher.instance=other']}))}"),
    ("GET", f"/containers/json?filters={quote(json.dumps({'name': ['database']}))}"),
    ("GET", f"/containers/json?size=1&filters={quote(json.dumps({'label': [f'jobfetcher.instance={INSTANCE}']}))}"),
    ("POST", "/build"),
    ("POST", "/build?remote=http://10.0.0.1/"),
    ("POST", "/build/prune"),
    ("POST", "/build/cancel?id=1"),
    ("POST", "/images/load"),
    ("POST", "/images/create?fromSrc=http://10.0.0.1/x.tar&repo=lab/tool"),
    ("POST", "/images/create?fromSrc=-&repo=lab/tool:1"),
    ("POST", "/images/create?fromSrc=-&repo=jobfetcher-proof:1&changes=ENTRYPOINT+x"),
    ("POST", "/images/create?fromImage=docker.io/other/thing&tag=1"),
    ("POST", "/images/create?fromImage=127.0.0.1:5000/lab/tool&tag=1"),
    ("POST", "/images/create?fromImage=docker.io.evil.example/lab/tool&tag=1"),
    ("POST", "/images/create?fromImage=docker.io/lab/tool&tag=1&platform=linux/arm64"),
    ("POST", "/images/create?fromImage=docker.io/lab/tool"),
    ("POST", "/images/create?fromImage=docker.io/lab/tool:1&tag=2"),
    ("POST", "/images/create?fromImage=docker.io/library/jobfetcher-proof&tag=1"),
    ("POST", "/images/create?fromImage=docker.io/lab/../other/thing&tag=1"),
    ("POST", "/images/create?fromImage=docker.io/lab/tool&fromSrc=-&tag=1"),
    ("GET", f"/images/{STRANGE}/json"),
    ("GET", "/images/docker.io/other/thing:1/json"),
    ("GET", "/images/other/thing:1/json"),
    ("POST", "/images/lab/tool:1/tag?repo=docker.io/lab/mine&tag=1"),
    ("POST", "/images/lab/tool:1/push"),
    ("GET", "/images/lab/tool:1/get"),
    ("GET", "/images/get?names=lab/tool:1"),
    ("GET", "/images/lab/tool:1/history"),
    ("GET", "/images/search?term=x"),
    ("POST", "/images/prune"),
    ("DELETE", "/images/lab/tool:1?noprune=1"),
    ("DELETE", f"/images/{STRANGE}?noprune=1"),
    ("DELETE", f"/images/{IMAGE}?noprune=1"),
    ("DELETE", f"/images/{IMAGE}?noprune=1&force=1"),
    ("DELETE", f"/images/{IMAGE}"),
    ("GET", "/volumes"),
    ("POST", "/volumes/create"),
    ("DELETE", "/volumes/data"),
    ("POST", "/volumes/prune"),
    ("GET", "/networks/corp"),
    ("GET", f"/networks?filters={quote(json.dumps({'name': ['corp']}))}"),
    ("POST", "/networks/create"),
    ("POST", f"/networks/{NETWORK}/connect"),
    ("POST", f"/networks/{NETWORK}/disconnect"),
    ("DELETE", f"/networks/{NETWORK}"),
    ("POST", "/networks/prune"),
    ("GET", "/events"),
    ("GET", "/events?since=0"),
    ("GET", "/events?since=0&until=never"),
    ("GET", f"/events?since=0&until=0&filters={quote(json.dumps({'type': ['image']}))}"),
    ("GET", f"/events?since=0&until=0&filters={quote(json.dumps({'container': [OTHER]}))}"),
    ("GET", f"/events?since=0&until=0&filters={quote(json.dumps({'event': ['exec_create']}))}"),
    ("GET", "/system/df?type=container"),
    ("POST", "/auth"),
    ("GET", "/distribution/lab/tool/json"),
    ("POST", "/session"),
    ("POST", "/grpc"),
    ("GET", "/swarm"),
    ("POST", "/swarm/init"),
    ("POST", "/swarm/join"),
    ("GET", "/nodes"),
    ("GET", "/services"),
    ("POST", "/services/create"),
    ("GET", "/tasks"),
    ("GET", "/secrets"),
    ("POST", "/secrets/create"),
    ("GET", "/configs"),
    ("GET", "/plugins"),
    ("POST", "/plugins/pull?remote=x"),
    ("POST", "/plugins/create?name=x"),
    ("GET", "/debug/pprof/heap"),
    ("GET", "/metrics"),
    ("GET", "/libpod/info"),
    ("POST", "/libpod/containers/create"),
    ("GET", "/"),
    ("OPTIONS", "/_ping"),
    ("PUT", "/containers/create?name=x"),
    ("PATCH", "/info"),
]

#: Paths that two readers would read in two ways.
_PATHS = [
    ("GET", "//containers/json"),
    ("GET", "/v1.41//containers/json?all=1"),
    ("GET", "/v1.41/../containers/json"),
    ("GET", "/containers/./json"),
    ("GET", f"/containers/{OURS}/../{OTHER}/json"),
    ("GET", f"/containers/{OURS}/%2e%2e/{OTHER}/json"),
    ("GET", f"/containers/{OURS}%2f..%2f{OTHER}/json"),
    ("GET", f"/containers/{OURS};/json"),
    ("GET", f"/images/docker.io/lab/tool:1%2f..%2f..%2f..%2fcontainers%2f{OTHER}/json"),
    ("GET", f"/images/docker.io/lab/../../containers/{OTHER}/json"),
    ("GET", f"/images/../containers/{OTHER}/json"),
    ("GET", "http://localhost/containers/json"),
    ("GET", "unix:///var/run/docker.sock/containers/json"),
    ("GET", "*"),
    ("GET", "/v1.41/v1.41/info"),
    ("GET", "/v2.0/info"),
    ("GET", "/v1.41.0/info"),
    ("GET", "/V1.41/info"),
    ("GET", "/INFO"),
    ("GET", "/info/"),
    ("GET", "/info?x=1"),
    ("GET", "/_ping?x"),
    ("GET", "/info%00"),
    ("GET", "/info#fragment"),
    ("GET", "/\\info"),
    ("DELETE", f"/containers/{OURS}?v=1&force=1&force=0"),
    ("POST", f"/containers/create?name={NAME}&name=other"),
]

CREATE = f"POST /v1.41/containers/create?name={NAME} HTTP/1.1\r\nHost: x\r\n".encode()
_BODY = json.dumps(job_box()).encode()

#: Requests that are none, and what two servers behind each other would understand in two ways.
RAW: dict[str, bytes] = {
    "two lengths": CREATE + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "length and chunks": CREATE + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks": CREATE + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "chunks, hidden": CREATE + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "negative length": CREATE + b"Content-Length: -1\r\n\r\n",
    "length with a sign": CREATE + b"Content-Length: +2\r\n\r\n{}",
    "two numbers": CREATE + b"Content-Length: 2, 2\r\n\r\n{}",
    "hex": CREATE + b"Content-Length: 0x2\r\n\r\n{}",
    "folded header": CREATE + b"Content-Length: 2\r\n 4\r\n\r\n{}",
    "bare line feeds": b"GET /info HTTP/1.1\nHost: x\n\n",
    "a line feed within": b"GET /info HTTP/1.1\r\nHost: x\nTransfer-Encoding: chunked\r\n\r\n",
    "a carriage return": b"GET /info HTTP/1.1\r\nHost: x\rY: z\r\n\r\n",
    "a null byte": b"GET /info HTTP/1.1\r\nHost: x\0\r\n\r\n",
    "old": b"GET /info HTTP/1.0\r\n\r\n",
    "oldest": b"GET /info\r\n\r\n",
    "new": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "upgrade": b"POST /v1.41/session HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    "upgrade of what is allowed": b"GET /info HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n",
    "expects": CREATE + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
    "a proxy": b"CONNECT /var/run/docker.sock HTTP/1.1\r\nHost: x\r\n\r\n",
    "another's word": b"GET /info HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: root\r\n\r\n",
    "build secrets": b"GET /info HTTP/1.1\r\nHost: x\r\nX-Registry-Config: e30=\r\n\r\n",
    "a long header": b"GET /info HTTP/1.1\r\nHost: " + b"x" * 100_000 + b"\r\n\r\n",
    "many headers": b"GET /info HTTP/1.1\r\n" + b"Accept: x\r\n" * 10_000 + b"\r\n",
    "a long path": b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
    "a huge body": CREATE + b"Content-Length: 99999999\r\n\r\n",
    "no end of the head": b"GET /info HTTP/1.1\r\nHost: x\r\n",
    "half a body": CREATE + b"Content-Length: 100\r\n\r\n{}",
    "binary": bytes(range(256)) * 4 + b"\r\n\r\n",
    "TLS": bytes.fromhex("16030100a5010000a10303") + bytes(64) + b"\r\n\r\n",
    "a name twice": CREATE
    + b"Content-Length: %d\r\n\r\n" % (len(_BODY) + 22)
    + _BODY.replace(b'"Image"', b'"Privileged": false, "Image"', 1)[: len(_BODY) + 21]
    + b"\n",
}


def _twice(body: bytes, name: bytes, value: bytes) -> bytes:
    """The body with a second entry of that name before the first."""
    return body.replace(name, name + b": " + value + b", " + name, 1)


#: Bodies that are JSON in more than one reading, or none.
BODIES: dict[str, bytes] = {
    "the host's part twice": _twice(_BODY, b'"HostConfig"', b'{"Privileged": true}'),
    "a field twice": _twice(_BODY, b'"NetworkMode"', b'"host"'),
    "other letters": _BODY.replace(b'"HostConfig"', b'"hostconfig"'),
    "both spellings": _BODY.replace(b'"HostConfig"', b'"hostConfig": {"Privileged": true}, "HostConfig"'),
    "a mark first": b"\xef\xbb\xbf" + _BODY,
    "another encoding": _BODY.decode().encode("utf-16"),
    "no number": _BODY.replace(b'"CpuShares": 512', b'"CpuShares": NaN'),
    "more behind": _BODY + b"{}",
    "a list": b"[" + _BODY + b"]",
    "nothing": b"",
    "null": b"null",
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "a text for a number": _BODY.replace(b'"CpuShares": 512', b'"CpuShares": "512"'),
    "true for a number": _BODY.replace(b'"Soft": 0', b'"Soft": false'),
}


def _words(item: Any) -> str:
    return json.dumps(item)[:60] if isinstance(item, dict) else " ".join(item)[:80]


CALLS = [
    *[(method, path.format(other)) for other in _OTHERS for method, path in _THEIRS],
    *[(method, path.format(target)) for target in (OURS, OTHER) for method, path in _NEVER],
    *_ELSEWHERE,
]


def test_there_are_more_than_200_attacks() -> None:
    assert len(FIELDS) + len(CALLS) + len(_PATHS) + len(RAW) + len(BODIES) > 350


def test_what_a_worker_asks_passes(taken: Taken, place: Path) -> None:
    """Without this, a broker that refuses everything would be a good one. The mount leads to the broker's own place."""
    taken.engine.asked.clear()
    with without(taken.engine, f"/containers/{NAME}/json"):  # the name is free
        assert taken.ask("POST", f"/v1.41/containers/create?name={NAME}", job_box()) == 201
    wanted = job_box()
    wanted["HostConfig"]["Mounts"][0]["Source"] = str(place / "mounts" / INSTANCE / NAME / "0")
    [(_, _, body)] = [one for one in taken.engine.acts() if one[0] == "POST"]
    assert json.loads(body) == wanted
    assert (place / "base" / "jobs" / "7" / "files").samefile(wanted["HostConfig"]["Mounts"][0]["Source"])
    for method, path in (
        ("GET", f"/v1.41/containers/{OURS}/json?size=1"),
        ("GET", f"/v1.41/containers/{NAME}/json?"),
        ("GET", "/v1.41/images/docker.io/lab/tool:1/json"),
        ("GET", f"/v1.41/images/{IMAGE}/json"),
        ("GET", "/v1.41/info"),
    ):
        assert taken.ask(method, path) == 200, path


def test_of_others_a_worker_hears_nothing(taken: Taken) -> None:
    api = EngineApi(f"unix://{taken.path}")
    with contextlib.closing(api):
        assert api.inspect(OTHER) is None
        assert api.inspect(LABEL_ONLY) is None
        found = api.inspect(OURS)
        assert found is not None
        assert found["Name"] == f"/{NAME}"
        with api.calling("ask"):
            info = api.ask("GET", "/info").json()
        assert (info["NCPU"], "Name" in info) == (4, False)


@contextlib.contextmanager
def without(engine: CountingEngine, path: str) -> Iterator[None]:
    """An engine that does not have what is at `path`, for the length of the block."""
    kept = engine.there.pop(path, None)
    try:
        yield
    finally:
        engine.there.pop(path, None)
        if kept is not None:
            engine.there[path] = kept


@pytest.mark.parametrize("changes", FIELDS, ids=_words)
def test_no_container_is_made_that_is_not_the_box(taken: Taken, changes: dict[str, Any]) -> None:
    taken.engine.asked.clear()
    status = taken.ask("POST", f"/v1.41/containers/create?name={NAME}", job_box(**changes))
    assert (status in {403, 400, 404}, taken.engine.acts()) == (True, []), status


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_no_body_is_read_in_two_ways(taken: Taken, body: bytes) -> None:
    taken.engine.asked.clear()
    status = taken.ask("POST", f"/v1.41/containers/create?name={NAME}", body)
    assert (status in {400, 403}, taken.engine.asked) == (True, []), status


@pytest.mark.parametrize(
    "name",
    ["database", "jobfetcher-other000-7-1", f"jobfetcher-{INSTANCE}-own-1", f"jobfetcher-{INSTANCE}-8-1", "", "a/b"],
)
def test_no_container_gets_a_name_that_is_not_its_own(taken: Taken, name: str) -> None:
    taken.engine.asked.clear()
    status = taken.ask("POST", f"/v1.41/containers/create?name={quote(name, safe='')}", job_box())
    assert (status, taken.engine.acts()) == (403, [])


@pytest.mark.parametrize("call", CALLS, ids=_words)
def test_nothing_else_is_asked_of_the_engine(taken: Taken, call: tuple[str, str]) -> None:
    taken.engine.asked.clear()
    method, path = call
    status = taken.ask(method, f"/v1.41{path}" if path != "/" else path)
    assert status in {400, 403, 404, 409}, status
    assert taken.engine.acts() == []


@pytest.mark.parametrize("call", _PATHS, ids=_words)
def test_no_path_is_read_in_two_ways(taken: Taken, call: tuple[str, str]) -> None:
    taken.engine.asked.clear()
    assert taken.ask(*call) in {400, 403}
    assert taken.engine.asked == []


@pytest.mark.parametrize("content", RAW.values(), ids=RAW)
def test_nothing_is_smuggled(taken: Taken, content: bytes) -> None:
    taken.engine.asked.clear()
    answer = taken.send(content)
    assert answer == b"" or answer.split(b" ")[1] in {b"400", b"403", b"413", b"431"}
    assert taken.engine.asked == []


def test_a_body_that_hides_a_request_hides_it_in_vain(taken: Taken) -> None:
    """A request that the broker refuses is read to its end, so its body is never the next request."""
    hidden = f"POST /containers/{OURS}/start HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    taken.engine.asked.clear()
    answer = taken.send(b"POST /build HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(hidden) + hidden)
    assert answer.count(b"HTTP/1.1") == 1
    assert taken.engine.asked == []


def test_every_attempt_is_told_and_counted(taken: Taken) -> None:
    before = len(taken.told.refusals())
    taken.ask("POST", "/v1.41/containers/create?name=x", job_box(HostConfig__Privileged=True))
    found = taken.told.refusals()[before:]
    assert found == [f"refused (403): create: the name must begin with jobfetcher-{INSTANCE}-"]
    taken.ask("POST", f"/v1.41/containers/create?name={NAME}", job_box(HostConfig__Privileged=True))
    assert taken.told.refusals()[-1] == "refused (403): create: HostConfig.Privileged is no field of such a container"
    assert taken.told.errors() == []


def test_a_flood_is_counted_and_not_told_line_by_line(tmp_path: Path) -> None:
    """Of 300 refusals at once the log gets a fifth; the number of all of them is in the last."""
    told = Told()

    def nobody(_client: object) -> Any:
        raise ConnectionRefusedError

    rules = Rules(boxes.Policy(INSTANCE, HOST_BASE), ImageRules(), Ledger(), Pins(tmp_path, INSTANCE), nobody)
    with Broker(tmp_path / "broker.sock", frozenset(), rules, nobody, told) as broker:
        thread = threading.Thread(target=broker.serve)
        thread.start()
        flooding = Taken(tmp_path / "broker.sock", CountingEngine("", {}), told)
        for _ in range(300):
            flooding.send(b"GET /info HTTP/1.0\r\n\r\n")
        broker.close()
        thread.join()
    assert broker.refused == 300
    assert 50 <= len(told.refusals()) < 150


def test_another_user_is_not_listened_to(taken: Taken, tmp_path: Path) -> None:
    """The socket's mode keeps others out; and where it does not, the kernel says who asks."""
    program = (
        "import os, socket, sys; line = socket.socket(socket.AF_UNIX); line.connect(sys.argv[1]);"
        "os.setuid(4711); other = socket.socket(socket.AF_UNIX)\n"
        "try: other.connect(sys.argv[1])\n"
        "except PermissionError: sys.exit(3)"
    )
    before = len(taken.told.refusals())
    assert subprocess.run([sys.executable, "-c", program, str(taken.path)], check=False).returncode == 3
    taken.path.chmod(0o666)
    for folder in taken.path.parents:  # up to /tmp, which is everybody's
        if folder.stat().st_mode & 0o7 == 0:
            folder.chmod(0o711)
    ask = "\nother.sendall(b'GET /_ping HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n'); sys.exit(len(other.recv(10)))"
    done = subprocess.run([sys.executable, "-c", program + ask, str(taken.path)], check=False, stderr=subprocess.PIPE)
    taken.path.chmod(0o600)
    assert done.returncode == 0 or b"BrokenPipe" in done.stderr or b"ConnectionReset" in done.stderr
    assert taken.told.refusals()[before:] == ["refused (another user): user 4711 may not ask this broker (BROKER_USER)"]
