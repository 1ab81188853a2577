"""Jobs side by side: what they were told, what came out, the curves and updates over each other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from app.freezing.config import parse_rules
from app.web.guard import signed_in
from app.web.job_views import CompareRow, CompareView, JobView
from app.web.pages.entries import text_of_rule
from app.web.pages.job import figures_of
from app.web.pages.jobs import service_of, view_job, view_jobs
from app.web.render import format_bytes, format_duration, render_page, root_path, shell

router = APIRouter(dependencies=[Depends(signed_in)], include_in_schema=False)

Document = dict[str, Any]
COMPARED_JOBS = 6
LOWER_IS_BETTER = ("loss", "perplexity", "error")
NOT_RESULTS = ("lr", "grad_norm_total")


@router.get("/compare")
def show_compare(request: Request) -> Response:
    """Jobs side by side; ``jobs`` is a list of ids, or repeated as the list's form sends it."""
    service = service_of(request)
    parts = ",".join(request.query_params.getlist("jobs")).split(",")
    ids = list(dict.fromkeys(int(p) for p in parts if p.isascii() and p.isdigit() and len(p) < 19))
    page = shell(request, "Compare", "compare")
    if len(ids) < 2:
        message = "Tick at least two." if ids else ""
        choices, sweeps = view_jobs(service), service.list_sweeps()
        view = CompareView(page, (), choices=choices, sweeps=sweeps, message=message)
        return render_page(request, "compare.html", view)
    compared = [view_job(service, service.get_job(job_id)) for job_id in ids[:COMPARED_JOBS]]
    message = f"Only the first {COMPARED_JOBS} are shown." if len(ids) > COMPARED_JOBS else ""
    metrics = [service.read_metrics(job.id, points=2) for job in compared]
    results = _result_rows(compared, metrics)
    figures = [{f.label: f for f in figures_of(service, dict(job.document))} for job in compared]
    for label in ("step time", "peak memory"):
        foretold = [f[label].predicted if label in f else None for f in figures]
        results.append(CompareRow(f"{label}, predicted", foretold))
    view = CompareView(
        page, compared, setting_rows(compared), results, (), (), message,
        curves_of(compared, root_path(request)),
    )  # fmt: skip
    return render_page(request, "compare.html", view)


def curves_of(jobs: Sequence[JobView], root: str) -> str:
    """What the charts of several jobs are told, as JSON."""
    return json.dumps(
        [
            {
                "id": job.id,
                "name": job.name,
                "address": f"{root}/api/jobs/{job.id}",
                "color": index % COMPARED_JOBS,
            }
            for index, job in enumerate(jobs)
        ]
    )


def rules_text(config: Mapping[str, Any]) -> str:
    """The rules of a freeze config in one line."""
    rules = parse_rules(config.get("rules") or [])
    return "; ".join(f"{rule.action} {text_of_rule(rule)}" for rule in rules) or "none"


def setting_rows(jobs: Sequence[JobView]) -> list[CompareRow]:
    """What the jobs were told: model, data and rules always, all else only where it differs."""

    def row(label: str, read: Callable[[JobView], Any]) -> CompareRow:
        return CompareRow(label, [read(job) for job in jobs])

    def config(job: JobView) -> Mapping[str, Any]:
        return job.document.get("config") or {}

    always = [
        row("model", lambda job: job.model_uri),
        row("dataset", lambda job: job.dataset_uri),
        row("rules", lambda job: rules_text(config(job))),
        row("schedule", lambda job: _schedule_text(config(job))),
        row("frozen tensors", lambda job: f"{job.frozen_count} of {job.tensor_count}"),
    ]
    others = [row(key.replace("_", " "), _reader("config", key))
              for key in ("mechanism", "norm_statistics", "dropout", "groups")]  # fmt: skip
    for part in ("dataset", "training"):
        names = sorted({name for job in jobs for name in job.document.get(part) or {}} - {"uri"})
        others += [row(name.replace("_", " "), _reader(part, name)) for name in names]
    return always + [option for option in others if option.differs]


def _reader(part: str, name: str) -> Callable[[JobView], Any]:
    def read(job: JobView) -> Any:
        value = (job.document.get(part) or {}).get(name)
        return json.dumps(value) if isinstance(value, dict | list) else value

    return read


def _schedule_text(config: Mapping[str, Any]) -> str:
    entries = config.get("schedule") or []
    return "; ".join(
        f"{entry['action']} {entry.get('match') or 'type=' + entry.get('type', '')} after "
        + " ".join(f"{unit} {count}" for unit, count in entry["at"].items())
        for entry in entries
    ) or "none"  # fmt: skip


def _result_rows(jobs: Sequence[JobView], metrics: Sequence[Mapping[str, Any]]) -> list[CompareRow]:
    def shown(key: str) -> list[Any]:
        return [job.document.get(key) for job in jobs]

    rows = [
        CompareRow("state", [job.state for job in jobs]),
        CompareRow("steps", shown("step")),
        CompareRow("proof", shown("proof")),
    ]
    for name in sorted({name for series in metrics for name in series}):
        if name not in NOT_RESULTS:
            ends = [(series.get(name) or {}).get("values") or [None] for series in metrics]
            lower = any(word in name for word in LOWER_IS_BETTER)
            rows.append(best_row(metric_words(name), [end[-1] for end in ends], lower=lower))
    seconds = [ms / 1000 if ms else None for ms in shown("step_ms")]
    memory = [job.memory_bytes for job in jobs]
    rows.append(best_row("step time", seconds, lower=True, words=format_duration))
    rows.append(best_row("peak memory", memory, lower=True, words=format_bytes))
    return rows


def metric_words(name: str) -> str:
    """``eval/new/accuracy`` → "accuracy, new", in the words of the charts."""
    *_, measured = parts = name.split("/")
    if len(parts) < 3:
        return {"loss": "loss, training", "grad_norm_total": "gradient norm"}.get(name, name)
    return f"{measured}, {'held out' if parts[1] == 'eval' else parts[1]}"


def best_marks(values: Iterable[Any], *, lower: bool) -> list[bool]:
    """Which values are the best, where not all are the same; what is no number is never best."""
    values = list(values)
    numbers = [v for v in values if isinstance(v, int | float) and math.isfinite(v)]
    best = (min if lower else max)(numbers, default=None)
    return [len(set(numbers)) > 1 and value == best for value in values]


def best_row(
    label: str, values: Sequence[Any], *, lower: bool, words: Callable[[Any], str] | None = None
) -> CompareRow:
    """A row with its best values marked, shown in `words`."""
    shown = [words(value) for value in values] if words else values
    return CompareRow(label, shown, best_marks(values, lower=lower))
