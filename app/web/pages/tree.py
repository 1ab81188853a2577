"""The module tree as rows with three-state boxes, shares, flow states, the frost line; no HTML."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple

from app.freezing.globs import compile_match
from app.freezing.graph import ModelGraph
from app.freezing.presets import find_blocks
from app.web.views import TreeRow

FIRST_SIGHT_ROWS = 64
FOUND_ROWS = 300
NO_BOX = "-"
BOX_CODES = {"trainable": "0", "frozen": "1", "mixed": "2", "": NO_BOX}
FLOW_CODES = {"trained": "t", "unreached": "u", "passes": "p", "idle": "i", "": NO_BOX}


@dataclass(frozen=True)
class Outline:
    """What of a tree does not depend on a freeze config, by index of the module in model order.

    Attributes:
        parents: index of the module above, -1 for the root.
        ends: index after the last module below.
        numels: elements in the unique parameters at and below.
        below: first names of the unique parameters at and below.
        parameter_index: every name of a parameter → index of the unique parameter.
        module_index: path of a module → its index.
    """

    graph: ModelGraph
    parents: Sequence[int]
    ends: Sequence[int]
    numels: Sequence[int]
    below: Sequence[Sequence[int]]
    parameter_index: Mapping[str, int]
    module_index: Mapping[str, int]

    @property
    def total(self) -> int:
        return max(self.numels[0] if self.numels else 0, 1)

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Paths of the repeated blocks."""
        return find_blocks(self.graph)

    @cached_property
    def spans(self) -> Sequence[tuple[int, int] | None]:
        """First and last of `below` and one beyond, where nothing is missing between them."""
        return [
            (own[0], own[-1] + 1) if own and own[-1] + 1 - own[0] == len(own) else None
            for own in self.below
        ]

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """First name of every parameter → its elements."""
        return {parameter.name: parameter.numel for parameter in self.graph.parameters}

    @cached_property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.graph.parameters)

    def children(self, index: int) -> Iterable[int]:
        child = index + 1
        while child < self.ends[index]:
            yield child
            child = self.ends[child]

    def is_expandable(self, index: int) -> bool:
        return self.ends[index] > index + 1 or bool(self.graph.modules[index].parameters)


def outline(graph: ModelGraph) -> Outline:
    """The outline of a graph, kept for the graphs that were asked for last."""
    for known in tuple(_kept):
        if known.graph is graph:
            return known
    built = _build_outline(graph)
    _kept.append(built)
    return built


# By identity: a graph is a value, and comparing two large ones would cost more than the outline.
_kept: deque[Outline] = deque(maxlen=8)


def _build_outline(graph: ModelGraph) -> Outline:
    modules = graph.modules
    index_of = {module.path: index for index, module in enumerate(modules)}
    parents = [-1 if not module.path else _nearest(index_of, module.path) for module in modules]
    ends = list(range(1, len(modules) + 1))
    for index in range(len(modules) - 1, 0, -1):
        ends[parents[index]] = max(ends[parents[index]], ends[index])
    first = {p.name: index for index, p in enumerate(graph.parameters)}
    parameter_index = {name: first[p.name] for p in graph.parameters for name in p.names}
    below: list[dict[int, None]] = [
        dict.fromkeys(parameter_index[name] for name in module.parameters) for module in modules
    ]
    for index in range(len(modules) - 1, 0, -1):
        below[parents[index]] |= below[index]
    ordered = [tuple(sorted(indices)) for indices in below]
    numels = [sum(graph.parameters[i].numel for i in indices) for indices in ordered]
    return Outline(graph, parents, ends, numels, ordered, parameter_index, index_of)


def _nearest(index_of: Mapping[str, int], path: str) -> int:
    """Index of the closest module above; a name with dots of its own may skip levels."""
    while path:
        path = path.rpartition(".")[0]
        if path in index_of:
            return index_of[path]
    return 0


class RowState(NamedTuple):
    """What one plan says about one row: its box, the frozen share of it, its flow state and why."""

    box: str
    frozen_share: float
    flow: str = ""
    because: str = ""

    def codes(self) -> list[str | float]:
        """As tree.js reads it."""
        box, flow = BOX_CODES[self.box], FLOW_CODES[self.flow]
        return [box, round(self.frozen_share, 3), flow, self.because]


@dataclass(frozen=True)
class TreeStates:
    """What one plan says about the rows of the tree, each worked out when it is asked for.

    Attributes:
        frozen: by unique parameter: is it frozen.
        counts, numels: how many parameters before each are frozen, and how many elements.
        flows, becauses: a layer's own flow state and its reason by module, "" where it has none.
        above: modules above which the frost line may be drawn, outermost first.
        inside: modules that contain it, outermost first.
    """

    shape: Outline
    frozen: Sequence[bool]
    counts: Sequence[int]
    numels: Sequence[int]
    flows: Sequence[str]
    becauses: Sequence[str]
    above: Sequence[int]
    inside: Sequence[int]

    def module(self, index: int) -> RowState:
        """A layer's own flow; for a container the flow of all layers below it, where they agree."""
        indices = self.shape.below[index]
        count, numel = self._frozen_below(index)
        box = "mixed" if 0 < count < len(indices) else "frozen" if count else "trainable"
        share = numel / max(self.shape.numels[index], 1)
        if self.flows[index]:
            return RowState(box, share, self.flows[index], self.becauses[index])
        below = set(self.flows[index : self.shape.ends[index]]) - {""}
        return RowState(box if indices else "", share, below.pop() if len(below) == 1 else "")

    def _frozen_below(self, index: int) -> tuple[int, int]:
        """How many parameters at and below a module are frozen, and how many elements."""
        if span := self.shape.spans[index]:
            first, end = span
            return self.counts[end] - self.counts[first], self.numels[end] - self.numels[first]
        frozen = [i for i in self.shape.below[index] if self.frozen[i]]
        return len(frozen), sum(self.shape.graph.parameters[i].numel for i in frozen)

    def parameter(self, index: int) -> RowState:
        parameter = self.shape.graph.parameters[index]
        why = "" if parameter.floating else f"{parameter.dtype} cannot be trained"
        frozen = self.frozen[index]
        return RowState("frozen" if frozen else "trainable", float(frozen), because=why)

    def of(self, place: Place) -> RowState:
        return (self.module if place.is_module else self.parameter)(place.at)


def read_states(graph: ModelGraph, plan: Mapping[str, Any]) -> TreeStates:
    """The states of every row from a plan document, kept for the plans that were asked for last."""
    for known, states in tuple(_kept_states):
        if known is plan and states.shape.graph is graph:
            return states
    states = _read_states(graph, plan)
    _kept_states.append((plan, states))
    return states


# By identity, as outlines: the service answers with the same plan as long as it keeps it.
_kept_states: deque[tuple[Mapping[str, Any], TreeStates]] = deque(maxlen=4)


def _read_states(graph: ModelGraph, plan: Mapping[str, Any]) -> TreeStates:
    shape = outline(graph)
    frozen = list(map(set(plan["frozen"]).__contains__, shape.sizes))
    counts = [0, *accumulate(frozen)]
    numels = [0, *accumulate(map(mul, frozen, shape.sizes.values()))]
    flows, becauses = [""] * len(graph.modules), [""] * len(graph.modules)
    for layer in plan["layers"]:
        index = shape.module_index[layer["path"]]
        flows[index], becauses[index] = layer["flow"], layer.get("because") or ""
    return TreeStates(shape, frozen, counts, numels, flows, becauses, *_frost_line(shape, flows))


def changed_states(
    before: TreeStates | None, after: TreeStates, places: Iterable[Place]
) -> dict[str, Any]:
    """What tree.js must paint anew: those of the visible rows that changed, all without `before`.

    Returns:
        ``modules`` and ``parameters`` by index as `RowState.codes`, and the frost line's modules.
    """
    changed: dict[str, dict[int, list[str | float]]] = {"modules": {}, "parameters": {}}
    for place in places:
        now = after.of(place)
        if before is None or before.of(place) != now:
            changed["modules" if place.is_module else "parameters"][place.at] = now.codes()
    return {**changed, "above": list(after.above), "inside": list(after.inside)}


def _frost_line(shape: Outline, own: Sequence[str]) -> tuple[list[int], list[int]]:
    """Where backward stops, in model order: between the idle layers at the start and the next."""
    layers = [index for index, flow in enumerate(own) if flow]
    target = next((index for index in layers if own[index] != "idle"), None)
    if target is None or target == layers[0]:
        return [], []
    chain = [target]
    while shape.parents[chain[-1]] >= 0:
        chain.append(shape.parents[chain[-1]])
    above = [i for i in chain if not any(i <= layer < target for layer in layers)]
    return above[::-1], [i for i in chain if i not in above][::-1]


# -------------------------------------------------------------------------------------------- rows


def first_open(graph: ModelGraph) -> frozenset[int]:
    """Modules that are open before anybody chose: whole levels, as long as they fit on a screen."""
    shape = outline(graph)
    opened: set[int] = set()
    level, shown = [0] if graph.modules else [], 1
    while level:
        growth = sum(1 for index in level for _ in shape.children(index))
        if opened and shown + growth > FIRST_SIGHT_ROWS:
            break
        opened |= {i for i in level if i == 0 or any(True for _ in shape.children(i))}
        shown += growth
        level = [child for index in level for child in shape.children(index)]
    return frozenset(opened)


class Place(NamedTuple):
    """What a row shows: module `at`, or unique parameter `at` under `name` in module `owner`."""

    at: int
    owner: int = -1
    name: str = ""

    @property
    def is_module(self) -> bool:
        return self.owner < 0


def list_places(graph: ModelGraph, opened: frozenset[int], start: int = 0) -> list[Place]:
    """The visible rows below and with module `start`, given which modules are open."""
    places: list[Place] = []
    shape = outline(graph)
    stack = [start] if graph.modules else []
    while stack:
        index = stack.pop()
        places.append(Place(index))
        if index in opened:
            places += _own_parameters(shape, index)
            stack += reversed(list(shape.children(index)))
    return places


def _own_parameters(shape: Outline, owner: int) -> list[Place]:
    names = shape.graph.modules[owner].parameters
    return [Place(shape.parameter_index[name], owner, name) for name in names]


def find_places(graph: ModelGraph, text: str) -> tuple[list[Place], int]:
    """Modules and parameters whose name or type contains `text`, or that it matches as a glob.

    Returns:
        Where the first of those found stand, and how many were found.
    """
    shape = outline(graph)
    needle = text.casefold()
    type_ = needle.removeprefix("type=").strip()
    try:
        matches = compile_match(text) if any(mark in text for mark in "*?{:") else None
    except ValueError:
        matches = None  # half-typed: until it is whole it is searched for as plain text

    def is_named(name: str) -> bool:
        return bool(name) and (matches(name) if matches else needle in name.casefold())

    places: list[Place] = []
    for index, module in enumerate(graph.modules):
        if is_named(module.path) or (module.path and type_ and type_ in module.type.casefold()):
            places.append(Place(index))
        if any(map(is_named, module.parameters)):
            places += [place for place in _own_parameters(shape, index) if is_named(place.name)]
    return places[:FOUND_ROWS], len(places)


def list_rows(
    graph: ModelGraph, states: TreeStates, opened: frozenset[int], start: int = 0
) -> list[TreeRow]:
    """The rows of `list_places`, the frost line marked."""
    rows = [
        _row(states, place, expanded=place.is_module and place.at in opened)
        for place in list_places(graph, opened, start)
    ]
    return _mark_line(rows, states)


def find_rows(graph: ModelGraph, states: TreeStates, text: str) -> tuple[list[TreeRow], int]:
    """The rows of `find_places`, each under its whole name, and how many were found."""
    places, found = find_places(graph, text)
    return [_row(states, place, flat=True) for place in places], found


def _row(
    states: TreeStates, place: Place, *, expanded: bool = False, flat: bool = False
) -> TreeRow:
    make = _module_row if place.is_module else _parameter_row
    row = make(states, place)
    if flat:
        return replace(row, label=row.path or row.label, level=1, expandable=False)
    return replace(row, expanded=expanded)


def _module_row(states: TreeStates, place: Place) -> TreeRow:
    shape, index = states.shape, place.at
    module, state = shape.graph.modules[index], states.module(index)
    parent = shape.parents[index]
    above = shape.graph.modules[parent].path if parent >= 0 else ""
    return TreeRow(
        kind="module",
        index=index,
        parent=parent,
        path=module.path,
        label=module.path[len(above) + 1 if above else 0 :] or "(model)",
        detail=module.type,
        level=_level(shape, index),
        numel=shape.numels[index],
        size_share=shape.numels[index] / shape.total,
        frozen_share=state.frozen_share,
        box=state.box,
        flow=state.flow,
        because=state.because,
        expandable=shape.is_expandable(index),
        expanded=False,
        shared_with=(),
        line="",
    )


def _parameter_row(states: TreeStates, place: Place) -> TreeRow:
    shape, state = states.shape, states.parameter(place.at)
    parameter = shape.graph.parameters[place.at]
    return TreeRow(
        kind="parameter",
        index=place.at,
        parent=place.owner,
        path=place.name,
        label=place.name.rpartition(".")[2],
        detail=" × ".join(map(str, parameter.shape)) or "scalar",
        level=_level(shape, place.owner) + 1,
        numel=parameter.numel,
        size_share=parameter.numel / shape.total,
        frozen_share=state.frozen_share,
        box=state.box,
        flow="",
        because=state.because,
        expandable=False,
        expanded=False,
        shared_with=tuple(other for other in parameter.names if other != place.name),
        line="",
    )


def _level(shape: Outline, index: int) -> int:
    level = 1
    while shape.parents[index] >= 0:
        index, level = shape.parents[index], level + 1
    return level


def _mark_line(rows: list[TreeRow], states: TreeStates) -> list[TreeRow]:
    """Draw the frost line once: above the outermost visible row beyond it, else inside."""
    visible = {row.index: at for at, row in enumerate(rows) if row.kind == "module"}
    above = next((i for i in states.above if i in visible), None)
    inside = next((i for i in reversed(states.inside) if i in visible), None)
    if above is not None:
        rows[visible[above]] = replace(rows[visible[above]], line="above")
    elif inside is not None:
        rows[visible[inside]] = replace(rows[visible[inside]], line="inside")
    return rows
