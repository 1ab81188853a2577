"""Crash points: every call that leaves a trace on the disk, found by scanning the source itself.

A point is the moment right before or right after such a call. `crash_at` forks a process that plays
a scenario and is killed by SIGKILL at one point. Nothing has to be marked in the source, so that a
new call is a new point by itself.
"""

import ast
import json
import os
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from app.jobs import attendance, folder, rebuild, runner, spool, tasks
from app.store import db, files
from app.training import checkpoint

# What writes: to files, to processes, to the database; our own such functions too.
LASTING = frozenset(
    (
        *("fsync", "rename", "replace", "link", "unlink", "ftruncate", "rmtree", "rmdir", "mkdir"),
        *("copyfile", "write", "write_text", "write_bytes", "dump", "save_file", "utime"),
        *("write_document", "write_spec", "write_wish", "write_result", "write_exit"),
        *("prepare_attempt", "bar_attempt", "hold_lock", "tidy_checkpoints", "tidy_drafts"),
        *("start", "start_attempt", "end_attempt", "ingest", "move_job", "queue_job", "flush"),
        *("remove_folder", "keep_model_card", "_set_aside", "add_job"),
    )
)


@dataclass(frozen=True)
class Point:
    """A moment next to one call: its name is stable while the function is."""

    name: str
    file: str
    line: int
    is_after: bool


def scan(module: Any) -> Iterator[Point]:
    """Every point of a module, in the order of its source."""
    file = module.__file__
    source = ast.parse(Path(file).read_text("utf-8"))
    numbers: Counter[str] = Counter()
    for function in ast.walk(source):
        if not isinstance(function, ast.FunctionDef):
            continue
        for call in _own_calls(function):
            called = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id  # type: ignore[attr-defined]
            key = f"{Path(file).stem}.{function.name}:{called}"
            numbers[key] += 1
            for when in ("before", "after"):
                yield Point(f"{key}:{numbers[key]}:{when}", file, call.lineno, when == "after")


def _own_calls(function: ast.FunctionDef) -> Iterator[ast.Call]:
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.FunctionDef):
            continue  # a function inside is visited as one of its own
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in LASTING:
                yield node
        waiting[:0] = ast.iter_child_nodes(node)


def crash_at(point: Point | None, scenario: Callable[[], None]) -> int:
    """Play a scenario in a child that dies at the point; the child's exit code (-9: it died).

    Args:
        point: None lets it come to its end.
    """
    return _play(scenario, None if point is None else _tracer(point))


def find_reached(points: list[Point], scenario: Callable[[], None], notes: Path) -> list[Point]:
    """The points that a scenario comes by, found by playing it to its end."""
    files = {point.file for point in points}

    def watch(frame: FrameType, event: str, _: Any) -> Any:
        return note if frame.f_code.co_filename in files else None

    seen: set[tuple[str, int]] = set()

    def note(frame: FrameType, event: str, _: Any) -> Any:
        seen.add((frame.f_code.co_filename, frame.f_lineno))
        return note

    def play_and_tell() -> None:
        scenario()
        notes.write_text(json.dumps(sorted(seen)))

    assert _play(play_and_tell, watch) == 0
    found = {tuple(one) for one in json.loads(notes.read_text())}
    return [point for point in points if (point.file, point.line) in found]


def _play(scenario: Callable[[], None], trace: Any) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            threading.settrace(trace)
            sys.settrace(trace)
            scenario()
        except BaseException:
            traceback.print_exc()
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _tracer(point: Point) -> Callable[[FrameType, str, Any], Any]:
    def watch(frame: FrameType, event: str, _: Any) -> Any:
        return follow if frame.f_code.co_filename == point.file else None

    reached: set[int] = set()

    def follow(frame: FrameType, event: str, _: Any) -> Any:
        at_point = event == "line" and frame.f_lineno == point.line
        if at_point and not point.is_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if at_point:
            reached.add(id(frame))
        elif id(frame) in reached and event in ("line", "return"):
            os.kill(os.getpid(), signal.SIGKILL)
        return follow

    return watch


def points_of(modules: Iterable[Any]) -> list[Point]:
    return [point for module in modules for point in scan(module)]


WORKER_SIDE = (folder, spool, checkpoint)
SERVER_SIDE = (attendance, runner, tasks, rebuild, files, db)
