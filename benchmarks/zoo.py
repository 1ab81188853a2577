"""How many libraries' model types show tree, counts, rules and their backward graph.

Run alone: python -m benchmarks.zoo [--jobs N] [NAME …]. It takes minutes, so `make bench` leaves it
out: it is `make zoo`. Nothing is downloaded, and no weight takes memory. What the library itself
cannot build from its default configuration is named and not counted. Of what shows its tree and is
not traced under fake tensors the reason is named, and the reasons are counted at the end.
"""

import argparse
import inspect
import logging
import multiprocessing
import os
import re
import signal
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch

from app.freezing.config import FreezeConfig, Rule, split_names
from app.freezing.errors import InvalidDocument
from app.freezing.trace import trace_model
from app.sources.hub import build_on_meta
from app.sources.libraries import load_library
from app.sources.models import build_model
from app.sources.spec import ModelSpec

LIMIT_S = 120  # for one type


def list_models() -> Iterator[str]:
    """Transformers' model types, and what timm and torchvision list where they import."""
    transformers = load_library("transformers")
    for kind, config in transformers.CONFIG_MAPPING.items():
        if has_model(transformers, config):
            yield f"hf:{kind}"
    for library in ("timm", "torchvision.models"):
        try:
            names = load_library(library).list_models()
        except InvalidDocument as error:
            print(f"left out: {error}")
        else:
            yield from (f"{library.partition('.')[0]}:{name}" for name in names)


def has_model(transformers: Any, config: type) -> bool:
    """Whether a type has a base model at all; some are a part or a tokenizer alone."""
    try:
        return config in transformers.AutoModel._model_mapping
    except Exception:  # a part that needs a library of its own
        return True


def build_plainly(uri: str) -> Any:
    """The model as its library's own documentation has it built, on the meta device."""
    scheme, _, name = uri.partition(":")

    def build() -> Any:
        if scheme == "hf":
            transformers = load_library("transformers")
            config = transformers.CONFIG_MAPPING[name]()
            return transformers.AutoModel.from_config(config)
        if scheme == "timm":
            return load_library("timm").create_model(name, pretrained=False)
        models = load_library("torchvision.models")
        takes = inspect.signature(models.get_model_builder(name)).parameters
        options = {"weights_backbone": None} if "weights_backbone" in takes else {}
        return models.get_model(name, weights=None, **options)

    return build_on_meta(build)


def try_model(uri: str) -> tuple[str, str, float]:
    """(how far it came: graph, tree, failed or unbuildable; why no further; seconds)."""
    started = time.perf_counter()
    try:
        built = build_model(ModelSpec(uri, random_init=True), code_dirs=[], weightless=True)
        graph = trace_model(built.model, built.example)
    except Exception as error:  # the point is to name every one
        why, seconds = f"{type(error).__name__}: {error!s:.200}", time.perf_counter() - started
        try:
            build_plainly(uri)
        except Exception as plain:
            return "unbuildable", f"{type(plain).__name__}: {plain!s:.200}", seconds
        return "failed", why, seconds
    seconds = time.perf_counter() - started
    names = {parameter.name for parameter in graph.parameters}
    frozen, trainable = split_names(FreezeConfig(rules=(Rule("freeze", "**"),)), graph)
    if trainable or set(frozen) != names:
        return "failed", f"rules leave {len(trainable)} of {len(names)} tensors", seconds
    try:
        plain = build_plainly(uri)
    except Exception:  # ours built it where the plain way does not
        plain = None
    if plain is not None:
        expected = sum(parameter.numel() for parameter in plain.parameters())
        if graph.parameter_count != expected:
            why = f"{graph.parameter_count:,} parameters, the library has {expected:,}"
            return "failed", why, seconds
    return "graph" if graph.traced_by == "fake" else "tree", graph.trace_note[:200], seconds


def main(names: Iterable[str] = (), jobs: int = 1) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)  # torch logs every failed meta function at length
    uris = list(names or list_models())
    results = {}
    with multiprocessing.get_context("fork").Pool(jobs, prepare_process) as pool:
        for uri, (far, why, seconds) in zip(uris, pool.imap(limit_time, uris), strict=True):
            results[uri] = far, why, seconds
            if far != "graph":
                print(f"{far:11} {uri} ({seconds:.1f} s): {' '.join(why.split())}", flush=True)
    for scheme in ("hf", "timm", "torchvision"):
        report(scheme, [result for uri, result in results.items() if uri.startswith(f"{scheme}:")])


def prepare_process() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, give_up)


def give_up(*_: object) -> None:
    raise TimeoutError(f"took more than {LIMIT_S} s")


def limit_time(uri: str) -> tuple[str, str, float]:
    signal.alarm(LIMIT_S)
    try:
        return try_model(uri)
    except TimeoutError as error:  # while the library's own way of building was tried
        return "failed", str(error), LIMIT_S
    finally:
        signal.alarm(0)


def report(scheme: str, results: list[tuple[str, str, float]]) -> None:
    counted = [result for result in results if result[0] != "unbuildable"]
    if not counted:
        return
    shown = [result for result in counted if result[0] != "failed"]
    graphs = sum(result[0] == "graph" for result in shown)
    reasons = Counter(name_reason(why) for far, why, _ in shown if far == "tree")
    for reason, count in reasons.most_common():
        print(f"{scheme}: {count:4} not traced: {reason}")
    print(
        f"{scheme}: {len(results)} models, {len(results) - len(counted)} of which their library "
        f"itself cannot build from the default configuration. Of the other {len(counted)}, "
        f"{len(shown)} ({len(shown) / len(counted):.1%}) show tree, counts and rules, {graphs} "
        f"({graphs / len(counted):.1%}) the backward graph, traced under fake tensors; "
        f"{statistics.median(r[2] for r in counted):.2f} s at the median."
    )


def name_reason(note: str) -> str:
    """The kind of error of a trace's note, its numbers left out, or that there was no example."""
    if note.startswith("There is no example"):
        return "no example"
    return re.sub(r"\d+", "N", note.removeprefix("fake: "))[:90]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only these, like hf:bert")
    parser.add_argument("--jobs", type=int, default=1, help="processes beside one another")
    given = parser.parse_args()
    main(given.names, given.jobs)
