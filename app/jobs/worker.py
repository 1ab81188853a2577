"""One attempt of one job: load, run, report; it knows no server, no database and no network.

``python -m app.jobs.worker FOLDER`` does by hand exactly what the server has done by the warm
process. Only the standard library is imported here at first, so that whatever is missing or broken
in the interpreter of the user's choice is told in result.json like every other failure.
"""

import argparse
import contextlib
import errno
import faulthandler
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from app.freezing.errors import InvalidDocument
from app.jobs import BRIEF_SPIN
from app.jobs import folder as job_folder
from app.jobs.folder import Wish, WishReader
from app.jobs.spool import SpoolWriter
from app.numbers import name_non_finite
from app.training.places import checkpoint_path, checkpoint_steps

LOG_BYTES = 10 * 2**20
SIGN_SECONDS = 1.0  # between two signs of life of the loop
TRACEBACK_BYTES = 64 * 2**10
MESSAGE_CHARACTERS = 1000
KINDS = ("train", "evaluate", "inspect", "preview", "mechanisms", "calibrate", "trace")
SMALL_MODEL_BYTES = 2 * 2**30


def main(folder: Path, attempt: int | None = None) -> int:
    """Run one attempt from its start to its result.

    Args:
        attempt: one that has been prepared; None takes the newest one that has not been started,
            or prepares the next, which goes on from the newest checkpoint.

    Returns:
        The exit status: 0 for succeeded, stopped and released; 1 for failed, with its reason in
        result.json; 2 where there was nothing to run, or somebody else runs it.

    Side effects:
        Takes over the output and the signals of this process, which must not be used for more.
    """
    folder = folder.resolve()
    os.environ.setdefault(*BRIEF_SPIN)  # before torch is imported
    try:
        directory = _choose_attempt(folder, attempt)
        job_folder.hold_lock(directory)
        job_folder.tidy_checkpoints(folder)
        facts = job_folder.read_attempt(directory)
        spool = SpoolWriter(directory / "telemetry.spool", facts["attempt"])
    except (OSError, ValueError, job_folder.AttemptTaken) as error:
        print(f"frostline worker: {error}", file=sys.stderr)
        return 2
    terminal = os.dup(2)
    log = Log(directory / "log.txt")
    report = Report(spool, facts["resume_step"] or 0)
    wishes = Wishes(directory)
    room = directory / "result.room"
    try:
        try:
            wishes.listen()
            # Held back for the result, so that a job can still tell that the disk is full.
            room.write_bytes(bytes(3 * TRACEBACK_BYTES))
            os.environ.update(facts["environment"])
            outcome, step = _run(folder, directory, facts, report, wishes)
            spool.close()
            result: dict[str, Any] = {"outcome": outcome, "step": step}
        finally:
            wishes.ignore()
    except BaseException as error:  # SystemExit too: only a finished run has succeeded
        result = _describe_end(error, report.step, wishes.end)
        if not isinstance(error, StopAsked):
            log.add("".join(traceback.format_exception(error)))
    log.close()
    room.unlink(missing_ok=True)
    job_folder.write_result(directory, **result)
    line = f"attempt {directory.name}: {result['outcome']} at step {result['step']}"
    if result.get("message"):
        line += f": {result['message']}"
    with contextlib.suppress(OSError):  # the result is safe; a terminal that has gone hears nothing
        os.write(terminal, f"{line}\n".encode())
    return int(result["outcome"] == "failed")


def _describe_end(error: BaseException, step: int, wished: str | None) -> dict[str, Any]:
    if isinstance(error, StopAsked):
        return {"outcome": wished, "step": step}
    # What breaks while it is being stopped is told as ever, but it ends as wished.
    outcome = "stopped" if wished == "stopped" else "failed"
    return {"outcome": outcome, "step": step, **describe_failure(error)}


def _choose_attempt(folder: Path, number: int | None) -> Path:
    if number is not None:
        return folder / "attempts" / str(number)
    spec = job_folder.read_spec(folder)
    newest = job_folder.newest_attempt(folder)
    if newest and not job_folder.is_started(newest):
        return newest
    if newest and job_folder.is_held(newest):
        raise job_folder.AttemptTaken(f"{newest} is running; stop it, or wait for its end.")
    job_folder.tidy_checkpoints(folder)  # it may put back the newest one
    steps = checkpoint_steps(job_folder.checkpoints_folder(folder))
    return job_folder.prepare_attempt(
        folder,
        int(newest.name) + 1 if newest else 1,
        resume_step=steps[-1] if steps else None,
        device=spec.get("training", {}).get("device", "auto"),
        environment={},
    )


def _run(
    folder: Path, directory: Path, facts: Mapping[str, Any], report: "Report", wishes: "Wishes"
) -> tuple[str, int]:
    """Read the spec, load what it names, then inspect, trace, preview, try, evaluate or train it.

    Returns:
        The outcome and the step at which it came.
    """
    # What needs no torch comes first: a spec that cannot be used is refused in milliseconds.
    from app.freezing.config import parse_config
    from app.sources.spec import parse_dataset_spec, parse_model_spec
    from app.training.recipe import parse_recipe

    spec = _read_spec(folder)
    code_dirs, file_dirs = ([Path(path) for path in spec[name]] for name in _FOLDER_LISTS)
    model_spec = parse_model_spec(spec["model"], code_dirs=code_dirs, file_dirs=file_dirs)
    is_inspection, is_preview = (spec["kind"] == kind for kind in ("inspect", "preview"))
    has_data = "dataset" in spec and not is_inspection
    if has_data:
        data_spec = parse_dataset_spec(spec["dataset"], code_dirs=code_dirs, file_dirs=file_dirs)
    config = parse_config(spec.get("config", {}))
    recipe = parse_recipe(spec.get("training", {}))

    import numpy
    import torch

    from app.sources.models import build_model

    if spec.get("threads"):
        torch.set_num_threads(spec["threads"])
    # The loop seeds again. This is for the factories: weights and synthetic data that they draw
    # are the same in every attempt, and the same by hand as in a copy of the warm process.
    random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    numpy.random.seed(recipe.seed % 2**32)
    if spec["kind"] in ("calibrate", "trace") and not model_spec.uri.startswith(
        ("python:", "demo:")
    ):
        model_spec = replace(model_spec, random_init=True, weights=None)  # values take no time
    kernels = spec.get("kernels", "cpu")
    weightless = is_inspection or is_preview or spec.get("traced_by") == "fake"
    built = build_model(model_spec, code_dirs=code_dirs, weightless=weightless)
    for note in built.notes:
        print(note, flush=True)
    if is_inspection:
        from app.freezing.trace import trace_model
        from app.sources.sizes import size_example

        digest = _digest_weights(built.model)  # before a forward in train mode moves a buffer
        graph = trace_model(built.model, built.example, loss=built.loss, kernels=kernels)
        if graph.traced_by == "none" and digest is None and _is_small(graph):
            # Its forward looks at values: those of untrained weights do as well as any.
            untrained = replace(model_spec, random_init=True, weights=None)
            built = build_model(untrained, code_dirs=code_dirs)
            graph = trace_model(built.model, built.example, loss=built.loss, kernels=kernels)
        sizes = size_example(built.example, {}, built.make).sizes
        document = {**graph.to_document(), **sizes, "weights_digest": digest}
        job_folder.write_document(directory / "graph.json", document)
        return "succeeded", 0
    if spec["kind"] == "trace":
        from app.sources.traces import trace_as_assumed

        found = trace_as_assumed(built, spec["assumed"], spec["traced_by"], kernels)
        job_folder.write_document(directory / "graph.json", found)
        return "succeeded", 0
    if is_preview:
        from app.sources.preview import preview_dataset, trace_on_data

        def trace(data: Any) -> dict[str, Any]:
            if built.example is not None:
                return {}
            graph = trace_on_data(built, data, kernels)
            document = {**graph.to_document(), "weights_digest": _digest_weights(built.model)}
            job_folder.write_document(directory / "graph.json", document)
            return {"traced_by": graph.traced_by}

        preview_dataset(
            data_spec,
            code_dirs=code_dirs,
            seed=recipe.seed,
            intake=built.intake,
            keep=partial(job_folder.write_document, directory / job_folder.FOUND),
            use=trace,
        )
        return "succeeded", 0

    from app.sources.datasets import build_data
    from app.training import loop

    device = facts["device"]
    if device == "auto":  # started by hand: nobody has chosen one
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    if spec["kind"] == "calibrate":
        from app.freezing.calibrate import calibrate_model
        from app.freezing.trace import trace_model

        # Always as the CPU runs it that is timed; a plan for a GPU is made of another graph.
        graph = trace_model(built.model, built.example, loss=built.loss)
        timed = calibrate_model(built.model.to(device), built.example, graph, loss=built.loss)
        if kernels != graph.kernels:
            timed["graph"] = graph.to_document()
        job_folder.write_document(directory / job_folder.FOUND, timed)
        return "succeeded", 0
    data = None
    if has_data:
        data = build_data(data_spec, code_dirs=code_dirs, seed=recipe.seed, intake=built.intake)
    if spec["kind"] == "mechanisms":
        from app.training.trial import try_mechanisms

        found = try_mechanisms(built, data, config, recipe, device)
        job_folder.write_document(directory / job_folder.FOUND, name_non_finite(found))
        return "succeeded", 0
    assert data is not None
    wishes.loaded()
    if spec["kind"] == "evaluate":
        end = loop.evaluate(built, data, recipe, device=device, emit=report, wishes=wishes)
        return end.outcome, end.step
    checkpoints = job_folder.checkpoints_folder(folder)
    checkpoints.mkdir(exist_ok=True)
    step = facts["resume_step"]
    end = loop.train(
        built,
        data,
        config,
        recipe,
        device=device,
        checkpoints=checkpoints,
        emit=report,
        wishes=wishes,
        resume_from=None if step is None else checkpoint_path(checkpoints, step),
    )
    return end.outcome, end.step


def _digest_weights(model: Any) -> str | None:
    """SHA-256 of what a checkpoint would hold, by name; None where weights are not there yet."""
    from app.sources.hub import is_weightless
    from app.training.checkpoint import digest_weights

    return None if is_weightless(model) else digest_weights(model)


def _is_small(graph: Any) -> bool:
    """Whether a model may be built for real where its structure alone would not do."""
    return sum(parameter.nbytes for parameter in graph.parameters) <= SMALL_MODEL_BYTES


_FOLDER_LISTS = ("code_dirs", "file_dirs")
_NEEDED: dict[str, tuple[str, ...]] = {  # beside a model; others need a dataset
    "inspect": (),
    "mechanisms": (),
    "calibrate": (),
    "trace": ("assumed", "traced_by"),
}


def _read_spec(folder: Path) -> dict[str, Any]:
    """The spec, checked as far as nobody else checks it; otherwise InvalidDocument."""
    try:
        spec = job_folder.read_spec(folder)
    except ValueError as error:
        raise InvalidDocument([("", f"The job's spec.json cannot be read: {error}")]) from error
    if spec.get("kind") not in KINDS:
        message = f"'kind' is {spec.get('kind')!r}; it must be one of {', '.join(KINDS)}."
        raise InvalidDocument([("kind", message)])
    needed = ("model", *_NEEDED.get(spec["kind"], ("dataset",)))
    if missing := [(name, f"The spec has no {name!r}.") for name in needed if name not in spec]:
        raise InvalidDocument(missing)
    return {**dict.fromkeys(_FOLDER_LISTS, ()), **spec}


class Report:
    """What the loop emits into: the spool, and the log; it remembers the last step in there."""

    def __init__(self, spool: SpoolWriter, step: int) -> None:
        self._spool = spool
        self.step = step

    def __call__(self, kind: str, payload: Mapping[str, Any]) -> None:
        if kind == "log":
            print(payload["text"], flush=True)
            return
        self._spool.append(kind, payload)
        # Metrics without a duration tell of no new step: of an evaluation, or of a loss that is no
        # number and that the optimizer did not take.
        if kind != "metrics" or payload["step_ms"] is not None:
            self.step = payload.get("step", self.step)
        if kind == "start":
            for warning in payload["warnings"]:
                print(f"WARNING: {warning}", flush=True)


class StopAsked(BaseException):
    """Ends loading at once; not an Exception, so that user code is unlikely to swallow it."""


class Wishes:
    """What the server wants, where SIGTERM and Ctrl-C mean the same as the wish to stop."""

    def __init__(self, directory: Path) -> None:
        self._read = WishReader(directory)
        self._sign_of_life = directory / "attempt.json"
        self._shown_at = time.monotonic()
        self._loading = True
        self._signalled = False

    def __call__(self) -> Wish:
        wish = self._read()
        now = time.monotonic()
        if now - self._shown_at >= SIGN_SECONDS:
            # The loop asks between two steps, and between two batches of an evaluation, which
            # reports nothing for long: whoever asks has not hung.
            self._shown_at = now
            os.utime(self._sign_of_life)
        if self._signalled and wish.state != "release":
            return replace(wish, state="stop")
        return wish

    @property
    def end(self) -> str | None:
        """The outcome that somebody wishes for, or None where the attempt is to go on."""
        return {"stop": "stopped", "release": "released"}.get(self().state)

    def listen(self) -> None:
        """Take SIGTERM and SIGINT from now on; raises StopAsked where an end is wished already."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        self._leave_if_asked()

    def loaded(self) -> None:
        """From now on a signal is a wish like others, for the loop to see between two steps."""
        self._leave_if_asked()
        self._loading = False

    def ignore(self) -> None:
        """Signals come too late from now on: the result is being written."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._signalled = True
        if self._loading:
            self._loading = False  # once is enough: the second must not disturb the report
            raise StopAsked

    def _leave_if_asked(self) -> None:
        if self.end:
            raise StopAsked


class Log:
    """Sends what this process and its children print to a file of bounded size.

    Everything is written to the file directly, so that the last words before a crash are in it. A
    thread looks at the size: past the limit the rest goes nowhere, and the file says so.
    """

    def __init__(self, path: Path, limit_bytes: int = LOG_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._file = path.open("ab", buffering=0)
        self._is_full = False
        self._closing = threading.Event()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(self._file.fileno(), stream.fileno())
            stream.reconfigure(  # type: ignore[union-attr]
                encoding="utf-8", errors="backslashreplace", line_buffering=True
            )
        faulthandler.enable(self._file)
        self._thread = threading.Thread(target=self._watch, name="log", daemon=True)
        self._thread.start()

    def add(self, text: str) -> None:
        """Print to standard error, whatever its state: a full disk loses lines, not the result."""
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Bring everything into the file; what is printed later is lost."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        self._closing.set()
        self._thread.join()
        self._point_output_at_nothing()
        self._cut()

    def _watch(self) -> None:
        while not self._closing.wait(0.1):
            self._cut()

    def _cut(self) -> None:
        """Keep the limit; again and again, because children hold the file open too."""
        notice = b"\n[the log ends here, at its limit of %d bytes]\n" % self._limit_bytes
        descriptor = self._file.fileno()
        if os.fstat(descriptor).st_size <= self._limit_bytes + len(notice) * self._is_full:
            return
        self._point_output_at_nothing()
        self._is_full = True
        os.ftruncate(descriptor, self._limit_bytes)
        os.write(descriptor, notice)

    def _point_output_at_nothing(self) -> None:
        nothing = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nothing, stream.fileno())
        os.close(nothing)


# By name, because a failure is told also where torch, and what needs it, cannot be imported.
_REASONS = {
    "InvalidDocument": "bad_spec",
    "NonFinite": "nonfinite",
    "CorruptCheckpoint": "checkpoint_corrupt",
}


def describe_failure(error: BaseException) -> dict[str, str]:
    """The reason (one of the fixed list), one sentence and the traceback of what went wrong."""
    message = " ".join("".join(traceback.format_exception_only(error)).split())
    if isinstance(error, SystemExit):
        message = f"The user's code ended the process by sys.exit({error.code!r})."
    elif type(error).__module__.partition(".")[0] == "app":  # our own speak in sentences
        message = str(error)
    elif isinstance(error, ModuleNotFoundError) and error.name in ("torch", "numpy", "safetensors"):
        message = (
            f"The worker's Python, {sys.executable}, has no module {error.name!r}; it needs torch,"
            " numpy and safetensors."
        )
    trace = "".join(traceback.format_exception(error))
    return {
        "reason": _classify(error),
        "message": _storable(message)[:MESSAGE_CHARACTERS],
        "traceback": _shorten(_storable(trace), TRACEBACK_BYTES),
    }


def _classify(error: BaseException) -> str:
    """Find the reason; an exhausted resource counts also where it is the cause of another error."""
    chain = [error]
    while cause := _cause(chain[-1]):
        if cause in chain:
            break
        chain.append(cause)
    for link in chain:
        if reason := _exhausted(link):
            return reason
    if isinstance(error, ImportError):
        return "import_error"
    if type(error).__name__ == "InvalidDocument" and all(
        field.partition(".")[0] == "dataset" for field, _ in getattr(error, "errors", ())
    ):
        return "data_error"
    reason = getattr(error, "reason", None)
    return (
        reason if reason in job_folder.REASONS else _REASONS.get(type(error).__name__, "user_code")
    )


def _cause(error: BaseException) -> BaseException | None:
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _exhausted(error: BaseException) -> str | None:
    text = str(error) if isinstance(error, Exception) else ""
    name = type(error).__name__
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk_full"
    if name == "SafetensorError" and "os error 28" in text:  # it keeps no errno
        return "disk_full"
    if name == "OutOfMemoryError":
        return "oom_cuda"
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in text
    ):
        return "oom_host"
    if name == "AcceleratorError" or (isinstance(error, RuntimeError) and "CUDA error" in text):
        return "cuda_fatal"
    return None


def _storable(text: str) -> str:
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def _shorten(text: str, limit_bytes: int) -> str:
    """Keep the beginning and, longer, the end, where the error itself stands."""
    data = text.encode()
    if len(data) <= limit_bytes:
        return text
    mark = b"\n[...]\n"
    head = data[: limit_bytes // 4]
    tail = data[len(head) + len(mark) - limit_bytes :]
    return (head + mark + tail).decode(errors="ignore")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m app.jobs.worker", description=__doc__)
    parser.add_argument("folder", type=Path, help="a job folder: it holds spec.json")
    parser.add_argument("--attempt", type=int, help="one that has been prepared")
    arguments = parser.parse_args()
    # Threads and exit handlers that user code has left behind cannot hold up, or change, the end.
    os._exit(main(arguments.folder, arguments.attempt))
