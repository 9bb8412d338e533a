"""settings: layers, names, pairs, secrets, and one readable line for every bad value."""

import re
from pathlib import Path

import pytest

from jobfetcher.core.errors import ConfigError
from jobfetcher.settings import Loaded, Settings, load
from jobfetcher.show import config_rows

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


def test_nothing_is_interpolated(tmp_path: Path) -> None:
    env = dotenv(tmp_path, "PASSWORD=a${HOME}b\nUSERNAME=w\n")
    found = load(environ={"API_URL": GOOD["API_URL"]}, env_file=env).settings
    assert found.password is not None
    assert found.password.get_secret_value() == "a${HOME}b"


def test_a_named_env_file_must_be_there_and_readable(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file .*missing"):
        load(environ=dict(GOOD), env_file=tmp_path / "missing")
    (tmp_path / "latin").write_bytes(b"USERNAME=\xe4\n")
    with pytest.raises(ConfigError, match=r"latin cannot be read"):
        load(environ=dict(GOOD), env_file=tmp_path / "latin")


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


def test_a_secret_file_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    text = refused(SIGN_IN | {"USERNAME": "lab", "PASSWORD_FILE": str(missing)})
    assert re.fullmatch(f"PASSWORD_FILE: {missing} cannot be read: .*", text)
    missing.write_text(" \n")
    assert refused(SIGN_IN | {"USERNAME": "lab", "PASSWORD_FILE": str(missing)}).endswith("is empty")


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
        ("JOB_NETWORK", "a b"),
        ("JOB_NETWORK", "container:x"),
        ("JOB_READ_ONLY", "perhaps"),
        ("JOB_SHM_SIZE", "x"),
        ("JOB_PIDS_LIMIT", "1"),
        ("TRANSFERS", "0"),
        ("TRANSFERS", "65"),
        ("CA_FILE", "/nowhere/ca.pem"),
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
    assert load(environ={}, server=False).settings.api_url == ""


@pytest.mark.fault("T20")
@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "[::1]:80", "host.docker.internal:8000"])
def test_plain_http_is_for_this_machine(host: str) -> None:
    assert loaded({"API_URL": f"http://{host}"}).settings.origin.scheme == "http"


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
    assert loaded({"API_URL": "https://h/api/"}).settings.api_url == "https://h/api"


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
    environ = {"ACCESS_TOKEN": "t", "JOBFETCHER_MAXJOBS": "2", "SHELL": "/bin/sh"}
    warnings = load(environ=environ, env_file=env_file).warnings
    assert warnings == (
        "environment: JOBFETCHER_MAXJOBS is no setting; is MAX_JOBS meant?",
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
