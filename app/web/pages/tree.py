"""The module tree as rows with three-state boxes, shares, flow states, the frost line; no HTML."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from app.freezing.globs import compile_match
from app.freezing.graph import ModelGraph
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
    """

    graph: ModelGraph
    parents: Sequence[int]
    ends: Sequence[int]
    numels: Sequence[int]
    below: Sequence[Sequence[int]]
    parameter_index: Mapping[str, int]

    @property
    def total(self) -> int:
        return max(self.numels[0] if self.numels else 0, 1)

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
    return Outline(graph, parents, ends, numels, ordered, parameter_index)


def _nearest(index_of: Mapping[str, int], path: str) -> int:
    """Index of the closest module above; a name with dots of its own may skip levels."""
    while path:
        path = path.rpartition(".")[0]
        if path in index_of:
            return index_of[path]
    return 0


@dataclass(frozen=True)
class TreeStates:
    """What one plan says about every row of the tree.

    Attributes:
        parameters: by unique parameter: is it frozen.
        boxes, frozen_shares, flows, becauses: by module.
        above: modules above which the frost line may be drawn, outermost first.
        inside: modules that contain it, outermost first.
    """

    parameters: Sequence[bool]
    boxes: Sequence[str]
    frozen_shares: Sequence[float]
    flows: Sequence[str]
    becauses: Sequence[str]
    above: Sequence[int]
    inside: Sequence[int]

    def as_json(self) -> str:
        """Compact codes, one character a module or parameter, for tree.js."""
        return json.dumps(
            {
                "boxes": "".join(BOX_CODES[box] for box in self.boxes),
                "parameters": "".join("1" if frozen else "0" for frozen in self.parameters),
                "flows": "".join(FLOW_CODES[flow] for flow in self.flows),
                "shares": [round(share, 3) for share in self.frozen_shares],
                "above": list(self.above),
                "inside": list(self.inside),
            },
            separators=(",", ":"),
        )


def read_states(graph: ModelGraph, plan: Mapping[str, Any]) -> TreeStates:
    """The states of every row from a plan document."""
    shape = outline(graph)
    frozen_names = set(plan["frozen"])
    parameters = [p.name in frozen_names for p in graph.parameters]
    layers = {layer["path"]: layer for layer in plan["layers"]}
    boxes, shares = [], []
    for indices in shape.below:
        frozen = sum(parameters[i] for i in indices)
        box = "mixed" if 0 < frozen < len(indices) else "frozen" if frozen else "trainable"
        boxes.append(box if indices else "")
        numel = sum(graph.parameters[i].numel for i in indices if parameters[i])
        shares.append(numel / max(sum(graph.parameters[i].numel for i in indices), 1))
    own = [layers[m.path]["flow"] if m.path in layers else "" for m in graph.modules]
    becauses = [
        layers[m.path].get("because") or "" if m.path in layers else "" for m in graph.modules
    ]
    above, inside = _frost_line(shape, own)
    return TreeStates(parameters, boxes, shares, _agreed_flows(shape, own), becauses, above, inside)


def _agreed_flows(shape: Outline, own: Sequence[str]) -> list[str]:
    """A layer's own flow; for a container the flow of all layers below it, where they agree."""
    seen: list[set[str]] = [{flow} if flow else set() for flow in own]
    for index in range(len(own) - 1, 0, -1):
        seen[shape.parents[index]] |= seen[index]
    return [
        flow or ("".join(flows) if len(flows) == 1 else "")
        for flow, flows in zip(own, seen, strict=True)
    ]


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


def list_rows(
    graph: ModelGraph, states: TreeStates, opened: frozenset[int], start: int = 0
) -> list[TreeRow]:
    """The visible rows below and with module `start`, given which modules are open."""
    rows: list[TreeRow] = []
    if not graph.modules:
        return rows
    shape = outline(graph)
    stack = [start]
    while stack:
        index = stack.pop()
        rows.append(_module_row(shape, states, index, index in opened))
        if index in opened:
            rows += _parameter_rows(shape, states, index)
            stack += reversed(list(shape.children(index)))
    return _mark_line(rows, states)


def find_rows(graph: ModelGraph, states: TreeStates, text: str) -> tuple[list[TreeRow], int]:
    """Modules and parameters whose name or type contains `text`, or that it matches as a glob.

    Returns:
        The first rows of those found, and how many were found.
    """
    shape = outline(graph)
    needle = text.casefold()
    type_ = needle.removeprefix("type=").strip()
    try:
        matches = compile_match(text) if any(mark in text for mark in "*?{:") else None
    except ValueError:
        matches = None  # half-typed: until it is whole it is searched for as plain text
    rows: list[TreeRow] = []
    found = 0
    for index, module in enumerate(graph.modules):
        for name in (module.path, *module.parameters):
            is_hit = name and (matches(name) if matches else needle in name.casefold())
            if not is_hit and not (
                name == module.path and type_ and type_ in module.type.casefold()
            ):
                continue
            found += 1
            if found > FOUND_ROWS:
                continue
            if name == module.path:
                rows.append(_module_row(shape, states, index, False, flat=True))
            else:
                rows += [
                    r for r in _parameter_rows(shape, states, index, flat=True) if r.path == name
                ]
    return rows, found


def _module_row(
    shape: Outline, states: TreeStates, index: int, expanded: bool, flat: bool = False
) -> TreeRow:
    module = shape.graph.modules[index]
    parent = shape.parents[index]
    above = shape.graph.modules[parent].path if parent >= 0 else ""
    label = module.path[len(above) + 1 if above else 0 :]
    return TreeRow(
        kind="module",
        index=index,
        parent=parent,
        path=module.path,
        label=(module.path if flat else label) or "(model)",
        detail=module.type,
        level=1 if flat else _level(shape, index),
        numel=shape.numels[index],
        size_share=shape.numels[index] / shape.total,
        frozen_share=states.frozen_shares[index],
        box=states.boxes[index],
        flow=states.flows[index],
        because=states.becauses[index],
        expandable=not flat and shape.is_expandable(index),
        expanded=expanded,
        shared_with=(),
        line="",
    )


def _parameter_rows(
    shape: Outline, states: TreeStates, index: int, flat: bool = False
) -> list[TreeRow]:
    rows = []
    for name in shape.graph.modules[index].parameters:
        unique = shape.parameter_index[name]
        parameter = shape.graph.parameters[unique]
        is_frozen = states.parameters[unique]
        rows.append(
            TreeRow(
                kind="parameter",
                index=unique,
                parent=index,
                path=name,
                label=name if flat else name.rpartition(".")[2],
                detail=" × ".join(map(str, parameter.shape)) or "scalar",
                level=1 if flat else _level(shape, index) + 1,
                numel=parameter.numel,
                size_share=parameter.numel / shape.total,
                frozen_share=float(is_frozen),
                box="frozen" if is_frozen else "trainable",
                flow="",
                because="" if parameter.floating else f"{parameter.dtype} cannot be trained",
                expandable=False,
                expanded=False,
                shared_with=tuple(other for other in parameter.names if other != name),
                line="",
            )
        )
    return rows


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
