"""The keeper: a process that has imported torch and forks the workers; it knows no job and no row.

It is the parent of all workers: it waits for them, writes their exit.json, outlives a server that
dies, is found again by its socket in the data folder, and leaves when it has neither a server nor a
child. It never runs a torch operation (a fork after one hangs) and never loads user code. What it
is asked, and how, is said in ``keeper``, the server's side of it.

    python -m app.jobs.warm DATA_DIR [--no-preload]
"""

import argparse
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import app
from app.jobs import folder as job_folder
from app.jobs.keeper import can_be_read, own_version
from app.jobs.leftovers import end_leftovers, find_children, mark_of
from app.jobs.oom import count_oom_kills

# torch._dynamo is what the first optimizer of a process would import, for two seconds.
PRELOADED = (
    "torch",
    "torch._dynamo",
    "app.freezing.trace",
    "app.sources.datasets",
    "app.sources.models",
    "app.training.loop",
    "app.jobs.worker",
)
MAX_SOCKET_PATH_BYTES = 100
FIRST_CALL_SECONDS = 5
PRELOAD_NICE = 10
PR_SET_CHILD_SUBREAPER = 36  # from linux/prctl.h


class KeeperProcess:
    """One thread around one selector: requests come in, ended children are waited for."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._children: dict[int, Path] = {}
        self._connections: dict[socket.socket, bytes] = {}
        self._preloaded = False
        self._has_been_called = False
        self._oom_kills = count_oom_kills()
        _become_reaper()
        self._lock = os.open(data_dir / "warm.lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)  # waits for one that is about to leave
        self._address = _choose_address(data_dir)
        self._listener: socket.socket | None = _listen(self._address)
        job_folder.write_document(
            data_dir / "warm.json",
            {"address": str(self._address), "pid": os.getpid(), "version": own_version()},
        )
        # A child that ends wakes the selector through this pair.
        self._bell, self._bell_rope = socket.socketpair()
        self._bell.setblocking(False)
        self._bell_rope.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._bell_rope.fileno(), warn_on_full_buffer=False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._bell, selectors.EVENT_READ, self._hear_bell)

    def preload(self) -> None:
        """Import what workers need, behind whatever else the machine has to do.

        The seconds that it takes are those in which somebody opens the first page. A thread has a
        priority of its own, which it could not raise again; it ends before anything is forked.
        """
        thread = threading.Thread(target=self._import_preloaded, name="preload")
        thread.start()
        thread.join()
        gc.collect()
        gc.freeze()  # the collector of a child leaves these pages shared

    def _import_preloaded(self) -> None:
        """What fails here fails again, and is told, in the worker."""
        try:
            if sys.platform == "linux":  # elsewhere it would be the priority of the whole process
                mine = os.getpriority(os.PRIO_PROCESS, 0)
                os.setpriority(os.PRIO_PROCESS, 0, max(mine, PRELOAD_NICE))
            for name in PRELOADED:
                importlib.import_module(name)
            self._preloaded = True
        except Exception:  # a broken torch raises anything
            traceback.print_exc()

    def serve(self) -> None:
        """Answer and wait, until there is neither a server nor a child."""
        while self._has_reason_to_stay():
            patience = None if self._has_been_called else FIRST_CALL_SECONDS
            events = self._selector.select(patience)
            if not events:
                break
            for key, _ in events:
                key.data(key.fileobj)
        self._hang_up()

    def _has_reason_to_stay(self) -> bool:
        if self._children or self._connections or not self._has_been_called:
            return True
        # Somebody may have connected since the last look.
        return self._listener is not None and can_be_read(self._listener)

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.setblocking(False)
        self._connections[connection] = b""
        self._has_been_called = True
        self._selector.register(connection, selectors.EVENT_READ, self._read)

    def _read(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        *lines, rest = (self._connections[connection] + data).split(b"\n")
        self._connections[connection] = rest
        try:
            for line in lines:
                connection.sendall(json.dumps(self._answer(line)).encode() + b"\n")
        except OSError:  # gone, or it asks and never listens
            data = b""
        if not data:
            self._drop(connection)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._connections[connection]
        connection.close()

    def _answer(self, line: bytes) -> dict[str, Any]:
        verbs: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "ping": self._ping,
            "start": self._start,
            "kill": self._kill,
            "retire": self._retire,
        }
        try:
            request = json.loads(line)
            return verbs[request["verb"]](request)
        except (ValueError, KeyError, TypeError, OSError) as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}

    def _ping(self, _request: dict[str, Any]) -> dict[str, Any]:
        return {"ready": True, "pid": os.getpid(), "preloaded": self._preloaded}

    def _kill(self, request: dict[str, Any]) -> dict[str, Any]:
        pid = request["pid"]
        if pid not in self._children:
            return {"error": f"{pid} is not a living child of the keeper {os.getpid()}."}
        number = signal.Signals(request["signal"])
        try:
            os.killpg(pid, number)
        except ProcessLookupError:  # so young that it has no group of its own yet
            os.kill(pid, number)
        return {"pid": pid}

    def _retire(self, _request: dict[str, Any]) -> dict[str, Any]:
        """Make room for a keeper of another version; children go on and are waited for."""
        self._hang_up()
        return {"pid": os.getpid()}

    def _start(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._listener is None:
            return {"error": f"The keeper {os.getpid()} has been replaced."}
        folder, number = Path(request["folder"]), int(request["attempt"])
        directory = folder / "attempts" / str(number)
        if not (directory / "attempt.json").exists():
            return {"error": f"{directory} has not been prepared."}
        if directory in self._children.values() or job_folder.is_started(directory):
            return {"error": f"{directory} has been started before; prepare another one."}
        pid = os.fork()
        if pid == 0:
            self._become_worker(folder, number, request["environment"], request["python"])
        self._children[pid] = directory
        return {"pid": pid}

    def _become_worker(
        self, folder: Path, attempt: int, environment: dict[str, str], python: str | None
    ) -> NoReturn:
        """Never returns: a copy of the keeper's loop must not run in a child."""
        status = 1
        try:
            os.setsid()
            self._forget()
            directory = folder / "attempts" / str(attempt)
            _open_as(0, os.devnull, os.O_RDONLY)
            for descriptor in (1, 2):
                _open_as(descriptor, directory / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.chdir(folder)  # what user code drops into its working folder goes with the job
            os.environ.clear()
            os.environ.update([*environment.items(), mark_of(directory)])
            if python is not None:
                self._execute(python, folder, attempt, directory)
            # By name, like all that is preloaded: the server, which imports this file for Keeper,
            # does not depend on what workers import.
            worker = importlib.import_module("app.jobs.worker")
            sys.argv = [str(worker.__file__), str(folder), "--attempt", str(attempt)]
            status = worker.main(folder, attempt)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def _execute(self, python: str, folder: Path, attempt: int, directory: Path) -> None:
        """Run the worker in another interpreter, which finds our code and nothing else of ours."""
        os.environ["PYTHONPATH"] = str(_code_folder(self._data_dir))
        command = [python, "-P", "-m", "app.jobs.worker", str(folder), "--attempt", str(attempt)]
        try:
            os.execvpe(python, command, os.environ)  # noqa: S606 (an argument list, no shell)
        except OSError as error:
            message = f"The worker's Python, {python}, cannot be started: {error.strerror}."
            job_folder.write_result(directory, "failed", 0, reason="import_error", message=message)
            raise

    def _forget(self) -> None:
        """Let go, in a child, of everything that is the keeper's."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        self._selector.close()
        self._bell.close()
        self._bell_rope.close()
        for connection in self._connections:
            connection.close()
        if self._listener is not None:
            self._listener.close()
            os.close(self._lock)  # closing leaves it to the parent; unlocking would not

    def _hear_bell(self, bell: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while bell.recv(4096):
                pass
        with contextlib.suppress(ChildProcessError):  # there is none left
            # WNOWAIT: as long as it has not been waited for, its pid, and with it the number of
            # its process group, cannot be given to a stranger.
            while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                self._bury(ended.si_pid)

    def _bury(self, pid: int) -> None:
        """Wait for a child that has ended: a worker, or what an ended worker had left to us."""
        directory = self._children.get(pid)
        if directory is None:
            os.waitpid(pid, 0)
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        end_leftovers(directory)
        _, status = os.waitpid(pid, 0)
        del self._children[pid]
        self._write_exit(pid, directory, os.waitstatus_to_exitcode(status))
        if not self._children:  # whose the rest was no longer matters
            for orphan in find_children(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(orphan, signal.SIGKILL)

    def _write_exit(self, pid: int, directory: Path, status: int) -> None:
        before, self._oom_kills = self._oom_kills, count_oom_kills()
        try:
            holder = job_folder.read_holder(directory)
            if holder is not None and holder.pid != pid:
                return  # it found the attempt taken: the end of the other one is what counts
            job_folder.write_exit(
                directory,
                code=status if status >= 0 else None,
                signal_number=-status if status < 0 else None,
                out_of_memory=status == -signal.SIGKILL and self._oom_kills > before,
            )
        except OSError:  # a deleted job or a full disk; the lock that is free tells the rest
            traceback.print_exc()

    def _hang_up(self) -> None:
        """Stop listening, so that another keeper may take this one's place."""
        if self._listener is None:
            return
        self._selector.unregister(self._listener)
        self._listener.close()
        self._listener = None
        (self._data_dir / "warm.json").unlink(missing_ok=True)
        self._address.unlink(missing_ok=True)
        if self._address.parent != self._data_dir:
            shutil.rmtree(self._address.parent)
        os.close(self._lock)


def _become_reaper() -> None:
    """Have what ended workers leave behind handed to this process, where the system can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _choose_address(data_dir: Path) -> Path:
    """The socket's path; the kernel takes none of more than 107 bytes."""
    address = data_dir / "warm.sock"
    if len(os.fsencode(address)) <= MAX_SOCKET_PATH_BYTES:
        return address
    return Path(tempfile.mkdtemp(prefix="frostline-")) / "warm.sock"  # 0700


def _listen(address: Path) -> socket.socket:
    address.unlink(missing_ok=True)  # left behind by one that was killed: we hold the lock
    listener = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        listener.bind(str(address))
    finally:
        os.umask(mask)
    listener.listen(64)
    return listener


def _code_folder(data_dir: Path) -> Path:
    """A folder to import ``app`` from, and nothing else: beside it may lie a site-packages."""
    folder = data_dir / "code"
    folder.mkdir(exist_ok=True)
    link, target = folder / "app", Path(app.__file__).parent
    if not link.is_symlink() or link.readlink() != target:
        draft = folder / f".app.{os.getpid()}"
        draft.symlink_to(target)
        draft.replace(link)
    return folder


def _open_as(descriptor: int, path: str | Path, flags: int) -> None:
    opened = os.open(path, flags, 0o644)
    os.dup2(opened, descriptor)
    os.close(opened)


def main() -> None:
    """Run a keeper until it is not needed any more."""
    parser = argparse.ArgumentParser(prog="python -m app.jobs.warm")
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--no-preload", action="store_true", help="do not import torch")
    parser.add_argument("--detach", action="store_true", help="go on in the background")
    arguments = parser.parse_args()
    if arguments.detach and os.fork():
        os._exit(0)
    keeper = KeeperProcess(arguments.data_dir.resolve())
    if arguments.detach:
        _open_as(1, os.devnull, os.O_WRONLY)  # who waits for the end of our output may connect now
    if not arguments.no_preload:
        keeper.preload()
    keeper.serve()


if __name__ == "__main__":
    main()
