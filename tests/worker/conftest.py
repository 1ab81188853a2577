"""Real keepers, real job folders, and a worker that heeds nothing."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.jobs import folder as job_folder
from app.jobs.keeper import Keeper
from tests.worker.silly_jobs import USER_CODE, eventually, prepare, wait_until_left


@pytest.fixture(scope="session")
def code_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    (folder / "silly.py").write_text(USER_CODE)
    return folder


@pytest.fixture
def make_job(tmp_path: Path, code_dir: Path) -> Iterator[Callable[..., Path]]:
    """Make a job folder of a silly model and dataset, with one attempt prepared."""
    numbers = iter(range(1, 1000))

    def make(
        model: str = "model",
        dataset: str = "data",
        kind: str = "train",
        training: dict[str, Any] | None = None,
        prepared: bool = True,
        **more: Any,
    ) -> Path:
        folder = tmp_path / "jobs" / str(next(numbers))
        spec = {
            "kind": kind,
            "model": {"uri": model if ":" in model else f"python:silly:{model}"},
            "config": {"rules": [{"action": "freeze", "match": "0.**"}]},
            "dataset": {"uri": f"python:silly:{dataset}"},
            "training": {"epochs": 2, "batch_size": 8, **(training or {})},
            "code_dirs": [str(code_dir)],
            "file_dirs": [],
            "threads": 1,
            **more,
        }
        job_folder.write_spec(folder, spec)
        if prepared:
            prepare(folder)
        return folder

    yield make
    for attempt in tmp_path.glob("jobs/*/attempts/*"):  # what a test that failed left running
        job_folder.signal_holder(attempt, signal.SIGKILL)


@pytest.fixture(scope="session")
def warm_keeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keeper]:
    """One keeper with everything imported, for all tests that only need a worker."""
    keeper = Keeper.connect(tmp_path_factory.mktemp("warm"))
    eventually(keeper.ready)
    yield keeper
    keeper.close()


@pytest.fixture
def cold_keeper(tmp_path: Path) -> Iterator[Keeper]:
    """A keeper of the test's own data folder that has imported nothing."""
    keeper = Keeper.connect(tmp_path / "data", preload=False)
    yield keeper
    keeper.close()
    wait_until_left(tmp_path / "data")


@pytest.fixture
def deaf_worker() -> Iterator[Callable[[Path], subprocess.Popen[bytes]]]:
    """Makes a real process that holds an attempt and heeds nothing."""
    with contextlib.ExitStack() as stack:

        def make(directory: Path) -> subprocess.Popen[bytes]:
            code = (
                "import sys; from pathlib import Path; from app.jobs.folder import hold_lock;"
                "hold_lock(Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
            )
            worker = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", code, str(directory)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    start_new_session=True,
                )
            )
            stack.callback(worker.kill)
            assert worker.stdout is not None
            worker.stdout.readline()
            return worker

        yield make
