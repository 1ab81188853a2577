// Line charts with uPlot: buckets with their spikes, zoom and pan that ask for more, log by hand, marks of what changed.
import uPlot from "./vendor/uplot.js";

const HEIGHT = 190;
export const SERIES = ["series-1", "series-2", "series-3", "series-4", "series-5", "series-6"];

export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
export const brief = (value) => (Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(2).replace(/\.?0+e/, "e") : String(Number(value.toPrecision(4))));

export async function read(address, query = {}) {
  const response = await fetch(`${address}?${new URLSearchParams(query)}`);
  if (!response.ok) throw new Error(`${address} answered ${response.status}`);
  return response.json();
}

// The glyphs of frozen and trained, for canvases.
export function glyph(context, action, x, y, size) {
  const r = size / 2;
  context.beginPath();
  if (action === "freeze") {
    for (let i = 0; i < 3; i++) {
      const [dx, dy] = [Math.cos((i * Math.PI) / 3 + Math.PI / 2) * r, Math.sin((i * Math.PI) / 3 + Math.PI / 2) * r];
      context.moveTo(x - dx, y - dy);
      context.lineTo(x + dx, y + dy);
    }
    context.stroke();
  } else {
    context.moveTo(x, y - r);
    context.quadraticCurveTo(x + r * 1.3, y + r * 0.5, x, y + r);
    context.quadraticCurveTo(x - r * 1.3, y + r * 0.5, x, y - r);
    context.fill();
  }
}

export class Chart {
  // ask(range): zoomed to [from, to], or to everything with null. A chart of whole steps asks the server.
  constructor(parent, title, { ask = () => {}, log = false, unit = "step", wide = false } = {}) {
    this.ask = ask;
    this.title = title;
    this.unit = unit;
    this.isLog = false;
    this.zoom = null;
    this.marks = [];
    this.lines = [];
    this.element = document.createElement("figure");
    this.element.className = wide ? "chart wide" : "chart";
    this.element.innerHTML = '<figcaption><span></span><span class="note"></span><button type="button" class="quiet" aria-pressed="false" hidden>log</button><button type="button" class="quiet" hidden>whole</button></figcaption><div class="plot" tabindex="0" role="group"></div>';
    [this.caption, this.lost, this.logButton, this.wholeButton] = this.element.firstChild.children;
    this.caption.textContent = title;
    this.logButton.hidden = !log;
    this.logButton.setAttribute("aria-label", `log: ${title} on a logarithmic axis`);
    this.wholeButton.setAttribute("aria-label", `whole: all steps of ${title}`);
    this.box = this.element.lastChild;
    parent.append(this.element);
    this.logButton.addEventListener("click", () => this.setLog(!this.isLog));
    this.wholeButton.addEventListener("click", () => this.zoomTo(null));
    this.box.addEventListener("keydown", (event) => this.steer(event));
    this.resized = new ResizeObserver(() => this.plot && this.plot.width !== this.width && this.plot.setSize({ width: this.width, height: HEIGHT }));
    this.resized.observe(this.element);
    document.addEventListener("theme:changed", () => this.rebuild());
  }

  get width() {
    return Math.max(this.element.clientWidth, 200);
  }

  setLog(isLog) {
    this.isLog = isLog;
    this.logButton.setAttribute("aria-pressed", isLog);
    this.show(this.lines);
  }

  // On a log axis of its own uPlot hangs for some ranges: we draw logarithms on a linear one, and label powers of ten.
  level(value) {
    if (!isNumber(value)) return null;
    if (!this.isLog) return value;
    return value > 0 ? Math.log10(value) : null;
  }

  // lines: [{label, steps, values, min, max, color}]; marks: [{step, action, words}]
  show(lines, marks = this.marks) {
    this.lines = lines;
    this.marks = marks;
    const tables = lines.map((line) => [line.steps, ...[line.max, line.min, line.values].map((column) => column.map((v) => this.level(v)))]);
    this.data = tables.length ? uPlot.join(tables) : [[]];
    this.lostAt = lines.flatMap((line) => line.steps.filter((_, i) => [line.min[i], line.max[i], line.values[i]].some((v) => v !== null && !isNumber(v))));
    this.lost.textContent = this.lostAt.length ? `${this.lostAt.length} not finite` : "";
    this.lost.classList.toggle("fault", this.lostAt.length > 0);
    const built = `${lines.map((line) => line.label).join("\n")}${this.isLog}`;
    if (built !== this.built) {
      this.built = built;
      this.rebuild();
    } else {
      this.plot.setData(this.data, !this.zoom);
    }
    this.box.setAttribute("aria-label", this.describe());
  }

  describe() {
    const ends = this.lines.map((line) => {
      const numbers = line.values.filter(isNumber);
      return numbers.length ? `${line.label} from ${brief(numbers[0])} to ${brief(numbers.at(-1))}` : `${line.label} without a value`;
    });
    return `${this.title}: ${ends.join("; ")}. Arrow keys read, plus and minus zoom, 0 shows all.`;
  }

  rebuild() {
    if (!this.data) return;
    this.plot?.destroy();
    const zoom = this.zoom;
    const axis = { stroke: css("muted"), grid: { stroke: css("grid"), width: 1 }, ticks: { show: false }, font: `11px ${css("sans")}`, gap: 4 };
    const shown = (value) => (this.isLog ? 10 ** value : value);
    // Without a cursor the legend reads the newest value, so that nothing jumps when one comes.
    const value = (plot, raw, index) => {
      const level = raw ?? plot.data[index].findLast((v) => v != null);
      return level == null ? "–" : brief(shown(level));
    };
    const whole = (raw) => (raw == null ? "–" : Number(raw.toFixed(2)).toLocaleString());
    const series = [{ label: this.unit, value: (plot, raw) => whole(raw ?? plot.data[0].at(-1)) }];
    const bands = [];
    this.lines.forEach((line, i) => {
      const color = css(SERIES[line.color ?? i % SERIES.length]);
      const first = series.length;
      for (const edge of ["max", "min"]) series.push({ label: `${line.label} ${edge}`, stroke: `${color}55`, width: 1, points: { show: false }, spanGaps: true, class: "edge" });
      series.push({ label: line.label, stroke: color, width: 1.5, dash: line.color === undefined && i >= SERIES.length ? [6, 4] : undefined, spanGaps: true, points: { show: line.steps.length < 30, size: 4, fill: color }, value });
      bands.push({ series: [first, first + 1], fill: `${color}22` });
    });
    this.plot = new uPlot(
      {
        width: this.width,
        height: HEIGHT,
        series,
        bands,
        axes: [{ ...axis, size: 26 }, { ...axis, size: 52, values: (_, ticks) => ticks.map((v) => (this.isLog && v % 1 ? "" : brief(shown(v)))) }],
        scales: { x: { time: false, range: (_, low, high) => [low, high > low ? high : low + 1] } },
        cursor: { drag: { x: true, y: false, setScale: false }, points: { size: 6 }, bind: { dblclick: () => () => this.zoomTo(null), mousedown: (_, target, handler) => (event) => (event.shiftKey ? this.pan(event) : handler(event)) } },
        hooks: {
          setSelect: [(plot) => plot.select.width > 4 && this.zoomTo([plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x")])],
          draw: [(plot) => this.mark(plot)],
        },
      },
      this.data,
      this.box,
    );
    this.plot.root.querySelector("table")?.setAttribute("role", "presentation");
    if (zoom) this.plot.setScale("x", { min: zoom[0], max: zoom[1] });
  }

  // Where something was frozen or unfrozen, and where a value was no number.
  mark(plot) {
    const { ctx: context, bbox } = plot;
    const ratio = devicePixelRatio || 1;
    const place = (step) => plot.valToPos(step, "x", true);
    const isInside = (x) => x >= bbox.left && x <= bbox.left + bbox.width;
    context.save();
    context.lineWidth = ratio;
    for (const mark of this.marks) {
      const x = place(mark.step);
      if (!isInside(x)) continue;
      context.strokeStyle = context.fillStyle = css(mark.action === "freeze" ? "ice" : "ember");
      context.setLineDash([3 * ratio, 3 * ratio]);
      context.beginPath();
      context.moveTo(x, bbox.top + 12 * ratio);
      context.lineTo(x, bbox.top + bbox.height);
      context.stroke();
      context.setLineDash([]);
      glyph(context, mark.action, x, bbox.top + 6 * ratio, 9 * ratio);
    }
    context.strokeStyle = css("bad");
    context.lineWidth = 1.5 * ratio;
    context.beginPath();
    for (const step of this.lostAt) {
      const [x, y, r] = [place(step), bbox.top + bbox.height - 5 * ratio, 3 * ratio];
      if (!isInside(x)) continue;
      context.moveTo(x - r, y - r);
      context.lineTo(x + r, y + r);
      context.moveTo(x + r, y - r);
      context.lineTo(x - r, y + r);
    }
    context.stroke();
    context.restore();
  }

  // ---- moving about
  get range() {
    return [this.plot.scales.x.min, this.plot.scales.x.max];
  }

  zoomTo(range) {
    this.zoom = range;
    this.wholeButton.hidden = !range;
    this.plot.setSelect({ left: 0, width: 0 }, false);
    if (range) this.plot.setScale("x", { min: range[0], max: range[1] });
    else this.plot.setData(this.data);
    clearTimeout(this.asking);
    this.asking = setTimeout(() => this.ask(range && [Math.floor(range[0]), Math.ceil(range[1])]), range ? 120 : 0);
  }

  pan(event) {
    event.preventDefault();
    const [low, high] = this.range;
    const scale = (high - low) / this.plot.over.clientWidth;
    let frame = 0; // drawn once a frame, however often the mouse moves
    const move = (next) => {
      cancelAnimationFrame(frame);
      const by = (event.clientX - next.clientX) * scale;
      frame = requestAnimationFrame(() => this.zoomTo([low + by, high + by]));
    };
    const end = () => {
      removeEventListener("pointermove", move);
      removeEventListener("pointerup", end);
    };
    addEventListener("pointermove", move);
    addEventListener("pointerup", end);
  }

  steer(event) {
    const [low, high] = this.range;
    const span = high - low;
    const moves = {
      "+": [low + span / 4, high - span / 4],
      "-": [low - span / 2, high + span / 2],
      PageUp: [low - span / 2, high - span / 2],
      PageDown: [low + span / 2, high + span / 2],
    };
    if (event.key === "0") this.zoomTo(null);
    else if (event.key in moves) this.zoomTo(moves[event.key]);
    else if (["ArrowLeft", "ArrowRight"].includes(event.key)) {
      const last = this.data[0].length - 1;
      const at = (this.plot.cursor.idx ?? last) + (event.key === "ArrowLeft" ? -1 : 1);
      this.plot.setCursor({ left: this.plot.valToPos(this.data[0][Math.max(0, Math.min(at, last))], "x"), top: HEIGHT / 2 });
    } else return;
    event.preventDefault();
  }

  remove() {
    this.resized.disconnect();
    this.plot?.destroy();
    this.element.remove();
  }
}
