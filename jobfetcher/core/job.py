"""What a job is, in our own words: checked values, made once at the edge, never changed.

A source adapter turns its wire format into a `Job`; the journal and `steps` keep it as JSON (`Job.model_dump_json`,
`Job.model_validate_json`), so what comes back from disk is checked again. Names are parsed, not cleaned: what is not
plainly safe is refused with a reason (FAULTS.md T1, T2, T3, T9).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Any, NewType, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

JobId = NewType("JobId", str)
"""A job's name, safe as a directory and container name."""

JobPath = NewType("JobPath", str)
"""A path below the job directory: relative, `/`-separated, no empty, `.` or `..` segment."""

FileRef = NewType("FileRef", str)
"""What a source calls an input file, such as `s3://bucket/key`; it means something to the source only."""

_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

#: Linux: NAME_MAX is 255 bytes for one component, PATH_MAX 4096 for a path.
_NAME_MAX, _PATH_MAX = 255, 4096

#: FAULTS.md B15: more files than this in one job is an attack or a mistake.
MAX_FILES = 10_000


def parse_job_id(text: str) -> JobId:
    """`text` as a JobId, or ValueError (FAULTS.md T3)."""
    if not _JOB_ID.fullmatch(text):
        raise ValueError(f"not a job id: {text[:80]!r} (letters, digits, _ and -, at most 64)")
    return JobId(text)


def parse_job_path(text: str) -> JobPath:
    """`text` as a JobPath, or ValueError saying what is wrong with it (FAULTS.md T1)."""

    def refuse(why: str) -> ValueError:
        return ValueError(f"path {text[:120]!r} {why}")

    if text.startswith("/"):
        raise refuse("is absolute; it must lie inside the job directory")
    if "\\" in text:
        raise refuse("contains a backslash")
    if any(unicodedata.category(char) in {"Cc", "Cs", "Zl", "Zp"} for char in text):
        raise refuse("contains a control character")
    if len(text.encode()) > _PATH_MAX:
        raise refuse(f"is longer than {_PATH_MAX} bytes")
    for segment in text.split("/"):
        if segment in {"", ".", ".."}:
            raise refuse("has an empty, '.' or '..' segment; it must lie inside the job directory")
        if len(segment.encode()) > _NAME_MAX:
            raise refuse(f"has a segment longer than {_NAME_MAX} bytes")
    return JobPath(text)


#: The output path that means the whole job directory, inputs included (PROTOCOL.md "How a job must be run").
WHOLE_DIRECTORY = JobPath(".")


def parse_output_path(text: str) -> JobPath:
    """A directory to upload: a JobPath as people write directories, with a closing `/` or a `./` in front, or `.`."""
    if text in {".", "./"}:
        return WHOLE_DIRECTORY
    return parse_job_path(text.removeprefix("./").removesuffix("/"))


def parse_file_ref(text: str) -> FileRef:
    """`text` as a FileRef, or ValueError: no `.` or `..` segment and no control character (FAULTS.md T9)."""
    if any(unicodedata.category(char) in {"Cc", "Cs", "Zl", "Zp"} for char in text):
        raise ValueError(f"file id {text[:80]!r} contains a control character")
    if not text or len(text.encode()) > _PATH_MAX:
        raise ValueError(f"file id {text[:80]!r} is empty or longer than {_PATH_MAX} bytes")
    if any(segment in {".", ".."} for segment in text.split("/")):
        raise ValueError(f"file id {text[:80]!r} has a '.' or '..' segment")
    return FileRef(text)


def check_distinct(paths: Iterable[JobPath]) -> None:
    """Raise ValueError if two paths would fall together on some filesystem, or one is a directory of another.

    Compared after NFC and case folding, because a job's author may have written them on a filesystem that does so.
    """
    folded: dict[str, str] = {}
    for path in paths:
        # Twice: folding may take a composed character apart, so that two spellings of one name would differ again.
        key = unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
        if key in folded:
            raise ValueError(f"paths {folded[key][:120]!r} and {path[:120]!r} are the same file")
        folded[key] = path
    for key, inner in folded.items():
        parent = key
        while "/" in parent:
            parent = parent.rpartition("/")[0]
            if parent in folded:
                raise ValueError(f"path {folded[parent][:120]!r} is a file and a directory of {inner[:120]!r}")


def _check_env_name(name: str) -> str:
    if not name or "=" in name:
        raise ValueError(f"not an environment variable name: {name[:80]!r}")
    return _check_text(name)


def _check_text(value: str) -> str:
    if "\0" in value:
        raise ValueError("contains a NUL character")
    # JSON can spell half of a surrogate pair (RFC 8259, 8.2); no file, argument or variable can hold it.
    if any(unicodedata.category(char) == "Cs" for char in value):
        raise ValueError("contains a lone surrogate, which is no character")
    return value


_Text = Annotated[str, AfterValidator(_check_text)]


class OutputKind(StrEnum):
    """What an uploaded file is to its user."""

    OUTPUT = "output"
    LOG = "log"
    ARTIFACT = "artifact"


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InputFile(_Value):
    """One file to bring: `ref` at the source, `path` in the job directory. `sha256`: what its content must hash to, in
    hex, where whoever signed the job said so (FAULTS.md T30)."""

    path: Annotated[JobPath, AfterValidator(parse_job_path)]
    ref: Annotated[FileRef, AfterValidator(parse_file_ref)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None


class OutputTree(_Value):
    """One directory whose files are sent as `kind`. Trees may nest or coincide: each kind gets its files.

    `path` is WHOLE_DIRECTORY, or a path below the job directory.
    """

    kind: OutputKind
    path: Annotated[JobPath, AfterValidator(parse_output_path)]

    @property
    def parts(self) -> tuple[str, ...]:
        """The path's segments below the job directory; none for the whole of it."""
        return () if self.path == WHOLE_DIRECTORY else tuple(self.path.split("/"))


class Needs(_Value):
    """What a job asks of the machine; None means it does not care.

    `cpu_cores` may be a fraction; `memory_mib` and `gpu_mem_mib` are MiB; `gpu_archi` is a compute capability.
    """

    cpu_cores: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    memory_mib: Annotated[int, Field(gt=0)] | None = None
    gpu_mem_mib: Annotated[int, Field(ge=0)] | None = None
    gpu_model: _Text | None = None
    gpu_archi: _Text | None = None

    @property
    def gpu(self) -> bool | None:
        """True: needs a GPU; False: says it needs none (`gpu_mem` 0); None: does not say."""
        if self.gpu_model or self.gpu_archi or self.gpu_mem_mib:
            return True
        return False if self.gpu_mem_mib == 0 else None


class Job(_Value):
    """One job, whole.

    `command` is a list of shell fragments, joined with spaces and run by `/bin/sh -c` (PROTOCOL.md); None: the
    image's own command. `labels` are what the source calls the job's program and `user_job_id` what the job's user
    calls the job: both are for people and records, and nothing of them reaches the engine.
    """

    id: Annotated[JobId, AfterValidator(parse_job_id)]
    image: Annotated[str, Field(min_length=1, max_length=1024)]
    command: tuple[_Text, ...] | None = None
    labels: dict[_Text, _Text] = {}
    user_job_id: _Text | None = None
    env: dict[Annotated[str, AfterValidator(_check_env_name)], _Text] = {}
    inputs: Annotated[tuple[InputFile, ...], Field(max_length=MAX_FILES)] = ()
    outputs: tuple[OutputTree, ...] = ()
    needs: Needs = Needs()

    @model_validator(mode="before")
    @classmethod
    def _read_an_older_record(cls, data: Any) -> Any:
        """A journal of before `labels` holds the label `entrypoint` as a field of its own (FAULTS.md F12)."""
        if isinstance(data, dict) and "entrypoint" in data:
            data = dict(data)
            if (label := data.pop("entrypoint")) is not None:
                data["labels"] = {"entrypoint": label}
        return data

    @model_validator(mode="after")
    def _inputs_are_distinct(self) -> Self:
        check_distinct(file.path for file in self.inputs)
        return self
