// Line charts of a job's metrics with uPlot: buckets with their spikes, zoom asks the server for more, live jobs grow.
import uPlot from "./vendor/uplot.js";

const POINTS = 600;
const HEIGHT = 190;
const SERIES = ["series-1", "series-2", "series-3", "series-4", "series-5", "series-6"];
const TITLES = { lr: "learning rate", grad_norm_total: "gradient norm, all layers" };

export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

// "loss", "eval/new/accuracy" → the panel they share: what they measure.
const quantity = (name) => name.split("/").at(-1);
const label = (name) => {
  const parts = name.split("/");
  if (parts.length < 3) return name === "loss" ? "training" : "each step";
  return parts[1] === "eval" ? "held out" : parts[1];
};

class Chart {
  constructor(parent, title, refetch) {
    this.title = title;
    this.refetch = refetch;
    this.element = document.createElement("figure");
    this.element.className = "chart";
    this.element.innerHTML = "<figcaption></figcaption><div></div>";
    this.element.firstChild.textContent = title;
    parent.append(this.element);
    this.names = "";
    new ResizeObserver(() => this.plot?.setSize({ width: this.width, height: HEIGHT })).observe(this.element);
    document.addEventListener("theme:changed", () => this.rebuild());
  }

  get width() {
    return Math.max(this.element.clientWidth, 200);
  }

  // lines: [{label, steps, values, min, max}]
  show(lines) {
    this.lines = lines;
    const tables = lines.map((line) => [line.steps, line.max, line.min, line.values].map((column, i) => (i ? column.map((v) => (isNumber(v) ? v : null)) : column)));
    this.data = uPlot.join(tables);
    const names = lines.map((line) => line.label).join("\n");
    if (names !== this.names) {
      this.names = names;
      this.rebuild();
    } else if (!this.zoom) {
      this.plot.setData(this.data);
    } else {
      this.plot.setData(this.data, false);
    }
    const lost = lines.reduce((sum, line) => sum + line.values.filter((v) => v !== null && !isNumber(v)).length, 0);
    this.element.firstChild.textContent = lost ? `${this.title}, ${lost} not finite` : this.title;
  }

  rebuild() {
    if (!this.data) return;
    this.plot?.destroy();
    const axis = { stroke: css("muted"), grid: { stroke: css("grid"), width: 1 }, ticks: { show: false }, font: `11px ${css("sans")}`, gap: 4 };
    // Without a cursor the legend reads the newest value, so that nothing jumps when one comes.
    const read = (plot, value, index) => {
      const shown = value ?? plot.data[index].findLast((v) => v != null);
      return shown == null ? "–" : Number(shown.toPrecision(4));
    };
    const series = [{ label: "step", value: (plot, value) => value ?? plot.data[0].at(-1) ?? "–" }];
    const bands = [];
    this.lines.forEach((line, i) => {
      const color = css(SERIES[line.color ?? i % SERIES.length]);
      const first = series.length;
      for (const edge of ["max", "min"]) series.push({ label: `${line.label} ${edge}`, stroke: color + "55", width: 1, points: { show: false }, spanGaps: true, class: "edge" });
      series.push({ label: line.label, stroke: color, width: 1.5, spanGaps: true, points: { show: line.steps.length < 30, size: 4, fill: color }, value: read });
      bands.push({ series: [first, first + 1], fill: color + "22" });
    });
    this.plot = new uPlot(
      {
        width: this.width,
        height: HEIGHT,
        series,
        bands,
        axes: [{ ...axis, size: 26 }, { ...axis, size: 48, values: (_, ticks) => ticks.map((v) => (Math.abs(v) >= 1e5 || (v && Math.abs(v) < 1e-3) ? v.toExponential(0) : Number(v.toPrecision(6)))) }],
        scales: { x: { time: false, range: (_, low, high) => [low, high > low ? high : low + 1] } },
        cursor: { drag: { x: true, y: false, setScale: false }, points: { size: 6 } },
        hooks: {
          setSelect: [(plot) => plot.select.width > 4 && this.zoomTo([plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x")])],
          ready: [(plot) => plot.over.addEventListener("dblclick", () => this.zoomTo(null))],
        },
      },
      this.data,
      this.element.lastChild,
    );
    this.plot.root.querySelector("table")?.setAttribute("role", "presentation");
  }

  zoomTo(range) {
    this.zoom = range;
    this.plot.setSelect({ left: 0, width: 0 }, false);
    if (range) this.plot.setScale("x", { min: range[0], max: range[1] });
    this.refetch(range && [Math.floor(range[0]), Math.ceil(range[1])]);
  }
}

// One panel a quantity, in the order people read them.
function panels(metrics) {
  const grouped = new Map([["loss", []], ["accuracy", []]]);
  for (const name of Object.keys(metrics)) {
    if (!metrics[name].steps.length) continue;
    const key = quantity(name);
    if (!grouped.has(key)) grouped.set(key, []);
    grouped.get(key).push(name);
  }
  const last = grouped.get("lr");
  if (grouped.delete("lr")) grouped.set("lr", last); // the least telling one stands last
  for (const names of grouped.values()) names.sort((a, b) => (b === "loss") - (a === "loss"));
  return [...grouped].filter(([, names]) => names.length);
}

async function read(address, query) {
  const response = await fetch(`${address}?${new URLSearchParams(query)}`);
  if (!response.ok) throw new Error(`${address} answered ${response.status}`);
  return response.json();
}

export function startCharts(section) {
  const address = section.dataset.charts;
  const parent = section.querySelector(".charts");
  const charts = new Map();
  let metrics = {};
  let busy = false;
  let again = false;

  function draw(shown, only) {
    for (const [key, names] of panels(shown)) {
      if (only && key !== only) continue;
      parent.querySelector(".waiting")?.remove();
      if (!charts.has(key)) charts.set(key, new Chart(parent, TITLES[key] ?? key, (range) => zoom(key, range)));
      charts.get(key).show(names.map((name) => ({ label: label(name), color: colorOf(label(name)), ...shown[name] })));
    }
  }

  // A set keeps its colour in every panel.
  const sets = ["training", "held out"];
  function colorOf(set) {
    if (set === "each step") return 0;
    if (!sets.includes(set)) sets.push(set);
    return sets.indexOf(set) % SERIES.length;
  }

  async function zoom(key, range) {
    if (!range) return draw(metrics, key);
    draw(await read(address, { points: POINTS, from: range[0], to: range[1] }), key);
  }

  // What is new is appended at full resolution; when that grows too long, the whole comes again in buckets.
  async function refresh() {
    if (busy) return void (again = true);
    busy = true;
    const longest = Math.max(0, ...Object.values(metrics).map((series) => series.steps.length));
    const newest = Math.max(-1, ...Object.values(metrics).map((series) => series.steps.at(-1) ?? -1));
    if (newest < 0 || longest > 2 * POINTS) {
      metrics = await read(address, { points: POINTS });
    } else {
      append(metrics, await read(address, { points: POINTS, from: newest }));
    }
    draw(Object.fromEntries(Object.entries(metrics).filter(([name]) => !charts.get(quantity(name))?.zoom)));
    busy = false;
    if (again) {
      again = false;
      refresh();
    }
  }

  document.body.addEventListener("job:numbers", refresh);
  refresh();
}

function append(metrics, more) {
  for (const [name, fresh] of Object.entries(more)) {
    const known = (metrics[name] ??= { steps: [], min: [], max: [], values: [] });
    const last = known.steps.at(-1) ?? -1;
    fresh.steps.forEach((step, i) => {
      if (step <= last) return;
      known.steps.push(step);
      for (const key of ["min", "max", "values"]) known[key].push(fresh[key][i]);
    });
  }
}

export async function startCompare(section) {
  const names = section.dataset.names.split("\n");
  const all = await Promise.all(section.dataset.compare.split(" ").map((address) => read(address, { points: POINTS })));
  const parent = section.querySelector(".charts");
  const shared = [...new Set(all.flatMap((metrics) => Object.keys(metrics)))].filter((name) => !["lr", "grad_norm_total"].includes(name));
  for (const name of shared) {
    const chart = new Chart(parent, name.includes("/") || name === "loss" ? `${quantity(name)}, ${label(name)}` : name, () => {});
    chart.show(all.map((metrics, i) => ({ label: names[i], ...(metrics[name] ?? { steps: [], min: [], max: [], values: [] }) })));
  }
}
