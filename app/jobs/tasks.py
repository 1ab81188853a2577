"""Attends the tasks: what a worker finds out beside the jobs, in a slot of its own; one attempt."""

import shutil
import signal
from pathlib import Path

from sqlmodel import Session

from app.freezing.graph import ModelGraph
from app.jobs import folder as job_folder
from app.jobs.devices import Device
from app.jobs.endings import Ending, explain_start, judge, read_end
from app.jobs.processes import Processes, Watch, environment_of, is_held_still, written_files
from app.jobs.rebuild import keep_model_card
from app.settings import Settings
from app.store import catalog, files
from app.store.db import Database
from app.store.tables import Model, Task

TRACES_KEPT = 16  # graphs of one model beside its own
_CHANGED = "The model is another than was inspected: its code has changed. Add it again."


class Tasks:
    """One task from its start to its end; one thread calls it, tick by tick."""

    def __init__(self, settings: Settings, db: Database, processes: Processes) -> None:
        self._settings = settings
        self._db = db
        self._processes = processes
        self.watches: dict[Path, Watch] = {}

    def start(self, task: Task, device: Device, now: float) -> None:
        """Start the worker of a queued task; it sees no GPU."""
        if not self._db.write(lambda s: catalog.move_task(s, task.id, "queued", "running")):
            return  # stopped in this very moment
        folder = self._folder(task)
        files.remove_folder(folder)  # of a start that a crash cut short
        directory = folder / "attempts" / "1"
        self.watches[directory] = Watch(now)
        try:
            job_folder.write_spec(folder, task.spec)
            job_folder.prepare_attempt(
                folder, 1, resume_step=None, device="cpu", environment=environment_of(device)
            )
            pid = self._processes.start(folder, 1, device)
        except (RuntimeError, OSError) as error:
            ending = explain_start(error)
            self._db.write(lambda s: _end(s, task, "failed", ending))
            return

        def note_pid(session: Session) -> None:
            row = session.get_one(Task, task.id)
            row.pid = pid
            session.add(row)

        self._db.write(note_pid)

    def attend(self, task: Task, now: float) -> None:
        """Do what can be done now for a task that has not ended, as far as its row knows."""
        folder = self._folder(task)
        directory = folder / "attempts" / "1"
        watch = self.watches.setdefault(directory, Watch(now))
        if directory.is_dir() and not self._processes.has_ended(directory, task.pid, watch, now):
            self._watch(task, directory, watch, now)
            return
        result, ended = read_end(directory)
        if ended is None:
            self._processes.clear(directory, task.pid)
        is_open = directory.is_dir() and not job_folder.is_started(directory)
        if is_open and not job_folder.bar_attempt(directory):
            return  # it has started after all, in this very moment
        self.watches.pop(directory, None)
        if task.state == "stopping":
            self._db.write(lambda s: _end(s, task, "stopped", Ending("stopped")))
            files.remove_folder(folder)
        elif result is not None and result["outcome"] == "succeeded":
            self._keep(task, directory)
        elif result is None and ended is None and (is_open or not directory.is_dir()):
            # A crash before the start; one that is to stop since is seen to at the next look.
            self._db.write(lambda s: catalog.move_task(s, task.id, "running", "queued"))
        else:
            ending = judge(result, ended, has_stalled=watch.has_stalled)
            self._db.write(lambda s: _end(s, task, "failed", ending))

    def _watch(self, task: Task, directory: Path, watch: Watch, now: float) -> None:
        if watch.is_due(now):
            watch.note_written(written_files(directory), now)
            if is_held_still(task.pid):
                watch.progress_at = now
        watch.has_stalled |= now - watch.progress_at >= self._settings.stall_seconds
        if task.state == "stopping" or watch.has_stalled:
            self._processes.signal(directory, task.pid, signal.SIGKILL)

    def _keep(self, task: Task, directory: Path) -> None:
        """Keep what a task found: a graph or a calibration; all else stays in the task's folder."""
        if task.kind == "calibrate":
            path = files.timing_path(self._settings.data_dir, task.model_id or 0)
            shutil.copyfile(directory / job_folder.FOUND, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        try:
            if task.kind == "inspect":
                self._keep_graph(task, directory)
            elif task.kind == "preview":
                self._keep_traced(task, directory)
            elif task.kind == "trace":
                self._keep_assumed(task, directory)
                return
        except (ValueError, KeyError, TypeError) as error:
            noun = "inspection" if task.kind == "inspect" else task.kind
            unread = Ending("failed", "lost", f"What the {noun} found cannot be read: {error}")
            self._db.write(lambda s: _end(s, task, "failed", unread))
            return
        if task.kind != "inspect":
            self._db.write(lambda s: _end(s, task, "succeeded", Ending("succeeded")))
            return
        files.remove_folder(self._folder(task))

    def _keep_graph(self, task: Task, directory: Path) -> None:
        """Keep what an inspection found, and say so in the model's row."""
        found = directory / "graph.json"
        document = job_folder.read_document(found)
        if document is None:
            raise ValueError(f"{found} is missing although its inspection succeeded.")
        graph = ModelGraph.from_document(document)
        assert task.model_id is not None
        path = files.graph_path(self._settings.data_dir, task.model_id)
        path.parent.mkdir(exist_ok=True)

        def keep(session: Session) -> None:
            row = session.get_one(Task, task.id)
            model = session.get(Model, task.model_id)
            if row.state == "running" and model is not None:
                keep_model_card(self._settings.data_dir, model)
                # Copied, so that a crash before the commit finds it where it was.
                draft = path.with_name(f".{path.name}")
                shutil.copyfile(found, draft)
                draft.replace(path)
                model.state, model.fingerprint = "ready", graph.fingerprint
                model.weights_digest = document.get("weights_digest")
                model.parameter_count = graph.parameter_count
                model.tensor_count = graph.tensor_count
                model.module_count = graph.module_count
                session.add(model)
            catalog.end_task(session, row, "succeeded")

        self._db.write(keep)

    def _keep_traced(self, task: Task, directory: Path) -> None:
        """Keep the graph of a model without an example, which was traced on a dataset's batch."""
        document = job_folder.read_document(directory / "graph.json")
        if document is None or task.model_id is None:
            return
        path = files.graph_path(self._settings.data_dir, task.model_id)
        with self._db.read() as session:
            model = session.get(Model, task.model_id)
        if (
            model is not None
            and model.fingerprint == ModelGraph.from_document(document).fingerprint
        ):
            job_folder.write_document(path, document)

    def _keep_assumed(self, task: Task, directory: Path) -> None:
        """Keep the graph of a model as a run is assumed, or why there is none; its oldest ones go.

        Of a model that was deleted, or that is another than was inspected, none is kept.
        """
        document = job_folder.read_document(directory / "graph.json")
        if document is None or task.model_id is None:
            raise ValueError("it wrote none.")
        data_dir = self._settings.data_dir
        path = files.assumed_graph_path(data_dir, task.model_id, task.spec["assumed"])
        draft = path.with_name(f".{path.name}")
        job_folder.write_document(draft, document)

        def keep_assumed(session: Session) -> None:
            row, model = session.get_one(Task, task.id), session.get(Model, task.model_id)
            if model is None:
                draft.unlink()
                catalog.end_task(session, row, "stopped")
            elif document["fingerprint"] != model.fingerprint:
                draft.unlink()
                catalog.end_task(session, row, "failed", "bad_spec", _CHANGED)
            else:
                draft.replace(path)
                for old in files.assumed_graph_paths(data_dir, model.id or 0)[:-TRACES_KEPT]:
                    old.unlink(missing_ok=True)
                catalog.end_task(session, row, "succeeded")

        self._db.write(keep_assumed)
        files.remove_folder(self._folder(task))

    def _folder(self, task: Task) -> Path:
        assert task.id is not None
        return files.task_folder(self._settings.data_dir, task.id)


def _end(session: Session, task: Task, state: str, ending: Ending) -> None:
    row = session.get_one(Task, task.id)
    catalog.end_task(session, row, state, ending.reason, ending.message)
