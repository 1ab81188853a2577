"""A job or a sweep as one HTML file that asks nobody for anything: to send to a colleague."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from app import __version__
from app.freezing.config import parse_rules
from app.service import Service
from app.web.drawing import Line, draw_curves, draw_heatmap
from app.web.job_views import JobView, ReportJob, ReportView, Shell
from app.web.pages.compare import metric_words
from app.web.pages.entries import text_of_rule
from app.web.pages.job import figures_of
from app.web.render import environment, format_percent, format_si
from app.web.sweep_table import build_view

Document = dict[str, Any]
STYLE = Path(__file__).resolve().parents[2] / "static" / "report.css"
POINTS = 400
CELLS = 200_000
STATS = (("grad_norm", "Gradient norm"), ("update_ratio", "Update / weight"))


def write_job_report(service: Service, job_id: int) -> str:
    """One job: what was told, planned, measured and proved."""
    job = _report_job(service, service.get_job(job_id))
    return _render(job.job.name, [job])


def write_sweep_report(service: Service, sweep_id: int) -> str:
    """A sweep: its table, the curves over each other, and each job."""
    sweep = service.get_sweep(sweep_id)
    title = sweep["name"] or f"Sweep {sweep_id}"
    table = build_view(service, sweep, Shell(title), "")
    found = [service.read_metrics(row["job_id"], points=POINTS) for row in sweep["table"]]
    names = list(dict.fromkeys(name for metrics in found for name in metrics))
    curves = [
        (
            metric_words(name),
            draw_curves(
                [
                    Line.of_series(row["set"], metrics[name])
                    for row, metrics in zip(sweep["table"], found, strict=True)
                    if name in metrics
                ]
            ),
        )
        for name in names
        if name != "lr"
    ]
    jobs = [_report_job(service, service.get_job(row["job_id"])) for row in sweep["table"]]
    return _render(title, jobs, table, curves)


def _render(
    title: str,
    jobs: Sequence[ReportJob],
    sweep: Any = None,
    curves: Sequence[tuple[str, Markup]] = (),
) -> str:
    style = Markup("<style>{}</style>").format(Markup(STYLE.read_text("utf-8")))  # noqa: S704
    now = datetime.now(UTC).strftime("%d %b %Y %H:%M UTC")
    view = ReportView(title, style, now, __version__, jobs, sweep, curves)
    return environment().get_template("report.html").render(view=view, root="")


def _report_job(service: Service, document: Document) -> ReportJob:
    job_id, config = document["id"], document["config"]
    metrics = service.read_metrics(job_id, points=POINTS)
    is_training = document["kind"] == "train"
    plan = service.plan_job(job_id)
    timeline = service.read_freeze(job_id) if is_training and plan else None
    return ReportJob(
        job=JobView(document),
        rules=[(rule.action, text_of_rule(rule)) for rule in parse_rules(config["rules"])],
        policies=[(key, config[key]) for key in ("mechanism", "norm_statistics", "dropout")],
        options=sorted(document["training"].items()),
        changes=timeline["changes"] if timeline else (),
        plan=_plan_rows(plan) if plan else (),
        figures=figures_of(service, document),
        proof=service.read_proof(job_id) if is_training else None,
        curves=[
            (metric_words(name), draw_curves([Line.of_series(metric_words(name), series)]))
            for name, series in metrics.items()
            if name != "lr"
        ],
        heatmaps=[_heatmap(service, job_id, stat, title, timeline) for stat, title in STATS]
        if is_training
        else (),
    )


def _heatmap(
    service: Service, job_id: int, stat: str, title: str, timeline: Document | None
) -> tuple[str, Markup]:
    points = max(60, min(POINTS * 2, CELLS // max(1, service.count_layers(job_id))))
    found = service.read_layers(job_id, stat, points)
    changes = timeline["changes"] if timeline else ()
    layers, steps, rows = found["layers"], found["steps"], found["values"]
    if timeline:  # a frozen layer that moved by nothing is empty, as on the page
        rows = [
            [
                None if value == 0 and _is_frozen(timeline, layer, step) else value
                for step, value in zip(steps, row, strict=True)
            ]
            for layer, row in zip(layers, rows, strict=True)
        ]
    return title, draw_heatmap(layers, steps, rows, changes)


def _is_frozen(timeline: Document, layer: str, step: int) -> bool:
    frozen = bool(timeline["layers"].get(layer))
    for change in timeline["changes"]:
        if change["step"] is not None and change["step"] <= step and layer in change["layers"]:
            frozen = change["action"] == "freeze"
    return frozen


def _plan_rows(plan: Document) -> list[tuple[str, str]]:
    """What the plan said before the first step."""
    cost = plan["cost"]
    flows: dict[str, int] = {}
    for layer in plan["layers"]:
        flows[layer["flow"]] = flows.get(layer["flow"], 0) + 1
    rows = [
        ("frozen tensors", f"{len(plan['frozen'])} of {len(plan['frozen'] + plan['trainable'])}"),
        ("layers", ", ".join(f"{count} {flow}" for flow, count in flows.items())),
    ]
    if cost.get("step_flops"):
        share = format_percent(cost["step_flops"] / cost["full_step_flops"])
        rows.append(
            ("work a step", f"{format_si(cost['step_flops'], 'FLOP')}, {share} of training all")
        )
    if cost.get("speedup_bound"):
        rows.append(("speed-up", f"at most {cost['speedup_bound']:.2f} ×"))
    return rows
