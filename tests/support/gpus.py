"""GPUs that are only a list: what `self_test` asks of a machine's, in place of NVIDIA's driver."""

from __future__ import annotations

from jobfetcher.core.machine import Gpu

A4000 = Gpu("GPU-1", "NVIDIA RTX A4000", 16000, "8.6")
TITAN = Gpu("GPU-2", "NVIDIA TITAN V", 12000, "7.0")


class ListedGpus:
    """`self_test.Gpus`: these, and which of them are set aside, and why."""

    def __init__(self, *gpus: Gpu) -> None:
        self.aside: dict[str, str] = {}
        self._gpus = gpus

    def every(self) -> tuple[Gpu, ...]:
        return self._gpus

    def is_aside(self, gpu: Gpu) -> bool:
        return gpu.uuid in self.aside

    def set_aside(self, gpu: Gpu, why: str) -> None:
        self.aside[gpu.uuid] = why

    def take_back(self, gpu: Gpu) -> None:
        self.aside.pop(gpu.uuid, None)
