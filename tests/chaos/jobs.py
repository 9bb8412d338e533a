"""The jobs of a campaign: small, of many kinds, and what each must leave at the server, byte for byte.

Each says of itself when it was not run from a clean state: it exits with 9 when it finds what a run before it wrote,
and some spoil their inputs, so that a second run that is not given fresh ones has other outputs.
"""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

_MIB = 1024 * 1024

#: Sizes of the inputs, in bytes; jobs share them, so that a cache of inputs has something to do.
INPUT_SIZES = (0, 1, 1000, 100_000, _MIB, 3 * _MIB + 7, 8 * _MIB)

#: What the worker itself adds to the logs of every job. The first is known in advance, the second is not.
CONTAINER_LOG, PROVENANCE = "log/jobfetcher/container.log", "log/jobfetcher/provenance.json"

#: The code that a job ends with when it was made to fail, and when it was not run from a clean state.
FAILS, UNCLEAN = 7, 9

_CLEAN = f"[ ! -e /files/out/began ] || exit {UNCLEAN}; touch /files/out/began;"
_OUT = {"output": "out"}


@dataclass(frozen=True)
class Planned:
    """One job and what must come of it. `reads`: path to index of INPUT_SIZES; `objects`: name to SHA-256."""

    kind: str
    command: str
    objects: Mapping[str, str]
    reads: Mapping[str, int] = field(default_factory=dict)
    writes: Mapping[str, str] = field(default_factory=dict)
    exit_code: int = 0


def input_content(index: int) -> bytes:
    """The content of an input, the same in every campaign."""
    return random.Random(index).randbytes(INPUT_SIZES[index])  # noqa: S311 - test data


def sha256(content: bytes) -> str:
    """The SHA-256 of `content`, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def plan(number: int, chance: random.Random) -> Planned:
    """The job of that number: one in eight fails by itself, the kinds take turns, the rest is `chance`."""
    if number % 8 == 7:
        return _fails(number, chance)
    return _KINDS[number % len(_KINDS)](number, chance)


def _trivial(number: int, chance: random.Random) -> Planned:
    return Planned("trivial", "true", _objects({}))


def _copies(number: int, chance: random.Random) -> Planned:
    """Copies its input, then spoils it; most keep their size."""
    index = chance.randrange(len(INPUT_SIZES))
    half = _seconds(chance) / 2
    command = (
        f"{_CLEAN} sleep {half:.2f}; cp /files/data/in.bin /files/out/copy.bin;"
        f" printf spoiled | dd of=/files/data/in.bin conv=notrunc 2> /dev/null; sleep {half:.2f}"
    )
    files = {"output/out/began": b"", "output/out/copy.bin": input_content(index)}
    return Planned("copies", command, _objects(files), reads={"data/in.bin": index}, writes=_OUT)


def _gathers(number: int, chance: random.Random) -> Planned:
    """Copies inputs that other jobs have as well, then spoils its own."""
    indexes = chance.sample(range(len(INPUT_SIZES)), 3)
    command = (
        f"{_CLEAN} sleep {_seconds(chance):.2f}; cp /files/data/*.bin /files/out/;"
        " for i in /files/data/*.bin; do printf spoiled | dd of=$i conv=notrunc 2> /dev/null; done"
    )
    reads = {f"data/{index}.bin": index for index in indexes}
    files = {"output/out/began": b"", **{f"output/out/{index}.bin": input_content(index) for index in indexes}}
    return Planned("gathers", command, _objects(files), reads=reads, writes=_OUT)


def _several(number: int, chance: random.Random) -> Planned:
    """Outputs of all three kinds, one of 2 MiB, folders, and something printed."""
    command = (
        f"{_CLEAN} sleep {_seconds(chance):.2f};"
        f" yes 'job {number}' | head -c {2 * _MIB} > /files/out/two.bin; mkdir -p /files/out/a/b;"
        f" for i in $(seq 12); do echo {number} $i > /files/out/a/b/$i; done;"
        f" echo model {number} > /files/model/m.pt; echo logged > /files/logs/own.log;"
        f" for i in $(seq 300); do echo line $i of job {number}; done"
    )
    files = {
        "output/out/began": b"",
        "output/out/two.bin": (f"job {number}\n".encode() * _MIB)[: 2 * _MIB],
        **{f"output/out/a/b/{i}": f"{number} {i}\n".encode() for i in range(1, 13)},
        "artifact/model/m.pt": f"model {number}\n".encode(),
        "log/logs/own.log": b"logged\n",
    }
    printed = "".join(f"line {i} of job {number}\n" for i in range(1, 301)).encode()
    writes = {"output": "out", "artifact": "model", "log": "logs"}
    return Planned("several", command, _objects(files, printed), writes=writes)


def _stubborn(number: int, chance: random.Random) -> Planned:
    """Does not heed TERM: it goes on where others end."""
    command = f"trap '' TERM; {_CLEAN} sleep {_seconds(chance):.2f}; echo {number} > /files/out/number"
    return Planned("stubborn", command, _objects(_numbered(number)), writes=_OUT)


def _polite(number: int, chance: random.Random) -> Planned:
    """Ends with 0 when it is told to end, its work half done: no exit code tells that from success (FAULTS.md E1)."""
    command = (
        f"trap 'exit 0' TERM; {_CLEAN} echo half > /files/out/number; sleep {_seconds(chance):.2f} & wait $!;"
        f" echo {number} > /files/out/number"
    )
    return Planned("polite", command, _objects(_numbered(number)), writes=_OUT)


def _fails(number: int, chance: random.Random) -> Planned:
    """Fails by its own fault, its outputs half written; they are wanted all the same."""
    command = (
        f"{_CLEAN} sleep {_seconds(chance):.2f}; echo {number} > /files/out/number;"
        f" echo job {number} gives up; exit {FAILS}"
    )
    objects = _objects(_numbered(number), f"job {number} gives up\n".encode())
    return Planned("fails", command, objects, writes=_OUT, exit_code=FAILS)


_KINDS = (_copies, _several, _trivial, _stubborn, _polite, _gathers)


def _seconds(chance: random.Random) -> float:
    return chance.uniform(0.2, 2.0)


def _numbered(number: int) -> dict[str, bytes]:
    return {"output/out/began": b"", "output/out/number": f"{number}\n".encode()}


def _objects(files: Mapping[str, bytes], printed: bytes = b"") -> dict[str, str]:
    return {name: sha256(content) for name, content in {**files, CONTAINER_LOG: printed}.items()}
