"""Drawings that need no browser's help: curves as SVG, layers × steps as a PNG within one."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

# The ramp of the page's heatmap: no colour of it means frozen or trained.
RAMP = (
    (38, 24, 66), (73, 41, 121), (99, 68, 160), (104, 109, 180),
    (92, 152, 176), (98, 190, 154), (156, 220, 116), (238, 240, 120),
)  # fmt: skip
EMPTY, BAD, FIRST = 0, 1, 2  # entries of the palette: no value, not finite, the lowest colour
LEVELS = 254
DECADES = 6.0  # at most: one denormal must not flatten everything else
LABELS = 168
ROW = 14.0
TALLEST = 520.0


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: its steps, values, and the lowest and highest value of each bucket."""

    label: str
    steps: Sequence[float]
    values: Sequence[Any]
    lows: Sequence[Any]
    highs: Sequence[Any]

    @classmethod
    def of_series(cls, label: str, series: Mapping[str, Sequence[Any]]) -> Line:
        return cls(label, series["steps"], series["values"], series["min"], series["max"])


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def draw_curves(lines: Sequence[Line], width: int = 460, height: int = 190) -> Markup:
    """Curves over each other with their bands, axes and legend; colours are classes of the page."""
    left, right, top, bottom = 54, 8, 8, 22
    steps = [step for line in lines for step in line.steps]
    numbers = [
        float(v) for line in lines for v in (*line.lows, *line.highs, *line.values) if is_finite(v)
    ]
    if not steps or not numbers:
        return Markup("<p>No numbers.</p>")
    x0, x1, y0, y1 = min(steps), max(steps), min(numbers), max(numbers)
    if y1 == y0:
        y0, y1 = y0 - 0.5, y1 + 0.5

    def x(step: float) -> float:
        return left + (step - x0) / ((x1 - x0) or 1) * (width - left - right)

    def y(value: float) -> float:
        return top + (y1 - value) / (y1 - y0) * (height - top - bottom)

    parts = []
    for value in nice_ticks(y0, y1, 4):
        parts.append(f'<path class="grid" d="M{left} {y(value):.1f}H{width - right}"/>')
        parts.append(
            f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>'
        )
    for value in nice_ticks(x0, x1, 5):
        parts.append(
            f'<text x="{x(value):.1f}" y="{height - 6}" text-anchor="middle">{value:,.6g}</text>'
        )

    def place(steps: Sequence[float], values: Sequence[Any]) -> list[tuple[float, float]]:
        pairs = zip(steps, values, strict=True)
        return [(x(step), y(float(value))) for step, value in pairs if is_finite(value)]

    for number, line in enumerate(lines, 1):
        edge = place(line.steps, line.highs) + place(line.steps, line.lows)[::-1]
        parts.append(f'<polygon class="band line-{number}" points="{_points(edge)}"/>')
        curve = _points(place(line.steps, line.values))
        parts.append(f'<polyline class="curve line-{number}" points="{curve}"/>')
    legend = "".join(
        f'<span><i class="key line-{number}"></i>{escape(line.label)} <b>{_newest(line)}</b></span>'
        for number, line in enumerate(lines, 1)
    )
    return Markup(  # noqa: S704 (labels are escaped above, the rest are numbers)
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Curves">{"".join(parts)}</svg>'
        f'<p class="legend">{legend}</p>'
    )


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _newest(line: Line) -> str:
    return next((f"{v:.4g}" for v in reversed(line.values) if is_finite(v)), "–")


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between two bounds, about `count` of them."""
    rough = (high - low) / max(1, count)
    if rough <= 0 or not math.isfinite(rough):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    every = next(n * power for n in (1, 2, 5, 10) if n * power >= rough * 0.999)
    first = math.ceil(low / every - 1e-9)
    return [i * every for i in range(first, math.floor(high / every + 1e-9) + 1)]


# ------------------------------------------------------------------------------------- the heatmap


def draw_heatmap(
    layers: Sequence[str],
    steps: Sequence[int],
    values: Sequence[Sequence[Any]],
    changes: Sequence[Mapping[str, Any]] = (),
    width: int = 940,
) -> Markup:
    """Layers × steps by the logarithm of the values, with marks where something was (un)frozen.

    Args:
        values: a row a layer; None stays empty, what is not finite is marked.
        changes: each with its first `step`, its `action` and the `layers` that it turned.
    """
    if not layers or not steps:
        return Markup("<p>No steps.</p>")
    low, high = color_range(values)
    row = min(ROW, TALLEST / len(layers))
    left = LABELS if row >= 9 else 0
    top, height = 14.0, row * len(layers)
    plot = width - left
    first, last = steps[0], steps[-1]

    def x(step: float) -> float:
        return left + (step - first) / max(1, last + 1 - first) * plot

    image = base64.b64encode(encode_png(values, low, high)).decode()
    parts = [
        f'<rect class="empty" x="{left}" y="{top}" width="{plot}" height="{height:.1f}"/>',
        f'<image x="{left}" y="{top}" width="{plot}" height="{height:.1f}" '
        f'preserveAspectRatio="none" image-rendering="pixelated" '
        f'href="data:image/png;base64,{image}"/>',
    ]
    if left:
        for index, name in enumerate(layers):
            shown = name if len(name) <= 26 else f"…{name[-25:]}"
            parts.append(
                f'<text class="mono" x="0" y="{top + (index + 0.75) * row:.1f}">'
                f"<title>{escape(name)}</title>{escape(shown or '(model)')}</text>"
            )
    for change in changes:
        if change["step"] is None or not first <= change["step"] <= last:
            continue
        at, turned = x(change["step"]), set(change["layers"])
        parts += [
            f'<path class="mark {escape(change["action"])}" '
            f'd="M{at:.1f} {top + index * row:.1f}v{row:.1f}"/>'
            for index, name in enumerate(layers)
            if name in turned
        ]
        sign = "❄" if change["action"] == "freeze" else "▲"
        parts.append(
            f'<text class="mark {escape(change["action"])}" x="{at:.1f}" y="10" '
            f'text-anchor="middle">{sign}</text>'
        )
    for tick in nice_ticks(first, last, 8):
        if tick == int(tick) and left + 8 < x(tick) < width - 16:
            parts.append(
                f'<text x="{x(tick):.1f}" y="{top + height + 14:.1f}" '
                f'text-anchor="middle">{int(tick):,}</text>'
            )
    whole = top + height + 18
    ramp = base64.b64encode(encode_png([[10.0 ** (i / 60) for i in range(240)]], 0, 239 / 60))
    return Markup(  # noqa: S704 (names are escaped above, the rest are numbers)
        f'<svg viewBox="0 0 {width} {whole:.0f}" role="img" aria-label="Layers over steps">'
        f"{''.join(parts)}</svg>"
        f'<p class="legend"><span>{10**low:.0e}</span><img width="120" height="8" alt="" '
        f'src="data:image/png;base64,{ramp.decode()}"><span>{10**high:.0e}, logarithmic; '
        "blank: no value</span></p>"
    )


def color_range(values: Sequence[Sequence[Any]]) -> tuple[float, float]:
    """Where the colours begin and end, in powers of ten."""
    positive = [float(v) for row in values for v in row if is_finite(v) and v > 0]
    if not positive:
        return 0.0, 1.0
    high = math.log10(max(positive))
    low = max(math.log10(min(positive)), high - DECADES)
    return (low, high) if high - low > 1e-6 else (low - 0.5, high + 0.5)


def encode_png(values: Sequence[Sequence[Any]], low: float, high: float) -> bytes:
    """A matrix as a PNG with a palette, a pixel a cell; what has no value is transparent."""
    factor = (LEVELS - 1) / (high - low)

    def pixel(value: Any) -> int:
        if value is None:
            return EMPTY
        if not is_finite(value):
            return BAD
        level = math.log10(value) if value > 0 else low
        return FIRST + min(LEVELS - 1, max(0, round((level - low) * factor)))

    rows = b"".join(b"\0" + bytes(pixel(value) for value in row) for row in values)
    palette = bytes((0, 0, 0, 208, 42, 42)) + b"".join(
        _color(i / (LEVELS - 1)) for i in range(LEVELS)
    )
    header = struct.pack(">IIBBBBB", len(values[0]), len(values), 8, 3, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"PLTE", palette), (b"tRNS", b"\0"),
              (b"IDAT", zlib.compress(rows, 6)), (b"IEND", b""))  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _color(share: float) -> bytes:
    at = share * (len(RAMP) - 1)
    low = min(int(at), len(RAMP) - 2)
    pairs = zip(RAMP[low], RAMP[low + 1], strict=True)
    return bytes(round(a + (b - a) * (at - low)) for a, b in pairs)
