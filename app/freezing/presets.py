"""Ticks and presets as rules, the fewest that say it. No torch, no page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace

from app.freezing.config import FreezeConfig, Group, Rule, expand_rules
from app.freezing.errors import InvalidDocument
from app.freezing.graph import ModelGraph


def tick_module(config: FreezeConfig, graph: ModelGraph, path: str, frozen: bool) -> FreezeConfig:
    """The config after the box of a module or of one parameter is ticked or cleared.

    The rules stay readable: the tick is appended and what it made idle is dropped, unless the
    shortest rules that say the same are fewer.

    Raises:
        InvalidDocument: the model has neither a module nor a parameter of that name.
    """
    if path not in graph.by_path and path not in graph.canonical_names:
        raise InvalidDocument(
            [("path", f"{path!r} is neither a module nor a parameter of this model.")]
        )
    match = match_path(path, path in graph.canonical_names)
    ticked = replace(config, rules=(*config.rules, Rule("freeze" if frozen else "unfreeze", match)))
    state = expand_rules(ticked, graph)
    rules = _drop_idle_rules(ticked, graph, state)
    if len(rules) > 1:
        rules = min(rules, shortest_rules(state, graph), key=len)
    return replace(config, rules=rules, frozen=None, trainable=None)


def adopt_names(config: FreezeConfig, graph: ModelGraph) -> FreezeConfig:
    """The config with rules that give the names that its document lists, as far as they exist."""
    state = expand_rules(config, graph)
    for names, is_frozen in ((config.frozen, True), (config.trainable, False)):
        for name in names or ():
            if name in graph.canonical_names:
                state[graph.canonical_names[name]] = is_frozen
    return replace(config, rules=shortest_rules(state, graph), frozen=None, trainable=None)


def _drop_idle_rules(
    config: FreezeConfig, graph: ModelGraph, state: Mapping[str, bool]
) -> tuple[Rule, ...]:
    rules = config.rules
    for rule in config.rules:
        fewer = tuple(other for other in rules if other is not rule)
        if expand_rules(replace(config, rules=fewer), graph) == state:
            rules = fewer
    return rules


def shortest_rules(state: Mapping[str, bool], graph: ModelGraph) -> tuple[Rule, ...]:
    """The fewest nested rules that give `state`, numbered siblings gathered in braces.

    Args:
        state: first name of every parameter → whether it is frozen.
    """
    # For each path three choices, by what it inherits (nothing, trainable, frozen): how many rules
    # its subtree takes, and the state that a rule for itself sets, None where it has no rule.
    best: dict[str, _Choices] = {}
    by_name = graph.by_name
    for name, first in graph.canonical_names.items():
        parameter = by_name[first]
        if parameter.floating:
            best[name] = _LEAVES[state[first], not parameter.requires_grad]
    is_parameter = set(best)
    paths = [(path, below) for path, below in graph.name_tree if path not in is_parameter]
    # Blocks are alike: children with the very same choices are put together once.
    known: dict[tuple[int, ...], _Choices | None] = {}
    for path, below in paths:
        key = tuple([id(best.get(child)) for child in below])
        if key not in known:
            known[key] = _combine([best[child] for child in below if child in best])
        if (choices := known[key]) is not None:
            best[path] = choices
    chosen: list[tuple[str, bool]] = []
    children_of = dict(paths)
    level = [("", 0)] if "" in best else []
    while level:
        deeper: list[tuple[str, int]] = []
        for path, inherited in level:
            sets = best[path][inherited][1]
            if sets is not None:
                chosen.append((path, sets))
                inherited = 2 if sets else 1
            # where the whole subtree agrees with what it inherits, nothing below has a rule
            if best[path][inherited] != _AS_IT_IS:
                deeper += [(c, inherited) for c in children_of.get(path, ()) if c in best]
        level = deeper
    return tuple(
        Rule("freeze" if frozen else "unfreeze", match)
        for match, frozen in _gather(chosen, is_parameter)
    )


_Choice = tuple[int, bool | None]
_Choices = tuple[_Choice, _Choice, _Choice]
_AS_IT_IS: _Choice = (0, None)
# Of one parameter, by the state that is wanted and the one in which it came.
_LEAVES: dict[tuple[bool, bool], _Choices] = {
    (wanted, came): (
        _AS_IT_IS if came == wanted else (1, wanted),
        (1, wanted) if wanted else _AS_IT_IS,
        _AS_IT_IS if wanted else (1, wanted),
    )
    for wanted in (False, True)
    for came in (False, True)
}


def _combine(children: Sequence[_Choices]) -> _Choices | None:
    """The choices of what has these below it; None where it has nothing."""
    if not children:
        return None
    totals = [sum(choices[inherited][0] for choices in children) for inherited in range(3)]
    came, trainable, frozen = (_choose(total, totals) for total in totals)
    return came, trainable, frozen


def _choose(as_inherited: int, totals: Sequence[int]) -> _Choice:
    """As few rules as can be; among those a rule for the whole, then rules for the parts."""
    trainable, frozen = totals[1] + 1, totals[2] + 1
    if as_inherited and 1 in (trainable, frozen):
        return (1, frozen == 1)
    if as_inherited <= min(trainable, frozen):
        return (as_inherited, None)
    return (frozen, True) if frozen <= trainable else (trainable, False)


def match_path(path: str, is_parameter: bool) -> str:
    """The match that covers one parameter, or all below one module, whatever its name holds."""
    if not set(path) & _SPECIAL and not path.startswith(("re:", "has:")):
        return path if is_parameter else f"{path}.**" if path else "**"
    return f"re:{re.escape(path)}" + ("" if is_parameter else r"\..*")


_SPECIAL = frozenset("*?{},")


def _gather(chosen: Iterable[tuple[str, bool]], parameters: Set[str]) -> Iterable[tuple[str, bool]]:
    """Siblings with the same rule become one: layer.0, layer.1, layer.2 → layer.{0..2}."""
    siblings: dict[tuple[str, bool, bool], list[str]] = {}
    for path, frozen in chosen:
        parent, _, last = path.rpartition(".")
        siblings.setdefault((parent, frozen, path in parameters), []).append(last)
    for (parent, frozen, is_parameter), lasts in siblings.items():
        prefix = f"{parent}." if parent else ""
        special = [last for last in lasts if set(prefix + last) & _SPECIAL]
        for last in special:
            yield match_path(prefix + last, is_parameter), frozen
        for last in _braces([last for last in lasts if last not in special]):
            match = prefix + last
            yield (match if is_parameter else f"{match}.**" if match else "**"), frozen


def _braces(lasts: Sequence[str]) -> list[str]:
    numbers = sorted(int(last) for last in lasts if last.isascii() and last.isdigit())
    rest = [last for last in lasts if not (last.isascii() and last.isdigit())]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]
    if len(parts) == 1:
        parts = [f"{{{parts[0]}}}" if ".." in parts[0] else parts[0]]
    elif parts:
        parts = ["{" + ",".join(f"{{{part}}}" if ".." in part else part for part in parts) + "}"]
    if len(rest) > 1:
        rest = ["{" + ",".join(rest) + "}"]
    return parts + rest


PRESETS: tuple[tuple[str, str], ...] = (
    ("nothing", "Freeze nothing"),
    ("everything", "Freeze everything"),
    ("head-only", "Train the head only"),
    ("last-blocks", "Train the last blocks and the head"),
    ("first-blocks", "Train the first blocks and the head"),
    ("one-block", "Train one block (surgical)"),
    ("norms-only", "Train norm layers only"),
    ("biases-only", "Train biases only"),
    ("all-but-norms", "Train all but norm layers"),
    ("layer-decay", "Lower learning rates with depth (layer-wise decay)"),
)
BLOCK_PRESETS = frozenset({"last-blocks", "first-blocks", "one-block", "layer-decay"})
# The rate of each block is that of the block above it times this; 0.65 to 0.95 are customary.
LAYER_DECAY = 0.8


def preset_config(name: str, graph: ModelGraph, count: int | None = None) -> FreezeConfig:
    """The freeze config of a preset on one model.

    Args:
        count: how many blocks, for the presets that count them (1), or which one (0) for
            ``one-block``.

    Raises:
        InvalidDocument: no preset has that name, or the model has no such blocks.
    """
    labels = dict(PRESETS)
    if name not in labels:
        raise InvalidDocument(
            [("preset", f"{name!r} is not a preset; they are {', '.join(labels)}.")]
        )
    head, blocks = find_head(graph), find_blocks(graph)
    state = {p.name: True for p in graph.parameters}

    def train(covered: Callable[[str], bool]) -> None:
        for parameter in graph.parameters:
            if any(covered(n) for n in parameter.names) and parameter.floating:
                state[parameter.name] = False

    def below(*paths: str) -> Callable[[str], bool]:
        return lambda n: any(n.startswith(f"{path}.") or n == path for path in paths)

    if name in BLOCK_PRESETS:
        if not blocks:
            raise InvalidDocument([("preset", "This model has no repeated blocks to count.")])
        number = count if count is not None else (0 if name == "one-block" else 1)
        limit = len(blocks) - 1 if name == "one-block" else len(blocks)
        if not 0 <= number <= limit:
            raise InvalidDocument([("count", f"The count is {number}; it may be 0 to {limit}.")])
    if name == "layer-decay":
        return FreezeConfig(name=labels[name], groups=_decaying_groups(graph, blocks))
    norms = tuple(m.path for m in graph.modules if "Norm" in m.type)
    if name == "nothing":
        train(lambda _: True)
    elif name == "head-only":
        train(below(head))
    elif name == "last-blocks":
        first_kept = blocks[len(blocks) - number] if number else head
        names = list(graph.canonical_names)
        start = next(i for i, n in enumerate(names) if below(first_kept)(n))
        train(lambda n: n in set(names[start:]))
    elif name == "first-blocks":
        train(lambda n: not below(*blocks[number:])(n))
    elif name == "one-block":
        train(below(blocks[number]))
    elif name == "norms-only":
        train(below(*norms))
    elif name == "biases-only":
        train(lambda n: n.rpartition(".")[2].endswith("bias"))
    elif name == "all-but-norms":
        train(lambda n: not below(*norms)(n))
    if all(state.values()) and name != "everything":
        what = labels[name].removeprefix("Train ").removesuffix(" only")
        raise InvalidDocument([("preset", f"This model has nothing to train of it: {what}.")])
    return FreezeConfig(name=labels[name], rules=_fewest_rules(state, graph))


def _decaying_groups(graph: ModelGraph, blocks: Sequence[str]) -> tuple[Group, ...]:
    """Full rates after the blocks, lower ones from block to block, the lowest before them."""
    names = list(graph.canonical_names)
    first = next(i for i, name in enumerate(names) if name.startswith(f"{blocks[0]}."))
    before = {graph.canonical_names[name] for name in names[:first]}
    # The rules for "all before the first block" are the matches for its group; later ones win in
    # both, so that one which unfreezes gives the full rate back.
    cover = shortest_rules({p.name: p.name in before for p in graph.parameters}, graph)
    least = round(LAYER_DECAY ** (len(blocks) + 1), 6)
    stem = tuple(Group(rule.match, rule.type, least if rule.freezes else 1.0) for rule in cover)
    return stem + tuple(
        Group(f"{path}.**", None, round(LAYER_DECAY ** (len(blocks) - index), 6))
        for index, path in enumerate(blocks)
    )


def _fewest_rules(state: Mapping[str, bool], graph: ModelGraph) -> tuple[Rule, ...]:
    """The fewest rules that give `state`: by place, or by kind (norm classes, biases)."""
    types = dict.fromkeys(m.type for m in graph.modules if "Norm" in m.type and m.parameters)
    by_kind = (
        [("**.*bias", None)],
        [(None, type_) for type_ in types],
    )
    candidates = [shortest_rules(state, graph)]
    for covers in by_kind:
        for base, then in (("freeze", "unfreeze"), ("unfreeze", "freeze"), (None, "freeze")):
            first = () if base is None else (Rule(base, "**"),)
            candidates.append((*first, *(Rule(then, match, type_) for match, type_ in covers)))
    exact = (c for c in candidates if expand_rules(FreezeConfig(rules=c), graph) == state)
    return min(exact, key=len)


def find_head(graph: ModelGraph) -> str:
    """Path of the last module with layers that is not most of the model: often the classifier."""
    owners = [module.path for module in graph.layers]
    if not owners:
        return ""
    path, total = "", max(graph.parameter_count, 1)
    while True:
        prefix = f"{path}." if path else ""
        last = next((o for o in reversed(owners) if o.startswith(prefix)), None)
        if last is None:
            return path
        path = prefix + last[len(prefix) :].split(".")[0]
        size = sum(p.numel for p in graph.parameters if p.name.startswith(f"{path}."))
        if size * 2 <= total or path == last:
            return path


def find_blocks(graph: ModelGraph) -> tuple[str, ...]:
    """Paths of the repeated blocks: the heaviest group of alike siblings, in model order.

    Alike are those of one class whose names differ in their number alone: an encoder and a decoder
    of one class are not two blocks.
    """
    weights = _weights_below(graph)
    groups: dict[tuple[str, str, str], list[str]] = {}
    for module in graph.modules:
        parent, _, last = module.path.rpartition(".")
        stem = last.rstrip("0123456789")
        if stem != last and weights.get(module.path):
            groups.setdefault((parent, module.type, stem), []).append(module.path)
    repeated = [paths for paths in groups.values() if len(paths) > 1]
    return tuple(max(repeated, key=lambda paths: sum(weights[p] for p in paths), default=()))


def _weights_below(graph: ModelGraph) -> dict[str, int]:
    """Path of every module → elements in the parameters at and below it."""
    weights: dict[str, int] = {}
    for parameter in graph.parameters:
        path = parameter.name
        while path:
            path = path.rpartition(".")[0]
            weights[path] = weights.get(path, 0) + parameter.numel
    return weights
