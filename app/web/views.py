"""What templates are given: a frozen dataclass each, no behaviour beyond choosing words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.freezing.config import DROPOUT_POLICIES, MECHANISMS, NORM_POLICIES
from app.web.job_views import Insight, JobView, Shell

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with what was sent: the field it belongs to and the sentence about it."""

    field: str
    message: str


# ------------------------------------------------------------------------------------------ models


@dataclass(frozen=True, slots=True)
class ModelsView:
    shell: Shell
    models: Sequence[Document]
    jobs: Sequence[JobView]
    uri: Field
    options: Sequence[Field]
    checks: Sequence[Field]
    faults: Sequence[Fault] = ()
    conflict: str = ""
    in_use: Sequence[int] = ()

    @property
    def is_opened(self) -> bool:
        """Whether somebody said more than a URI, or must look at what they said."""
        given = any(check.value or check.fault for check in self.checks)
        return given or any(option.fault or option.is_given for option in self.options)

    @property
    def is_waiting(self) -> bool:
        return any(model["state"] == "inspecting" for model in self.models)


@dataclass(frozen=True, slots=True)
class TreeRow:
    """One line of the tree: a module, or a parameter that a module owns.

    Attributes:
        index: of the module in model order, or of the unique parameter.
        parent: index of the module it hangs below, -1 for the root.
        detail: the module's type, or the parameter's shape.
        size_share: its elements in those of the whole model, 0 to 1.
        frozen_share: the frozen ones in its own elements, 0 to 1.
        box: frozen, trainable or mixed; "" where there is nothing to tick.
        flow: flow state of a layer, or of everything below where that agrees; else "".
        line: "above" where the frost line runs before this row, "inside" where it runs within.
    """

    kind: str
    index: int
    parent: int
    path: str
    label: str
    detail: str
    level: int
    numel: int
    size_share: float
    frozen_share: float
    box: str
    flow: str
    because: str
    expandable: bool
    expanded: bool
    shared_with: Sequence[str]
    line: str

    @property
    def frozen_width(self) -> float:
        return round(100 * self.size_share * self.frozen_share, 2)

    @property
    def full_width(self) -> float:
        """At least a little, so that a small layer still shows."""
        return round(max(100 * self.size_share, 1.5), 2) if self.numel else 0


@dataclass(frozen=True, slots=True)
class EntryRow:
    """A rule, a phase or a group as it is edited, with what it matches and what is wrong with it.

    Attributes:
        entry: its columns, the text last: a glob, or ``type=CLASS`` and perhaps a glob after it.
        tensors, numel: parameters and elements that the text covers; None where it cannot be read.
    """

    entry: Sequence[str]
    tensors: int | None = None
    numel: int | None = None
    fault: str = ""

    @property
    def text(self) -> str:
        return self.entry[-1]

    @property
    def action(self) -> str:
        """Of a rule, which is (action, text)."""
        return self.entry[0]


@dataclass(frozen=True, slots=True)
class Preset:
    """One of the freeze configs that everybody asks for; `limit` where it takes a number."""

    key: str
    label: str
    limit: int | None = None
    is_index: bool = False
    is_possible: bool = True


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure beside what it would be with everything trainable, and the whole of both."""

    label: str
    value: float | None
    full: float | None
    whole: float | None

    @property
    def share(self) -> float | None:
        return self.value / self.full if self.value is not None and self.full else None

    @property
    def width(self) -> float:
        """Percent of the bar."""
        return _width(self.value, self.whole)

    @property
    def full_width(self) -> float:
        return _width(self.full, self.whole)


def _width(value: float | None, whole: float | None) -> float:
    return round(100 * value / whole, 2) if value and whole else 0.0


@dataclass(frozen=True, slots=True)
class PlanPanel:
    """What this freeze config does to this model."""

    trainable_numel: int
    frozen_numel: int
    trainable_tensors: int
    frozen_tensors: int
    speedup_bound: float | None
    predicted_step_ms: float | None
    timed_on: Document | None
    is_traced: bool
    flops: Sequence[Measure]
    memory: Sequence[Measure]
    fits: Mapping[str, bool]
    assumed: Mapping[str, Any]
    warnings: Sequence[Document]

    @property
    def trainable_share(self) -> float:
        return self.trainable_numel / max(self.trainable_numel + self.frozen_numel, 1)


@dataclass(frozen=True, slots=True)
class Field:
    """One input of a form, with what was typed and what is wrong with it."""

    name: str
    label: str
    value: str
    placeholder: str = ""
    choices: Sequence[str] = ()
    suggestions: Sequence[tuple[str, str]] = ()
    numeric: bool = False
    help: str = ""
    fault: str = ""

    @property
    def is_given(self) -> bool:
        """Whether something was typed, or another choice made than the first."""
        return bool(self.value) and self.value != next(iter(self.choices), "")


@dataclass(frozen=True, slots=True)
class WorkbenchView:
    """The model's page. `address` is the query string that holds everything that was chosen.

    Attributes:
        tracing: the sizes that a worker traces the model at now, in words; "" where it does not.
    """

    shell: Shell
    model: Document
    again: str = ""
    tree: Sequence[TreeRow] = ()
    search: str = ""
    found: int | None = None
    rules: Sequence[EntryRow] = ()
    phases: Sequence[EntryRow] = ()
    groups: Sequence[EntryRow] = ()
    mechanism: str = MECHANISMS[0]
    norm_statistics: str = NORM_POLICIES[0]
    dropout: str = DROPOUT_POLICIES[0]
    plan: PlanPanel | None = None
    assume: Sequence[Field] = ()
    tracing: str = ""
    states: str = "{}"
    address: str = ""
    base: Document | None = None
    config_name: str = ""
    is_changed: bool = False
    fields: Sequence[Field] = ()
    more_fields: Sequence[tuple[str, Sequence[Field]]] = ()
    columns: Sequence[tuple[str, str]] = ()
    faults: Sequence[Fault] = ()
    saved: Sequence[Document] = ()
    mechanisms: Sequence[str] = MECHANISMS
    norm_policies: Sequence[str] = NORM_POLICIES
    dropout_policies: Sequence[str] = DROPOUT_POLICIES
    presets: Sequence[Preset] = ()
    guide: bool = False

    @property
    def has_more_faults(self) -> bool:
        return any(field.fault for _, fields in self.more_fields for field in fields)

    @property
    def can_download(self) -> bool:
        return not any(entry.fault for entry in (*self.rules, *self.phases, *self.groups))

    @property
    def phases_and_blank(self) -> Sequence[EntryRow]:
        """The phases, and an empty one to be filled in."""
        return [*self.phases, EntryRow(("epoch", "1", "unfreeze", "fresh", ""))]

    @property
    def groups_and_blank(self) -> Sequence[EntryRow]:
        return [*self.groups, EntryRow(("", "", ""))]


@dataclass(frozen=True, slots=True)
class PreviewView:
    """A dataset as a model will see it. `address` is the workbench's, with what was chosen there.

    Attributes:
        task: as the interface answers it; its `result` may be there though it failed.
        hidden: what was chosen, for a form that sends it again.
    """

    shell: Shell
    model_id: int
    task: Document
    address: str = ""
    hidden: Sequence[tuple[str, str]] = ()

    @property
    def is_waiting(self) -> bool:
        return self.task["state"] in ("queued", "running", "stopping")

    @property
    def result(self) -> Document:
        return self.task["result"] or {}

    @property
    def fault(self) -> str:
        return self.task["error"]["message"] if self.task["error"] else ""

    @property
    def columns(self) -> Sequence[Field]:
        """One select for each role that the model needs a column for."""
        chosen, optional = self.result.get("columns") or {}, self.result.get("optional") or ()
        wished = dict(self.hidden)
        offered = tuple(self.result.get("offered") or ())
        return [
            Field(
                f"train.columns.{role}",
                f"{role.replace('_', ' ')}{' (optional)' if role in optional else ''}",
                chosen.get(role) or wished.get(f"train.columns.{role}", ""),
                choices=("", *offered),
            )
            for role in self.result.get("roles") or ()
        ]

    @property
    def example_columns(self) -> Sequence[str]:
        examples = self.result.get("examples") or ()
        return [name for name in (examples[0] if examples else ()) if name != "encoded"]

    @property
    def set_names(self) -> Sequence[str]:
        return list(self.result.get("sizes") or ())


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One line of a table with the mechanisms as columns."""

    label: str
    note: str
    values: Sequence[str]


@dataclass(frozen=True, slots=True)
class TrialView:
    """A trial of a model: its mechanisms side by side, or its operations timed.

    Attributes:
        task: as the interface answers it.
        address: the workbench's, with what was chosen there.
        rows, settings: what a comparison measured, and what each setting of an optimizer does.
    """

    shell: Shell
    model_id: int
    task: Document
    address: str = ""
    rows: Sequence[TrialRow] = ()
    settings: Sequence[TrialRow] = ()

    @property
    def is_comparison(self) -> bool:
        return bool(self.task["kind"] == "mechanisms")

    @property
    def is_waiting(self) -> bool:
        return self.task["state"] in ("queued", "running", "stopping")

    @property
    def result(self) -> Document:
        return self.task["result"] or {}

    @property
    def fault(self) -> str:
        if self.task["state"] == "stopped":
            return "It was cancelled."
        return self.task["error"]["message"] if self.task["error"] else ""


@dataclass(frozen=True, slots=True)
class MatchesView:
    """How much a rule that is being typed would match."""

    text: str
    tensors: int = 0
    numel: int = 0
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that an import would change, where its rules count and where its names do."""

    label: str
    by_rules: Sequence[str]
    by_names: Sequence[str]


@dataclass(frozen=True, slots=True)
class ImportView:
    """A freeze config to be imported. `now` is the address of what the workbench shows.

    Attributes:
        config: the document as its rules expand on this model; None before one was given.
        differences: names on which its lists and its rules disagree, by kind.
    """

    shell: Shell
    model: Document
    now: str = ""
    document: str = ""
    config: Document | None = None
    is_other_model: bool = False
    differences: Sequence[tuple[str, Sequence[str]]] = ()
    changes: Sequence[Change] = ()
    faults: Sequence[Fault] = ()


@dataclass(frozen=True, slots=True)
class ConfigsView:
    shell: Shell
    configs: Sequence[Document]
    models: Mapping[int, Document]
    message: str = ""


@dataclass(frozen=True, slots=True)
class Pair:
    """One thing said of two freeze configs."""

    label: str
    values: Sequence[str]

    @property
    def differs(self) -> bool:
        return self.values[0] != self.values[1]


@dataclass(frozen=True, slots=True)
class CompareConfigsView:
    """Two saved freeze configs side by side, each planned on its own model.

    Attributes:
        rows: (heading, rows) of figures and policies.
        rules: the rules, phases and groups of each, as they are typed.
        only: names that one freezes and the other does not, by side.
    """

    shell: Shell
    configs: Sequence[Document]
    models: Sequence[Document]
    rows: Sequence[tuple[str, Sequence[Pair]]]
    rules: Sequence[Sequence[str]]
    only: Sequence[Sequence[str]]


# ------------------------------------------------------------------------------------------ others


@dataclass(frozen=True, slots=True)
class SystemView:
    """`sections` are (title, rows) with rows of (label, value); `report` is the service's."""

    shell: Shell
    report: Document
    sections: Sequence[tuple[str, Sequence[tuple[str, Any]]]]


@dataclass(frozen=True, slots=True)
class LoginView:
    """`link` is the one-time token of a login link, None where the page was opened without one."""

    shell: Shell
    link: str | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class ErrorView:
    shell: Shell
    title: str
    status: int
    detail: str
    errors: Sequence[Fault] = ()


@dataclass(frozen=True, slots=True)
class PatternsView:
    """Every component once, with made-up contents."""

    shell: Shell
    tree: Sequence[TreeRow]
    jobs: Sequence[JobView]
    proofs: Sequence[Document]
    rules: Sequence[EntryRow]
    fields: Sequence[Field]
    phases: Sequence[EntryRow]
    groups: Sequence[EntryRow]
    differences: Sequence[tuple[str, Sequence[str]]]
    changes: Sequence[Change]
    trials: Sequence[TrialView]
    insights: Sequence[Insight]
    running: JobView
    plan: PlanPanel
    faults: Sequence[Fault]
    address: str = ""


@dataclass(frozen=True, slots=True)
class Route:
    """One route of the interface, as its page lists it."""

    method: str
    path: str
    summary: str


@dataclass(frozen=True, slots=True)
class DocsView:
    shell: Shell
    routes: Sequence[Route]
