"""What autograd nodes hide: custom backwards, recomputed regions, fused attention. No modules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import GradientEdge

from app.freezing.flops import Counter
from app.freezing.record import Recorder

Edge = tuple[Any, int]


def nodes_in_order(
    *roots: Any, edges: Callable[[Any], Sequence[Edge]] | None = None
) -> Iterator[Any]:
    """Every node below `roots`, each after all that its edges lead to, without recursion.

    Args:
        edges: of a node; by default those that autograd has.
    """
    edges = edges or (lambda grad_fn: grad_fn.next_functions)
    seen: set[Any] = set()
    for root in roots:
        if root is None or root in seen:
            continue
        seen.add(root)
        stack = [(root, iter(edges(root)))]
        while stack:
            grad_fn, below = stack[-1]
            for next_fn, _ in below:
                if next_fn is not None and next_fn not in seen:
                    seen.add(next_fn)
                    stack.append((next_fn, iter(edges(next_fn))))
                    break
            else:
                stack.pop()
                yield grad_fn


def is_python(grad_fn: Any) -> bool:
    """Whether a node's backward is Python's: nobody knows what it does but by running it."""
    return isinstance(grad_fn, torch.autograd.function.BackwardCFunction)


class Probe(NamedTuple):
    """What came of running one node's backward alone, on zeros.

    Attributes:
        node_flops: whatever is wanted of it.
        edge_flops: for each edge what it costs beyond that.
        dead: edges that get no gradient.
        roots: tensors from which it ran a backward of its own: a region that it had recomputed.
    """

    node_flops: int
    edge_flops: tuple[int, ...] = ()
    dead: frozenset[int] = frozenset()
    roots: tuple[torch.Tensor, ...] = ()


def probe_python(grad_fn: Any, used: set[int], recorder: Recorder) -> Probe | None:
    """Run a Python autograd function's backward, alone, on zeros.

    Args:
        used: which of its results lead to the loss.
        recorder: records what it has recomputed, as part of no forward.

    Returns:
        None where it cannot be run so: it looks at values, or wants its gradients otherwise.
    """
    unpacking = _count_unpacking(grad_fn, recorder)
    before = recorder.forward_flops
    try:
        with torch.no_grad(), _catch_backward(recorder) as roots:
            given = _run(grad_fn, used)
    except Exception:  # whatever a user's backward raises
        return None
    finally:
        flops, recorder.forward_flops = recorder.forward_flops - before - unpacking, before
    edges = _wanted_edges(grad_fn)
    if len(given) != len(grad_fn.needs_input_grad):
        return None
    returned = [g for g, need in zip(given, grad_fn.needs_input_grad, strict=True) if need]
    dead = frozenset(e for e, gradient in zip(edges, returned, strict=True) if gradient is None)
    if roots or not flops or len(edges) < 2:
        return Probe(flops, (), dead, tuple(roots))
    with recorder.paused():
        alone = {edge: _count_alone(grad_fn, used, at) for at, edge in enumerate(edges)}
    # What each costs alone, less what all of them have in common.
    common = max(0, (sum(alone.values()) - flops) // (len(edges) - 1))
    by_edge = [alone.get(e, common) - common for e in range(len(grad_fn.next_functions))]
    return Probe(common, tuple(by_edge), dead)


def _run(grad_fn: Any, used: set[int]) -> Sequence[Any]:
    zeros: list[torch.Tensor | None] = [_zeros(given) for given in grad_fn._input_metadata]
    if _takes_none(grad_fn._forward_cls):
        zeros = [zero if nr in used else None for nr, zero in enumerate(zeros)]
    result = grad_fn.apply(*zeros)
    return result if isinstance(result, tuple) else (result,)


def _count_unpacking(grad_fn: Any, recorder: Recorder) -> int:
    """FLOPs of getting at what a node keeps: in a checkpoint, that runs a forward again."""
    if grad_fn._sequence_nr() in recorder.saving:
        return 0
    with recorder.paused(), Counter() as counter:
        _ = grad_fn.saved_tensors
    return counter.flops


def _takes_none(function: type) -> bool:
    """Whether its backward is given None for a result without a gradient: torch does not tell."""
    written = (getattr(function, name, None) for name in ("forward", "setup_context"))
    codes = (getattr(method, "__code__", None) for method in written)
    return any(code is not None and "set_materialize_grads" in code.co_names for code in codes)


def _zeros(given: Any) -> torch.Tensor:
    return torch.zeros(given.shape, dtype=given.dtype, device=given.device)


def _wanted_edges(grad_fn: Any) -> list[int]:
    return [e for e, (next_fn, _) in enumerate(grad_fn.next_functions) if next_fn is not None]


def _count_alone(grad_fn: Any, used: set[int], position: int) -> int:
    """FLOPs where of all that it can give a gradient to only one wants one."""
    needs = grad_fn.needs_input_grad
    wanted = [i for i, need in enumerate(needs) if need]
    others = [
        next_fn.variable
        for at, edge in enumerate(_wanted_edges(grad_fn))
        if at != position and hasattr(next_fn := grad_fn.next_functions[edge][0], "variable")
    ]
    counter = Counter()
    try:
        grad_fn.needs_input_grad = tuple(i == wanted[position] for i in range(len(needs)))
        for parameter in others:
            parameter.requires_grad_(False)
        with torch.no_grad(), counter:
            _run(grad_fn, used)
    except Exception:  # one that cannot do with less
        return 0
    finally:
        grad_fn.needs_input_grad = needs
        for parameter in others:
            parameter.requires_grad_(True)
    return counter.flops


@contextlib.contextmanager
def _catch_backward(recorder: Recorder) -> Iterator[list[torch.Tensor]]:
    """Tensors from which a backward is started meanwhile; it runs, and keeps what it read."""
    original = torch.autograd.backward
    roots: list[torch.Tensor] = []

    def backward(tensors: Any, grad_tensors: Any = None, *_: Any, **__: Any) -> None:
        caught = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        roots.extend(caught)
        torch.autograd.backward = original
        try:
            with torch.enable_grad(), recorder.paused():
                original(caught, grad_tensors, retain_graph=True)
        finally:
            torch.autograd.backward = backward

    torch.autograd.backward = backward
    try:
        yield roots
    finally:
        torch.autograd.backward = original


# Nodes that ask what they kept whether it needs a gradient, not what is wanted of them: the edge.
_ONLY_FOR = {"LinalgSolveExBackward0": 0}


def probe_builtin(grad_fn: Any, used: set[int], recorder: Recorder) -> Probe:
    """Run one of torch's own nodes alone, on zeros, once for each of its edges."""
    start = [GradientEdge(grad_fn, nr) for nr in sorted(used)]
    zeros = [_zeros(grad_fn._input_metadata[nr]) for nr in sorted(used)]

    def count(edges: Sequence[int]) -> int:
        ends = [GradientEdge(*grad_fn.next_functions[e]) for e in edges]
        seen: list[int] = []  # before and after: other ways may lead to the same ends
        with recorder.paused(), Counter() as counter:
            hooks = (
                grad_fn.register_prehook(lambda *_: seen.append(counter.flops)),
                grad_fn.register_hook(lambda *_: seen.append(counter.flops)),
            )
            torch.autograd.grad(start, ends, zeros, retain_graph=True, allow_unused=True)
        for hook in hooks:
            hook.remove()
        return seen[1] - seen[0]

    edges = _wanted_edges(grad_fn)
    if grad_fn.name() in _ONLY_FOR:
        wanted_for = _ONLY_FOR[grad_fn.name()]
        flops = count(edges) if wanted_for in edges else 0
        return Probe(
            0, tuple(flops * (e == wanted_for) for e in range(len(grad_fn.next_functions)))
        )
    alone = {edge: count([edge]) for edge in edges}
    if len(edges) < 2:
        return Probe(sum(alone.values()))
    common = max(0, (sum(alone.values()) - count(edges)) // (len(edges) - 1))
    return Probe(
        common, tuple(alone.get(e, common) - common for e in range(len(grad_fn.next_functions)))
    )
