"""Every setting, and the only room that reads the environment and `.env`.

A value may come from the command line, the environment, a `.env` file or a default; each setting is also known as
`JOBFETCHER_<NAME>`, which wins over the plain name in the same layer. `load` returns frozen `Settings` and, for
`jobfetcher config`, which layer each value came from.

`.env` is read directly (`dotenv`) instead of through pydantic-settings, because every value must know its layer, and
because USERNAME and PASSWORD must come from the same one: many desktops set USERNAME to the login name.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import os
import re
import socket
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
)

from jobfetcher import owners
from jobfetcher.certificates import is_hashed, read_certificates
from jobfetcher.core.addresses import Address, Kind, kind_of, plain
from jobfetcher.core.errors import ConfigError
from jobfetcher.core.failpoints import Request, parse_request
from jobfetcher.core.hosts import HostPattern, Proxies
from jobfetcher.core.patterns import check_pattern
from jobfetcher.core.urls import Origin, canonical_url, parse_origin
from jobfetcher.dotenv import read_dotenv, unquoted, without_remark

PREFIX = "JOBFETCHER_"

#: Read here, but not for a person to set: the image's own default, and what only tests ask for.
_NOT_SETTINGS = frozenset({"JOBFETCHER_DEFAULT_PATH_BASE", "JOBFETCHER_FAILPOINT"})

#: As it is spelt in the documentation of the reference worker, and so in the wild.
_ALIASES = {"TIMEOUT_STATUS": "TIMOUT_STATUS"}

#: Under which name containers know the machine that they run on, and where an engine writes down what that means.
_ENGINES_HOST, _HOSTS_FILE = "host.docker.internal", Path("/etc/hosts")

#: What other programs call the file of certificates to trust; each counts where none before it is set.
_CA_FILES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")

#: What other programs go by as well and this one does not, or not always: said where that matters (`_unused`).
_OTHERS = frozenset({"ALL_PROXY", "SSL_CERT_DIR"})

#: Settings that other programs of the machine know as well, in lower case rather than in upper case (curl, requests).
_SHARED = frozenset({"http_proxy", "https_proxy", "no_proxy"})

#: Of names in the environment, which are not ours, only one that is so like a setting's is called a slip of the finger.
_NEAR = 0.9

#: Last parts of an API_URL that the worker adds by itself, or that are a page for people.
_ENDPOINTS = frozenset({"jobs", "access_info", "docs"})

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)I?B?", re.IGNORECASE)
_SIZE_MIB = {"": 1.0, "K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0 * 1024}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d)?", re.IGNORECASE)
_TIME_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _mib(value: Any) -> Any:
    """`512`, `512MiB`, `2GB`: MiB; a bare number is MiB."""
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if not match:
            raise ValueError("must be a size such as 512MiB or 2GiB")
        size = float(match[1]) * _SIZE_MIB[match[2].upper()]
        return max(1, round(size)) if size else 0  # 0 is no size but "none" or "no limit"
    return value


def _seconds(value: Any) -> Any:
    """`30`, `90s`, `5m`, `24h`: seconds; a bare number is seconds."""
    if isinstance(value, str):
        match = _TIME.fullmatch(value.strip())
        if not match:
            raise ValueError("must be a time such as 30, 90s, 5m or 24h")
        return float(match[1]) * _TIME_S[(match[2] or "s").lower()]
    return value


def _words(value: Any) -> Any:
    """`a, b`: ('a', 'b')."""
    return tuple(word.strip() for word in value.split(",") if word.strip()) if isinstance(value, str) else value


def _signing_allow(words: tuple[str, ...]) -> tuple[str, ...]:
    if strange := sorted(set(words) - {"tags", "version-1"}):
        raise ValueError(f"knows tags and version-1, not {strange[0]!r}")
    return words


def _api_url(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError("must be a URL such as https://jobs.example.org")
    if not value:
        return value
    try:
        parse_origin(value)
    except ValueError as error:
        raise ValueError(f"{error}; it must look like https://jobs.example.org") from None
    if "?" in value or "#" in value:
        raise ValueError("must not have a query or fragment")
    return canonical_url(value)


def _proxy(value: str) -> str:
    if value.lower() == "none":
        return "none"
    if not re.fullmatch(r"https?://[^/?#\s]+:\d+/?", value):
        raise ValueError("must be an address with a port, such as http://proxy.example.org:3128, or none")
    return value.rstrip("/")


def _shared_proxy(value: str) -> str:
    """As other programs take it: `http://` and the port may be left out."""
    scheme, separator, rest = value.rpartition("://")
    address = f"{scheme.lower() or 'http'}://{rest.rstrip('/')}"
    if separator and scheme.lower() not in {"http", "https"}:
        raise ValueError("is no HTTP proxy, and no other kind can be used; set PROXY to one that is, or PROXY=none")
    if not re.search(r":\d+$", address):
        address += ":443" if scheme.lower() == "https" else ":80"
    if not re.fullmatch(r"https?://[^/?#\s]+:\d+", address):
        raise ValueError("is not the address of a proxy, such as http://proxy.example.org:3128; PROXY wins over it")
    return address


def _hosts(value: tuple[str, ...]) -> tuple[str, ...]:
    for entry in value:
        HostPattern.parse(entry)
    return value


def _patterns(value: tuple[str, ...]) -> tuple[str, ...]:
    for entry in value:
        check_pattern(entry)
    return value


def _cognito_pool(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9-]{1,40}_[A-Za-z0-9_]{1,55}/[\w+]{1,128}", value, re.ASCII):
        raise ValueError(
            "must be a user pool's id and a client's, such as eu-central-1_AbCdEf/1h57kf5cpq17m0eml12example"
        )
    return value


def _gpus(value: str) -> str:
    if any(word.strip().isdecimal() for word in value.split(",")):
        raise ValueError("takes UUIDs such as GPU-8f2c4f0e-... and no numbers; `nvidia-smi -L` lists them")
    return value


def _path(value: Any) -> Any:
    if isinstance(value, str) and re.search(r"\$\{?[A-Za-z_]", value):
        raise ValueError("has a variable in it that nobody replaced; write the whole path (in .env also ${HOME}/...)")
    return value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _token(value: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[\x21-\x7e]+", value.get_secret_value()):
        raise ValueError("has characters that no token has; copy it again, without quotes or spaces")
    return value


def _auto(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() == "auto" else value


AutoMib = Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(lambda value: _mib(_auto(value)))]
Mib = Annotated[int, BeforeValidator(_mib), Field(ge=0)]
Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0, allow_inf_nan=False)]
SecondsOrNever = Annotated[float, BeforeValidator(_seconds), Field(ge=0, allow_inf_nan=False)]
Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
Hosts = Annotated[Words, AfterValidator(_hosts)]
FilePath = Annotated[Path, BeforeValidator(_path)]


def _field(default: Any, text: str, **more: Any) -> Any:
    return Field(default=default, description=text, **more)


class Settings(BaseModel):
    """All settings of one worker, checked. Times in seconds, sizes in MiB."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    api_url: Annotated[str, BeforeValidator(_api_url)] = _field("", "Address of the worker-facing API. Must be set.")
    access_token: Annotated[SecretStr, AfterValidator(_token)] | None = _field(
        None, "A fixed token. Wins over USERNAME and PASSWORD; usually short-lived."
    )
    username: str | None = _field(None, "Account to sign in with, together with PASSWORD.")
    password: SecretStr | None = _field(None, "Password of USERNAME. Better: PASSWORD_FILE, a file of mode 0600.")
    cognito_pool: Annotated[str, AfterValidator(_cognito_pool)] | None = _field(
        None,
        "Where USERNAME signs in, as POOL_ID/CLIENT_ID; the password goes nowhere else. Empty: where it did first.",
    )
    path_base: FilePath = Field(
        description="Directory for jobs and the journal, private to this worker. Best below directories of root's."
    )
    path_host_base: FilePath | None = _field(
        None, "Where PATH_BASE lies on the engine's host. Found by itself; a wrong one is refused."
    )
    timeout_job: Seconds = _field(30.0, "How often to ask for a job when there was none, in seconds.")
    timeout_status: Seconds = _field(
        30.0, "How often to tell the server that a job is still in hand (a keep-alive), in seconds.", le=120
    )
    groups: Words = _field(
        (), "Groups (comma-separated) whose jobs are asked for first. A preference: any other job may come, too."
    )
    older_than: Annotated[int, Field(ge=0)] = _field(
        0,
        "Take only jobs that have waited for this many seconds; servers heed it only for jobs that name no environment "
        "(local or cloud).",
    )
    gpus: Annotated[str, AfterValidator(_gpus)] = _field(
        "all", "GPUs to use: all, none, or a comma-separated list of UUIDs."
    )
    max_jobs: Annotated[Annotated[int, Field(ge=1, le=256)] | None, BeforeValidator(_auto)] = _field(
        "auto", "Jobs computing side by side. auto: one per GPU, or 1; with GPU_UNASKED=none one more."
    )
    gpu_unasked: Literal["give", "none"] = _field(
        "give",
        "What a job gets that does not say whether it needs a GPU: give (its share of those that are free: one with "
        "MAX_JOBS=auto), or none (GPUs are for jobs that ask).",
    )
    reserve_cpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = _field(
        0.1, "Cores no job may use, so that keep-alives never starve. May be a fraction."
    )
    reserve_memory: AutoMib = _field("auto", "Memory no job may use. auto: 512 MiB or 5 %, whichever is more.")
    reserve_disk: AutoMib = _field(
        "auto", "Free disk below which no job is taken. auto: 5 GiB or 5 %, whichever is more, at most half the disk."
    )
    max_runtime: Seconds | None = _field(None, "Longest time one job may compute, such as 24h. Empty: no limit.")
    stop_grace: Seconds = _field(10.0, "Seconds between TERM and KILL when a job is stopped.")
    stop_mode: Annotated[Literal["drain", "detach"], BeforeValidator(_lower)] = _field(
        "drain",
        "What the first Ctrl-C or SIGTERM does: drain (finish the jobs in hand), or detach (leave them running; the "
        "next start goes on with them).",
    )
    stop_after_silence: SecondsOrNever = _field(
        86400.0, "Stop a running job when the server has not answered for so long, such as 24h. 0: never."
    )
    pull_policy: Annotated[Literal["newer", "always", "if-not-present", "never"], BeforeValidator(_lower)] = _field(
        "newer",
        "When to ask the registry for a job's image: newer (each time; downloads what changed, and runs the local "
        "image where the registry is out of reach or never had it), always (each time; runs only what the registry "
        "has), if-not-present or never.",
    )
    allowed_images: Annotated[Words, AfterValidator(_patterns)] = _field(
        (), "Images that may run, as patterns such as docker.io/library/*. Empty: every image the server names."
    )
    registry_allow: Hosts = _field(
        (),
        "Registries of images that may have internal addresses: hosts, host:port, *.domain, networks such as "
        "10.0.0.0/8. Public registries, and those that ALLOWED_IMAGES names, need no entry.",
    )
    job_network: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = _field(
        "bridge", "Network of jobs: bridge (an own one, jobs cannot reach each other), none, or a network's name."
    )
    job_network_guard: Annotated[Literal["auto", "off"], BeforeValidator(_lower)] = _field(
        "auto",
        "Rules of this machine's firewall that keep jobs on the network bridge from its own services: auto (where the "
        "worker may make them), or off.",
    )
    job_runtime: str | None = _field(
        None, "Engine runtime for jobs, such as nvidia, runsc or kata. Empty: the default."
    )
    job_user: str | None = _field(
        None, "User that jobs run as, in numbers that nobody has here, such as 70000:70000. Empty: as the image says."
    )
    job_read_only: bool = _field(False, "Make the image's own files read-only for the job (/files stays writable).")
    job_cap_add: Words = _field((), "Linux capabilities given back to jobs on top of the few they keep.")
    job_seccomp: Literal["jobfetcher", "default"] = _field(
        "jobfetcher", "Filter of system calls in jobs: jobfetcher (the worker's), or default (the engine's own)."
    )
    job_shm_size: AutoMib = _field("auto", "Size of /dev/shm in jobs. auto: half of the job's memory.")
    job_pids_limit: Annotated[int, Field(ge=16)] = _field(4096, "Processes one job may have.")
    job_disk_limit: AutoMib = _field(
        "auto",
        "Disk one job may use in all (/files, its container's layer and volumes, deleted files that it keeps open), "
        "such as 200GiB. auto: what is free above RESERVE_DISK.",
    )
    job_signing_keys: FilePath | None = _field(
        None,
        "Run only jobs signed with one of the public keys in this file (lines of KEYID BASE64, Ed25519). It must be "
        "root's or your own, and nobody else may write to it.",
    )
    job_signing_audience: Words = _field(
        (),
        "Names of this worker (comma-separated): signed jobs must be for one of them. Empty: the origin of API_URL, "
        "such as https://jobs.example.org.",
    )
    job_signing_inputs: Annotated[Literal["optional", "required"], BeforeValidator(_lower)] = _field(
        "optional", "Whether a signed job must sign the content (SHA-256) of each of its inputs: optional or required."
    )
    job_signing_allow: Annotated[Words, AfterValidator(_signing_allow)] = _field(
        (),
        "What signed jobs may do all the same: tags (name images by tag), version-1 (have signatures of before version "
        "2, which never expire).",
    )
    image_keep: Seconds = _field(
        604800.0, "Remove images that this worker pulled when no job used them for so long, such as 7d."
    )
    storage_allow: Hosts = _field(
        (),
        "Storage that may have internal addresses or plain http: hosts, host:port, *.domain, networks such as "
        "10.0.0.0/8. Public hosts need no entry.",
    )
    prefetch: Annotated[int, Field(ge=0, le=16)] = _field(
        0, "Jobs whose inputs are brought while others compute; such a job is one that no other worker can take."
    )
    prefetch_hold: Seconds = _field(
        600.0, "A prefetched job that has waited for so long is given back for other workers, such as 10m."
    )
    cache_size: Mib = _field(0, "Disk for inputs that are kept for later jobs, such as 50GiB. 0: none is kept.")
    transfers: Annotated[int, Field(ge=1, le=64)] = _field(
        8, "Files that the server is asked for at the same time, per job; more helps where it is far away."
    )
    transfer_ranges: Annotated[int, Field(ge=1, le=16)] = _field(
        8, "Connections that one large download may use; as many as make it faster are used. 1: never more than one."
    )
    bandwidth_limit: Mib = _field(
        0, "Most that all transfers together move in a second, each way, such as 50MiB. 0: no limit."
    )
    ca_file: FilePath | None = _field(
        None,
        "File (PEM, DER) or directory of certificates to trust instead of the system's. Wins over SSL_CERT_FILE.",
    )
    proxy: Annotated[str, AfterValidator(_proxy)] | None = _field(
        None,
        "HTTP proxy for the API and all storage, such as http://proxy.example.org:3128; none: no proxy at all. Wins "
        "over the next three. Images: the engine's own.",
    )
    http_proxy: Annotated[str, AfterValidator(_shared_proxy)] | None = _field(
        None, "HTTP proxy for http:// addresses, but for this machine's own."
    )
    https_proxy: Annotated[str, AfterValidator(_shared_proxy)] | None = _field(
        None, "HTTP proxy for https:// addresses, but for this machine's own."
    )
    no_proxy: Words = _field(
        (), "Hosts, domains and networks that HTTP_PROXY and HTTPS_PROXY are not used for (comma-separated); *: all."
    )
    allow_insecure_http: bool = _field(False, "Allow an API_URL with plain http that is not on this machine.")
    on_worker_fault: Annotated[Literal["release", "error"], BeforeValidator(_lower)] = _field(
        "release", "A job this machine could not run: release (others take it) or error (one worker is all there is)."
    )
    aws_endpoint_url: str | None = _field(None, "Where to sign in instead of AWS's own address (for tests).")
    docker_host: str | None = _field(None, "The engine's socket. Empty: unix:///var/run/docker.sock.")
    broker_socket: FilePath = _field(
        Path("/run/jobfetcher/broker.sock"),
        "Where the broker listens (jobfetcher broker); its worker has DOCKER_HOST=unix:// and this path.",
    )
    broker_user: str | None = _field(
        None, "User (name or number) whose worker may use the broker. Empty: root, and the broker's own."
    )
    broker_state: FilePath | None = _field(
        None,
        "File in which the broker keeps which images came through it, for IMAGE_KEEP. Empty: it forgets them when it "
        "ends.",
    )
    log_format: Annotated[Literal["plain", "json"], BeforeValidator(_lower)] = _field(
        "plain", "Log lines: plain, or json (one object a line)."
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = _field(
        "info", "Least level that is logged."
    )

    #: Where ACCESS_TOKEN was read from a file: it is read again when the server refuses it (FAULTS.md B24).
    _access_token_path: Path | None = PrivateAttr(None)

    @property
    def access_token_path(self) -> Path | None:
        """ACCESS_TOKEN_FILE, where the token came from there."""
        return self._access_token_path

    def read_access_token(self) -> str:
        """What stands in ACCESS_TOKEN_FILE now. Raises ConfigError for what is no token."""
        assert self._access_token_path is not None  # noqa: S101 - the caller has looked
        token = _secret(self._access_token_path, "ACCESS_TOKEN_FILE")
        try:
            return _token(SecretStr(token)).get_secret_value()
        except ValueError as error:
            raise ConfigError(f"ACCESS_TOKEN_FILE: {self._access_token_path} {error}") from None

    @property
    def origin(self) -> Origin:
        """The API's origin."""
        return parse_origin(self.api_url)

    @property
    def proxies(self) -> Proxies:
        """Which proxy is used for what."""
        if self.proxy is not None:
            return Proxies.everything_through(None if self.proxy == "none" else self.proxy)
        is_here = (self.http_proxy or self.https_proxy) and _on_this_machine(_ENGINES_HOST)
        here = frozenset({_ENGINES_HOST} if is_here else ())
        return Proxies(self.http_proxy, self.https_proxy, self.no_proxy, here=here)


#: Settings whose value may lie in a file instead, named by <NAME>_FILE.
SECRETS = ("access_token", "password")

#: Values that mean what they say, whatever `${...}` is in them.
_LITERAL = frozenset({"USERNAME", *(name.upper() for name in SECRETS)})

#: Every name that is read, in upper case and without the prefix.
_KNOWN = frozenset(
    {name.upper() for name in Settings.model_fields}
    | {f"{name.upper()}_FILE" for name in SECRETS}
    | {"AWS_ENDPOINT_URL_COGNITO_IDENTITY_PROVIDER", *_ALIASES.values(), *_CA_FILES}
)

#: Those that no other program has names like: `ftp_proxy` and AWS_ENDPOINT_URL_S3 are no slips of the finger.
_OURS = _KNOWN - {name for name in _KNOWN if name.startswith(("AWS_", "DOCKER_")) or name.lower() in _SHARED}
_OURS -= set(_CA_FILES)


@dataclass(frozen=True)
class Loaded:
    """The settings, the layer each one came from (by field name), and what a person should know about them."""

    settings: Settings
    layers: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    #: The `.env` that was looked for and is not there.
    looked_for: Path | None = None


@dataclass(frozen=True)
class _Found:
    value: str
    layer: str
    prefixed: bool
    path: Path | None = None


def load(
    options: Mapping[str, Any] | None = None,
    *,
    environ: MutableMapping[str, str] | None = None,
    env_file: Path | None = None,
    server: bool = True,
) -> Loaded:
    """Read and check all settings. `options`: given on the command line, by field name; None values do not count.

    `server` False: those that say where and as whom to sign in may be missing, for commands that speak to no server.

    `env_file` None means `.env` in the working directory, if there is one. Secrets are taken out of `environ` after
    reading, so that no child process inherits them. Raises ConfigError with one line per bad setting.
    """
    environ = os.environ if environ is None else environ
    warnings: list[str] = []
    path, in_file = _dotenv(env_file, environ, warnings)
    found_in = {"environment": environ, **({} if in_file is None else {str(path): in_file})}
    layers = {layer: _named(layer, values, warnings) for layer, values in found_in.items()}
    given: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name in Settings.model_fields:
        found = _find(name, layers)
        if found is not None:
            given[name], origin[name] = found.value, found.layer
    _pair_credentials(given, origin, layers)
    _take_shared(given, origin, layers)
    found = _find("aws_endpoint_url_cognito_identity_provider", layers)
    if found is not None:  # as AWS's own tools have it, the address of one service goes before that of all
        given["aws_endpoint_url"], origin["aws_endpoint_url"] = found.value, found.layer
    for key in [key for key in environ if key.upper().removeprefix(PREFIX).lower() in SECRETS]:
        environ.pop(key)
    for name, value in (options or {}).items():
        if value is not None:
            given[name], origin[name] = value, "command line"
    if "path_base" not in given:
        from platformdirs import user_data_dir

        # The image has a default of its own. It must not be PATH_BASE itself: that would win over a mounted .env.
        given["path_base"] = environ.get("JOBFETCHER_DEFAULT_PATH_BASE") or user_data_dir("jobfetcher")
    looked_for = path.absolute() if in_file is None else None
    settings = _check(given, origin)
    warnings += _changed_by_others(settings, layers)
    if (token := _find("access_token", layers)) is not None and origin["access_token"] == token.layer:
        settings._access_token_path = token.path
    if server:
        check_server(settings, looked_for)
    layer_of = {name: origin.get(name, "default") for name in Settings.model_fields}
    warnings += [*_unknown(layers), *_readable_by_others(layers), *_odd(settings)]
    warnings += _unused(layers, settings)
    return Loaded(settings, layer_of, tuple(warnings), looked_for)


def docker_config() -> str:
    """The file that `docker login` writes credentials into; it may be written at any time, or never."""
    folder = os.environ.get("DOCKER_CONFIG")
    with contextlib.suppress(RuntimeError):  # a user without a home, as in many containers
        folder = folder or str(Path("~/.docker").expanduser())
    return f"{folder or '/.docker'}/config.json"


def failpoint_request() -> Request | None:
    """What a test asks for (core.failpoints), or None. Raises ConfigError for a name that does not exist."""
    text = os.environ.get("JOBFETCHER_FAILPOINT", "")
    return parse_request(text) if text else None


class _Layer(dict[str, str]):
    """Values by name in upper case; `spelt` is how such a name was written."""

    def __init__(self) -> None:
        super().__init__()
        self.spelt: dict[str, str] = {}


def _named(layer: str, values: Mapping[str, str], warnings: list[str]) -> _Layer:
    """The values under their names in upper case, however these are written; the usual spelling wins.

    `docker run --env-file` hands quotes and remarks on with the value: they are taken off, and quotes of a secret said.
    A password keeps what looks like a remark, for it may be a part of it.
    """
    named = _Layer()
    for key, value in sorted(values.items(), key=lambda item: _is_usual(item[0])):
        upper = key.upper()
        is_ours = upper.startswith(PREFIX) or upper in _KNOWN
        inside = unquoted(value) if layer == "environment" and is_ours else None
        if inside is not None and upper.removeprefix(PREFIX).lower() in SECRETS:
            warnings.append(
                f"{layer}: {key} stood in quotes, as `docker run --env-file` leaves them, and they were taken off; if "
                f"they belong to it, put it into a file and name that in {key}_FILE"
            )
        if inside is None and layer == "environment" and is_ours and (before := without_remark(value)) is not None:
            if upper.removeprefix(PREFIX) == "PASSWORD":
                warnings.append(
                    f"{layer}: {key} has a space and a # in it; if that begins a remark, which `docker run --env-file` "
                    "takes for a part of the value, take it out"
                )
            else:
                inside = before
        # another name's spelling means nothing to us: it stays as it is
        name = upper if is_ours else key
        named[name], named.spelt[name] = value if inside is None else inside, key
    return named


def _is_usual(key: str) -> bool:
    """Whether it is spelt as most people do: upper case, and for proxies lower case."""
    return key == (key.lower() if key.lower() in _SHARED else key.upper())


def _unknown(layers: Mapping[str, _Layer]) -> Iterator[str]:
    """Names that are no setting, in .env and with the prefix anywhere: most are a slip of the finger. Of the others in
    the environment only those that look like one."""
    for layer, values in layers.items():
        for key in values:
            name = key.removeprefix(PREFIX)
            if name in _KNOWN or key in _NOT_SETTINGS or key.upper() in _OTHERS:
                continue
            is_others = layer == "environment" and not key.startswith(PREFIX)
            meant, least = (_OURS, _NEAR) if is_others else (_KNOWN, 0.6)
            like = difflib.get_close_matches(name.upper(), meant, 1, least)
            if like or not is_others:
                yield f"{layer}: {values.spelt[key]} is no setting" + (f"; is {like[0]} meant?" if like else "")


def _odd(settings: Settings) -> Iterator[str]:
    """What may be meant, but hardly is."""
    address, _, last = settings.api_url.rpartition("/")
    if last in _ENDPOINTS:
        yield f"API_URL ends in /{last}, which the worker adds where it is needed; is {address} meant?"


def _unused(layers: Mapping[str, _Layer], settings: Settings) -> Iterator[str]:
    """What other programs of this machine go by and this one does not, where that makes a difference."""
    for layer, values in layers.items():
        for key, value in values.items():
            if key.upper() == "ALL_PROXY" and value.strip():
                if settings.proxy is None and not (settings.http_proxy and settings.https_proxy):
                    yield f"{layer}: {key} is not used; set PROXY, or HTTPS_PROXY and HTTP_PROXY, if a proxy is needed"
            elif key == "SSL_CERT_DIR" and value.strip() and settings.ca_file is None:  # a file that is named wins
                if layer == "environment" and _is_rehashed(value):
                    continue
                yield (
                    f"{layer}: {key} is not used: it counts only in the environment, as one directory that "
                    "`openssl rehash` has been through; name the directory in CA_FILE, which takes any"
                )


def _is_rehashed(folder: str) -> bool:
    """Whether OpenSSL finds certificates there by itself, as both libraries then do, beside those of the system."""
    try:
        return any(is_hashed(entry.name) for entry in Path(folder).iterdir())
    except OSError:
        return False


def _changed_by_others(settings: Settings, layers: Mapping[str, _Layer]) -> Iterator[str]:
    """Files that settings name, and docker's own, which names the programs that know a registry's password. The file of
    settings itself was looked at before it was read."""
    for name in SECRETS:
        if (found := _find(name, layers)) is not None and found.path is not None:
            yield from owners.check(found.path.expanduser(), f"{name.upper()}_FILE", secret=True)
    for name in ("ca_file", "job_signing_keys"):
        if (path := getattr(settings, name)) is not None:
            yield from owners.check(path, name.upper())
    yield from owners.check(Path(docker_config()))


def _readable_by_others(layers: Mapping[str, _Layer]) -> Iterator[str]:
    for layer, values in layers.items():
        if layer == "environment" or not any(values.get(name.upper()) for name in SECRETS):
            continue
        if Path(layer).stat().st_mode & 0o077:
            yield f"{layer} holds a secret and can be read by others; run `chmod 600 {layer}`"


def _dotenv(
    env_file: Path | None, environ: Mapping[str, str], warnings: list[str]
) -> tuple[Path, dict[str, str] | None]:
    """The file that settings are looked for in, and what stands in it; None where there is none."""
    path = env_file or Path(".env")
    if path.is_dir():
        raise ConfigError(
            f"{path} is a directory (docker makes one when the file that is to be mounted is missing); "
            "remove it, make the file, and start again"
        )
    if path.is_file():
        warnings += owners.check(path)
        return path, read_dotenv(path, environ, lambda key: key.upper().removeprefix(PREFIX) in _LITERAL)
    if env_file is not None:
        raise ConfigError(f"there is no file {path.absolute()} (--env-file)")
    return path, None


def _find(name: str, layers: Mapping[str, _Layer], only: str | None = None) -> _Found | None:
    """The first non-empty value of a setting: an empty one means "not set", as `ACCESS_TOKEN=` in a template does."""
    upper = name.upper()
    keys = [PREFIX + upper, upper, *([_ALIASES[upper]] if upper in _ALIASES else [])]
    for layer, values in layers.items():
        if only is not None and layer != only:
            continue
        for key in keys:
            if (value := values.get(key, "")).strip():
                value = value.strip("\r\n") if name in SECRETS else value.strip()  # a password may have spaces
                return _Found(value, f"{layer} ({values.spelt[key]})", key.startswith(PREFIX))
            if name in SECRETS and values.get(f"{key}_FILE", "").strip():
                path = Path(values[f"{key}_FILE"].strip())
                layer = f"{layer} ({values.spelt[f'{key}_FILE']})"
                return _Found(_secret(path, f"{key}_FILE"), layer, key.startswith(PREFIX), path)
    return None


def _secret(path: Path, key: str) -> str:
    """What stands in the file, without a byte order mark and the ends of lines around it: spaces may belong to it."""
    try:
        content = path.expanduser().read_bytes()
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig").strip("\r\n")
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:  # its words would show a piece of the secret
        raise ConfigError(f"{key}: {path} cannot be read: it is not text in UTF-8") from None
    if not text.strip():
        raise ConfigError(f"{key}: {path} is empty")
    return text


def _take_shared(given: dict[str, Any], origin: dict[str, str], layers: Mapping[str, _Layer]) -> None:
    """What other programs of this machine go by: certificates, and proxies. Our own CA_FILE and PROXY win."""
    for name in _CA_FILES:
        if "ca_file" not in given and (found := _find(name.lower(), layers)) is not None:
            given["ca_file"], origin["ca_file"] = found.value, found.layer
    if "proxy" in given:
        for name in _SHARED & given.keys():
            del given[name]
            origin[name] = f"not used, PROXY wins over {origin[name]}"


def _pair_credentials(given: dict[str, Any], origin: dict[str, str], layers: Mapping[str, _Layer]) -> None:
    """USERNAME comes from the layer that sets PASSWORD; a plain USERNAME elsewhere is the desktop's, not ours."""
    given.pop("username", None)
    origin.pop("username", None)
    password = origin.get("password")
    if password is None:
        return
    same = next(layer for layer in layers if password.startswith(f"{layer} ("))
    found = _find("username", layers, only=same) or _find("username", layers)
    if found is not None and (found.layer.startswith(f"{same} (") or found.prefixed):
        given["username"], origin["username"] = found.value, found.layer
        return
    raise ConfigError(f"USERNAME: missing beside PASSWORD in {same}; both must stand in the same place")


def _check(given: Mapping[str, Any], origin: Mapping[str, str]) -> Settings:
    try:
        settings = Settings.model_validate(given)
    except ValidationError as error:
        lines = [_line(problem, given) for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(lines)) from None
    paths = {name: getattr(settings, name) for name in ("path_base", "ca_file", "job_signing_keys")}
    settings = settings.model_copy(update={name: path.expanduser() for name, path in paths.items() if path is not None})
    if settings.job_signing_keys is not None and not settings.job_signing_keys.is_file():
        raise ConfigError(f"JOB_SIGNING_KEYS: there is no file {settings.job_signing_keys}")
    named = re.search(rf"\(({'|'.join(_CA_FILES)})\)$", origin.get("ca_file", ""))
    read_certificates(settings.ca_file, named[1] if named else "CA_FILE")
    return settings.model_copy(update={"path_base": settings.path_base.absolute()})


def check_server(settings: Settings, looked_for: Path | None = None) -> None:
    """Raise ConfigError unless it is said where to sign in, as whom, and safely.

    `looked_for`: see `Loaded`.
    """
    problems = []
    if not settings.api_url:
        problems.append(
            "API_URL: must be set to the address of the worker-facing API, such as https://jobs.example.org"
        )
    if settings.access_token is None and settings.password is None:
        problems.append("ACCESS_TOKEN, or USERNAME and PASSWORD: one of the two must be set to sign in")
    if problems and looked_for is not None:
        problems[-1] += f" (no file {looked_for}, where settings are looked for, either)"
    if problems:
        raise ConfigError("\n".join(problems))
    host = settings.origin.host
    if settings.origin.scheme == "http" and not settings.allow_insecure_http and not _on_this_machine(host):
        raise ConfigError(
            f"API_URL: {settings.api_url} would send the token unencrypted over the network; use https, "
            "or set ALLOW_INSECURE_HTTP=true if that network is yours alone"
        )


def _line(problem: Any, given: Mapping[str, Any]) -> str:
    name = str(problem["loc"][0])
    text = problem["msg"].removeprefix("Value error, ")
    text = text[0].lower() + text[1:]
    secret = name in SECRETS or "@" in str(given.get(name))  # a URL may carry a password
    shown = "" if secret else f" (it is {str(given.get(name))[:80]!r})"
    return f"{name.upper()}: {text}{shown}"


def _on_this_machine(host: str) -> bool:
    """Whether all that `host` leads to is this machine: loopback, or from inside a container its engine's machine.

    That one has a name of its own there and an address of the engine's network. The name proves nothing, for a name
    server may answer for it as well; that the engine itself wrote it into the container's hosts file does
    (`--add-host=host.docker.internal:host-gateway`, and Docker Desktop), if the address is an internal one.
    """
    try:
        found = {plain(str(entry[4][0])) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    written = _in_hosts_file(host) if host == _ENGINES_HOST else frozenset[Address]()
    return all(
        kind_of(address) is Kind.LOOPBACK or (kind_of(address) is Kind.PRIVATE and address in written)
        for address in found
    )


def _in_hosts_file(host: str) -> frozenset[Address]:
    """The addresses beside that name in the hosts file; none where it cannot be read."""
    found = set()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in _HOSTS_FILE.read_text().splitlines():
            address, *names = line.partition("#")[0].split() or [""]
            if host in (name.lower() for name in names):
                with contextlib.suppress(ValueError):
                    found.add(plain(address))
    return frozenset(found)
