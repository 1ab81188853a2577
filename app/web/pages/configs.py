"""The pages of saved freeze configs: open, rename, duplicate, download, delete, compare two."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import APIRouter, Depends, Form, Request, Response

from app.service import Service
from app.web.guard import signed_in
from app.web.pages.entries import COLUMNS, entries_of
from app.web.pages.workbench import POLICIES
from app.web.render import (
    format_bytes,
    format_count,
    format_percent,
    format_si,
    redirect,
    render_page,
    shell,
)
from app.web.views import CompareConfigsView, ConfigsView, Pair

router = APIRouter(dependencies=[Depends(signed_in)], include_in_schema=False)

# What the service adds to a freeze config; the rest is the document itself.
OWN_MEMBERS = ("id", "created_at", "updated_at", "frozen_count", "trainable_count")


def service_of(request: Request) -> Service:
    return request.app.state.service


@router.get("/configs")
def show_configs(request: Request) -> Response:
    return render_page(request, "configs.html", _list_view(request))


def _list_view(request: Request, message: str = "") -> ConfigsView:
    service = service_of(request)
    models = {model["id"]: model for model in service.list_models(limit=1000)}
    page = shell(request, "Configs", "configs")
    return ConfigsView(page, service.list_configs(), models, message)


@router.get("/configs/compare")
def compare_configs(request: Request) -> Response:
    """Two saved configs side by side: ``config=1&config=2``."""
    service = service_of(request)
    ids = [int(i) for i in request.query_params.getlist("config") if _is_id(i)]
    if len(ids) != 2:
        message = f"Tick two freeze configs to compare; {len(ids)} are ticked."
        return render_page(request, "configs.html", _list_view(request, message), 422)
    configs = [service.get_config(config_id) for config_id in ids]
    models = [service.get_model(config["model_id"]) for config in configs]
    plans = [service.make_plan(config["model_id"], config) for config in configs]
    frozen = [set(config["frozen"]) for config in configs]
    view = CompareConfigsView(
        shell(request, "Compare configs", "configs"),
        configs,
        models,
        _compare_rows(configs, models, plans),
        [[f"{kind} {words}" for kind, words in _entries(config)] for config in configs],
        [[n for n in configs[i]["frozen"] if n not in frozen[1 - i]] for i in (0, 1)],
    )
    return render_page(request, "compare_configs.html", view)


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 19


def _entries(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Its rules, phases and groups, each as (kind, words)."""
    return [
        (" ".join(entry[:-1]) if kind == "rule" else f"{kind} {' '.join(entry[:-1])}", entry[-1])
        for kind in COLUMNS
        for entry in entries_of(kind, config)
    ]


def _compare_rows(
    configs: Sequence[dict[str, Any]],
    models: Sequence[dict[str, Any]],
    plans: Sequence[dict[str, Any]],
) -> list[tuple[str, list[Pair]]]:
    costs = [plan["cost"] for plan in plans]

    def row(label: str, values: Iterable[str]) -> Pair:
        return Pair(label, list(values))

    def share(key: str) -> list[str]:
        wholes = [(cost.get("full") or {}).get(key) for cost in costs]
        return [
            f"{format_si(cost.get(key))}, {format_percent(cost[key] / whole)}" if whole else "–"
            for cost, whole in zip(costs, wholes, strict=True)
        ]

    def size(key: str) -> list[str]:
        return [format_bytes(cost.get(key)) for cost in costs]

    chosen = [row("model", (model["uri"] for model in models))]
    chosen += [row(key.replace("_", " "), (config[key] for config in configs)) for key in POLICIES]
    figures = [
        row("frozen tensors", (format_count(len(plan["frozen"])) for plan in plans)),
        row("trainable tensors", (format_count(len(plan["trainable"])) for plan in plans)),
        row("backward FLOPs, of full", share("backward_flops")),
        row("step FLOPs, of full", share("step_flops")),
        row("speedup, at most", (f"{cost.get('speedup_bound') or 0:.2f} ×" for cost in costs)),
        row("gradients", size("gradient_bytes")),
        row("optimizer", size("optimizer_bytes")),
        row("saved activations", size("activation_bytes")),
        row("peak memory", size("peak_bytes")),
        row("findings", (str(len(plan["warnings"])) for plan in plans)),
    ]
    return [("What was chosen", chosen), ("What it does", figures)]


def _read_document(service: Service, config_id: int) -> dict[str, Any]:
    config = service.get_config(config_id)
    return {key: value for key, value in config.items() if key not in OWN_MEMBERS}


@router.post("/configs/{config_id}/rename")
def rename_config(request: Request, config_id: int, name: str = Form("")) -> Response:
    service = service_of(request)
    service.replace_config(config_id, {**_read_document(service, config_id), "name": name.strip()})
    return redirect(request, "/configs")


@router.post("/configs/{config_id}/duplicate")
def duplicate_config(request: Request, config_id: int) -> Response:
    service = service_of(request)
    document = _read_document(service, config_id)
    service.save_config({**document, "name": f"{document.get('name') or 'unnamed'} (copy)"})
    return redirect(request, "/configs")


@router.post("/configs/{config_id}/delete")
def delete_config(request: Request, config_id: int) -> Response:
    service_of(request).delete_config(config_id)
    return redirect(request, "/configs")
