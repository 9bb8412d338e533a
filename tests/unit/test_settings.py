"""settings: layers, names, pairs, secrets, and one readable line for every bad value."""

import re
import ssl
from pathlib import Path

import pytest

from jobfetcher.certificates import read_certificates
from jobfetcher.core.errors import ConfigError
from jobfetcher.settings import Loaded, Settings, load
from jobfetcher.show import config_rows
from jobfetcher.sources.worker_api.deadline import tls
from tests.support.transfers import Authority

ROOT = Path(__file__).parents[2]
GOOD = {"API_URL": "https://jobs.example.org", "ACCESS_TOKEN": "t0k3n", "PATH_BASE": "/srv/jobs"}


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No `.env` but the test's own is found."""
    monkeypatch.chdir(tmp_path)


def loaded(environ: dict[str, str] | None = None, **options: object) -> Loaded:
    return load(options, environ=GOOD | (environ or {}))


def refused(environ: dict[str, str]) -> str:
    with pytest.raises(ConfigError) as error:
        load(environ=environ)
    return str(error.value)


def dotenv(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "worker.env"
    path.write_text(text)
    return path


# -- layers ---------------------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_environment_over_the_file_over_the_default(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("TIMEOUT_JOB=11\nMAX_JOBS=2\nTRANSFERS=3\n")
    found = load({"max_jobs": 5}, environ=GOOD | {"MAX_JOBS": "4", "TRANSFERS": "6"})
    assert (found.settings.max_jobs, found.layers["max_jobs"]) == (5, "command line")
    assert (found.settings.transfers, found.layers["transfers"]) == (6, "environment (TRANSFERS)")
    assert (found.settings.timeout_job, found.layers["timeout_job"]) == (11, ".env (TIMEOUT_JOB)")
    assert (found.settings.log_format, found.layers["log_format"]) == ("plain", "default")


def test_an_option_that_was_not_given_does_not_count() -> None:
    assert loaded({"MAX_JOBS": "4"}, max_jobs=None).settings.max_jobs == 4


def test_the_prefix_wins_within_a_layer_but_not_over_a_higher_one(tmp_path: Path) -> None:
    env = dotenv(tmp_path, "JOBFETCHER_TIMEOUT_JOB=5\nJOBFETCHER_TRANSFERS=5\nTRANSFERS=7\n")
    found = load(environ=GOOD | {"TIMEOUT_JOB": "9"}, env_file=env)
    assert found.settings.timeout_job == 9
    assert (found.settings.transfers, found.layers["transfers"]) == (5, f"{env} (JOBFETCHER_TRANSFERS)")


def test_an_empty_value_is_not_set(tmp_path: Path) -> None:
    found = load(environ=GOOD | {"TIMEOUT_JOB": "", "GPUS": "  "}, env_file=dotenv(tmp_path, "TIMEOUT_JOB=7\n"))
    assert (found.settings.timeout_job, found.settings.gpus) == (7, "all")


def test_the_spelling_of_the_wild_is_known() -> None:
    assert loaded({"TIMOUT_STATUS": "21"}).settings.timeout_status == 21
    assert loaded({"TIMOUT_STATUS": "21", "TIMEOUT_STATUS": "22"}).settings.timeout_status == 22


REFERENCE_ENV = """\
# API
API_URL="https://api.example.org"  # the worker-facing API

# Authentication: either a token
ACCESS_TOKEN=  # leave empty to sign in
# or credentials
USERNAME=lab-worker # the account
PASSWORD='pa ss#word' # quoted: it has a hash

PATH_BASE=/data  # in the container
PATH_HOST_BASE=/srv/data # on the host
TIMEOUT_JOB=10  # seconds
export TIMOUT_STATUS=60 # seconds
"""


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_an_env_file_of_the_reference_works_as_it_is(tmp_path: Path, newline: str, bom: str) -> None:
    path = tmp_path / ".env"
    path.write_bytes((bom + REFERENCE_ENV.replace("# API\n", "", 1).replace("\n", newline)).encode())
    found = load(environ={"USERNAME": "alice"}).settings
    assert found.api_url == "https://api.example.org"
    assert found.access_token is None
    assert found.password is not None
    assert (found.username, found.password.get_secret_value()) == ("lab-worker", "pa ss#word")
    assert (found.path_base, found.path_host_base) == (Path("/data"), Path("/srv/data"))
    assert (found.timeout_job, found.timeout_status) == (10, 60)


def test_variables_are_replaced_but_in_what_means_what_it_says(tmp_path: Path) -> None:
    env = dotenv(
        tmp_path, "PASSWORD=a${HOME}b\nUSERNAME=w${x}\nDISK=/disk\nPATH_BASE=${DISK}/${LOGNAME}\nGROUPS=${NONE:-a},b\n"
    )
    found = load(environ={"API_URL": GOOD["API_URL"], "LOGNAME": "lab"}, env_file=env).settings
    assert found.password is not None
    assert (found.username, found.password.get_secret_value()) == ("w${x}", "a${HOME}b")
    assert (found.path_base, found.groups) == (Path("/disk/lab"), ("a", "b"))


def test_a_variable_that_nobody_replaced_makes_no_directory_of_that_name(tmp_path: Path) -> None:
    env = dotenv(tmp_path, "\n# where\nPATH_BASE=${NOWHERE}/jobs\n")
    with pytest.raises(ConfigError) as error:
        load(environ={}, env_file=env)
    assert str(error.value) == f"{env}, line 3: PATH_BASE has ${{NOWHERE}} in it, and there is no such variable"
    for written in ("${HOME}/jobs", "$HOME/jobs"):  # as `docker run --env-file` passes them on
        assert refused(GOOD | {"PATH_BASE": written}).startswith("PATH_BASE: has a variable in it that nobody replaced")


def test_a_named_env_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"there is no file {tmp_path}/missing \(--env-file\)"):
        load(environ=dict(GOOD), env_file=tmp_path / "missing")


@pytest.mark.parametrize(
    ("content", "line", "told"),
    [
        (b"USERNAME=lab\nPASSWORD=sesam\xe4\n", 2, "is not UTF-8; save it as UTF-8"),
        ("USERNAME=lab\nPASSWORD=sesam".encode("utf-16-le"), 1, "has zero bytes in it"),
        (b"USERNAME=lab\nPASSWORD='sesam\n", 2, "the quote that begins the value of PASSWORD is not closed"),
        (b"PASSWORD='sesam\nUSERNAME='lab'\n", 1, "PASSWORD"),
        (b'PASSWORD="sesam\n\nUSERNAME="lab"\n', 1, "PASSWORD"),
        (b"\n\nPASSWORD='sesam\nUSERNAME=lab'\n", 3, "the quote that begins the value of PASSWORD is not closed"),
        (b'PASSWORD="ses"am"\n', 1, 'something follows the closing quote of PASSWORD; where the value has a " in it'),
        (b"API_URL https://jobs.example.org\n", 1, "this is no setting; a line is NAME=VALUE"),
        (b"\n# x\nexport PASSWORD\n", 3, "PASSWORD has no value"),
        (b'PASSWORD="sesam\\nopen"\n', 1, "the value of PASSWORD has a control character in it"),
    ],
)
def test_a_line_that_cannot_be_read_is_named_and_not_shown(
    tmp_path: Path, content: bytes, line: int, told: str
) -> None:
    path = tmp_path / "worker.env"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load(environ=dict(GOOD), env_file=path)
    said = str(error.value)
    assert said.startswith(str(path))
    assert f"line {line}" in said
    assert told in said
    assert len(said.splitlines()) == 1
    assert "sesam" not in said


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "worker.env"
    path.write_text("USERNAME=lab\r\nPASSWORD='pä ss'\r\n", encoding=encoding, newline="")
    found = load(environ=dict(SIGN_IN), env_file=path).settings
    assert found.password is not None
    assert (found.username, found.password.get_secret_value()) == ("lab", "pä ss")


def test_names_and_fixed_words_may_be_written_in_any_case(tmp_path: Path) -> None:
    env = dotenv(tmp_path, "api_url=https://jobs.example.org\nAccess_Token=t\nlog_level=DEBUG\nGROUPS=A\ngroups=b\n")
    found = load(environ={"pull_policy": "Never", "Max_Jobs": "AUTO", "JobFetcher_Log_Format": "JSON"}, env_file=env)
    assert found.warnings == (f"{env} holds a secret and can be read by others; run `chmod 600 {env}`",)
    settings = found.settings
    assert (settings.api_url, settings.log_level, settings.log_format) == (GOOD["API_URL"], "debug", "json")
    assert (settings.pull_policy, settings.max_jobs, settings.groups) == ("never", None, ("A",))


def test_a_secret_in_lower_case_leaves_the_environment_as_well() -> None:
    environ = {"api_url": GOOD["API_URL"], "access_token": "canary", "jobfetcher_password": "canary"}
    load(environ=environ | {"JOBFETCHER_USERNAME": "w"})
    with_user = environ | {"JOBFETCHER_USERNAME": "w"}
    load(environ=with_user)
    assert "canary" not in str(with_user)


def test_quotes_that_docker_leaves_are_taken_off() -> None:
    found = load(
        environ={
            "API_URL": "'https://jobs.example.org'",
            "USERNAME": '"lab"  # the account',
            "PASSWORD": "'pa ss#word'",
            "TIMEOUT_JOB": '"7"',
            "OTHERS": "'not ours'",
        }
    )
    settings = found.settings
    assert settings.password is not None
    assert (settings.api_url, settings.username, settings.timeout_job) == (GOOD["API_URL"], "lab", 7)
    assert settings.password.get_secret_value() == "pa ss#word"
    assert found.warnings == (
        "environment: PASSWORD stood in quotes, as `docker run --env-file` leaves them, and they were taken off; if "
        "they belong to it, put it into a file and name that in PASSWORD_FILE",
    )


def test_remarks_that_docker_leaves_are_no_part_of_a_value() -> None:
    """The reference worker's `.env` has one behind each path, and its own command line is `docker run --env-file`."""
    found = load(
        environ={
            "API_URL": "https://jobs.example.org  # where the jobs are",
            "ACCESS_TOKEN": " # alternatively, a fixed token",
            "USERNAME": "lab#1",
            "PASSWORD": "pa ss #word",
            "PATH_BASE": "/data  # as the worker sees it",
            "PATH_HOST_BASE": " # found by itself",
            "TIMEOUT_JOB": "7\t# seconds",
            "OTHERS": "not # ours",
        }
    )
    settings = found.settings
    assert settings.password is not None
    assert settings.password.get_secret_value() == "pa ss #word"
    assert (settings.api_url, settings.access_token, settings.username) == (GOOD["API_URL"], None, "lab#1")
    assert (str(settings.path_base), settings.path_host_base, settings.timeout_job) == ("/data", None, 7)
    assert found.warnings == (
        "environment: PASSWORD has a space and a # in it; if that begins a remark, which `docker run --env-file` takes "
        "for a part of the value, take it out",
    )


# -- user name and password -----------------------------------------------------------------------------------------

SIGN_IN = {"API_URL": GOOD["API_URL"], "PATH_BASE": "/srv/jobs"}


def test_the_desktops_user_name_is_not_ours(tmp_path: Path) -> None:
    env = dotenv(tmp_path, "USERNAME=lab\nPASSWORD=pw\n")
    found = load(environ=SIGN_IN | {"USERNAME": "alice"}, env_file=env)
    assert (found.settings.username, found.layers["username"]) == ("lab", f"{env} (USERNAME)")


def test_a_user_name_without_a_password_is_ignored() -> None:
    assert loaded({"USERNAME": "alice"}).settings.username is None


def test_a_password_without_a_user_name_beside_it_is_refused(tmp_path: Path) -> None:
    env = dotenv(tmp_path, "PASSWORD=pw\n")
    with pytest.raises(ConfigError, match=r"USERNAME: missing beside PASSWORD in .*worker\.env"):
        load(environ=SIGN_IN | {"USERNAME": "alice"}, env_file=env)


def test_a_prefixed_user_name_is_ours_wherever_it_stands(tmp_path: Path) -> None:
    env = dotenv(tmp_path, "PASSWORD=pw\n")
    found = load(environ=SIGN_IN | {"USERNAME": "alice", "JOBFETCHER_USERNAME": "lab"}, env_file=env)
    assert found.settings.username == "lab"


def test_both_from_the_environment() -> None:
    assert load(environ=SIGN_IN | {"USERNAME": "lab", "PASSWORD": "pw"}).settings.username == "lab"


# -- secrets --------------------------------------------------------------------------------------------------------


@pytest.mark.fault("T10")
def test_secrets_leave_the_environment_and_show_nowhere() -> None:
    environ = SIGN_IN | {
        "USERNAME": "lab",
        "PASSWORD": "plain-secret",
        "JOBFETCHER_PASSWORD": "prefixed-secret",
        "ACCESS_TOKEN": "token-secret",
        "JOBFETCHER_ACCESS_TOKEN": "prefixed-token-secret",
        "PATH": "/bin",
    }
    found = load(environ=environ)
    assert found.settings.password is not None
    assert found.settings.password.get_secret_value() == "prefixed-secret"
    assert environ == SIGN_IN | {"USERNAME": "lab", "PATH": "/bin"}
    shown = f"{found} {found.settings!r} {found.settings.model_dump_json()} {config_rows(found)}"
    assert "secret'" not in shown
    assert "-secret" not in shown


@pytest.mark.fault("T10")
def test_a_secret_may_lie_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("from-a-file\n")
    found = load(environ=SIGN_IN | {"USERNAME": "lab", "PASSWORD_FILE": str(path)})
    assert found.settings.password is not None
    assert found.settings.password.get_secret_value() == "from-a-file"
    assert found.layers["password"] == "environment (PASSWORD_FILE)"
    path.write_text("token\n")
    with_token = load(environ=SIGN_IN | {"JOBFETCHER_ACCESS_TOKEN_FILE": str(path)})
    assert with_token.settings.access_token is not None
    assert with_token.settings.access_token.get_secret_value() == "token"


@pytest.mark.fault("B24")
def test_the_file_of_a_token_is_known_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("old\n")
    settings = load(environ=SIGN_IN | {"ACCESS_TOKEN_FILE": str(path)}).settings
    assert settings.access_token_path == path
    path.write_text("new\n")
    assert settings.read_access_token() == "new"
    for content, words in (("", "is empty"), ("a b\n", "has characters that no token has")):
        path.write_text(content)
        with pytest.raises(ConfigError, match=f"ACCESS_TOKEN_FILE: {path} {words}"):
            settings.read_access_token()
    assert load(environ=SIGN_IN | {"ACCESS_TOKEN": "fixed"}).settings.access_token_path is None
    both = load(environ=SIGN_IN | {"ACCESS_TOKEN": "fixed", "ACCESS_TOKEN_FILE": str(path)}).settings
    assert both.access_token_path is None


@pytest.mark.fault("S21")
def test_groups_are_told_to_be_a_preference() -> None:
    assert "A preference: any other job may come, too." in str(Settings.model_fields["groups"].description)


def test_a_secret_file_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    text = refused(SIGN_IN | {"USERNAME": "lab", "PASSWORD_FILE": str(missing)})
    assert re.fullmatch(f"PASSWORD_FILE: {missing} cannot be read: .*", text)
    missing.write_text(" \n")
    assert refused(SIGN_IN | {"USERNAME": "lab", "PASSWORD_FILE": str(missing)}).endswith("is empty")
    missing.write_bytes(b"sesam\xe4\n")
    text = refused(SIGN_IN | {"USERNAME": "lab", "PASSWORD_FILE": str(missing)})
    assert text == f"PASSWORD_FILE: {missing} cannot be read: it is not text in UTF-8"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_only_the_ends_of_lines_are_cut_from_a_secret(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "password"
    path.write_text(" two words \r\n", encoding=encoding, newline="")
    found = load(environ=SIGN_IN | {"USERNAME": "lab", "PASSWORD_FILE": str(path)}).settings
    assert found.password is not None
    assert found.password.get_secret_value() == " two words "
    found = load(environ=SIGN_IN | {"USERNAME": "lab ", "PASSWORD": " two words \r"}).settings
    assert found.password is not None
    assert (found.username, found.password.get_secret_value()) == ("lab", " two words ")
    (tmp_path / ".env").write_text("USERNAME=lab\nPASSWORD=' two words '\n")
    found = load(environ=dict(SIGN_IN)).settings
    assert found.password is not None
    assert found.password.get_secret_value() == " two words "


# -- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mib"),
    [("512", 512), ("512MiB", 512), ("2GB", 2048), ("2 g", 2048), ("1.5GiB", 1536), ("1024k", 1), ("1T", 1 << 20)],
)
def test_sizes_are_mib(text: str, mib: int) -> None:
    assert loaded({"RESERVE_MEMORY": text}).settings.reserve_memory == mib


@pytest.mark.parametrize(
    ("text", "seconds"), [("30", 30), ("90s", 90), ("5m", 300), ("24h", 86400), ("1.5 H", 5400), ("2d", 172800)]
)
def test_times_are_seconds(text: str, seconds: float) -> None:
    assert loaded({"MAX_RUNTIME": text}).settings.max_runtime == seconds


def test_auto_and_lists() -> None:
    found = loaded({"MAX_JOBS": "auto", "GROUPS": " a, ,b ", "RESERVE_DISK": "auto", "ALLOWED_IMAGES": ""}).settings
    assert (found.max_jobs, found.groups, found.reserve_disk, found.allowed_images) == (None, ("a", "b"), None, ())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("API_URL", "jobs.example.org"),
        ("API_URL", "ftp://jobs.example.org"),
        ("API_URL", "https://"),
        ("API_URL", "https://jobs.example.org:99999"),
        ("API_URL", "https://jobs.example.org/?a=b"),
        ("API_URL", "https://jobs.example.org/#a"),
        ("API_URL", "https://jobs example.org"),
        ("ACCESS_TOKEN", "\u201cquoted\u201d"),
        ("ACCESS_TOKEN", "two words"),
        ("TIMEOUT_JOB", "soon"),
        ("TIMEOUT_JOB", "0"),
        ("TIMEOUT_JOB", "-5"),
        ("TIMEOUT_JOB", "inf"),
        ("TIMEOUT_STATUS", "121"),
        ("OLDER_THAN", "-1"),
        ("MAX_JOBS", "0"),
        ("MAX_JOBS", "many"),
        ("MAX_JOBS", "257"),
        ("RESERVE_CPUS", "-0.1"),
        ("RESERVE_CPUS", "nan"),
        ("RESERVE_MEMORY", "lots"),
        ("RESERVE_MEMORY", "-1"),
        ("RESERVE_DISK", "5 bananas"),
        ("MAX_RUNTIME", "1y"),
        ("STOP_GRACE", "x"),
        ("PULL_POLICY", "sometimes"),
        ("ALLOWED_IMAGES", "docker.io/.*"),
        ("ALLOWED_IMAGES", r"docker.io/library/*, ^ghcr\.io/lab/.+$"),
        ("JOB_NETWORK", "a b"),
        ("JOB_NETWORK", "container:x"),
        ("JOB_READ_ONLY", "perhaps"),
        ("JOB_SHM_SIZE", "x"),
        ("JOB_PIDS_LIMIT", "1"),
        ("TRANSFERS", "0"),
        ("TRANSFERS", "65"),
        ("CA_FILE", "/nowhere/ca.pem"),
        ("GPUS", "1"),
        ("GPUS", "GPU-1, 0"),
        ("STORAGE_ALLOW", "minio.lab minio2.lab"),
        ("STORAGE_ALLOW", "minio.lab/bucket"),
        ("STORAGE_ALLOW", "*"),
        ("STORAGE_ALLOW", "*."),
        ("STORAGE_ALLOW", "m*.lab"),
        ("STORAGE_ALLOW", "minio.lab:"),
        ("STORAGE_ALLOW", "minio.lab:99999"),
        ("STORAGE_ALLOW", "10.0.0.0/33"),
        ("STORAGE_ALLOW", "[fd00::1"),
        ("STORAGE_ALLOW", "http://"),
        ("STORAGE_ALLOW", "minio.lab, ö.lab"),
        ("PROXY", "proxy.lab:3128"),
        ("PROXY", "socks5://proxy.lab:1080"),
        ("HTTPS_PROXY", "socks5://proxy.lab:1080"),
        ("HTTP_PROXY", "http://proxy lab"),
        ("ALLOW_INSECURE_HTTP", "x"),
        ("ON_WORKER_FAULT", "shrug"),
        ("LOG_FORMAT", "xml"),
        ("LOG_LEVEL", "loud\nline"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_setting(name: str, value: str) -> None:
    text = refused(GOOD | {name: value})
    assert text.startswith(f"{name}: ")
    assert len(text.splitlines()) == 1
    if name == "ACCESS_TOKEN":
        assert value not in text


def test_every_bad_value_has_its_line() -> None:
    lines = refused(GOOD | {"TIMEOUT_JOB": "soon", "TRANSFERS": "0", "GPUS": "all"}).splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == ["TIMEOUT_JOB", "TRANSFERS"]


def test_what_is_missing_is_named_at_once() -> None:
    lines = refused({}).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["API_URL", "ACCESS_TOKEN, or USERNAME and PASSWORD"]
    where = f"(no file {Path.cwd() / '.env'}, where settings are looked for, either)"
    assert where in lines[-1]
    Path(".env").touch()
    assert where not in refused({})
    assert load(environ={}, server=False).settings.api_url == ""


@pytest.mark.fault("T20")
@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "[::1]:80"])
def test_plain_http_is_for_this_machine(host: str) -> None:
    assert loaded({"API_URL": f"http://{host}"}).settings.origin.scheme == "http"


@pytest.mark.fault("T20")
@pytest.mark.parametrize(
    ("hosts", "answer", "is_local"),
    [
        ("172.17.0.1\thost.docker.internal", "172.17.0.1", True),  # as --add-host writes it
        ("127.0.0.1 localhost\n192.168.65.254 gateway Host.Docker.internal # Desktop", "192.168.65.254", True),
        ("fd00::1 host.docker.internal", "fd00::1", True),
        ("", "127.0.0.1", True),
        ("", "172.17.0.1", False),  # whoever answers for names says so
        ("", "192.168.1.66", False),
        ("", "93.184.216.34", False),
        ("# 192.168.1.66 host.docker.internal", "192.168.1.66", False),
        ("172.17.0.1 host.docker.internal", "192.168.1.66", False),
        ("172.17.0.1 other.host.docker.internal", "172.17.0.1", False),
        ("93.184.216.34 host.docker.internal", "93.184.216.34", False),
        ("169.254.169.254 host.docker.internal", "169.254.169.254", False),
        ("nonsense host.docker.internal", "172.17.0.1", False),
    ],
)
def test_the_engines_host_is_this_machine_only_where_its_address_is(
    hosts: str, answer: str, is_local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file := tmp_path / "hosts").write_text(hosts)
    monkeypatch.setattr("jobfetcher.settings._HOSTS_FILE", file, raising=False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: [(0, 0, 0, "", (answer, 0))])
    url = "http://host.docker.internal:8000"
    if is_local:
        assert loaded({"API_URL": url}).settings.origin.scheme == "http"
    else:
        assert refused(GOOD | {"API_URL": url}).startswith(f"API_URL: {url} would send the token unencrypted")
    proxies = loaded(
        {"HTTP_PROXY": "http://proxy.lab:3128", "ALLOW_INSECURE_HTTP": "true", "API_URL": url}
    ).settings.proxies
    assert (proxies.choose("http", "host.docker.internal", 8000) is None) is is_local


@pytest.mark.fault("T20")
def test_the_engines_host_is_elsewhere_where_nobody_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: object) -> None:
        raise OSError

    monkeypatch.setattr("socket.getaddrinfo", nobody)
    monkeypatch.setattr("jobfetcher.settings._HOSTS_FILE", Path("/nowhere"), raising=False)
    assert "unencrypted" in refused(GOOD | {"API_URL": "http://host.docker.internal:8000"})


@pytest.mark.fault("T20")
def test_plain_http_over_a_network_must_be_allowed() -> None:
    text = refused(GOOD | {"API_URL": "http://192.0.2.1"})
    assert text.startswith("API_URL: http://192.0.2.1 would send the token unencrypted")
    assert loaded({"API_URL": "http://192.0.2.1", "ALLOW_INSECURE_HTTP": "true"}).settings.allow_insecure_http


def test_the_base_directory_is_absolute_and_the_url_has_no_slash_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/lab")
    assert loaded({"PATH_BASE": "jobs"}).settings.path_base == tmp_path / "jobs"
    assert loaded({"PATH_BASE": "~/jobs"}).settings.path_base == Path("/home/lab/jobs")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("https://h/api/", "https://h/api"),
        ("https://h/api//", "https://h/api"),
        ("HTTPS://Jobs.Example.ORG:443/", "https://jobs.example.org"),
        ("https://jobs.example.org.", "https://jobs.example.org"),
        ("https://jobs.example.org:8443/API", "https://jobs.example.org:8443/API"),
        ("http://127.0.0.1:80", "http://127.0.0.1"),
        ("http://[::1]:8000/", "http://[::1]:8000"),
    ],
)
def test_every_spelling_of_an_address_is_one_address(written: str, meant: str) -> None:
    assert loaded({"API_URL": written}).settings.api_url == meant


@pytest.mark.parametrize("last", ["jobs", "access_info", "docs"])
def test_an_address_that_ends_in_what_the_worker_adds_is_told(last: str) -> None:
    (told,) = loaded({"API_URL": f"https://jobs.example.org/v1/{last}/"}).warnings
    assert told == (
        f"API_URL ends in /{last}, which the worker adds where it is needed; is https://jobs.example.org/v1 meant?"
    )


# -- certificates and proxies -----------------------------------------------------------------------------------------


def test_a_file_of_certificates_may_have_any_usual_form(authority: Authority, tmp_path: Path) -> None:
    pem = authority.file.read_text()
    forms = {
        "plain.pem": pem.encode(),
        "commented.pem": f"# Universität\r\n{pem}".replace("\n", "\r\n").encode(),
        "marked.pem": b"\xef\xbb\xbf" + pem.encode(),
        "wide.pem": pem.encode("utf-16"),
        "binary.der": ssl.PEM_cert_to_DER_cert(pem),
        "two.pem": (pem + pem).encode(),
    }
    for name, content in forms.items():
        (tmp_path / name).write_bytes(content)
        assert loaded({"CA_FILE": str(tmp_path / name)}).settings.ca_file == tmp_path / name
        trust = read_certificates(tmp_path / name)
        assert (trust.file is None) is (name in {"marked.pem", "wide.pem", "binary.der"})
        context = tls(None if trust.file is None else str(trust.file), trust.pem)
        assert [found["serialNumber"] for found in context.get_ca_certs()] != []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"hello", "has no certificate in it"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "has no certificate in it"),
        (
            b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
            "has no certificate .* a private key in it",
        ),
        (b"\x30\x03\x02\x01\x00", "has no certificate in it"),
    ],
)
@pytest.mark.parametrize("name", ["CA_FILE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_a_file_without_certificates_is_one_line(tmp_path: Path, content: bytes, told: str, name: str) -> None:
    path = tmp_path / "ca.pem"
    path.write_bytes(content)
    text = refused(GOOD | {name: str(path)})
    assert re.match(f"{name}: {path} {told}", text)
    assert len(text.splitlines()) == 1
    with pytest.raises(ConfigError, match=f"{name}: "):
        load(environ=GOOD | {name: str(path)}, server=False)  # `jobfetcher config` says so as well
    assert refused(GOOD | {name: str(tmp_path)}).startswith(f"{name}: {tmp_path} is a directory without a certificate")


@pytest.mark.parametrize("name", ["CA_FILE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_a_directory_of_certificates_counts_as_other_programs_take_it(
    authority: Authority, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "certificates"
    (folder / "java").mkdir(parents=True)
    mine = authority.file.read_text()
    (folder / "lab.crt").write_bytes(ssl.PEM_cert_to_DER_cert(mine))
    (folder / "bundle.pem").write_text(f"# all of them\n{mine}\n{mine}")
    (folder / "broken.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    (folder / "README").write_text("Universität")
    (folder / "gone.pem").symlink_to("/nowhere/gone.pem")
    assert loaded({name: str(folder)}).settings.ca_file == folder
    trust = read_certificates(folder, name)
    assert trust.file is None
    assert trust.pem is not None
    assert trust.pem.count("BEGIN CERTIFICATE") == 1
    assert len(tls(None, trust.pem).get_ca_certs()) == 1
    (folder / "0123abcd.0").symlink_to("broken.pem")  # then the names of OpenSSL are those that count
    assert refused(GOOD | {name: str(folder)}).startswith(f"{name}: {folder} is a directory without a certificate")


def test_certificates_below_a_closed_directory_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")  # what `stat` says to anybody but root

    path = tmp_path / "ca.pem"
    monkeypatch.setattr(Path, "is_dir", closed)
    with pytest.raises(ConfigError, match=f"CA_FILE: {path} cannot be read: Permission denied"):
        read_certificates(path)


@pytest.mark.parametrize("key", ["ALL_PROXY", "all_proxy"])
def test_a_proxy_that_others_go_by_and_this_worker_does_not_is_told_without_its_password(key: str) -> None:
    proxy = {key: "http://user:canary@proxy.lab:3128"}
    (told,) = loaded(proxy).warnings
    assert told == f"environment: {key} is not used; set PROXY, or HTTPS_PROXY and HTTP_PROXY, if a proxy is needed"
    assert loaded(proxy | {"PROXY": "none"}).warnings == ()
    assert loaded(proxy | {"HTTP_PROXY": "p:1", "HTTPS_PROXY": "p:1"}).warnings == ()
    assert loaded(proxy | {"HTTPS_PROXY": "p:1"}).warnings == (told,)
    Path(".env").write_text(f"{key}=http://user:canary@proxy.lab:3128\n")
    assert load(environ=dict(GOOD)).warnings == (told.replace("environment", ".env"),)


def test_a_directory_of_certificates_that_has_no_effect_is_told(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "certificates"
    folder.mkdir()
    found = {"SSL_CERT_DIR": str(folder)}
    (told,) = loaded(found).warnings
    assert told.startswith("environment: SSL_CERT_DIR is not used: it counts only in the environment, as one directory")
    (folder / "0123abcd.0").symlink_to(authority.file)
    assert loaded(found).warnings == ()
    # Distributions set both, and who names a file means it.
    assert loaded({"SSL_CERT_DIR": "/elsewhere", "REQUESTS_CA_BUNDLE": str(authority.file)}).warnings == ()
    assert len(loaded({"SSL_CERT_DIR": f"{folder}:/elsewhere"}).warnings) == 1
    Path(".env").write_text(f"SSL_CERT_DIR={folder}\n")
    (told,) = load(environ=dict(GOOD)).warnings
    assert told.startswith(".env: SSL_CERT_DIR is not used: ")


def test_certificates_that_others_go_by_count_where_ours_are_not_named(authority: Authority, tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("CA_FILE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")}
    for path in paths.values():
        path.write_bytes(authority.file.read_bytes())
    environ = {name: str(path) for name, path in paths.items()}
    env = dotenv(tmp_path, f"CA_FILE={environ.pop('CA_FILE')}\n")
    found = load(environ=GOOD | environ, env_file=env)
    assert (found.settings.ca_file, found.layers["ca_file"]) == (paths["CA_FILE"], f"{env} (CA_FILE)")
    found = load(environ=GOOD | environ)
    assert found.layers["ca_file"] == "environment (SSL_CERT_FILE)"
    del environ["SSL_CERT_FILE"]
    found = load(environ=GOOD | environ)
    assert (found.settings.ca_file, found.layers["ca_file"]) == (
        paths["REQUESTS_CA_BUNDLE"],
        "environment (REQUESTS_CA_BUNDLE)",
    )


@pytest.mark.fault("B20")
def test_proxies_of_the_environment_are_settings(tmp_path: Path) -> None:
    found = loaded(
        {"https_proxy": "proxy.lab:3128", "HTTPS_PROXY": "http://other:1", "no_proxy": "minio.lab, .cluster"}
    )
    assert found.layers["https_proxy"] == "environment (https_proxy)"
    proxies = found.settings.proxies
    assert proxies.choose("https", "jobs.example.org", 443) == "http://proxy.lab:3128"
    assert proxies.choose("http", "jobs.example.org", 80) is None
    assert proxies.choose("https", "minio.lab", 9000) is None
    env = dotenv(tmp_path, "HTTP_PROXY=http://user:canary@proxy.lab\n")
    found = load(environ=dict(GOOD), env_file=env)
    assert found.settings.http_proxy == "http://user:canary@proxy.lab:80"
    shown = {row["name"]: (row["value"], row["from"]) for row in config_rows(found)}
    assert shown["HTTP_PROXY"] == ("http://********@proxy.lab:80", f"{env} (HTTP_PROXY)")


@pytest.mark.fault("B20")
@pytest.mark.parametrize(("proxy", "chosen"), [("none", None), ("NONE", None), ("http://ours:1", "http://ours:1")])
def test_proxy_wins_over_what_is_for_every_program(proxy: str, chosen: str | None) -> None:
    found = loaded({"HTTPS_PROXY": "socks5://nonsense", "NO_PROXY": "*", "PROXY": proxy})
    assert found.settings.proxies.choose("https", "jobs.example.org", 443) == chosen
    assert found.settings.proxies.choose("http", "127.0.0.1", 80) == chosen
    shown = {row["name"]: (row["value"], row["from"]) for row in config_rows(found)}
    assert shown["HTTPS_PROXY"] == ("", "not used, PROXY wins over environment (HTTPS_PROXY)")


@pytest.mark.fault("B20")
@pytest.mark.parametrize(
    ("no_proxy", "host", "port", "direct"),
    [
        ("", "jobs.example.org", 443, False),
        ("*", "jobs.example.org", 443, True),
        ("example.org", "jobs.example.org", 443, True),
        (".example.org", "jobs.example.org", 443, True),
        ("*.example.org", "jobs.example.org", 443, True),
        ("Example.ORG", "example.org", 443, True),
        ("example.org", "notexample.org", 443, False),
        ("example.org:8443", "jobs.example.org", 443, False),
        ("example.org:8443", "jobs.example.org", 8443, True),
        ("10.0.0.0/8", "10.1.2.3", 443, True),
        ("10.0.0.0/8", "11.1.2.3", 443, False),
        ("10.1.2.3", "10.1.2.3", 443, True),
        ("2.3", "10.1.2.3", 443, False),
        ("not a host!, minio.lab", "minio.lab", 9000, True),
        ("", "127.0.0.1", 8000, True),
        ("", "localhost", 8000, True),
        ("", "::1", 8000, True),
        ("", "host.docker.internal", 8000, False),
    ],
)
def test_no_proxy_is_read_as_other_programs_read_it(no_proxy: str, host: str, port: int, direct: bool) -> None:
    proxies = loaded({"HTTPS_PROXY": "http://proxy.lab:3128", "NO_PROXY": no_proxy}).settings.proxies
    assert (proxies.choose("https", host, port) is None) is direct


def test_the_address_of_one_service_goes_before_that_of_all() -> None:
    assert loaded({"AWS_ENDPOINT_URL": "http://all"}).settings.aws_endpoint_url == "http://all"
    both = {"AWS_ENDPOINT_URL": "http://all", "AWS_ENDPOINT_URL_COGNITO_IDENTITY_PROVIDER": "http://cognito"}
    assert loaded(both).settings.aws_endpoint_url == "http://cognito"


# -- what people see ------------------------------------------------------------------------------------------------


def test_the_table_of_settings_is_whole_and_plain() -> None:
    rows = {row["name"]: row for row in config_rows(loaded({"GROUPS": "a,b", "JOB_READ_ONLY": "true"}))}
    assert set(rows) == {name.upper() for name in Settings.model_fields}
    assert rows["ACCESS_TOKEN"]["value"] == "********"
    assert rows["PASSWORD"]["value"] == ""
    assert rows["GROUPS"] == {"name": "GROUPS", "value": "a, b", "from": "environment (GROUPS)"}
    assert (rows["JOB_READ_ONLY"]["value"], rows["TIMEOUT_JOB"]["value"]) == ("true", "30")
    assert (rows["MAX_JOBS"]["value"], rows["MAX_JOBS"]["from"]) == ("auto", "default")


def test_the_example_file_has_every_setting_and_no_other() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    named = [match[1] for line in lines if (match := re.match(r"#?\s?([A-Z][A-Z0-9_]*)=", line))]
    assert len(named) == len(set(named))
    extra = {"PASSWORD_FILE", "ACCESS_TOKEN_FILE", "TIMOUT_STATUS"}
    assert set(named) - extra == {name.upper() for name in Settings.model_fields}


def test_readme_and_the_example_file_say_of_every_setting_what_it_says_of_itself() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| [^|]*\| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    example = re.findall(r"^# (.+)\n#?([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    texts = {name.upper(): field.description for name, field in Settings.model_fields.items()}
    assert {name: text.replace("`", "") for name, text in rows} == texts
    assert {name: text for text, name in example} == texts


def test_the_example_file_can_be_read_as_it_is() -> None:
    found = load(environ=dict(GOOD), env_file=ROOT / ".env.example", server=False)
    assert found.settings.api_url == GOOD["API_URL"]


def test_every_setting_says_what_it_is_for() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


# -- what a person should know ----------------------------------------------------------------------------------------


def test_a_name_that_is_no_setting_is_told_with_the_one_it_resembles(tmp_path: Path) -> None:
    env_file = tmp_path / "worker.env"
    env_file.write_text("API_URL=https://jobs.example.org\nTIMEOUT_JBO=3\nTIMOUT_STATUS=20\nPASSWORD_FILE=\n")
    environ = {"JOBFETCHER_MAXJOBS": "2", "SHELL": "/bin/sh", "USER": "lab", "HOSTNAME": "pc", "ACESS_TOKEN": "t"}
    environ |= {
        "ACCESS_TOKEN": "t",
        "LOGNAME": "lab",
        "PATH": "/bin",
        "FTP_PROXY": "",
        "AWS_ENDPOINT_URL_S3": "",
        "ALL_PROXY": "",
        "PROXIES": "",
    }
    warnings = load(environ=environ, env_file=env_file).warnings
    assert warnings == (
        "environment: JOBFETCHER_MAXJOBS is no setting; is MAX_JOBS meant?",
        "environment: ACESS_TOKEN is no setting; is ACCESS_TOKEN meant?",
        f"{env_file}: TIMEOUT_JBO is no setting; is TIMEOUT_JOB meant?",
    )


@pytest.mark.fault("T10")
@pytest.mark.parametrize(("mode", "told"), [(0o600, False), (0o640, True), (0o604, True)])
def test_a_file_with_a_secret_that_others_can_read_is_told(tmp_path: Path, mode: int, told: bool) -> None:
    env_file = tmp_path / "worker.env"
    env_file.write_text("API_URL=https://jobs.example.org\nACCESS_TOKEN=t\n")
    env_file.chmod(mode)
    warnings = load(environ={}, env_file=env_file).warnings
    assert warnings == ((f"{env_file} holds a secret and can be read by others; run `chmod 600 {env_file}`",) * told)


def test_a_directory_in_place_of_the_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a directory"):
        load(environ={"ACCESS_TOKEN": "t"}, env_file=tmp_path)
