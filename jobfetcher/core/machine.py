"""What a machine has, what of it is offered, and what one job holds. Plain values; all memory in MiB."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `archi` is the compute capability as text, such as `8.6`; `memory_mib` is what is free on it now."""

    uuid: str
    model: str
    memory_mib: int
    archi: str


@dataclass(frozen=True, slots=True)
class Inventory:
    """What this machine has for jobs and the worker together. `cpu_cores` may be a fraction (a cgroup quota)."""

    cpu_cores: float
    memory_mib: int
    gpus: tuple[Gpu, ...] = ()
    architecture: str = "amd64"


@dataclass(frozen=True, slots=True)
class Offer:
    """What a job could have now. Nothing is offered while no slot is free: then there is no Offer at all."""

    cpu_cores: float
    memory_mib: int
    gpus: tuple[Gpu, ...] = ()

    @property
    def whole_cores(self) -> int:
        """Free cores as servers count them, rounded half up: the 1.9 that a reserve of 0.1 leaves of 2 cores are 2."""
        return whole_cores(self.cpu_cores)


def whole_cores(cpu_cores: float) -> int:
    """Cores rounded half up, because servers match whole numbers and the reserve is a fraction of one core.

    Rounded down, a reserve of a tenth of a core would take a whole one from every machine. A job that asks for the
    rounded number is capped at what is really free.
    """
    return math.floor(cpu_cores + 0.5)


@dataclass(frozen=True, slots=True)
class Share:
    """What one job holds, and is limited to."""

    cpu_cores: float
    memory_mib: int
    gpus: tuple[Gpu, ...] = ()
