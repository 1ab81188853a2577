"""Every component on one page with made-up contents, for designers and for the browser tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from app.web.guard import signed_in
from app.web.job_views import Insight, JobView
from app.web.render import JOB_STATES, render_page, shell
from app.web.views import (
    Change,
    EntryRow,
    Fault,
    Field,
    Measure,
    PatternsView,
    PlanPanel,
    TreeRow,
    TrialRow,
    TrialView,
)

router = APIRouter(dependencies=[Depends(signed_in)], include_in_schema=False)

Document = dict[str, Any]
LONG_NAME = "model.decoder.layers.11.self_attn.attention_output_projection.parametrizations.weight"


@router.get("/patterns")
def show_patterns(request: Request) -> Response:
    view = PatternsView(
        shell=shell(request, "Patterns"),
        tree=_rows(),
        jobs=[
            _job(i, state)
            for i, state in enumerate(JOB_STATES, 1)
            if state not in ("ready", "inspecting")
        ],
        proofs=_proofs(),
        rules=[
            EntryRow(("freeze", "encoder.layer.{0..8}.**"), 144, 63_800_000),
            EntryRow(("unfreeze", "type=LayerNorm"), 25, 19_200),
            EntryRow(("unfreeze", "nothing.*"), 0, 0),
            EntryRow(
                ("freeze", "layer.{0.."), None, None, "The brace in 'layer.{0..' is never closed."
            ),
        ],
        fields=[
            Field("train.dataset", "dataset", "demo:digits"),
            Field("train.lr", "learning rate", "-1", fault="'lr' is -1; it must be above 0."),
            Field("train.optimizer", "optimizer", "adamw", choices=("sgd", "adam", "adamw")),
            Field("train.epochs", "epochs", "", "3", numeric=True, help="Whole passes."),
        ],
        phases=[
            EntryRow(("epoch", "2", "unfreeze", "keep", "encoder.layer.11.**"), 16, 7_087_872),
            EntryRow(
                ("step", "soon", "freeze", "fresh", "fc"),
                2,
                570,
                "'soon' is not a whole number of steps.",
            ),
            EntryRow(("epoch", "1", "unfreeze", "fresh", "")),
        ],
        groups=[EntryRow(("10", "0", "classifier.**"), 2, 7_690), EntryRow(("", "", ""))],
        differences=[("frozen", ("encoder.layer.0.weight", "encoder.layer.0.bias"))],
        changes=[
            Change("Would be frozen", ("head.weight",), ("head.weight", "head.bias")),
            Change("Would be trainable", (), ("encoder.layer.11.weight",)),
        ],
        trials=_trials(request),
        insights=_insights(),
        running=_job(3, "running"),
        plan=_plan(),
        faults=[
            Fault(
                "rules.0.match",
                "'layer5' is not a module of resnet-tiny. Its top modules are conv1, fc.",
            )
        ],
    )
    return render_page(request, "patterns.html", view)


def _rows() -> list[TreeRow]:
    row = TreeRow(
        kind="module",
        index=0,
        parent=-1,
        path="vit",
        label="vit",
        detail="ViTModel",
        level=1,
        numel=86_600_000,
        size_share=1.0,
        frozen_share=0.75,
        box="mixed",
        flow="",
        because="",
        expandable=True,
        expanded=True,
        shared_with=(),
        line="",
    )
    flows = [
        ("frozen", "idle"),
        ("frozen", "passes"),
        ("trainable", "trained"),
        ("trainable", "unreached"),
    ]
    states = [
        replace(
            row,
            index=index,
            parent=0,
            path=f"vit.layer.{index}",
            label=f"layer.{index}",
            detail="ViTLayer",
            level=2,
            numel=7_087_872,
            size_share=0.08 * index,
            frozen_share=float(box == "frozen"),
            box=box,
            flow=flow,
            expanded=False,
            line="above" if index == 2 else "",
        )
        for index, (box, flow) in enumerate(flows, 1)
    ]
    tied = replace(
        states[0],
        kind="parameter",
        index=5,
        path="vit.weight",
        label="weight",
        detail="30 522 × 768",
        flow="",
        expandable=False,
        shared_with=("head.decoder.weight",),
    )
    bare = replace(
        states[0],
        index=6,
        path="vit.act",
        label="act",
        detail="GELU",
        numel=0,
        box="",
        flow="",
        expandable=False,
    )
    return [row, *states, tied, bare, replace(states[2], index=7, path=LONG_NAME, label=LONG_NAME)]


def _job(number: int, state: str) -> JobView:
    document = {
        "id": number,
        "state": state,
        "kind": "train",
        "name": f"a job that is {state}",
        "step": 61,
        "total_steps": 105,
        "error": None,
        "model": {"uri": "demo:digits"},
        "dataset": {"uri": "demo:digits"},
    }
    return JobView(document, "0,2 16,6 32,11 48,9 64,15 80,18")


def _proofs() -> list[dict[str, object]]:
    held = {"checked": 128, "identical": 128, "changed": []}
    moved = {"checked": 20, "moved": 20, "still": []}
    moved_by = {
        "name": "layer2.weight",
        "largest_difference": 7.1e-4,
        "is_exact": True,
        "cause": "the optimizer moved it: it had a gradient when it was frozen",
    }
    broken = {"checked": 128, "identical": 127, "changed": [moved_by]}
    still = {"checked": 20, "moved": 19, "still": [{"name": "mask_token", "cause": "unreached"}]}
    return [
        {"verdict": "holds", "step": 1240, "frozen": held, "trained": moved, "buffers": {}},
        {"verdict": "broken", "step": 12, "frozen": broken, "trained": still, "buffers": {}},
        {"verdict": "pending", "frozen": {}, "trained": {}, "buffers": {}},
    ]


def _insights() -> list[Insight]:
    rest = "encoder.layer.0 has come to rest. A candidate for freezing from here on."
    lost = "The gradient of fc exploded: for a step it was a hundred times its usual size."
    still = [("encoder.layer.0", "from step 900 on at most 0.02 %, at first 4 %")]
    return [
        Insight("converged", rest, still, 1, can_freeze=True, rerun_address="/models"),
        Insight("explodes", lost, [("fc", "412 by step 73, usually 1.3")], 1),
    ]


def _trials(request: Request) -> list[TrialView]:
    """One that is under way, one that found something, one that could not be."""
    nothing = {"error": None, "result": None, "progress": None, "id": 0}
    trained = {"sgd": ("same", "same"), "adamw": ("same", "5.0e-03")}
    says = ["No gradient of what is frozen is computed or kept.", "Weight decay moves it."]
    found = {
        "frozen": 9,
        "trained": 20,
        "steps": 5,
        "setting": {"name": "AdamW"},
        "on": "example",
        "device": "cpu",
        "mechanisms": [
            {"mechanism": name, "says": [words]}
            for name, words in zip(("requires_grad", "zero_grad"), says, strict=True)
        ],
    }
    rows = [
        TrialRow("peak memory", "", ("1.1 MB", "1.2 MB")),
        TrialRow("what is frozen", "after these steps", ("identical", "moved")),
    ]
    frame = shell(request, "Patterns")
    wrong = {"reason": "bad_spec", "message": "Nothing is trainable under this freeze config."}
    tasks: list[Document] = [
        {**nothing, "kind": "mechanisms", "state": "running", "progress": "zero_lr, step 3"},
        {**nothing, "kind": "mechanisms", "state": "succeeded", "result": found},
        {**nothing, "kind": "mechanisms", "state": "failed", "error": wrong},
    ]
    settings = [TrialRow(name, "", values) for name, values in trained.items()]
    return [TrialView(frame, 1, task, rows=rows, settings=settings) for task in tasks]


def _plan() -> PlanPanel:
    return PlanPanel(
        trainable_numel=7_100_000,
        frozen_numel=79_500_000,
        trainable_tensors=20,
        frozen_tensors=180,
        speedup_bound=2.4,
        predicted_step_ms=41.7,
        timed_on={"device": "cpu", "threads": 2, "batch_sizes": [8, 32]},
        is_traced=True,
        flops=(
            Measure("forward", 35.1e9, 35.1e9, 105.3e9),
            Measure("backward", 8.4e9, 70.2e9, 105.3e9),
            Measure("step", 43.5e9, 105.3e9, 105.3e9),
        ),
        memory=(
            Measure("weights", 346e6, 346e6, 3.5e9),
            Measure("gradients", 28e6, 346e6, 3.5e9),
            Measure("optimizer", 57e6, 692e6, 3.5e9),
            Measure("saved activations", None, 2.1e9, 3.5e9),
            Measure("peak", 741e6, 3.5e9, 3.5e9),
        ),
        fits={"cpu": True, "cuda:0": False},
        assumed={"batch_size": 32, "optimizer": "adamw"},
        warnings=[
            {
                "code": "norm_statistics",
                "message": "Frozen BatchNorm would go on moving its running mean.",
                "names": ["layer1.bn1", "layer1.bn2"],
            }
        ],
    )
