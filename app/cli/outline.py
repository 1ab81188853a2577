"""The module tree in a terminal: flow states, the frost line, repeated blocks folded into one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

# What takes long to import is imported where it is used: `frostline --help` answers at once.
if TYPE_CHECKING:
    from rich.text import Text

FLOWS = {
    "trained": ("●", "dark_orange"),
    "unreached": ("○", "dim"),
    "passes": ("←", "cyan"),
    "idle": ("❄", "bright_cyan"),
}
ROWS = 60  # more than these are not shown where closing modules of one state helps
FROST_LINE = "─ ─ ─ ─ ─ ─ ─  frost line: backward stops here  ─ ─ ─ ─ ─ ─ ─"


@dataclass
class Branch:
    """A module, or several alike, with what lies below.

    Attributes:
        first: place of the first layer at or below it in model order; None where there is none.
        flows: of the layers at and below it.
    """

    name: str
    type: str
    layer: Mapping[str, Any] | None
    first: int | None = None
    frozen: int = 0
    trainable: int = 0
    flows: set[str] = field(default_factory=set)
    below: list[Branch] = field(default_factory=list)

    def shape(self) -> str:
        """Equal for modules that differ in nothing but their names' numbers."""
        flow = self.layer["flow"] if self.layer else None
        parts = [self.type, flow, self.frozen, self.trainable]
        return json.dumps([*parts, [[child.name, child.shape()] for child in self.below]])


def grow_tree(tree: Mapping[str, Any], plan: Mapping[str, Any]) -> Branch:
    """The modules of ``GET /api/models/{id}/tree`` with the flow states of a plan."""
    layers = {layer["path"]: (place, layer) for place, layer in enumerate(plan["layers"])}
    branches: dict[str, Branch] = {}
    for module in tree["modules"]:
        path = module["path"]
        place, layer = layers.get(path, (None, None))
        branch = Branch(path.rpartition(".")[2] or "model", module["type"], layer)
        branches[path] = branch
        if path:
            branches[path.rpartition(".")[0]].below.append(branch)
        if layer is not None:
            for above in _with_parents(path, branches):
                above.first = place if above.first is None else above.first
                above.frozen += layer["frozen_numel"]
                above.trainable += layer["trainable_numel"]
                above.flows.add(layer["flow"])
    return branches[""]


def _with_parents(path: str, branches: Mapping[str, Branch]) -> Iterator[Branch]:
    yield branches[path]
    while path:
        path = path.rpartition(".")[0]
        yield branches[path]


def fold_repeats(branch: Branch) -> Branch:
    """Runs of siblings that are alike but for their number become one: ``layer.{0..8}``."""
    folded: list[Branch] = []
    shapes: list[str] = []
    for child in map(fold_repeats, branch.below):
        shape = child.shape()
        if folded and child.name.isdigit() and shapes[-1] == shape and child.flows:
            begin, _, end = folded[-1].name.strip("{}").partition("..")
            if begin.isdigit() and int(end or begin) + 1 == int(child.name):
                folded[-1].name = f"{{{begin}..{child.name}}}"
                continue
        folded.append(child)
        shapes.append(shape)
    return Branch(**{**vars(branch), "below": folded})


def draw_tree(root: Branch, show_all: bool) -> Iterator[Text]:
    """The rows of the tree, with the frost line where it lies.

    Args:
        show_all: neither fold nor close anything.
    """
    from rich.text import Text

    if not show_all:
        root = fold_repeats(root)
    for depth in (None,) if show_all else (None, 6, 5, 4, 3, 2, 1):
        rows = list(_rows(root, "", "", depth))
        if len(rows) <= ROWS:
            break
    target = _frost_line(root)
    width = max(len(guide) + len(branch.name) for guide, branch, _ in rows)
    types = max(len(branch.type) for _, branch, _ in rows)
    for guide, branch, is_closed in rows:
        if target is not None and branch.first is not None and branch.first >= target:
            yield Text(FROST_LINE, style="bright_cyan")
            target = None
        text = Text(guide, style="dim").append(branch.name, style="bold")
        text.pad_right(width - len(text.plain))
        text.append(f"  {branch.type:<{types}}", style="dim")
        text.append(f"  {count(branch.frozen + branch.trainable):>7}").append(
            _state(branch, is_closed)
        )
        text.rstrip()
        yield text


def _rows(
    branch: Branch, guide: str, indent: str, depth: int | None
) -> Iterator[tuple[str, Branch, bool]]:
    """(guide lines, branch, is closed); below `depth` only what is of several states is open."""
    is_closed = depth is not None and depth <= 0 and len(branch.flows) < 2 and bool(branch.below)
    yield guide, branch, is_closed
    for index, child in enumerate(() if is_closed else branch.below):
        is_last = index == len(branch.below) - 1
        deeper = None if depth is None else depth - 1
        yield from _rows(
            child,
            indent + ("└─ " if is_last else "├─ "),
            indent + ("   " if is_last else "│  "),
            deeper,
        )


def _state(branch: Branch, is_closed: bool) -> Text:
    from rich.text import Text

    text = Text("  ")
    flow = branch.layer["flow"] if branch.layer else None
    if flow is None and is_closed and branch.flows:
        (flow,) = branch.flows
    if flow is None:
        return text
    glyph, style = FLOWS[flow]
    text.append(f"{glyph} {flow}", style=style)
    if branch.layer is None:
        return text.append(" all below", style="dim")
    if branch.layer["frozen_numel"] and branch.layer["trainable_numel"]:
        text.append(" in part", style="dim")
    if flow in ("passes", "unreached"):
        text.append(f" {branch.layer['because']}", style="dim")
    return text


def _frost_line(root: Branch) -> int | None:
    """Place of the first layer that backward reaches; None where it reaches all, or none."""
    flows: dict[int, str] = {}

    def collect(branch: Branch) -> None:
        if branch.layer is not None and branch.first is not None:
            flows.setdefault(branch.first, branch.layer["flow"])
        for child in branch.below:
            collect(child)

    collect(root)
    reached = [place for place in sorted(flows) if flows[place] != "idle"]
    return reached[0] if reached and reached[0] != min(flows) else None


def count(number: float) -> str:
    """A count with its SI prefix: ``7.1 M``."""
    for prefix in ("", " k", " M", " G", " T", " P", " E"):
        if abs(number) < 999.5:
            return f"{number:.3g}{prefix}"
        number /= 1000
    return f"{number:.3g} Z"


def counted(number: int, noun: str) -> str:
    """A number of things: ``1 tensor``, ``2 tensors``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def share_of(part: int, whole: int, noun: str) -> str:
    """The subject of a sentence and its verb: ``1 of 6 tensors is``, ``2 of 6 tensors are``."""
    return f"{part:,} of {counted(whole, noun)} {'is' if 1 in (part, whole) else 'are'}"


def size(number: float) -> str:
    """Bytes with a binary prefix: ``28 MiB``."""
    for prefix in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(number) < 999.5:
            return f"{number:.3g} {prefix}"
        number /= 1024
    return f"{number:.3g} PiB"
