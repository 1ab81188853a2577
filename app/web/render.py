"""Turns a view into HTML: the template environment and its words for numbers, states and times."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import (
    Environment,
    FileSystemBytecodeCache,
    FileSystemLoader,
    StrictUndefined,
    pass_context,
)
from jinja2.bccache import Bucket
from jinja2.runtime import Context
from markupsafe import Markup

from app import __version__
from app.freezing.errors import InvalidDocument
from app.web.job_views import Shell

TEMPLATES = Path(__file__).resolve().parents[2] / "templates"
LONGEST_ADDRESS = 16_000
THIN_SPACE = "\u202f"
NOTHING = "–"

# state → (icon, word, meaning): the icon and the word carry the state, the colour only repeats it.
FLOW_STATES: Mapping[str, tuple[str, str, str]] = {
    "trained": ("flame", "trained", "at least one of its own trainable parameters gets a gradient"),
    "unreached": ("circle-dashed", "unreached", "trainable, but no gradient ever arrives"),
    "passes": ("arrow-left", "passes", "frozen; backward runs through it to something before it"),
    "idle": ("snowflake", "idle", "frozen; backward does not come here"),
}
BOX_STATES: Mapping[str, tuple[str, str]] = {
    "frozen": ("snowflake", "frozen"),
    "trainable": ("flame", "trainable"),
    "mixed": ("minus", "partly frozen"),
}
JOB_STATES: Mapping[str, tuple[str, str]] = {
    "queued": ("clock", "queued"),
    "starting": ("clock", "starting"),
    "running": ("play", "running"),
    "paused": ("pause", "paused"),
    "stopping": ("square", "stopping"),
    "stopped": ("square", "stopped"),
    "succeeded": ("check", "succeeded"),
    "failed": ("x", "failed"),
    "interrupted": ("triangle-alert", "interrupted"),
    "inspecting": ("clock", "inspecting"),
    "ready": ("check", "ready"),
}
VERDICTS: Mapping[str, tuple[str, str]] = {
    "holds": ("shield-check", "The proof holds"),
    "broken": ("shield-alert", "The proof is broken"),
    "pending": ("shield-ellipsis", "Not checked yet"),
}


class KeptTemplates(FileSystemBytecodeCache):
    """Compiled templates in a folder, as Python keeps its own.

    Those of another version of Frostline or Jinja, or of other options of this file, are apart.

    The first page after a start comes a tenth of a second sooner.
    """

    def __init__(self, folder: Path) -> None:
        ours = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
        super().__init__(str(folder), f"{__version__}-{jinja2.__version__}-{ours}-%s.jinja")

    def dump_bytecode(self, bucket: Bucket) -> None:
        with suppress(OSError):  # no room, or not ours to write to: compiled again at every start
            Path(self.directory).mkdir(exist_ok=True)
            super().dump_bytecode(bucket)


@cache
def environment() -> Environment:
    """The one template environment: everything escaped, nothing undefined passes."""
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        bytecode_cache=KeptTemplates(TEMPLATES / "__pycache__"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "count": format_count,
        "si": format_si,
        "bytes": format_bytes,
        "percent": format_percent,
        "duration": format_duration,
        "number": format_number,
        "time": format_time,
        "path": lambda text: quote(str(text), safe=""),
    }
    env.globals |= {
        "icon": icon,
        "FLOW_STATES": FLOW_STATES,
        "BOX_STATES": BOX_STATES,
        "JOB_STATES": JOB_STATES,
        "VERDICTS": VERDICTS,
        "version": __version__,
    }
    return env


def render_page(request: Request, template: str, view: Any, status: int = 200) -> HTMLResponse:
    """A whole page. A template sees `view`, and `root`: the path the app is under."""
    html = environment().get_template(template).render(view=view, root=root_path(request))
    return HTMLResponse(html, status)


def render_block(request: Request, template: str, block: str, view: Any) -> HTMLResponse:
    """One block of a page alone, exactly as the whole page would contain it."""
    page = environment().get_template(template)
    context = page.new_context({"view": view, "root": root_path(request)})
    return HTMLResponse("".join(page.blocks[block](context)))


def redirect(request: Request, path: str) -> RedirectResponse:
    """303 to a page of ours, so that a reload does not send the form again.

    Raises:
        InvalidDocument: what the address is to carry is longer than servers and proxies read.
    """
    if len(path) > LONGEST_ADDRESS:
        raise InvalidDocument(
            [("", f"{len(path):,} characters do not fit into an address; save the config instead.")]
        )
    return RedirectResponse(root_path(request) + path, 303)


def root_path(request: Request) -> str:
    return str(request.scope.get("root_path", "")).rstrip("/")


def shell(request: Request, title: str, section: str = "") -> Shell:
    """The frame of a page; `request` gives the address that login and links return to."""
    return Shell(title=title, section=section, path=request.url.path)


# ------------------------------------------------------------------------------- words for values


@pass_context
def icon(context: Context, name: str) -> Markup:
    """An icon from the sprite, silent to screen readers: a word stands beside it."""
    return Markup(
        '<svg class="icon" aria-hidden="true"><use href="{}/static/vendor/icons.svg#{}"/></svg>'
    ).format(context.get("root", ""), name)


def format_count(value: int | None) -> str:
    """1 234 567 with thin spaces."""
    return NOTHING if value is None else f"{value:,}".replace(",", THIN_SPACE)


def format_si(value: float | None, unit: str = "") -> str:
    """7.1 M: three significant digits and an SI prefix."""
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P", "E"), unit)


def format_bytes(value: float | None) -> str:
    """28 MB: powers of a thousand, as disks and torch's own reports have them."""
    return _scaled(value, 1000, ("B", "kB", "MB", "GB", "TB", "PB"), "")


def _scaled(value: float | None, base: int, prefixes: tuple[str, ...], unit: str) -> str:
    if value is None or not math.isfinite(value):
        return NOTHING
    size, index = float(value), 0
    while abs(size) >= base and index < len(prefixes) - 1:
        size, index = size / base, index + 1
    digits = 0 if (index == 0 and size == int(size)) or abs(size) >= 100 else 1
    suffix = prefixes[index] + unit
    return f"{size:.{digits}f}{THIN_SPACE}{suffix}" if suffix else f"{size:.{digits}f}"


def format_percent(share: float | None) -> str:
    if share is None or not math.isfinite(share):
        return NOTHING
    percent = 100 * share
    return f"{percent:.0f}{THIN_SPACE}%" if percent in (0, 100) else f"{percent:.1f}{THIN_SPACE}%"


def format_duration(seconds: float | None) -> str:
    """2 h 05 min, 3 min 20 s, 4.2 s, 12 ms."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    space = THIN_SPACE
    if seconds < 1:
        return f"{seconds * 1000:.3g}{space}ms"
    if seconds < 60:
        return f"{seconds:.3g}{space}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}{space}h {minutes:02d}{space}min"
    return f"{minutes}{space}min {rest:02d}{space}s"


def format_number(value: Any) -> str:
    """Four significant digits for measured numbers; anything that is not a number as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NOTHING if value is None else str(value)
    if isinstance(value, int):
        return format_count(value)
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def format_time(moment: str | None) -> Markup | str:
    """A time in UTC that live.js rewrites in the reader's own zone."""
    if not moment:
        return NOTHING
    when = datetime.fromisoformat(moment)
    exact = (when if when.tzinfo else when.replace(tzinfo=UTC)).astimezone(UTC)
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        exact.isoformat(), exact.isoformat(), exact.strftime("%d %b %H:%M UTC")
    )
