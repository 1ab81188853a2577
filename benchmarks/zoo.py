"""How many of the libraries' model types build and trace from their configuration alone.

Run alone: python -m benchmarks.zoo [NAME …]. It takes minutes, so `make bench` leaves it
out. Nothing is downloaded, and no weight takes memory.
"""

import argparse
import logging
import os
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from app.freezing.config import Rule, match_names
from app.freezing.errors import InvalidDocument
from app.freezing.trace import trace_model
from app.sources.hub import load_library
from app.sources.models import build_model
from app.sources.spec import ModelSpec


def list_models() -> Iterator[str]:
    """Transformers' model types, and what timm and torchvision list where they import."""
    transformers = load_library("transformers")
    for kind in transformers.CONFIG_MAPPING:
        try:
            has_model = transformers.CONFIG_MAPPING[kind] in transformers.AutoModel._model_mapping
        except Exception:  # a part that needs a library of its own
            has_model = True
        if has_model:
            yield f"hf:{kind}"
    for library in ("timm", "torchvision.models"):
        try:
            names = load_library(library).list_models()
        except InvalidDocument as error:
            print(f"left out: {error}")
        else:
            yield from (f"{library.partition('.')[0]}:{name}" for name in names)


def try_model(uri: str) -> tuple[str, str, float]:
    """(how far it came: none, tree or graph; why no further; seconds)."""
    started = time.perf_counter()
    spec = ModelSpec(uri, random_init=True)
    try:
        built = build_model(spec, code_dirs=[], weightless=True)
    except Exception as error:  # the point is to name every one
        return "none", f"{type(error).__name__}: {error!s:.200}", time.perf_counter() - started
    graph = trace_model(built.model, built.example)
    assert len(match_names(Rule("freeze", "**"), graph)) == graph.tensor_count
    far = "tree" if graph.traced_by == "none" else "graph"
    return far, graph.trace_note[:200], time.perf_counter() - started


def main(names: Iterable[str] = ()) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)  # torch logs every failed meta function at length
    results = {}
    for uri in names or list_models():
        far, why, _ = results[uri] = try_model(uri)
        if far != "graph":
            print(f"{far:5} {uri}: {' '.join(why.split())}", flush=True)
    counts = {
        far: sum(result[0] == far for result in results.values()) for far in ("tree", "graph")
    }
    seconds = statistics.median(result[2] for result in results.values())
    print(
        f"{len(results)} models: {counts['tree'] + counts['graph']} show their tree, "
        f"{counts['graph']} of them with a graph; {seconds:.2f} s at the median"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only these, like hf:bert")
    main(parser.parse_args().names)
