// Line charts with uPlot: buckets with their spikes, zoom and pan that ask for more, log by hand, marks of what changed.
import uPlot from "./vendor/uplot.js";

const HEIGHT = 190;
const JUTS = 8; // pixels
const PALE = 0.22;
const BUCKETS_PANNED = 120; // of a line in sight
const BUCKETS_AT_REST = 8_000; // of all lines in sight
export const SERIES = ["series-1", "series-2", "series-3", "series-4", "series-5", "series-6"];

export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
export const brief = (value) => (Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(2).replace(/\.?0+e/, "e") : String(Number(value.toPrecision(4))));

export async function read(address, query = {}, options = {}) {
  const response = await fetch(`${address}?${new URLSearchParams(query)}`, options);
  if (!response.ok) throw new Error(`${address} answered ${response.status}`);
  return response.json();
}

// A line of JSON, then little-endian numbers: a tenth of the time that a large matrix takes as JSON.
export async function readFloats(address, query) {
  const response = await fetch(`${address}?${new URLSearchParams({ ...query, as: "float32" })}`);
  if (!response.ok) throw new Error(`${address} answered ${response.status}`);
  const bytes = new Uint8Array(await response.arrayBuffer());
  const end = bytes.indexOf(10);
  return [JSON.parse(new TextDecoder().decode(bytes.subarray(0, end))), new Float32Array(bytes.slice(end + 1).buffer)];
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

// Neighbours taken together, lowest and highest kept.
function thin(line, [low, high], most) {
  const [first, last] = inSight(line.steps, low, high);
  const many = Math.ceil((last - first) / most);
  if (many < 2) return line;
  const thinned = { steps: [], min: [], max: [], values: [] };
  const pick = (column, from, better) => {
    let best = null;
    for (let at = from; at < Math.min(from + many, column.length); at++) if (isNumber(column[at]) && (best === null || better(column[at], best))) best = column[at];
    return best;
  };
  for (let at = 0; at < line.steps.length; at += many) {
    thinned.steps.push(line.steps[at]);
    thinned.min.push(pick(line.min, at, (a, b) => a < b));
    thinned.max.push(pick(line.max, at, (a, b) => a > b));
    thinned.values.push(line.values[at]);
  }
  return thinned;
}

// First and last index of what lies between two steps, and one beyond on each side.
function inSight(steps, low, high) {
  const place = (value) => {
    let [from, to] = [0, steps.length];
    while (from < to) {
      const middle = (from + to) >> 1;
      if (steps[middle] < value) from = middle + 1;
      else to = middle;
    }
    return from;
  };
  return [Math.max(0, place(low) - 1), Math.min(steps.length - 1, place(high))];
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
    this.prepare();
    this.lostAt = lines.flatMap((line) => line.steps.filter((_, i) => [line.min[i], line.max[i], line.values[i]].some((v) => v !== null && !isNumber(v))));
    this.lost.textContent = this.lostAt.length ? `${this.lostAt.length} not finite` : "";
    this.lost.classList.toggle("fault", this.lostAt.length > 0);
    const built = `${lines.map((line) => line.label).join("\n")}${this.isLog}`;
    if (built !== this.built) {
      this.built = built;
      this.rebuild();
    } else {
      this.redraw();
    }
    this.box.setAttribute("aria-label", this.describe());
  }

  // What is drawn: of many lines, and while they are panned, so few buckets that a frame is ready in time.
  prepare() {
    const most = this.isPanned ? BUCKETS_PANNED : Math.max(BUCKETS_PANNED, BUCKETS_AT_REST / this.lines.length);
    const drawn = this.lines.map((line) => thin(line, this.zoom ?? [-Infinity, Infinity], most));
    const levels = (column) => column.map((v) => this.level(v));
    this.data = drawn.length ? uPlot.join(drawn.map((line) => [line.steps, levels(line.values)])) : [[]];
    // From the lowest to the highest of each bucket; at full resolution there is nothing between them.
    this.spans = drawn.map(({ steps, min, max }) => (steps.some((_, i) => min[i] !== max[i]) ? { steps, low: levels(min), high: levels(max) } : null));
  }

  describe() {
    const ends = this.lines.map((line) => {
      const numbers = line.values.filter(isNumber);
      return numbers.length ? `${line.label} from ${brief(numbers[0])} to ${brief(numbers.at(-1))}` : `${line.label} without a value`;
    });
    return `${this.title}: ${ends.join("; ")}. Arrow keys read, plus and minus zoom, 0 shows all.`;
  }

  redraw() {
    this.plot.setData(this.data, !this.zoom);
    if (this.zoom) this.plot.redraw(); // which setting data without scales leaves out
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
    const whole = (raw) => (raw == null ? "–" : Number(raw.toFixed(2)).toLocaleString()); // steps, or seconds
    const series = [{ label: this.unit, value: (plot, raw) => whole(raw ?? plot.data[0].at(-1)) }];
    this.colors = this.lines.map((line, i) => css(SERIES[line.color ?? i % SERIES.length]));
    this.lines.forEach((line, i) => {
      const color = this.colors[i];
      series.push({ label: line.label, stroke: color, width: 1.5, dash: line.color === undefined && i >= SERIES.length ? [6, 4] : undefined, spanGaps: true, points: { show: line.steps.length < 30, size: 4, fill: color }, value });
    });
    this.plot = new uPlot(
      {
        width: this.width,
        height: HEIGHT,
        padding: [null, 30, null, null], // half of the last step's number
        series,
        axes: [{ ...axis, size: 26 }, { ...axis, size: 52, values: (_, ticks) => ticks.map((v) => (this.isLog && v % 1 ? "" : brief(shown(v)))) }],
        scales: {
          x: { time: false, range: (_, low, high) => [low, high > low ? high : low + 1] },
          y: { range: (plot, low, high) => this.reach(plot, low, high) },
        },
        cursor: { drag: { x: true, y: false, setScale: false }, points: { size: 6 }, bind: { dblclick: () => () => this.zoomTo(null), mousedown: (_, target, handler) => (event) => (event.shiftKey ? this.pan(event) : handler(event)) } },
        hooks: {
          setSelect: [(plot) => plot.select.width > 4 && this.zoomTo([plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x")])],
          drawAxes: [(plot) => this.drawSpans(plot)],
          draw: [(plot) => this.mark(plot)],
        },
      },
      this.data,
      this.box,
    );
    this.plot.root.querySelector("table")?.setAttribute("role", "presentation");
    if (zoom) this.plot.setScale("x", { min: zoom[0], max: zoom[1] });
  }

  // The values in sight, spikes included.
  reach(plot, low, high) {
    const { min, max } = plot.scales.x;
    this.spans.forEach((span) => {
      if (!span) return;
      const [first, last] = inSight(span.steps, min, max);
      for (let at = first; at <= last; at++) {
        if (span.high[at] !== null && (high === null || span.high[at] > high)) high = span.high[at];
        if (span.low[at] !== null && (low === null || span.low[at] < low)) low = span.low[at];
      }
    });
    if (low === null) return [null, null];
    return low === 0 && high === 0 ? [0, 1] : uPlot.rangeNum(low, high, 0.1, true); // uPlot's for zero alone is a hundred
  }

  // A column a bucket, pale; what juts out between its neighbours is drawn full, so that one step of a million is seen.
  // Plain rectangles: where no GPU draws, uPlot's bands of twenty series take 150 ms a frame.
  drawSpans(plot) {
    const { ctx: context, bbox } = plot;
    const { min, max } = plot.scales.x;
    context.save();
    context.beginPath();
    context.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    context.clip();
    context.globalAlpha = PALE;
    const { min: lowest, max: highest } = plot.scales.y;
    const across = (step) => Math.round(bbox.left + (bbox.width * (step - min)) / (max - min));
    const place = (value) => bbox.top + (bbox.height * (highest - value)) / (highest - lowest);
    this.spans.forEach((span, i) => {
      if (!span) return;
      const { steps } = span;
      const [first, last] = inSight(steps, min, max);
      context.fillStyle = this.colors[i];
      let left = across(steps[first]);
      for (let at = first; at <= last; at++) {
        const right = at + 1 < steps.length ? across(steps[at + 1]) : left + 1;
        if (span.low[at] !== null && span.high[at] !== null) {
          const [top, bottom, width] = [place(span.high[at]), place(span.low[at]), Math.max(1, right - left)];
          context.fillRect(left, top, width, Math.max(1, bottom - top));
          const above = place(Math.max(span.high[at - 1] ?? span.low[at], span.high[at + 1] ?? span.low[at]));
          const below = place(Math.min(span.low[at - 1] ?? span.high[at], span.low[at + 1] ?? span.high[at]));
          if (above - top > JUTS || bottom - below > JUTS) {
            context.globalAlpha = 1;
            if (above - top > JUTS) context.fillRect(left, top, width, above - top);
            if (bottom - below > JUTS) context.fillRect(left, below, width, bottom - below);
            context.globalAlpha = PALE;
          }
        }
        left = right;
      }
    });
    context.restore();
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
    const [low, high] = this.range;
    const scale = (high - low) / this.plot.over.clientWidth;
    this.isPanned = true;
    this.prepare();
    this.redraw();
    let frame = 0; // drawn once a frame, however often the mouse moves
    const move = (next) => {
      cancelAnimationFrame(frame);
      const by = (event.clientX - next.clientX) * scale;
      frame = requestAnimationFrame(() => this.zoomTo([low + by, high + by]));
    };
    const end = () => {
      removeEventListener("pointermove", move);
      removeEventListener("pointerup", end);
      this.isPanned = false;
      this.prepare();
      this.redraw();
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
