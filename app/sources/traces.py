"""Traces a built model as a run is assumed to be. Knows no weights, no jobs, no config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.freezing.lookups import RefuseMissingRows
from app.freezing.trace import read_model, trace_model
from app.sources.models import BuiltModel
from app.sources.sizes import SIZES, size_example


def trace_as_assumed(
    built: BuiltModel, assumed: Mapping[str, Any], how: str, kernels: str
) -> dict[str, Any]:
    """Trace a model at other sizes or another precision, and say what of it could not be had.

    Args:
        assumed: `sequence_length`, `image_size`, `precision`, as far as they are others.
        how: ``fake`` or ``real``, as the model's own graph was got. The other way is not tried:
            what does not run at a size would only fail once more, and perhaps fill the memory.
        kernels: of that graph, too.

    Returns:
        ``graph``, without modules and parameters, which nothing of it changes; None where nothing
        that is assumed could be had. ``refused``: name → why, as the end of a sentence.
        ``fingerprint``.
    """
    sizes = {name: assumed[name] for name in SIZES if name in assumed}
    refused: dict[str, str] = {}
    graph = None
    for wanted in (sizes, {}):  # without the sizes, where they are what the model refuses
        sized = size_example(built.example, wanted, built.make)
        refused |= sized.refused
        if len(refused) == len(assumed):
            break
        with RefuseMissingRows():
            traced = trace_model(
                built.model,
                sized.example,
                loss=built.loss,
                ways=(how,),
                kernels=kernels,
                precision=assumed.get("precision", "fp32"),
            )
        if traced.nodes:
            graph = {**traced.to_document(), **sized.sizes, "modules": [], "parameters": []}
            break
        why = traced.trace_note.removeprefix(f"{how}: ").rstrip(".")
        told = dict.fromkeys(wanted or assumed, f"the model refuses it ({why})")
        refused = {**told, **refused}
    fingerprint = read_model(built.model).fingerprint
    return {"graph": graph, "refused": refused, "fingerprint": fingerprint}
