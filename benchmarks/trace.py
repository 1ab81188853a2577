"""An 80-layer, 70-billion-parameter Llama traced without weights: seconds and memory.

Run alone: python -m benchmarks.trace.
"""

import resource
import time

from app.freezing.config import FreezeConfig
from app.freezing.plan import plan_config
from app.freezing.trace import trace_model
from app.sources.models import build_model
from app.sources.spec import ModelSpec

LLAMA_70B = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip


def main() -> None:
    started = time.perf_counter()
    spec = ModelSpec("hf:llama", task="text-generation", random_init=True, kwargs=LLAMA_70B)
    built = build_model(spec, code_dirs=[], weightless=True)
    made = time.perf_counter()
    graph = trace_model(built.model, built.example)
    traced = time.perf_counter()
    cost = plan_config(graph, FreezeConfig()).cost
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{graph.parameter_count / 1e9:.1f} billion parameters, {len(graph.nodes):,} nodes, traced "
        f"by {graph.traced_by} tensors: built in {made - started:.1f} s, traced in "
        f"{traced - made:.1f} s, {peak / 2**30:.2f} GiB at most; a step is "
        f"{cost['step_flops'] / 1e12:.1f} TFLOP"
    )


if __name__ == "__main__":
    main()
