"""The page about the machine: how things are, devices, what runs and waits, disk use, versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from app.web.guard import signed_in
from app.web.render import format_bytes, render_page, shell
from app.web.views import SystemView

router = APIRouter(dependencies=[Depends(signed_in)], include_in_schema=False)


@router.get("/system")
def show_system(request: Request) -> Response:
    report = request.app.state.service.system_report()
    view = SystemView(shell(request, "System", "system"), report, _sections(report))
    return render_page(request, "system.html", view)


def _sections(report: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """What is looked up rather than watched, in groups of (label, value)."""
    memory = report["memory"]
    places = ("data_dir", "code_dirs", "file_dirs", "worker_python")
    return [
        ("Software", [(f"{key}", report[key]) for key in ("version", "python", "torch")]),
        (
            "Memory of this machine",
            [
                ("the server takes", format_bytes(memory["server"])),
                ("available", format_bytes(memory["available"])),
                ("in all", format_bytes(memory["total"])),
            ],
        ),
        ("Places", [(key.replace("_", " "), _list(report[key])) for key in places]),
        ("Jobs by state", list(report["jobs"].items()) or [("none yet", "")]),
    ]


def _list(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value) if value else "none"
