"""Devices: which there are to run jobs on, as the driver tells it. No torch, no CUDA context."""

import contextlib
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pynvml

HOPPER = 9  # from that compute capability on torch 2.13 gives cuBLAS more to work in


@dataclass(frozen=True, slots=True)
class Device:
    """Something a job can run on.

    Attributes:
        id: as users name it: ``cpu``, ``cuda:0``.
        visible: what CUDA_VISIBLE_DEVICES must be for a process that may see this one alone.
        kernels: whose operations run on it, as `ModelGraph.kernels` names them.
    """

    id: str
    name: str
    kind: str
    memory_bytes: int
    visible: str
    kernels: str = "cpu"


def find_devices() -> tuple[Device, ...]:
    """The CPU, then the GPUs that CUDA_VISIBLE_DEVICES leaves to us, numbered in its order."""
    memory = psutil.virtual_memory().total
    cpu = Device("cpu", _name_cpu(), "cpu", memory, "")
    return (cpu, *_find_gpus(os.environ.get("CUDA_VISIBLE_DEVICES")))


def find_kernels(devices: Iterable[Device]) -> str:
    """Whose operations a trace is to follow: a job is on a GPU where there is one."""
    return next((device.kernels for device in devices if device.kind == "cuda"), "cpu")


def nvml_handle(name: str) -> Any:
    """The driver's handle of a GPU by its number or its UUID, as CUDA_VISIBLE_DEVICES names it."""
    if name.lstrip("-").isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)


def _name_cpu(info: Path = Path("/proc/cpuinfo")) -> str:
    """What the processor calls itself, and how many cores of it we may use."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    title = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        title = names[0] if names else title
    return f"{title}, {cores} {'core' if cores == 1 else 'cores'}"


def _generation(handle: Any) -> int:
    """The first number of a GPU's compute capability; 0 where its driver does not tell."""
    try:
        major, _ = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    except pynvml.NVMLError:  # of a part of a GPU, for example
        return 0
    return int(major)


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
                handle = nvml_handle(name)
                memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total
                title = pynvml.nvmlDeviceGetName(handle)
            except pynvml.NVMLError:
                break  # CUDA too ignores the first one that does not exist, and all behind it
            kernels = "hopper" if _generation(handle) >= HOPPER else "cuda"
            number = f"cuda:{len(gpus)}"
            gpus.append(Device(number, str(title), "cuda", int(memory), name, kernels))
        return gpus
    finally:
        pynvml.nvmlShutdown()
