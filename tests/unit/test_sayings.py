"""sayings: what engines really said, and whose fault each is: by their own words, never by names of the job in them."""

from __future__ import annotations

import pytest

from jobfetcher.core.errors import JobFault, JobReason, WorkerFault, WorkerReason
from jobfetcher.engine.images import _fault
from jobfetcher.engine.references import parse_reference
from jobfetcher.engine.run_spec import BoxPolicy
from jobfetcher.engine.sayings import INIT_BROKEN, TOO_LONG, setting_fault, start_fault, with_cure

LAYER = "/var/lib/docker/overlay2/4a854d779c5f7aa5f2faad189c8015673a6bf1bdc6ac0c687b8cd748bc86750d/merged"
RUNC = "failed to create shim task: OCI runtime create failed: runc create failed: unable to start container process:"
INIT = f"{RUNC} error during container init:"
HOOK = f"{INIT} error running hook #0: error running hook: exit status 1, stdout: , stderr: "
CWD = f"{RUNC} chdir to cwd"
PODMANS_LAYER = (
    "/var/lib/containers/storage/overlay/962d132612be2808d5524a5e7f0d261c06c1cd263a96022e9424f29ef21da932/merged"
)
CRUN_MISSES = "No such file or directory: OCI runtime attempted to invoke a command that was not found"
NO_PASTA = (
    "could not find pasta, the network namespace can't be configured: "
    'exec: "pasta": executable file not found in $PATH'
)

JOBS = [
    # moby 20.10.24 and runc 1.1.5, as they answered; the names are a job's or its image's own
    "unable to find user nvidia: no matching entries in passwd file",
    "unable to find group nvidia: no matching entries in group file",
    "unable to find user could not select device driver: no matching entries in passwd file",
    "linux spec user: unable to find user nvidia: no matching entries in passwd file",
    f"lstat {LAYER}/opt/nvidia/x: not a directory",
    f"lstat {LAYER}/opt/nvidia/no space left on device: not a directory",
    f"lstat {LAYER}/opt/{'n' * 260}: file name too long",
    "Cannot mkdir: /opt/nvidia is not a directory",
    f'{RUNC} exec: "no space left on device": executable file not found in $PATH: unknown',
    f'{RUNC} exec: "/opt/nvidia/unknown device": permission denied: unknown',
    f'{RUNC} exec: "/closed": permission denied: unknown',
    f'{CWD} ("/opt/nvidia: no space left on device") set in config.json failed: permission denied: unknown',
    f'{CWD} ("/opt/nvidia") set in config.json failed: not a directory: unknown',
    # names that spell what engines say of settings and of runtimes
    "unable to find user shm_size: no matching entries in passwd file",
    "unable to find user ShmSize: no matching entries in passwd file",
    "unable to find user unknown capability: no matching entries in passwd file",
    "linux spec user: unable to find group network lab not found: no matching entries in group file",
    f"lstat {LAYER}/data/ShmSize: not a directory",
    f"lstat {LAYER}/opt/binary not installed: not a directory",
    "Cannot mkdir: /data/HostConfig.ShmSize is not a directory",
    "Cannot mkdir: /data/unknown capability is not a directory",
    f'{CWD} ("/data/shm_size") set in config.json failed: not a directory: unknown',
    f'{CWD} ("/opt/binary not installed") set in config.json failed: permission denied: unknown',
    f'{RUNC} exec: "/bin/shim not installed: unknown capability": permission denied: unknown',
    "No command specified",
    "no command specified",
    # Podman 4.3.1 with crun 1.8.1, and Podman 5.4.2 with crun 1.21
    f"creating container {'880ddb1f6315' * 5} workdir: mkdir {PODMANS_LAYER}/etc/passwd: not a directory",
    f"creating container {'880ddb1f6315' * 5} workdir: mkdir {PODMANS_LAYER}/{'n' * 260}: file name too long",
    "container create: no command or entrypoint provided, and no CMD or ENTRYPOINT from image",
    f"crun: executable file `/no/such` not found in $PATH: {CRUN_MISSES}",
    f"crun: executable file `/no/such` not found: {CRUN_MISSES}",
    f"crun: executable file `failed to start shim: ShmSize` not found: {CRUN_MISSES}",
    "crun: the path `/closed` exists but it is not executable: Operation not permitted: OCI permission denied",
]

MACHINES = [
    (WorkerReason.DISK, 'invalid mount config for type "bind": bind source path does not exist: /tmp/nope'),
    (WorkerReason.DISK, f"mkdir {LAYER.removesuffix('/merged')}-init: no space left on device"),
    (WorkerReason.DISK, f"{INIT} write /run/x: no space left on device: unknown"),
    (WorkerReason.GPU, 'could not select device driver "" with capabilities: [[gpu]]'),
    (WorkerReason.GPU, 'could not select device driver "nvidia" with capabilities: [[gpu]]'),
    (WorkerReason.GPU, f"{HOOK}nvidia-container-cli: device error: GPU-9: unknown device: unknown"),
    (
        WorkerReason.GPU,
        f"{HOOK}Auto-detected mode as 'legacy'\nnvidia-container-cli: initialization error: nvml error: driver/library "
        "version mismatch: unknown",
    ),
    (WorkerReason.GPU, "CDI device injection failed: unresolvable CDI devices nvidia.com/gpu=0"),
    (
        WorkerReason.GPU,
        'error gathering device information while adding custom device "/dev/nvidia0": no such file or directory',
    ),
    # an init or a runtime that is not there was taken for a program of the image
    (WorkerReason.ENGINE, 'exec: "docker-init": executable file not found in $PATH'),
    (
        WorkerReason.ENGINE,
        f'{INIT} exec: "/sbin/docker-init": stat /sbin/docker-init: no such file or directory: unknown',
    ),
    (
        WorkerReason.ENGINE,
        "failed to create shim: OCI runtime create failed: unable to retrieve OCI runtime error (open /run/x/log.json: "
        'no such file or directory): exec: "nvidia-container-runtime": executable file not found in $PATH: : unknown',
    ),
    (
        WorkerReason.ENGINE,
        "failed to create shim: OCI runtime create failed: unable to retrieve OCI runtime error (open /run/x/log.json: "
        "no such file or directory): fork/exec /usr/bin/kata-runtime: no such file or directory: unknown",
    ),
    (
        WorkerReason.ENGINE,
        'failed to start shim: exec: "containerd-shim-kata-v2": executable file not found in $PATH: unknown',
    ),
    (WorkerReason.ENGINE, 'error looking up logging plugin foo: plugin "foo" not found'),
    (WorkerReason.ENGINE, "driver failed programming external connectivity on endpoint nvidia: iptables failed"),
    # Podman 5.4.2 without passt, 4.3.1 without slirp4netns: taken for a program of the image as well
    (WorkerReason.ENGINE, NO_PASTA),
    (WorkerReason.ENGINE, NO_PASTA.replace("pasta", "slirp4netns")),
    (WorkerReason.GPU, "setting up CDI devices: unresolvable CDI devices nvidia.com/gpu=GPU-1, nvidia.com/gpu=GPU-2"),
    (WorkerReason.ENGINE, f"crun: executable file `/run/podman-init` not found: {CRUN_MISSES}"),
    (WorkerReason.ENGINE, "something that nobody has seen before"),
]

OWNERS = [
    (
        BoxPolicy(user="labuser"),
        "unable to find user labuser: no matching entries in passwd file",
        "JOB_USER=labuser: ",
    ),
    (BoxPolicy(user="0:lab"), "unable to find group lab: no matching entries in group file", "JOB_USER=0:lab: "),
    (BoxPolicy(network="brigde"), "network brigde not found", "JOB_NETWORK=brigde: "),
    (
        BoxPolicy(network="brigde"),
        "container create: unable to find network with name or ID brigde: network not found",
        "JOB_NETWORK=brigde: ",
    ),
    (BoxPolicy(cap_add=("FOO",)), 'container create: "CAP_FOO": unknown capability', "JOB_CAP_ADD: "),
    (BoxPolicy(runtime="rnuc"), "Unknown runtime specified rnuc", "JOB_RUNTIME=rnuc: "),
    (BoxPolicy(runtime="rnuc"), "unknown or invalid runtime name: rnuc", "JOB_RUNTIME=rnuc: "),
    (BoxPolicy(runtime="rnuc"), 'default OCI runtime "rnuc" not found: invalid argument', "JOB_RUNTIME=rnuc: "),
    (BoxPolicy(cap_add=("FOO",)), 'invalid CapAdd: unknown capability: "CAP_FOO"', "JOB_CAP_ADD: "),
]


@pytest.mark.fault("E8", "J5")
@pytest.mark.parametrize("said", JOBS)
def test_what_a_job_or_its_image_named_wrongly_is_its_own_fault(said: str) -> None:
    owners = BoxPolicy(user="1000:1000", network="lab", runtime="runc", cap_add=("SYS_PTRACE",), shm_mib=64)
    assert isinstance(start_fault(said, owners), JobFault)
    fault = start_fault(said, BoxPolicy())
    assert isinstance(fault, JobFault), fault
    assert fault.reason is JobReason.CANNOT_START


@pytest.mark.fault("E14", "J5")
@pytest.mark.parametrize(("reason", "said"), MACHINES)
def test_what_the_machine_cannot_do_is_no_jobs_fault(reason: WorkerReason, said: str) -> None:
    fault = start_fault(said, BoxPolicy())
    assert isinstance(fault, WorkerFault), fault
    assert fault.reason is reason


@pytest.mark.fault("J5")
@pytest.mark.parametrize(("policy", "said", "named"), OWNERS)
def test_what_the_owner_set_wrongly_is_named_and_never_a_jobs_fault(policy: BoxPolicy, said: str, named: str) -> None:
    wrong = setting_fault(said, policy)
    assert wrong is not None
    assert str(wrong).startswith(named)
    fault = start_fault(said, policy)
    assert isinstance(fault, WorkerFault)
    assert fault.reason is WorkerReason.ENGINE
    assert named in str(fault)


@pytest.mark.fault("E8")
@pytest.mark.parametrize(
    ("printed", "why"),
    [
        ("exec /sbin/docker-init: no such file or directory", "no such file or directory"),
        ("exec container process `/run/podman-init`: Exec format error", "Exec format error"),
        (
            '{"msg":"exec container process (missing dynamic library?) `/run/podman-init`: No such file or directory",'
            '"level":"error","time":"2026-11-29T02:04:19.930030Z"}',
            "No such file or directory",
        ),
        ("exec container process `/opt/program`: Exec format error", None),
        ("I exec /sbin/docker-init: no such file or directory", None),
    ],
)
def test_an_init_that_does_not_run_is_known_by_what_runc_or_crun_prints(printed: str, why: str | None) -> None:
    found = INIT_BROKEN.fullmatch(printed)
    assert (found and found["why"]) == why


@pytest.mark.fault("E8")
def test_a_command_that_is_too_long_is_known_by_what_runc_or_crun_prints() -> None:
    said = "exec container process `/run/podman-init`: Argument list too long"
    for printed in (
        "exec /sbin/docker-init: argument list too long",
        said,
        f'{{"msg":"{said}","level":"error","time":"2026-11-29T02:07:07.635437Z"}}',
    ):
        assert TOO_LONG.fullmatch(printed)
    assert not TOO_LONG.fullmatch(f"{said}, I think")


def test_a_slip_of_the_finger_is_guessed() -> None:
    wrong = setting_fault("network brigde not found", BoxPolicy(network="brigde"), ["bridge", "none", "lab"])
    assert str(wrong).endswith("; is bridge meant?")


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (BoxPolicy(user="1000:1000"), "unable to find user labuser: no matching entries in passwd file"),
        (BoxPolicy(user=None), "unable to find user labuser: no matching entries in passwd file"),
        (BoxPolicy(network="lab"), "network 5e7a not found"),
    ],
)
def test_what_the_owner_did_not_choose_names_no_setting(policy: BoxPolicy, said: str) -> None:
    assert setting_fault(said, policy) is None


@pytest.mark.fault("J10")
@pytest.mark.parametrize(
    ("said", "cure"),
    [
        ("could not find an available, non-overlapping IPv4 address pool among the defaults", "docker network prune"),
        ('could not select device driver "" with capabilities: [[gpu]]', "nvidia-ctk runtime configure"),
        ("nvidia-container-cli: initialization error: nvml error: driver/library version mismatch", "restart the mach"),
        ('error looking up logging plugin local: plugin "local" not found', "log driver `local`"),
        ("the engine lacks pasta, which gives jobs their networks", "package passt"),
        ("mkdir /var/lib/docker/x: no space left on device", "docker system df"),
        ("iptables failed: iptables: No chain/target/match by that name", "restart the engine"),
    ],
)
def test_a_machine_that_starts_nothing_is_told_with_what_to_do(said: str, cure: str) -> None:
    fault = with_cure(WorkerFault(WorkerReason.ENGINE, said))
    assert fault.reason is WorkerReason.ENGINE
    assert str(fault).startswith(f"{said}; ")
    assert cure in str(fault)
    assert str(with_cure(WorkerFault(WorkerReason.ENGINE, "nobody knows"))) == "nobody knows"


# -- pulls ------------------------------------------------------------------------------------------------------------

DOWN = 'Get "https://hub.example.org/v2/{path}/manifests/{tag}": dial tcp 192.0.2.1:443: connect: connection refused'


@pytest.mark.fault("E6", "E7")
@pytest.mark.parametrize("name", ["lab/denied:1", "forbidden:1", "lab/unauthorized:denied", "404-page-not-found/x:y"])
def test_an_images_own_name_is_no_word_of_its_registry(name: str) -> None:
    path, _, tag = name.partition(":")
    wanted = parse_reference(f"hub.example.org/{name}")
    away = _fault(wanted, DOWN.format(path=path, tag=tag))
    assert isinstance(away, WorkerFault), away
    assert away.reason is WorkerReason.REGISTRY
    denied = _fault(wanted, f"pull access denied for hub.example.org/{path}, repository does not exist or may require")
    assert isinstance(denied, JobFault)
    assert denied.reason is JobReason.IMAGE_DENIED
    missing = _fault(wanted, f"manifest for hub.example.org/{name} not found: manifest unknown: manifest unknown")
    assert isinstance(missing, JobFault)
    assert missing.reason is JobReason.IMAGE_MISSING
