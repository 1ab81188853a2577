"""What somebody has chosen on the workbench, read from an address or a form and written back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

from fastapi import Request

from app.freezing.config import (
    FreezeConfig,
    Rule,
    config_document,
    match_names,
    parse_config,
    parse_rules,
)
from app.freezing.errors import InvalidDocument
from app.freezing.graph import ModelGraph
from app.freezing.presets import find_blocks, preset_config, tick_module
from app.sources.demo import DEMO_DATASETS, DEMO_TRAINING
from app.training.recipe import OPTIONS, Option
from app.web.pages import tree
from app.web.render import shell
from app.web.views import (
    Fault,
    Field,
    MatchesView,
    Measure,
    PlanPanel,
    RuleRow,
    WorkbenchView,
)

Document = dict[str, Any]
Items = Sequence[tuple[str, str]]

ASSUMED = ("batch_size", "sequence_length", "image_size", "optimizer", "precision")
POLICIES = ("mechanism", "norm_statistics", "dropout")
DATASET_OPTIONS = {
    "eval_fraction": "Share held out when the dataset brings no evaluation set",
    "max_length": "Tokens per text",
    "image_size": "Pixels per side",
    "num_workers": "Loader processes",
}
COLUMN = "columns."  # before a role, in the name of the field that says its column
FIRST_OPTIONS = ("epochs", "batch_size", "optimizer", "lr", "device")
LABELS = {"lr": "learning rate", "max_steps": "steps at most", "lr_schedule": "LR schedule"}
# What an empty input means, where no default says it.
WHEN_EMPTY = {"lr": "by optimizer", "eval_every": "each epoch", "checkpoint_every": "at the end"}


@dataclass(frozen=True)
class Choice:
    """Everything chosen on one model's page.

    Attributes:
        rules: (action, text) as typed, also those that cannot be used.
        base: the saved freeze config that this began as, with groups and schedule of its own.
        opened: indices of the open modules; None before anybody chose.
        training: what was typed into the training form, by field name.
    """

    rules: tuple[tuple[str, str], ...] = ()
    policies: Mapping[str, str] = field(default_factory=dict)
    base: Document | None = None
    config_name: str = ""
    opened: frozenset[int] | None = None
    search: str = ""
    training: Mapping[str, str] = field(default_factory=dict)

    def faults(self) -> dict[int, str]:
        """Index of each rule that cannot be used → why."""
        faults = {}
        for index, (action, text) in enumerate(self.rules):
            try:
                parse_rules([rule_from_text(action, text)])
            except InvalidDocument as error:
                faults[index] = str(error)
        return faults

    def config(self, *, usable_only: bool = True) -> FreezeConfig:
        """The freeze config that was chosen.

        Raises:
            InvalidDocument: a rule or policy cannot be used; of the rules only without
                `usable_only`, since a page is shown while somebody is still typing.
        """
        faults = self.faults() if usable_only else {}
        kept = ("groups", "schedule", "model")
        return parse_config(
            {
                **{key: self.base[key] for key in kept if self.base and self.base.get(key)},
                **{key: value for key, value in self.policies.items() if value},
                "name": self.config_name or (self.base or {}).get("name") or "",
                "rules": [
                    rule_from_text(action, text)
                    for index, (action, text) in enumerate(self.rules)
                    if index not in faults
                ],
            }
        )

    def with_rules(self, rules: Iterable[Rule]) -> Choice:
        """The same choice with other rules; what could not be used stays, to be mended."""
        faults = self.faults()
        unusable = tuple(rule for index, rule in enumerate(self.rules) if index in faults)
        return replace(self, rules=(*((r.action, text_of_rule(r)) for r in rules), *unusable))

    def address(self) -> str:
        """The query string that `read_choice` reads back."""
        items: list[tuple[str, str]] = []
        if self.base:
            items.append(("config", str(self.base["id"])))
        items += [("rule", f"{action}:{text}") for action, text in self.rules]
        if self.base and not self.rules:
            items.append(("rule", ""))  # none at all, which is not the same as those of the base
        began = self.base or {}
        items += [
            (key, value)
            for key, value in self.policies.items()
            if value and value != began.get(key, _DEFAULT_POLICIES[key])
        ]
        if self.opened is not None:
            items.append(("open", ",".join(map(str, sorted(self.opened)))))
        items += [("search", self.search)] * bool(self.search)
        items += [(f"train.{name}", value) for name, value in self.training.items() if value]
        return urlencode(items)


_DEFAULT_POLICIES = {key: str(config_document(FreezeConfig())[key]) for key in POLICIES}


def rule_from_text(action: str, text: str) -> Document:
    """``type=LayerNorm``, ``type=Linear encoder.**`` or a match alone, as a rule document."""
    text = text.strip()
    if not text.startswith("type="):
        return {"action": action, "match": text}
    type_, _, match = text.removeprefix("type=").partition(" ")
    rule = {"action": action, "type": type_}
    return {**rule, "match": match.strip()} if match.strip() else rule


def text_of_rule(rule: Rule) -> str:
    parts = (f"type={rule.type}" if rule.type is not None else "", rule.match or "")
    return " ".join(part for part in parts if part)


def read_choice(items: Items, base: Document | None) -> Choice:
    """The choice in an address or a form; `base` is the saved config that ``config`` names."""
    values: dict[str, str] = dict(items)
    stated = [value for key, value in items if key == "rule"]
    actions = [value for key, value in items if key == "rule_action"]
    texts = [value for key, value in items if key == "rule_text"]
    rules = [(a, text) for a, _, text in (value.partition(":") for value in stated if value)]
    rules += [(a, text) for a, text in zip(actions, texts, strict=False) if text.strip()]
    if base and not stated and "form" not in values:
        rules = [(r.action, text_of_rule(r)) for r in parse_rules(base["rules"])]
    began = base or {}
    opened = None
    if "open" in values:
        opened = frozenset(int(part) for part in values["open"].split(",") if _is_index(part))
    return Choice(
        rules=tuple(rules),
        policies={
            key: values.get(key) or str(began.get(key) or _DEFAULT_POLICIES[key])
            for key in POLICIES
        },
        base=base,
        config_name=values.get("config_name", "").strip(),
        opened=opened,
        search=values.get("search", "").strip(),
        training={
            key.removeprefix("train."): value.strip()
            for key, value in items
            if key.startswith("train.") and value.strip()
        },
    )


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) < 8


def act(choice: Choice, graph: ModelGraph, items: Items) -> Choice:
    """The choice after the button that was pressed: a tick, a preset, a rule added or removed.

    Raises:
        InvalidDocument: the button names a row, a preset or a rule that does not exist.
    """
    values = dict(items)
    if "tick" in values:
        action, _, path = values["tick"].partition(":")
        ticked = tick_module(choice.config(), graph, path, action == "freeze")
        return choice.with_rules(ticked.rules)
    if "preset" in values:
        count = values.get("preset_count", "").strip()
        number = int(count) if _is_index(count) else None
        return choice.with_rules(preset_config(values["preset"], graph, number).rules)
    if "remove" in values:
        gone = int(values["remove"]) if _is_index(values["remove"]) else -1
        return replace(choice, rules=tuple(r for i, r in enumerate(choice.rules) if i != gone))
    if values.get("add_text", "").strip():
        added = (values.get("add_action") or "freeze", values["add_text"].strip())
        return replace(choice, rules=(*choice.rules, added))
    return choice


def suggest_training(choice: Choice, uri: str) -> Choice:
    """Where nothing was typed yet: a demo's own data, and options with which something is seen."""
    name = uri.removeprefix("demo:")
    if choice.training or name == uri or name not in DEMO_TRAINING:
        return choice
    return replace(choice, training={"dataset": uri, **DEMO_TRAINING[name]})


def plan_request(choice: Choice) -> Document:
    """The body of a plan: the freeze config, and what the training form lets us assume."""
    assume: Document = {}
    for option in OPTIONS:
        if option.name in ("batch_size", "optimizer", "precision"):
            assume[option.name] = typed(choice.training.get(option.name, "")) or option.default
    size = assume["batch_size"]
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= 10**6:
        del assume["batch_size"]  # still being typed; starting the job says what is wrong with it
    for name in ("optimizer", "precision"):
        option = next(option for option in OPTIONS if option.name == name)
        if assume[name] not in (option.choices or ()):
            del assume[name]
    return {**config_document(choice.config()), "assume": assume}


def job_request(choice: Choice, model_id: int, kind: str) -> Document:
    """The body that starts a job from what was typed; wrong values travel on, to be refused."""
    known = {option.name for option in OPTIONS}
    return {
        "kind": kind,
        "model_id": model_id,
        "config": config_document(choice.config(usable_only=False)),
        "dataset": dataset_request(choice),
        "training": {k: typed(v) for k, v in choice.training.items() if k in known},
        "name": choice.training.get("name", ""),
    }


def dataset_request(choice: Choice) -> Document:
    """The dataset's document from what was typed; wrong values travel on, to be refused."""
    given = choice.training
    roles = {k.removeprefix(COLUMN): v for k, v in given.items() if k.startswith(COLUMN)}
    dataset = {k: typed(v) for k, v in given.items() if k in DATASET_OPTIONS}
    if roles:
        dataset["columns"] = roles
    if given.get("eval"):
        # A comma may stand in a path; one before NAME=SCHEME: does not.
        pairs = re.split(r",\s*(?=[^,=]+=[a-z]+:)", given["eval"])
        dataset["eval"] = {name.strip(): uri.strip() for name, _, uri in map(_halves, pairs)}
    return {"uri": given.get("dataset", ""), **dataset}


def _halves(pair: str) -> tuple[str, str, str]:
    return pair.partition("=") if "=" in pair else ("more", "=", pair)


def typed(text: str) -> Any:
    """A form's text as the JSON value that it spells, else the text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return value if is_number or value is None else text


# -------------------------------------------------------------------------------------------- view


def build_view(
    request: Request,
    model: Document,
    graph: ModelGraph,
    choice: Choice,
    plan: Document,
    saved: Sequence[Document] = (),
    faults: Sequence[Fault] = (),
) -> WorkbenchView:
    """The whole page for one choice, given the plan that it leads to."""
    states = tree.read_states(graph, plan)
    found = None
    if choice.search:
        rows, found = tree.find_rows(graph, states, choice.search)
    else:
        opened = tree.first_open(graph) if choice.opened is None else choice.opened
        rows = tree.list_rows(graph, states, opened)
    first, more = form_fields(choice, faults)
    began = choice.base or {}
    before = [(r.action, text_of_rule(r)) for r in parse_rules(began.get("rules", []))]
    is_changed = bool(choice.base) and (
        before != list(choice.rules) or any(choice.policies[k] != began.get(k) for k in POLICIES)
    )
    shown = {field.name for field in (*first, *more) if field.fault}
    return WorkbenchView(
        shell=shell(request, str(model.get("name") or model["uri"]), "models"),
        model=model,
        tree=rows,
        search=choice.search,
        found=found,
        rules=rule_rows(choice, graph),
        mechanism=choice.policies["mechanism"],
        norm_statistics=choice.policies["norm_statistics"],
        dropout=choice.policies["dropout"],
        plan=plan_panel(graph, plan),
        states=states.as_json(),
        address=choice.address(),
        base=choice.base,
        config_name=choice.config_name or str(began.get("name") or ""),
        is_changed=is_changed,
        block_count=len(find_blocks(graph)),
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


def count_rule(graph: ModelGraph, action: str, text: str) -> MatchesView:
    """How many tensors a rule covers, or why it cannot be used."""
    if not text.strip():
        return MatchesView("")
    try:
        (rule,) = parse_rules([rule_from_text(action, text)])
    except InvalidDocument as error:
        return MatchesView(text, fault=str(error))
    names = match_names(rule, graph)
    return MatchesView(text, len(names), sum(graph.by_name[name].numel for name in names))


def rule_rows(choice: Choice, graph: ModelGraph) -> list[RuleRow]:
    rows = []
    for action, text in choice.rules:
        counted = count_rule(graph, action, text)
        rows.append(RuleRow(action, text, counted.tensors, counted.numel, counted.fault))
    return rows


def plan_panel(graph: ModelGraph, plan: Mapping[str, Any]) -> PlanPanel:
    """The right side of the workbench from a plan document."""
    cost, full = plan["cost"], plan["cost"].get("full") or {}
    sizes = {p.name: p.numel for p in graph.parameters}
    whole = full.get("step_flops") or cost.get("full_step_flops")

    def measure(label: str, key: str, unit: str) -> Measure:
        return Measure(label, cost.get(key), full.get(key), unit)

    def share(key: str) -> float | None:
        return cost[key] / whole if whole and cost.get(key) is not None else None

    return PlanPanel(
        trainable_numel=sum(sizes[name] for name in plan["trainable"]),
        frozen_numel=sum(sizes[name] for name in plan["frozen"]),
        trainable_tensors=len(plan["trainable"]),
        frozen_tensors=len(plan["frozen"]),
        forward_share=share("forward_flops"),
        backward_share=share("backward_flops"),
        step_share=share("step_flops"),
        speedup_bound=cost.get("speedup_bound"),
        predicted_step_ms=cost.get("predicted_step_ms"),
        flops=(
            measure("forward", "forward_flops", "flops"),
            measure("backward", "backward_flops", "flops"),
        ),
        memory=(
            measure("gradients", "gradient_bytes", "bytes"),
            measure("optimizer", "optimizer_bytes", "bytes"),
            measure("saved activations", "activation_bytes", "bytes"),
            measure("peak", "peak_bytes", "bytes"),
        ),
        fits=cost.get("fits") or {},
        assumed={k: v for k, v in (cost.get("assumed") or {}).items() if k in ASSUMED and v},
        warnings=plan["warnings"],
    )


def form_fields(choice: Choice, faults: Sequence[Fault]) -> tuple[list[Field], list[Field]]:
    """The inputs of the training form: those that everybody looks at, and the others."""
    wrong = {fault.field: fault.message for fault in faults}
    dataset = Field(
        "train.dataset",
        "dataset",
        choice.training.get("dataset", ""),
        placeholder="demo:digits, csv:PATH, folder:PATH or python:package.module:factory",
        suggestions=[(f"demo:{name}", words) for name, words in DEMO_DATASETS.items()],
        fault=wrong.get("dataset.uri", wrong.get("dataset", "")),
    )
    name = Field("train.name", "job name", choice.training.get("name", ""), "optional")
    options = {option.name: option for option in OPTIONS}
    first = [_option_field(options[key], choice, wrong) for key in FIRST_OPTIONS]
    more = [
        _option_field(option, choice, wrong)
        for key, option in options.items()
        if key not in FIRST_OPTIONS
    ]
    sets = choice.training.get("eval", "")
    more.append(
        Field(
            "train.eval",
            "further evaluation sets",
            sets,
            "NAME=URI, NAME=URI",
            help="What was known before beside what is new: each is judged under its own name",
            fault=next((m for f, m in wrong.items() if f.startswith("dataset.eval.")), "")
            or wrong.get("dataset.eval", ""),
        )
    )
    for key, help_ in DATASET_OPTIONS.items():
        fault = wrong.get(f"dataset.{key}", "")
        value = choice.training.get(key, "")
        more.append(
            Field(
                f"train.{key}",
                key.replace("_", " "),
                value,
                "default",
                numeric=True,
                help=help_,
                fault=fault,
            )
        )
    return [dataset, *first, name], more


def _option_field(option: Option, choice: Choice, wrong: Mapping[str, str]) -> Field:
    default = "" if option.default is None else str(option.default)
    choices = option.choices
    if option.kind == "bool":
        choices, default = ("false", "true"), str(option.default).lower()
    return Field(
        name=f"train.{option.name}",
        label=LABELS.get(option.name, option.name.replace("_", " ")),
        value=choice.training.get(option.name, default if choices else ""),
        placeholder=default or WHEN_EMPTY.get(option.name, "none"),
        choices=choices,
        numeric=option.kind in ("int", "float"),
        help=option.help,
        fault=wrong.get(f"training.{option.name}", wrong.get(option.name, "")),
    )


def training_address(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The address items that fill the training form as a job was started."""
    dataset = document.get("dataset") or {}
    items = {"dataset": dataset.get("uri")}
    items |= {key: dataset.get(key) for key in DATASET_OPTIONS}
    items |= {f"{COLUMN}{role}": name for role, name in (dataset.get("columns") or {}).items()}
    evals = (dataset.get("eval") or {}).items()
    items["eval"] = ", ".join(f"{name}={uri}" for name, uri in evals) or None
    given = document.get("training") or {}
    items |= {o.name: given[o.name] for o in OPTIONS if given.get(o.name, o.default) != o.default}
    return [
        (f"train.{key}", json.dumps(value) if isinstance(value, bool) else str(value))
        for key, value in items.items()
        if value is not None
    ]
