"""Every setting of the mock API: its meaning, its default, and how it is read from `MOCK_API_*` environment variables.

Used by `app.create_app` and by the command line. A bad value raises `ValueError` with one line per setting.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

ENV_PREFIX = "MOCK_API_"

GIB = 1024**3


class Account(BaseModel):
    """Somebody who may sign in. Only members of the group `workers` may use the API (PROTOCOL.md S16); those of `cloud`
    are of the environment `cloud`, all others of `local` (S21)."""

    model_config = ConfigDict(frozen=True)

    # a ';' is allowed and keeps the account from ever pulling a job, as on deployed servers (S23)
    name: str = Field(pattern=r"^[^:\s]+$")
    password: str
    groups: tuple[str, ...] = ("workers",)


def _accounts(value: object) -> object:
    """`name:password:group+group` items, comma-separated; anything that is no string passes through."""
    if not isinstance(value, str):
        return value
    accounts = []
    for item in value.split(","):
        name, _, rest = item.strip().partition(":")
        password, _, groups = rest.rpartition(":") if ":" in rest else (rest, "", "workers")
        accounts.append(Account(name=name, password=password, groups=tuple(filter(None, groups.split("+")))))
    return tuple(accounts)


def _tokens(value: object) -> object:
    """`token:account` items, comma-separated; anything that is no string passes through."""
    if not isinstance(value, str):
        return value
    return dict(item.strip().rpartition(":")[::2] for item in value.split(",") if item.strip())


class Settings(BaseModel):
    """What the server is told at its start. Times are seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data_dir: Path = Field(Path("mock-api-data"), description="database, secret and files live below it")
    file_mode: Literal["local", "signed", "s3"] = Field(
        "signed", description="local: API URLs with the caller's token; signed: own signed URLs; s3: presigned by boto3"
    )
    public_url: str | None = Field(None, description="the API's URL as workers see it; default: the Host header's")
    storage_url: str | None = Field(None, description="origin of the signed URLs; default: that of the API")

    accounts: Annotated[tuple[Account, ...], BeforeValidator(_accounts)] = Field(
        (Account(name="worker", password="worker-password"),),  # noqa: S106 - the documented password of a test server
        description="name:password:group+group,...",
    )
    tokens: Annotated[dict[str, str], BeforeValidator(_tokens)] = Field(
        {"mock-token": "worker"}, description="static tokens that never expire: token:account,..."
    )
    user_pool_id: str = Field("eu-central-1_mock", description="told by /access_info")
    client_id: str = Field("mock-client", description="told by /access_info; a sign-in must name it")
    region: str = Field("eu-central-1", description="told by /access_info")
    token_life_s: float = Field(3600, gt=0, description="life of an IdToken")

    lease_s: float = Field(300, gt=0, description="a held job silent for longer is put back in the queue")
    sweep_period_s: float = Field(60, gt=0, description="time between two looks for silent jobs")
    max_retries: int = Field(2, ge=0, description="times a silent job is put back before it is an error")
    retry_different: bool = Field(True, description="never give an account a job that it has pulled before")
    conflict_500: bool = Field(False, description="of two simultaneous updates of one job the second gets a 500")
    nested_headers: bool = Field(False, description="file answers carry nested headers, as their schema allows")

    url_life_s: float = Field(600, gt=0, description="life of a signed URL or form")
    upload_method: Literal["post", "put"] = Field("post", description="put: sign one object where a filename is sent")
    max_object_bytes: int = Field(5 * GIB, gt=0, description="largest object the storage takes")

    s3_endpoint: str | None = Field(None, description="S3 endpoint URL; default: AWS")
    s3_bucket: str = Field("mock-api", description="S3 bucket, made at the start if missing")
    s3_region: str = Field("us-east-1", description="S3 region")
    s3_access_key: str | None = Field(None, description="S3 access key; default: what boto3 finds")
    s3_secret_key: str | None = Field(None, description="S3 secret key; default: what boto3 finds")

    @model_validator(mode="after")
    def _tokens_belong_to_accounts(self) -> Self:
        names = {account.name for account in self.accounts}
        if strangers := sorted(set(self.tokens.values()) - names):
            raise ValueError(f"tokens name accounts that do not exist: {', '.join(strangers)}")
        return self

    @classmethod
    def from_env(cls, environ: Mapping[str, str], **overrides: object) -> Self:
        """The settings of `environ` (`MOCK_API_LEASE_S=300`, ...), `overrides` going first; the rest are defaults.

        Raises `ValueError` that says in one line which setting is wrong, and how.
        """
        values: dict[str, object] = {
            name: environ[ENV_PREFIX + name.upper()]
            for name in cls.model_fields
            if ENV_PREFIX + name.upper() in environ
        }
        try:
            return cls.model_validate(values | overrides)
        except ValidationError as error:
            raise ValueError("; ".join(_sentence(item["loc"], item["msg"]) for item in error.errors())) from None


def _sentence(where: tuple[int | str, ...], what: str) -> str:
    return f"{ENV_PREFIX}{str(where[0]).upper()}: {what}" if where else what
