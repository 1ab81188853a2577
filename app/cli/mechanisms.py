"""The comparison of mechanisms in a terminal: asked for, waited for, and printed side by side."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from app.cli.given import Document, wait_for_task
from app.cli.outline import counted, size
from app.client import Server


def run_comparison(server: Server, model_id: int, wanted: Document) -> Document:
    """What a worker found when it trained a few steps under each mechanism.

    Raises:
        Failure: it could not.
    """
    task = server.call("POST", f"/api/models/{model_id}/compare-mechanisms", wanted)
    result: Document = wait_for_task(server, task, "The mechanisms cannot be compared")["result"]
    return result


def print_comparison(found: Document) -> None:
    """The mechanisms as columns, then what each setting does to them, then what that says."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for line in _lines(found):
        console.print(line, markup=False)


def _lines(found: Document) -> Iterator[str]:
    results = found["mechanisms"]
    yield (
        f"{counted(found['frozen'], 'tensor')} frozen, {found['trained']} trained; "
        f"{found['steps']} steps of {found['setting']['name']} "
        f"on the {found['on']}, {found['device']}"
    )
    yield ""
    yield _row("", (result["mechanism"] for result in results))
    for words, read in FACTS:
        yield _row(words, (read(result) for result in results))
    yield ""
    yield "the largest difference that came of each setting: in what is frozen / in what is trained"
    for variant in found["variants"]:
        outcomes = (variant["mechanisms"][result["mechanism"]] for result in results)
        shown = (f"{_difference(o, 'frozen')} / {_difference(o, 'trained')}" for o in outcomes)
        yield _row(variant["name"], shown)
    for result in results:
        yield ""
        yield f"{result['mechanism']}"
        yield from (f"  {sentence}" for sentence in result["says"])


def _row(words: str, cells: Any) -> str:
    return f"{words:<44}" + "".join(f"{cell:>20}" for cell in cells)


def _difference(outcome: Mapping[str, Any], which: str) -> str:
    value = outcome[f"{which}_difference"]
    if outcome[f"{which}_identical"]:
        return "same"
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def _afterwards(result: Mapping[str, Any]) -> str:
    times = result["afterwards"]["times_fresh"]
    return "no step" if times is None else f"{times:.2f} times"


FACTS: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("frozen tensors with a gradient", lambda r: str(r["gradients"]["frozen"])),
    ("gradients", lambda r: size(r["gradient_bytes"])),
    ("optimizer state", lambda r: size(r["optimizer_bytes"])),
    ("peak memory", lambda r: size(r["peak_bytes"])),
    ("step, ms", lambda r: f"{r['step_ms']:.3g}"),
    ("left in gradients after the last step, norm", lambda r: f"{r['left_behind'][-1]:.3g}"),
    ("frozen tensors stayed identical", lambda r: "yes" if r["frozen_identical"] else "NO"),
    ("trained as under requires_grad", lambda r: "yes" if r["trained_identical"] else "NO"),
    ("first step when all is trained, to fresh", _afterwards),
)
