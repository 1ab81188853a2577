"""The workbench as it is shown: tree, rules, plan and training form for one choice; no HTML."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from fastapi import Request

from app.freezing.assume import OPTIMIZER_STATE, PRECISIONS
from app.freezing.config import match_names, parse_config
from app.freezing.errors import InvalidDocument
from app.freezing.graph import ModelGraph
from app.freezing.presets import BLOCK_PRESETS, PRESETS
from app.web.pages import tree
from app.web.pages.entries import Document, part_of
from app.web.pages.training_form import COLUMN, form_fields
from app.web.pages.workbench import ASSUMED, Choice, assumption, shown_entries
from app.web.render import shell
from app.web.views import (
    EntryRow,
    Fault,
    Field,
    MatchesView,
    Measure,
    PlanPanel,
    Preset,
    WorkbenchView,
)

ASSUME_CHOICES = {"optimizer": tuple(OPTIMIZER_STATE), "precision": PRECISIONS}


def build_view(
    request: Request,
    model: Document,
    graph: ModelGraph,
    choice: Choice,
    plan: Document,
    saved: Sequence[Document] = (),
    faults: Sequence[Fault] = (),
    plan_before: Document | None = None,
    *,
    with_rows: bool = True,
    is_tracing: bool = False,
) -> WorkbenchView:
    """The whole page for one choice, given the plan that it leads to.

    Args:
        plan_before: the plan that the page shows already; the states are those that differ.
        with_rows: whether the rows of the tree are wanted, or their states alone.
        is_tracing: the figures are still those of the model's own graph; another is being made.
    """
    states = tree.read_states(graph, plan)
    found = None
    if choice.search:
        rows, found = tree.find_rows(graph, states, choice.search) if with_rows else ([], None)
        places: Iterable[tree.Place] = tree.find_places(graph, choice.search)[0]
    else:
        opened = tree.first_open(graph) if choice.opened is None else choice.opened
        rows = tree.list_rows(graph, states, opened) if with_rows else []
        places = tree.list_places(graph, opened)
    before = tree.read_states(graph, plan_before) if plan_before else states
    first, more = form_fields(choice.training, faults)
    shown = {field.name for field in first if field.fault}
    shown |= {field.name for _, fields in more for field in fields if field.fault}
    return WorkbenchView(
        shell=shell(request, str(model.get("name") or model["uri"]), "models"),
        model=model,
        tree=rows,
        search=choice.search,
        found=found,
        rules=entry_rows(choice, "rule", graph),
        phases=entry_rows(choice, "phase", graph),
        groups=entry_rows(choice, "group", graph),
        mechanism=choice.policies["mechanism"],
        norm_statistics=choice.policies["norm_statistics"],
        dropout=choice.policies["dropout"],
        plan=plan_panel(graph, plan, is_tracing=is_tracing),
        tracing=untraced_in_words(choice, graph) if is_tracing else "",
        assume=assume_fields(choice),
        states=json.dumps(tree.changed_states(before, states, places), separators=(",", ":")),
        address=choice.address(),
        base=choice.base,
        config_name=choice.config_name or str((choice.base or {}).get("name") or ""),
        is_changed=choice.is_changed,
        presets=list_presets(len(tree.outline(graph).blocks)),
        fields=first,
        more_fields=more,
        columns=[(f"train.{k}", v) for k, v in choice.training.items() if k.startswith(COLUMN)],
        # A fault that stands beside its input is not said a second time.
        faults=[f for f in faults if not _field_names(f) & shown],
        saved=saved,
    )


def _field_names(fault: Fault) -> set[str]:
    last = fault.field.rpartition(".")[2]
    return {f"train.{last}", "train.dataset" if fault.field.startswith("dataset") else ""}


def list_presets(block_count: int) -> list[Preset]:
    """Every preset, with the number of blocks that it takes, as far as the model has any."""
    limits = {"last-blocks": block_count, "first-blocks": block_count, "one-block": block_count - 1}
    return [
        Preset(
            key,
            label,
            limits.get(key),
            key == "one-block",
            block_count > 0 or key not in BLOCK_PRESETS,
        )
        for key, label in PRESETS
    ]


def count_rule(graph: ModelGraph, action: str, text: str) -> MatchesView:
    """How many tensors a rule covers, or why it cannot be used."""
    if not text.strip():
        return MatchesView("")
    try:
        rule = parse_config({"rules": [part_of("rule", (action, text))]}).rules[0]
    except InvalidDocument as error:
        return MatchesView(text, fault=str(error))
    names = match_names(rule, graph)
    return MatchesView(text, len(names), sum(graph.by_name[name].numel for name in names))


def entry_rows(choice: Choice, kind: str, graph: ModelGraph) -> list[EntryRow]:
    rows = []
    for entry, fault in shown_entries(choice, kind):
        counted = count_rule(graph, "freeze", entry[-1])
        rows.append(EntryRow(entry, counted.tensors, counted.numel, fault or counted.fault))
    return rows


def assume_fields(choice: Choice) -> list[Field]:
    """What the plan assumes, to be said otherwise; what is left empty follows the training form."""
    used, faults = assumption(choice)
    fields = []
    for name in ASSUMED:
        choices = ASSUME_CHOICES.get(name, ())
        said = choice.assumed.get(name, "")
        fields.append(
            Field(
                f"assume.{name}",
                name.replace("_", " "),
                said,
                str(used.get(name, "as traced")),
                choices=(("", *choices) if choices else ()),
                numeric=not choices,
                fault=faults.get(name, ""),
            )
        )
    return fields


def untraced_in_words(choice: Choice, graph: ModelGraph) -> str:
    """The sizes and the precision that are assumed, where the model's own graph is not of them."""
    assumed = assumption(choice)[0]
    words = {
        "sequence_length": "{:,} tokens",
        "image_size": "images of {0:,} × {0:,}",
        "precision": "{}",
    }
    known = {name: assumed[name] for name in words if name in assumed}
    return " and ".join(
        words[name].format(value) for name, value in known.items() if value != getattr(graph, name)
    )


def plan_panel(graph: ModelGraph, plan: Document, *, is_tracing: bool = False) -> PlanPanel:
    """The right side of the workbench from a plan document.

    While the model is being traced the page says so in one line, not as a finding.
    """
    cost, full = plan["cost"], plan["cost"].get("full") or {}
    sizes, weights = tree.outline(graph).sizes, tree.outline(graph).nbytes
    total = sum(sizes.values())
    # The shorter list tells as much as the longer one.
    is_frozen_shorter = len(plan["frozen"]) < len(plan["trainable"])
    shorter = sum(sizes[name] for name in plan["frozen" if is_frozen_shorter else "trainable"])
    frozen_numel = shorter if is_frozen_shorter else total - shorter
    step = full.get("step_flops")
    # Of a model that was not traced the peak is not known: bars are then of what is.
    known = weights + (full.get("gradient_bytes") or 0) + (full.get("optimizer_bytes") or 0)
    peak = full.get("peak_bytes") or known

    def measure(label: str, key: str, whole: float | None) -> Measure:
        return Measure(label, cost.get(key), full.get(key), whole)

    of_cublas = measure("cuBLAS workspaces", "workspace_bytes", peak)  # on a GPU alone
    return PlanPanel(
        trainable_numel=total - frozen_numel,
        frozen_numel=frozen_numel,
        trainable_tensors=len(plan["trainable"]),
        frozen_tensors=len(plan["frozen"]),
        speedup_bound=cost.get("speedup_bound"),
        predicted_step_ms=cost.get("predicted_step_ms"),
        timed_on=(cost.get("assumed") or {}).get("timed_on"),
        is_traced=bool(graph.nodes),
        flops=(
            measure("forward", "forward_flops", step),
            measure("backward", "backward_flops", step),
            measure("step", "step_flops", step),
        ),
        memory=(
            Measure("weights", weights, weights, peak),
            measure("gradients", "gradient_bytes", peak),
            measure("optimizer", "optimizer_bytes", peak),
            measure("saved activations", "activation_bytes", peak),
            *([of_cublas] if of_cublas.full else []),
            measure("peak", "peak_bytes", peak),
        ),
        fits=cost.get("fits") or {},
        assumed={k: v for k, v in (cost.get("assumed") or {}).items() if k in ASSUMED and v},
        warnings=[w for w in plan["warnings"] if not (is_tracing and w["code"] == "not_assumed")],
    )
