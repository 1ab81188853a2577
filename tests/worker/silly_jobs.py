"""The silliest possible user code, and waiting for what becomes of it."""

import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.jobs import folder as job_folder

USER_CODE = '''
import ctypes, os, signal, subprocess, sys, threading, time
import torch
from torch import nn

def model(width=8):
    layers = [nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3)]
    return {"model": nn.Sequential(*layers), "example": torch.randn(2, 4)}

def data(size=32):
    inputs = torch.randn(size, 4)
    pairs = list(zip(inputs, (inputs.sum(1) > 0).long()))
    return {"train": pairs, "eval": pairs[:8]}

class Slow(list):
    """Items that take a while, and touch a file when the first one was asked for."""
    def __getitem__(self, index):
        time.sleep(0.01)
        return super().__getitem__(index)

def slow_data(size=32):
    sets = data(size)
    return {"train": Slow(sets["train"]), "eval": sets["eval"]}

class Hanging(list):
    def __getitem__(self, index):
        threading.Event().wait()

def raises():
    raise ValueError("no such luck: \\udc80")

def leaves():
    sys.exit(0)

def vanishes():
    os._exit(0)

def crashes():
    ctypes.string_at(0)

def hangs():
    print("hanging", flush=True)
    threading.Event().wait()

def shouts(megabytes=30):
    for _ in range(megabytes):
        print("x" * 2**20)
    return model()

def spawns():
    child = subprocess.Popen(["sleep", "1000"])
    print("child", child.pid, flush=True)
    raise ValueError("and leaves it behind")

def hogs():
    raise MemoryError("no room")

def fills():
    raise OSError(28, "No space left on device")

def tells():
    print("environment", sorted(os.environ), flush=True)
    print("secret", os.environ.get("PASSED"), os.getcwd(), os.getpgid(0) == os.getpid(), flush=True)
    print("threads", torch.get_num_threads(), sys.executable, flush=True)
    print("modules", [name for name in sys.modules if name in ("fastapi", "sqlmodel")], flush=True)
    return model()

def lingers():
    threading.Thread(target=threading.Event().wait).start()
    return model()
'''


def prepare(folder: Path, number: int = 1, resume_step: int | None = None) -> Path:
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    return job_folder.prepare_attempt(
        folder, number, resume_step=resume_step, device="cpu", environment=environment
    )


def wait_until_left(data_dir: Path) -> None:
    """Block until no keeper holds the data folder."""
    descriptor = os.open(data_dir / "warm.lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.close(descriptor)


def eventually(claim: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait until the claim is true, and return what it says."""
    never = threading.Event()
    for _ in range(int(seconds / 0.005)):
        if answer := claim():
            return answer
        never.wait(0.005)
    raise AssertionError(f"{claim} did not become true within {seconds} s")


def wait_for_exit(folder: Path, number: int = 1) -> dict[str, Any]:
    """The end of the process of an attempt, once its keeper has written it."""
    directory = folder / "attempts" / str(number)
    answer: dict[str, Any] = eventually(lambda: job_folder.read_exit(directory))
    return answer
