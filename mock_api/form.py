"""A multipart/form-data body (RFC 7578), parsed piece by piece: what each piece of the body completes, in order."""

from dataclasses import dataclass

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from mock_api.storage import StorageError

MAX_FIELDS_BYTES = 64 * 1024  # all fields together; S3 allows 20 KB of them
FILE_FIELD = "file"


@dataclass(frozen=True)
class FieldDone:
    """A field is complete."""

    name: str
    value: str


@dataclass(frozen=True)
class FileStart:
    """The file part begins."""

    filename: str


@dataclass(frozen=True)
class FileBytes:
    """More of the file."""

    data: bytes


Found = FieldDone | FileStart | FileBytes


class FormParser:
    """Turns pieces of a form's body into what they complete. The file's bytes are handed on, never gathered."""

    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            message = "Bucket POST must be of the enclosure-type multipart/form-data"
            raise StorageError(412, "PreconditionFailed", message)
        self.complete = False
        self._found: list[Found] = []
        self._fields_bytes = 0
        self._header = bytearray()
        self._header_value = bytearray()
        self._disposition = b""
        self._name: str | None = None  # of the field being read; None: the file, or a part behind the file
        self._value = bytearray()
        self._in_file = False
        self._past_file = False
        self._parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    def feed(self, data: bytes) -> list[Found]:
        """What `data` completes. Raises `StorageError` on a body that is no form."""
        self._found = []
        try:
            if data:
                self._parser.write(data)
        except (FormParserError, UnicodeDecodeError) as error:
            raise StorageError(400, "MalformedPOSTRequest", f"The form cannot be read: {error}") from error
        return self._found

    def _on_part_begin(self) -> None:
        self._disposition = b""

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header.clear()
        self._header_value.clear()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode()
        self._in_file = name == FILE_FIELD and not self._past_file
        self._name = None if self._in_file or self._past_file else name
        if self._in_file:
            self._past_file = True
            self._found.append(FileStart(options.get(b"filename", b"").decode()))

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._found.append(FileBytes(data[start:end]))
        elif self._name is not None:
            self._fields_bytes += end - start
            if self._fields_bytes > MAX_FIELDS_BYTES:
                raise StorageError(400, "MaxPostPreDataLengthExceeded", "The fields before the file are too large")
            self._value += data[start:end]

    def _on_part_end(self) -> None:
        if self._name is not None:
            self._found.append(FieldDone(self._name, self._value.decode()))
        self._value.clear()
        self._in_file = False

    def _on_end(self) -> None:
        self.complete = True
