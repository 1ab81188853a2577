"""Plans for a GPU that are made without one, beside what torch's own code for CUDA allocated."""

import json

import pytest
import transformers

from tests.unit.cuda_bytes import FIGURES, LARGER, LIBRARY, MODELS, PRECISIONS, TRAINED, trace
from tests.unit.peaks import choose, foretell

SEEN = json.loads(FIGURES.read_text())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_what_a_step_on_a_gpu_keeps_and_holds_is_foretold(name: str, precision: str) -> None:
    """At a batch 64 times as large as the one that was traced."""
    if name in LIBRARY and SEEN["versions"]["transformers"] != transformers.__version__:
        pytest.skip("another version of Transformers may have another model of that name")
    _, _, graph = trace(name, "cuda", precision)
    assert graph.traced_by == "fake", graph.trace_note
    for which in TRAINED:
        kept, peak = SEEN[f"{name}, {precision}, {which}"]
        cost = foretell(
            graph,
            choose(graph, which),
            batch_size=LARGER * graph.batch_size,
            optimizer="sgd",
            precision=precision,
        )
        assert cost["activation_bytes"] == pytest.approx(kept, rel=0.02), which
        # torch rounds what it allocates up, by a mebibyte at most.
        beside = cost["workspace_bytes"]
        assert cost["peak_bytes"] - beside == pytest.approx(peak - beside, rel=0.06), which
