"""Devices: which there are to run jobs on, as the driver tells it. No torch, no CUDA context."""

import os
import platform
from dataclasses import dataclass

import psutil
import pynvml


@dataclass(frozen=True, slots=True)
class Device:
    """Something a job can run on.

    Attributes:
        id: as users name it: ``cpu``, ``cuda:0``.
        visible: what CUDA_VISIBLE_DEVICES must be for a process that may see this one alone.
    """

    id: str
    name: str
    kind: str
    memory_bytes: int
    visible: str


def find_devices() -> tuple[Device, ...]:
    """The CPU, then the GPUs that CUDA_VISIBLE_DEVICES leaves to us, numbered in its order."""
    memory = psutil.virtual_memory().total
    cpu = Device("cpu", platform.machine(), "cpu", memory, "")
    return (cpu, *_find_gpus(os.environ.get("CUDA_VISIBLE_DEVICES")))


def _find_gpus(visible: str | None) -> list[Device]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver: the usual case, and not a fault
        return []
    try:
        if visible is None:
            names = [str(index) for index in range(pynvml.nvmlDeviceGetCount())]
        else:
            names = [name.strip() for name in visible.split(",") if name.strip()]
        gpus: list[Device] = []
        for name in names:
            try:
                handle = (
                    pynvml.nvmlDeviceGetHandleByIndex(int(name))
                    if name.lstrip("-").isdigit()
                    else pynvml.nvmlDeviceGetHandleByUUID(name)
                )
                memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total
                title = pynvml.nvmlDeviceGetName(handle)
            except pynvml.NVMLError:
                break  # CUDA too ignores the first one that does not exist, and all behind it
            gpus.append(Device(f"cuda:{len(gpus)}", str(title), "cuda", int(memory), name))
        return gpus
    finally:
        pynvml.nvmlShutdown()
