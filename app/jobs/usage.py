"""Usage: how much memory a worker's processes and the GPUs take right now, as the system tells."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import pynvml

from app.jobs.devices import Device, nvml_handle


@dataclass(frozen=True, slots=True)
class Usage:
    """What a worker takes, its children included.

    Attributes:
        memory_bytes: on the host; what several processes share counts once.
        device_bytes: on its GPU; None on a CPU, and where the driver does not say.
    """

    memory_bytes: int
    device_bytes: int | None = None

    def peak(self, other: "Usage | None") -> "Usage":
        """The larger of each figure."""
        if other is None:
            return self
        devices = [n for n in (self.device_bytes, other.device_bytes) if n is not None]
        return Usage(max(self.memory_bytes, other.memory_bytes), max(devices) if devices else None)


def measure_worker(pid: int, device: Device | None) -> Usage | None:
    """What a worker takes; None where it has ended."""
    try:
        worker = psutil.Process(pid)
        processes = [worker, *worker.children(recursive=True)]
        memory = sum(map(_memory_of, processes))
    except psutil.Error:
        return None
    pids = {process.pid for process in processes}
    return Usage(memory, _device_memory_of(pids, device) if device is not None else None)


def _memory_of(process: psutil.Process) -> int:
    try:
        full = process.memory_full_info()
    except psutil.AccessDenied:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:  # a child that has just ended
        return 0
    return int(getattr(full, "pss", full.uss))


def _device_memory_of(pids: set[int], device: Device) -> int | None:
    if device.kind != "cuda":
        return None
    with _driver() as is_there:
        if not is_there:
            return None
        try:
            running = pynvml.nvmlDeviceGetComputeRunningProcesses(nvml_handle(device.visible))
        except pynvml.NVMLError:
            return None
    # In a container the driver names pids of the host, which tell nothing here.
    return sum(one.usedGpuMemory or 0 for one in running if one.pid in pids) or None


def measure_device(device: Device) -> dict[str, Any]:
    """What a GPU is doing, whoever uses it: bytes used, utilization in percent, degrees Celsius."""
    if device.kind != "cuda":
        return {"bytes_used": psutil.virtual_memory().used, "utilization": psutil.cpu_percent()}
    with _driver() as is_there:
        if not is_there:
            return {}
        try:
            handle = nvml_handle(device.visible)
            return {
                "bytes_used": int(pynvml.nvmlDeviceGetMemoryInfo(handle).used),
                "utilization": int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
                "celsius": int(
                    pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
                ),
            }
        except pynvml.NVMLError:
            return {}


@contextmanager
def _driver() -> Iterator[bool]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield False
        return
    try:
        yield True
    finally:
        pynvml.nvmlShutdown()
