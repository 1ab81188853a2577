"""Traces a built model at other sizes than its example's. Knows no weights, no jobs, no config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.freezing.lookups import RefuseMissingRows
from app.freezing.trace import read_model, trace_model
from app.sources.models import BuiltModel
from app.sources.sizes import size_example


def trace_at_sizes(
    built: BuiltModel, wanted: Mapping[str, int], how: str, kernels: str
) -> dict[str, Any]:
    """Trace a model on its example at other sizes, and say which of them could not be had.

    Args:
        how: ``fake`` or ``real``, as the model's own graph was got. The other way is not tried:
            what does not run at a size would only fail once more, and perhaps fill the memory.
        kernels: of that graph, too.

    Returns:
        ``graph``, without modules and parameters, which no size changes; None where nothing that is
        wanted could be had. ``refused``: size → why, as the end of a sentence. ``fingerprint``.
    """
    sized = size_example(built.example, wanted, built.make)
    refused, graph = dict(sized.refused), None
    fingerprint = read_model(built.model).fingerprint
    if len(refused) < len(wanted):
        with RefuseMissingRows():
            traced = trace_model(
                built.model, sized.example, loss=built.loss, ways=(how,), kernels=kernels
            )
        if traced.nodes:
            graph = {**traced.to_document(), **sized.sizes, "modules": [], "parameters": []}
        else:
            why = traced.trace_note.removeprefix(f"{how}: ").rstrip(".")
            refused = {**dict.fromkeys(wanted, f"the model refuses it ({why})"), **refused}
    return {"graph": graph, "refused": refused, "fingerprint": fingerprint}
