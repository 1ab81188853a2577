"""Plans and ticks over graphs of some sizes, in milliseconds, without torch; and the route.

Run alone: python -m benchmarks.plan
"""

import itertools
import statistics
import time
from collections.abc import Callable

from app.freezing.config import FreezeConfig, Rule
from app.freezing.graph import ModelGraph, Module, Node, Parameter
from app.freezing.memory import Change, Memory
from app.freezing.plan import plan_config
from app.freezing.presets import tick_module
from benchmarks.browser import add_model, ask, serve, write_model

LINEARS = ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.up", "mlp.down")


def make_graph(blocks: int) -> ModelGraph:
    """A chain of transformer-like blocks: nine modules, twelve tensors and eighteen nodes each."""
    modules = [Module("", "Model", 0), Module("layers", "ModuleList", 1)]
    parameters: list[Parameter] = []
    nodes: list[Node] = []
    forward: list[Change] = []
    backward: list[tuple[int, tuple[Change, ...]]] = []
    previous = -1
    for block in range(blocks):
        prefix = f"layers.{block}"
        modules.append(Module(prefix, "Block", 2))
        modules += [Module(f"{prefix}.{part}", part, 3) for part in ("attention", "mlp")]
        for name in LINEARS:
            path = f"{prefix}.{name}"
            names = (f"{path}.weight", f"{path}.bias")
            modules.append(Module(path, "Linear", 4, names))
            for own in names:
                parameters.append(Parameter(own, (64, 64), "float32", 4096, 16384, True, True))
                nodes.append(Node("AccumulateGrad", None, (), own))
            edges = (len(nodes) - 1, previous, len(nodes) - 2)
            saved = ((len(nodes), 64, (2,)),)
            nodes.append(
                Node("AddmmBackward0", path, edges, None, 100, (0, 100, 100), 0, False, saved)
            )
            here = len(nodes) - 1
            forward += [Change(-1, True, 64, 128), Change(here, True, 64, 0)]
            gradients = [Change(edge, edge == previous, 64, 64) for edge in edges]
            backward.append((here, (*gradients, Change(here, True, -64, 0))))
            previous = here
    memory = Memory(tuple(forward), tuple(reversed(backward)))
    return ModelGraph(
        tuple(modules),
        tuple(parameters),
        nodes=tuple(nodes),
        traced_by="fake",
        forward_flops=100,
        memory=memory,
    )


def median_ms(work: Callable[[], object], times: int = 9) -> float:
    work()
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append((time.perf_counter() - started) * 1e3)
    return statistics.median(taken)


def main() -> None:
    print("modules   nodes   plan ms   tick ms")
    for blocks in (25, 220, 555, 1110):
        graph = make_graph(blocks)
        config = FreezeConfig(
            rules=(Rule("freeze", "**"), Rule("unfreeze", f"layers.{{{blocks - 9}..{blocks}}}.**"))
        )
        plan = median_ms(lambda graph=graph, config=config: plan_config(graph, config))
        tick = median_ms(
            lambda graph=graph, config=config: tick_module(config, graph, "layers.3.mlp", False)
        )
        print(f"{graph.module_count:7,} {len(graph.nodes):7,} {plan:9.1f} {tick:9.1f}")
    time_route()


def time_route(blocks: int = 222) -> None:
    """The plan's route over HTTP for a model of about 2,000 modules, another config each time."""
    with serve({"many": write_model(blocks)}) as (_, address, token):
        model = add_model(address, token)
        turns = itertools.count()

        def plan() -> None:
            rules = [{"action": "freeze", "match": f"layer.{{0..{next(turns)}}}.**"}]
            ask(address, token, f"/models/{model['id']}/plan", {"rules": rules})

        print(f"route, {model['module_count']:,} modules: {median_ms(plan, 40):.1f} ms")


if __name__ == "__main__":
    main()
