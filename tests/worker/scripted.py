"""A worker that plays a script instead of training: it needs no torch, and does every bad thing.

A shim around it takes the place of the interpreter in FROSTLINE_WORKER_PYTHON, so that the real
keeper starts it as it starts every worker. Its script is in the model's ``kwargs``:
``{"script": [[verb, argument…], …]}``.
"""

import contextlib
import hashlib
import json
import math
import os
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from app.freezing.graph import ModelGraph, Module, Parameter
from app.jobs import folder as job_folder
from app.jobs.spool import SpoolWriter
from app.training.places import checkpoint_path, checkpoint_steps

URI = "python:scripted:play"
LAYERS = ["below", "above"]
KEPT = 3


def write_shim(folder: Path) -> Path:
    """An executable for FROSTLINE_WORKER_PYTHON that plays instead of training."""
    shim = folder / "scripted-python"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" "$@"\n')
    shim.chmod(0o755)
    return shim


def loss_at(step: int) -> float:
    """The loss of a step: the same in every attempt, as it is when training resumes exactly."""
    return 1.0 / (1 + step)


class Actor:
    """One attempt: its verbs are what a script may ask for."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self.directory = folder / "attempts" / str(number)
        job_folder.hold_lock(self.directory)
        job_folder.tidy_checkpoints(folder)
        self.spool = SpoolWriter(self.directory / "telemetry.spool", number)
        self.wishes = job_folder.WishReader(self.directory)
        self.step = job_folder.read_attempt(self.directory)["resume_step"] or 0
        self.is_terminated = False
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, *_: Any) -> None:
        self.is_terminated = True

    def play(self, script: list[list[Any]]) -> tuple[str, str | None]:
        """Play to the end, or until somebody wishes otherwise: (outcome, reason)."""
        total = sum(line[1] for line in script if line[0] == "train")
        start = {"layers": LAYERS, "step": self.step, "total_steps": total, "warnings": []}
        self.spool.append("start", start)
        self.spool.append("state", {"state": "running", "seq": self.wishes().seq})
        for verb, *arguments in script:
            end = getattr(self, verb)(*arguments)
            if end is not None:
                return end
        self.save()
        return "succeeded", None

    def wished(self) -> tuple[str, None] | None:
        """How the attempt is to end by now; a hold is waited out."""
        held = False
        while self.wishes().state == "hold" and not self.is_terminated:
            if not held:
                self.spool.append("state", {"state": "paused", "seq": self.wishes().seq})
                held = True
            time.sleep(0.01)
        wish = self.wishes()
        if self.is_terminated or wish.state == "stop":
            self.save()
            return "stopped", None
        if wish.state == "release":
            self.save()
            return "released", None
        if held:
            self.spool.append("state", {"state": "running", "seq": wish.seq})
        return None

    # ------------------------------------------------------------------------------ good verbs

    def train(self, steps: int, every: int = 5, step_s: float = 0.005) -> tuple[str, None] | None:
        """Go on to a step, with a checkpoint now and then, and do what is wished in between."""
        while self.step < steps:
            end = self.wished()
            if end is not None:
                return end
            time.sleep(step_s)
            self.report()
            if self.step % every == 0:
                self.save()
        return None

    def report(self) -> None:
        self.step += 1
        values = {"loss": loss_at(self.step)}
        metrics = {"step": self.step, "epoch": 0.0, "values": values, "step_ms": 1.0}
        self.spool.append("metrics", metrics)
        column = [loss_at(self.step)] * len(LAYERS)
        measures = dict.fromkeys(("grad_norm", "update_norm", "weight_norm"), column)
        self.spool.append("layers", {"step": self.step, **measures})

    def save(self) -> None:
        """A checkpoint whose contents follow from its step, in the order of the real one."""
        checkpoints = job_folder.checkpoints_folder(self.folder)
        checkpoints.mkdir(exist_ok=True)
        final = checkpoint_path(checkpoints, self.step)
        if final.exists():
            return
        draft = checkpoints / f".{final.name}.{os.getpid()}"
        draft.mkdir()
        (draft / "model.safetensors").write_bytes(model_at(self.step))
        files = {
            path.name: {
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in draft.iterdir()
        }
        manifest = {"format": 1, "step": self.step, "created_at": "", "files": files}
        (draft / "manifest.json").write_text(json.dumps(manifest))
        draft.rename(final)
        for step in checkpoint_steps(checkpoints)[:-KEPT]:
            old = checkpoint_path(checkpoints, step)
            doomed = old.with_name(f".deleted-{old.name}.{os.getpid()}")
            old.rename(doomed)
            for file in doomed.iterdir():
                file.unlink()
            doomed.rmdir()

    def sleep(self, seconds: float) -> tuple[str, None] | None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            end = self.wished()
            if end is not None:
                return end
            time.sleep(0.01)
        return None

    # ------------------------------------------------------------------------------- bad verbs

    def leave(self, status: int) -> None:
        os._exit(status)

    def fail(self, message: str) -> None:
        raise ValueError(message)

    def hang(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(60)

    def allocate(self, megabytes: int) -> None:
        self.ballast = b"x" * (megabytes * 2**20)

    def fork(self, apart: bool) -> None:
        """Leave a child behind; one apart leads a session of its own and has been orphaned."""
        if os.fork() == 0:
            os.closerange(3, 100)
            if apart:
                os.setsid()
                if os.fork():
                    os._exit(0)
            os.execvp("sleep", ["sleep", "1000"])

    def garble(self) -> None:
        """Write into the spool what is no record, as a disk that goes wrong would."""
        with (self.directory / "telemetry.spool").open("ab") as file:
            file.write(struct.pack("<II", 40, 7) + b"not a record at all, and no checksum fits")

    def spoil(self) -> None:
        """Change a byte of the newest checkpoint, and find it corrupt."""
        checkpoints = job_folder.checkpoints_folder(self.folder)
        newest = checkpoint_path(checkpoints, checkpoint_steps(checkpoints)[-1])
        with (newest / "model.safetensors").open("r+b") as file:
            file.write(b"?")

    def diverge(self) -> tuple[str, str]:
        values = {"loss": math.nan}
        metrics = {"step": self.step + 1, "epoch": 0.0, "values": values, "step_ms": None}
        self.spool.append("metrics", metrics)
        return "failed", "nonfinite"

    def print(self, megabytes: int) -> None:
        for _ in range(megabytes):
            os.write(1, b"x" * 2**20)

    def kill(self, number: int) -> None:
        os.kill(os.getpid(), number)


def model_at(step: int) -> bytes:
    """A safetensors file of one number, the step."""
    header = json.dumps({"step": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    return struct.pack("<Q", len(header)) + header + struct.pack("<q", step)


def verify(folder: Path, step: int | None) -> None:
    """Refuse a checkpoint that is not what was written, as the real worker does."""
    if step is None:
        return
    path = checkpoint_path(job_folder.checkpoints_folder(folder), step)
    if (path / "model.safetensors").read_bytes() != model_at(step):
        raise RuntimeError(f"{path.name}: model.safetensors is not what was written.")


def run(folder: Path, number: int) -> int:
    spec = job_folder.read_spec(folder)
    actor = Actor(folder, number)
    room = actor.directory / "result.room"  # for the last words on a full disk
    room.write_bytes(bytes(20_000))
    result: dict[str, Any] = {"reason": None, "message": None}
    if spec["kind"] == "inspect":
        job_folder.write_document(actor.directory / "graph.json", GRAPH.to_document())
        outcome = "succeeded"
    else:
        try:
            verify(folder, job_folder.read_attempt(actor.directory)["resume_step"])
            outcome, result["reason"] = actor.play(spec["model"]["kwargs"]["script"])
        except OSError as error:
            outcome, result = "failed", {"reason": "disk_full", "message": str(error)}
        except RuntimeError as error:
            outcome, result = "failed", {"reason": "checkpoint_corrupt", "message": str(error)}
        except Exception as error:
            outcome, result = "failed", {"reason": "user_code", "message": str(error)}
    actor.spool.close()
    room.unlink()
    with contextlib.suppress(OSError):
        job_folder.write_result(actor.directory, outcome, actor.step, **result)
    return int(outcome == "failed")


GRAPH = ModelGraph(
    modules=(
        Module("", "Sequential", 0),
        *(Module(path, "Linear", 1, (f"{path}.weight",)) for path in LAYERS),
    ),
    parameters=tuple(
        Parameter(f"{path}.weight", (2, 2), "float32", 4, 16, True, True) for path in LAYERS
    ),
)

if __name__ == "__main__":
    # As the keeper calls an interpreter: PYTHON -P -m app.jobs.worker FOLDER --attempt N
    os._exit(run(Path(sys.argv[4]), int(sys.argv[6])))
