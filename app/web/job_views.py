"""What templates about jobs are given: one job, the list, its page, jobs side by side, sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LIVE_STATES = ("queued", "starting", "running", "paused", "stopping")
ENDED_STATES = ("stopped", "failed", "interrupted", "succeeded")
# Layers times buckets of a heatmap's first answer, and how many buckets a usual window shows.
FIRST_CELLS, WIDE = 16_000, 900

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Shell:
    """The frame around every page: `section` is the marked entry of the navigation."""

    title: str
    section: str = ""
    path: str = "/"


@dataclass(frozen=True, slots=True)
class JobView:
    """One job as pages speak of it; `document` is what the interface answers for it."""

    document: Document
    loss: str = ""

    @property
    def id(self) -> int:
        return int(self.document["id"])

    @property
    def state(self) -> str:
        return str(self.document["state"])

    @property
    def kind(self) -> str:
        return str(self.document.get("kind") or "train")

    @property
    def name(self) -> str:
        return str(self.document.get("name") or f"Job {self.id}")

    @property
    def notes(self) -> str:
        return str(self.document.get("notes") or "")

    @property
    def model_uri(self) -> str:
        return str((self.document.get("model") or {}).get("uri", ""))

    @property
    def dataset_uri(self) -> str:
        return str((self.document.get("dataset") or {}).get("uri", ""))

    @property
    def state_words(self) -> str:
        """The state in a sentence: what the job does now, and what it waits for."""
        if self.state == "paused":
            return {
                "hold": "Paused and held: the model stays loaded, the device stays taken.",
                "release": "Paused and released: a checkpoint is written, the device is free.",
            }.get(str(self.document.get("pause")), "Paused.")
        if self.state in ("queued", "interrupted") and self.document.get("waiting_for"):
            return " ".join(filter(None, (str(self.document["waiting_for"]), self.place_in_queue)))
        doing = "evaluating" if self.kind == "evaluate" else "training"
        return {
            "queued": "Waits for a free device; it starts by itself.",
            "starting": "A worker loads the model and the data.",
            "running": f"Is {doing}.",
            "stopping": "Ends after its current step, with a checkpoint.",
            "stopped": "Was stopped; it can go on from its newest checkpoint.",
            "succeeded": "Got to its end.",
            "failed": "Ended by a failure.",
            "interrupted": "Its worker died; it can go on from its newest checkpoint.",
        }.get(self.state, "")

    @property
    def place_in_queue(self) -> str:
        place = self.document.get("position")
        if not place:
            return ""
        return "It is the next to start." if place == 1 else f"It is number {place} in the queue."

    @property
    def frozen_count(self) -> int:
        """Frozen parameter tensors when it began."""
        return int((self.document.get("config") or {}).get("frozen_count") or 0)

    @property
    def tensor_count(self) -> int:
        config = self.document.get("config") or {}
        return self.frozen_count + int(config.get("trainable_count") or 0)

    @property
    def progress(self) -> float | None:
        total = self.document.get("total_steps")
        return min(self.document.get("step", 0) / total, 1.0) if total else None

    @property
    def is_live(self) -> bool:
        return self.state in LIVE_STATES

    @property
    def can_stop(self) -> bool:
        return self.state in ("queued", "starting", "running", "paused")

    @property
    def can_pause(self) -> bool:
        return self.state == "running" and self.kind == "train"

    @property
    def can_resume(self) -> bool:
        return self.state == "paused" or (
            self.state in ENDED_STATES and self.state != "succeeded" and self.kind == "train"
        )

    @property
    def resume_word(self) -> str:
        has_begun = self.state != "failed" or self.document.get("step")
        return "Resume" if has_begun else "Try again"

    @property
    def can_train_on(self) -> bool:
        """Whether it got to its end, and goes on only to a later one."""
        return self.state == "succeeded" and self.kind == "train"

    @property
    def can_change_freeze(self) -> bool:
        """Whether boxes can be ticked now, from the next step on."""
        is_held = self.state == "paused" and self.document.get("pause") != "release"
        mechanism = (self.document.get("config") or {}).get("mechanism")
        is_running = self.state == "running" or is_held
        return self.kind == "train" and is_running and mechanism == "requires_grad"

    @property
    def end_option(self) -> str:
        """The training option that says where it ends."""
        return "max_steps" if self.document["training"].get("max_steps") else "epochs"

    @property
    def samples_per_second(self) -> float | None:
        step_ms = self.document.get("step_ms")
        training = self.document.get("training") or {}
        batch = training.get("batch_size")
        if not step_ms or not batch:
            return None
        return 1000.0 * batch * (training.get("grad_accumulation") or 1) / step_ms

    @property
    def memory_bytes(self) -> int | None:
        """The most that it took so far where that was measured, else what it takes now."""
        for key in ("peak_bytes", "device_memory_bytes", "memory_bytes"):
            if self.document.get(key):
                return int(self.document[key])
        return None


@dataclass(frozen=True, slots=True)
class JobsView:
    """The list. `states` are those that may be chosen, with how many jobs are in each."""

    shell: Shell
    jobs: Sequence[JobView]
    has_models: bool = True
    search: str = ""
    state: str = ""
    states: Sequence[tuple[str, int]] = ()
    older: int | None = None
    total: int = 0

    @property
    def is_live(self) -> bool:
        return any(job.is_live for job in self.jobs)


@dataclass(frozen=True, slots=True)
class JobRowView:
    job: JobView


@dataclass(frozen=True, slots=True)
class Figure:
    """What the plan foretold beside what was measured, as texts; `note` explains."""

    label: str
    predicted: str
    measured: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Insight:
    """A finding about layers of a job.

    Attributes:
        layers: (path, evidence in words), the first of them where there are many.
        can_freeze: whether freezing the layers is what to do about it.
        rerun_address: the workbench with them frozen besides; "" where that is no remedy.
    """

    code: str
    message: str
    layers: Sequence[tuple[str, str]]
    layer_count: int = 0
    can_freeze: bool = False
    rerun_address: str = ""


@dataclass(frozen=True, slots=True)
class LiveTreeView:
    """The modules of a job with what is frozen now; `opened` is the list of the open ones."""

    job: JobView
    rows: Sequence[Any] = ()
    opened: Sequence[int] = ()
    waiting: Sequence[str] = ()
    changes: Sequence[Document] = ()

    @property
    def opened_text(self) -> str:
        return ",".join(map(str, self.opened))

    def toggled(self, index: int) -> str:
        """The list of open modules with one of them turned."""
        turned = set(self.opened) ^ {index}
        return ",".join(map(str, sorted(turned)))


@dataclass(frozen=True, slots=True)
class JobPageView:
    shell: Shell
    job: JobView
    config: Document
    options: Sequence[tuple[str, Any]]
    rerun_address: str
    message: str = ""
    proof: Document | None = None
    checkpoints: Sequence[Document] = ()
    resumed: Document | None = None
    log: str = ""
    log_is_cut: bool = False
    figures: Sequence[Figure] = ()
    insights: Sequence[Insight] = ()
    insight_steps: Sequence[int] | None = None
    tree: LiveTreeView | None = None
    layer_count: int = 0
    formats: Mapping[str, str] = field(default_factory=dict)

    @property
    def first_points(self) -> int:
        """Buckets of a heatmap's first answer, drawn while the whole comes; 0 where one will do."""
        few = FIRST_CELLS // max(1, self.layer_count)
        return max(8, few) if few < WIDE // 2 else 0


@dataclass(frozen=True, slots=True)
class CompareRow:
    """One line of a table with jobs as columns; `best` marks the best of them."""

    label: str
    values: Sequence[Any]
    best: Sequence[bool] = ()
    note: str = ""

    @property
    def differs(self) -> bool:
        return any(value != self.values[0] for value in self.values)


@dataclass(frozen=True, slots=True)
class CompareView:
    """Jobs side by side. `curves` is what the charts are told, as JSON."""

    shell: Shell
    jobs: Sequence[JobView]
    settings: Sequence[CompareRow] = ()
    results: Sequence[CompareRow] = ()
    choices: Sequence[JobView] = ()
    sweeps: Sequence[Document] = ()
    message: str = ""
    curves: str = "[]"


@dataclass(frozen=True, slots=True)
class SweepColumn:
    """One column of a sweep's table: its heading, the group above it, what it is measured in."""

    key: str
    label: str
    group: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class SweepLine:
    """One freeze set of a sweep: its job, the texts of its columns, and which are the best."""

    name: str
    job: JobView
    cells: Sequence[str]
    best: Sequence[bool]


@dataclass(frozen=True, slots=True)
class SweepView:
    shell: Shell
    sweep: Document
    columns: Sequence[SweepColumn]
    lines: Sequence[SweepLine]
    curves: str = "[]"
    message: str = ""

    @property
    def groups(self) -> Sequence[tuple[str, int]]:
        """Each group of columns with how many it has, in order."""
        counted: dict[str, int] = {}
        for column in self.columns:
            counted[column.group] = counted.get(column.group, 0) + 1
        return tuple(counted.items())

    @property
    def is_live(self) -> bool:
        return any(line.job.is_live for line in self.lines)


@dataclass(frozen=True, slots=True)
class ReportJob:
    """One job of a report; drawings are finished SVG."""

    job: JobView
    rules: Sequence[tuple[str, str]]
    policies: Sequence[tuple[str, str]]
    options: Sequence[tuple[str, Any]]
    changes: Sequence[Document]
    plan: Sequence[tuple[str, str]]
    figures: Sequence[Figure]
    proof: Document | None
    curves: Sequence[tuple[str, str]]
    heatmaps: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class ReportView:
    """A page that stands alone: its style comes along."""

    title: str
    style: str
    written_at: str
    version: str
    jobs: Sequence[ReportJob]
    sweep: SweepView | None = None
    curves: Sequence[tuple[str, str]] = ()
