"""The page about the machine: devices, slots, the warm process, disk, settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from app.web.guard import signed_in
from app.web.render import NOTHING, format_bytes, render_page, shell
from app.web.views import SystemView

router = APIRouter(dependencies=[Depends(signed_in)], include_in_schema=False)


@router.get("/system")
def show_system(request: Request) -> Response:
    report = request.app.state.service.system_report()
    view = SystemView(
        shell(request, "System", "system"), report.get("devices") or (), _sections(report)
    )
    return render_page(request, "system.html", view)


def _sections(report: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """The report in groups; members that this page does not know are shown as they are."""
    versions = [(key, report[key]) for key in ("version", "python", "torch") if key in report]
    slots = [
        (name, f"{slot['busy']} of {slot['total']} busy" if slot["total"] else "none here")
        for name, slot in (report.get("slots") or {}).items()
    ]
    keeper = report.get("keeper") or {}
    warm = [
        ("state", "ready" if keeper.get("ready") else "warming up"),
        ("process", keeper.get("pid") or NOTHING),
        ("torch loaded ahead", "yes" if keeper.get("preloaded") else "no"),
    ]
    space = [
        (f"{kind}, {part}", format_bytes(value))
        for kind in ("memory", "disk")
        for part, value in (report.get(kind) or {}).items()
    ]
    space.append(("database", format_bytes(report.get("database_bytes"))))
    places = [
        (key.replace("_", " "), _list(report.get(key)))
        for key in ("data_dir", "code_dirs", "file_dirs", "worker_python")
    ]
    jobs = list((report.get("jobs") or {}).items()) or [("none yet", "")]
    return [
        ("Software", versions),
        ("Slots", slots),
        ("Warm process", warm),
        ("Space", space),
        ("Places", places),
        ("Jobs by state", jobs),
    ]


def _list(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value) if value else "none"
