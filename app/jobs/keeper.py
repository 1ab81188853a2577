"""The server's line to its keeper: finds or starts it, asks it to start and to signal workers.

One JSON object a line each way: ``{"verb": "ping"}``, ``{"verb": "start", "folder", "attempt",
"environment", "python"}``, ``{"verb": "kill", "pid", "signal"}``, ``{"verb": "retire"}``. The other
end is ``warm``; nothing here imports torch.
"""

import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import app
from app.jobs import BRIEF_SPIN
from app.jobs import folder as job_folder

LAUNCH_SECONDS = 15
REOPEN_SECONDS = 1
ANSWER_SECONDS = 120  # an import of torch on a machine with a cold disk lies in between

# What a worker sees of the server's environment. No token of ours is among it.
ALLOWED_NAMES = frozenset(
    (
        *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
        *("XDG_CACHE_HOME", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"),
        *("http_proxy", "https_proxy", "no_proxy", "all_proxy"),
    )
)
ALLOWED_PREFIXES = (
    "LC_",
    "HF_",
    "CUDA_",
    "NVIDIA_",
    "NCCL_",
    "OMP_",
    "GOMP_",
    "MKL_",
    "TORCH",
    "PYTORCH_",
)


class KeeperError(RuntimeError):
    """The keeper could not do what was asked, or is not there."""


# What may go wrong on the way to a keeper; a warm.json of a later format is a ValueError.
_FAULTS = (OSError, ValueError, KeeperError)


def allowed_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that a worker may see."""
    allowed = {
        name: value
        for name, value in environment.items()
        if name in ALLOWED_NAMES or name.startswith(ALLOWED_PREFIXES)
    }
    return dict([BRIEF_SPIN]) | allowed


def own_version() -> list[str]:
    """What must be equal in the server and in the process that forks its workers."""
    return [app.__version__, sys.executable]


class Keeper:
    """The server's connection to its keeper; one thread starts and kills, any may ask ``ready``.

    Attributes:
        trouble: why the last attempt to reach a keeper failed; None while there is one.
    """

    def __init__(self, data_dir: Path, preload: bool) -> None:
        self._data_dir = data_dir
        self._preload = preload
        self._turn = threading.Lock()
        self._socket: socket.socket | None = None
        self._received = b""
        self._greeting: dict[str, Any] | None = None
        self._is_closed = False
        self._reopened_at = 0.0
        self.trouble: str | None = None

    @classmethod
    def connect(cls, data_dir: Path, *, preload: bool = True) -> "Keeper":
        """Find the living keeper of the data folder, or start one; does not wait for its imports.

        Raises:
            KeeperError: none answers and none can be started.
        """
        keeper = cls(data_dir.resolve(), preload)
        with keeper._turn:
            try:
                keeper._open()
            except _FAULTS as error:
                keeper._disconnect()
                raise KeeperError(f"No keeper for {data_dir}: {error}") from error
        return keeper

    def ready(self) -> bool:
        """True while a keeper is there and has imported what it preloads.

        Does not wait for imports. Where the keeper has gone it finds or starts another one, at most
        once in REOPEN_SECONDS.
        """
        if not self._turn.acquire(blocking=False):
            return self._greeting is not None
        try:
            if self._socket is None:
                self._reopen()
            while self._socket and can_be_read(self._socket):
                self._greeting = self._receive()
        except _FAULTS as error:
            self.trouble = str(error)
            self._disconnect()
        finally:
            self._turn.release()
        return self._greeting is not None

    def _reopen(self) -> None:
        if not self._is_closed and time.monotonic() >= self._reopened_at + REOPEN_SECONDS:
            self._reopened_at = time.monotonic()
            self._open()

    def start(
        self,
        folder: Path,
        attempt: int,
        environment: Mapping[str, str] | None = None,
        python: str | Path | None = None,
    ) -> int:
        """Start the worker of a prepared attempt, in a process group of its own.

        Args:
            environment: variables to set beside the allowed ones.
            python: an interpreter to run it in; None forks the keeper.

        Returns:
            The worker's pid.

        Raises:
            KeeperError: it was not started, unless the attempt's lock says otherwise.
        """
        request = {
            "verb": "start",
            "folder": str(folder.resolve()),
            "attempt": attempt,
            "environment": allowed_environment(os.environ) | dict(environment or {}),
            "python": None if python is None else str(python),
        }
        return int(self._call(request)["pid"])

    def kill(self, pid: int, number: int) -> None:
        """Send a signal to a worker's whole process group.

        Raises:
            KeeperError: it is not a living child of this keeper.
        """
        self._call({"verb": "kill", "pid": pid, "signal": int(number)})

    def close(self) -> None:
        """Hang up; the keeper leaves when its last child has ended."""
        with self._turn:
            self._is_closed = True
            self._disconnect()

    def _call(self, request: Mapping[str, Any]) -> dict[str, Any]:
        with self._turn:
            try:
                if self._socket is None:
                    self._open()
                while self._greeting is None:
                    self._greeting = self._receive()
                self._send(request)
                answer = self._receive()
            except _FAULTS as error:
                self._disconnect()
                message = f"The keeper did not answer {request['verb']}: {error}"
                raise KeeperError(message) from error
        if "error" in answer:
            raise KeeperError(answer["error"])
        return answer

    def _open(self) -> None:
        if self._is_closed:
            raise KeeperError("this connection to the keeper has been closed")
        if not self._reach():
            self._launch()
            if not self._reach():
                log = self._data_dir / "warm.log"
                last_words = log.read_text(errors="replace")[-2000:] if log.exists() else ""
                raise KeeperError(
                    f"No keeper could be started for {self._data_dir}. {log} says: {last_words}"
                )
        self._send({"verb": "ping"})
        self.trouble = None

    def _reach(self) -> bool:
        """Connect to the keeper that warm.json names, if it lives and is of our version."""
        known = job_folder.read_document(self._data_dir / "warm.json")
        if known is None:
            return False
        line = socket.socket(socket.AF_UNIX)
        line.settimeout(ANSWER_SECONDS)
        try:
            line.connect(known["address"])
        except OSError as error:
            line.close()
            if isinstance(error, FileNotFoundError | ConnectionRefusedError):
                return False
            raise
        self._socket, self._received, self._greeting = line, b"", None
        if known["version"] == own_version():
            return True
        self._send({"verb": "retire"})  # it finishes its children; a new one takes its place
        self._receive()
        self._disconnect()
        return False

    def _launch(self) -> None:
        command = [sys.executable, "-P", "-m", "app.jobs.warm", str(self._data_dir), "--detach"]
        if not self._preload:
            command.append("--no-preload")
        environment = allowed_environment(os.environ)
        environment["PYTHONPATH"] = str(Path(app.__file__).parents[1])
        self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self._data_dir / "warm.log").open("wb") as log:
            try:
                subprocess.run(  # noqa: S603 (our own interpreter, our own module)
                    command,
                    env=environment,
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,  # closed by it as soon as it listens
                    stderr=log,
                    timeout=LAUNCH_SECONDS,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise KeeperError(
                    f"A process holds {self._data_dir / 'warm.lock'} but does not listen; end it"
                    " and try again."
                ) from None

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self._socket is not None
        self._socket.sendall(json.dumps(request).encode() + b"\n")

    def _receive(self) -> dict[str, Any]:
        assert self._socket is not None
        while b"\n" not in self._received:
            data = self._socket.recv(65536)
            if not data:
                raise KeeperError("it has hung up")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = self._greeting = None


def can_be_read(stream: socket.socket) -> bool:
    """Whether something, or its end, has arrived. (select() fails in a server with 1,024 files.)"""
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    return bool(poll.poll(0))
