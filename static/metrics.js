// The charts of one job, which grow while it runs, and of several jobs over each other, by step or by time.
import { Chart, SERIES, isNumber, read } from "./charts.js";
import { marks, startTimeline } from "./timeline.js";

const POINTS = 600;
const TITLES = {
  lr: "learning rate",
  grad_norm_total: "gradient norm, all layers",
  clip_factor: "clip factor",
  lost_updates: "share of updates rounded away",
  update_norm_error: "error of estimated update norms",
};
const LEAST_TELLING = ["lr", "lost_updates", "update_norm_error"]; // stand last
const LOGGABLE = ["loss", "grad_norm_total", "perplexity"];

// "loss", "eval/new/accuracy" → the panel they share: what they measure.
const quantity = (name) => name.split("/").at(-1);
const label = (name) => {
  const parts = name.split("/");
  if (parts.length < 3) return name === "loss" ? "training" : "each step";
  return parts[1] === "eval" ? "held out" : parts[1];
};

// One panel a quantity, in the order people read them.
function panels(metrics) {
  const grouped = new Map([["loss", []], ["accuracy", []]]);
  for (const name of Object.keys(metrics)) {
    if (!metrics[name].steps.length) continue;
    const key = quantity(name);
    if (!grouped.has(key)) grouped.set(key, []);
    grouped.get(key).push(name);
  }
  for (const key of LEAST_TELLING) {
    const names = grouped.get(key);
    if (grouped.delete(key)) grouped.set(key, names);
  }
  for (const names of grouped.values()) names.sort((a, b) => (b === "loss") - (a === "loss"));
  return [...grouped].filter(([, names]) => names.length);
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
      if (!charts.has(key)) charts.set(key, new Chart(parent, TITLES[key] ?? key, { ask: (range) => zoom(key, range), log: LOGGABLE.includes(key) }));
      charts.get(key).show(names.map((name) => ({ label: label(name), color: colorOf(label(name)), ...shown[name] })), marks());
    }
  }

  // A set keeps its colour in every panel.
  const sets = ["training", "held out"];
  function colorOf(set) {
    if (set === "each step") return 0;
    if (!sets.includes(set)) sets.push(set);
    return sets.indexOf(set) % SERIES.length;
  }

  // One question at a time for each panel: what was asked before is of no interest any more.
  const asked = new Map();
  async function zoom(key, range) {
    asked.get(key)?.abort();
    if (!range) return draw(metrics, key);
    const abort = new AbortController();
    asked.set(key, abort);
    const points = Math.min(POINTS, charts.get(key).width); // a bucket a pixel shows all there is
    try {
      const found = await read(address, { points, from: Math.max(0, range[0]), to: Math.max(0, range[1]) }, { signal: abort.signal });
      if (charts.get(key).zoom) draw(found, key);
    } catch (error) {
      if (error.name !== "AbortError" && !(error instanceof TypeError)) throw error; // or a lost network, which the banner tells
    }
  }

  // What is new is appended at full resolution; when that grows too long, the whole comes again in buckets.
  async function refresh() {
    if (busy) return void (again = true);
    busy = true;
    try {
      const longest = Math.max(0, ...Object.values(metrics).map((series) => series.steps.length));
      const newest = Math.max(-1, ...Object.values(metrics).map((series) => series.steps.at(-1) ?? -1));
      if (newest < 0 || longest > 2 * POINTS) metrics = await read(address, { points: POINTS });
      else append(metrics, await read(address, { points: POINTS, from: newest }));
      draw(Object.fromEntries(Object.entries(metrics).filter(([name]) => !charts.get(quantity(name))?.zoom)));
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // a lost network: the banner says so, and its end asks again
    } finally {
      busy = false;
    }
    if (again) {
      again = false;
      refresh();
    }
  }

  document.body.addEventListener("job:numbers", refresh);
  document.addEventListener("timeline:changed", () => draw(metrics));
  startTimeline();
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

// ---- several jobs over each other

const NOTHING = { steps: [], min: [], max: [], values: [] };

export async function startCompare(section) {
  const jobs = JSON.parse(section.dataset.compare); // [{id, name, address, color}]
  const parent = section.querySelector(".charts");
  const charts = new Map();
  let all = [];
  let stepMs = [];
  let by = "step";

  async function refresh() {
    all = await Promise.all(jobs.map((job) => read(`${job.address}/metrics`, { points: POINTS })));
    const found = await Promise.all(jobs.map((job) => read(job.address)));
    stepMs = found.map((job) => job.step_ms); // null before its first step
    draw();
  }

  function draw() {
    const shared = [...new Set(all.flatMap((metrics) => Object.keys(metrics)))].filter((name) => name !== "lr");
    shared.sort((a, b) => (quantity(b) === "accuracy") - (quantity(a) === "accuracy") || (b === "loss") - (a === "loss"));
    for (const name of shared) {
      const title = name.includes("/") || name === "loss" ? `${quantity(name)}, ${label(name)}` : (TITLES[name] ?? name);
      if (!charts.has(name)) charts.set(name, new Chart(parent, title, { log: LOGGABLE.includes(quantity(name)) }));
      const chart = charts.get(name);
      chart.unit = by === "step" ? "step" : "seconds";
      chart.built = null;
      chart.show(
        jobs.map((job, i) => {
          const series = all[i][name] ?? NOTHING;
          const steps = by === "step" ? series.steps : series.steps.map((step) => (step * stepMs[i]) / 1000);
          return { label: job.name, color: job.color, ...series, steps };
        }),
      );
    }
    if (shared.length) parent.querySelector(".waiting")?.remove();
    section.querySelector("[data-estimated]")?.toggleAttribute("hidden", by === "step");
  }

  section.addEventListener("click", (event) => {
    const button = event.target.closest("[data-by]");
    if (!button) return;
    for (const each of section.querySelectorAll("[data-by]")) each.setAttribute("aria-pressed", each === button);
    by = button.dataset.by;
    draw();
  });
  document.body.addEventListener("sweep:curves", refresh);
  await refresh();
  startRatios(section, jobs);
}

// Per layer, how far an update moved it in proportion to its size: the median over all steps, job beside job.
async function startRatios(section, jobs) {
  const place = section.parentElement.querySelector("[data-ratios]");
  if (!place) return;
  const found = await Promise.all(jobs.map((job) => read(`${job.address}/layers`, { stat: "update_ratio", points: 200 })));
  const layers = [...new Set(found.flatMap((matrix) => matrix.layers))];
  const head = place.querySelector("thead").insertRow();
  for (const text of ["Layer", ...jobs.map((job) => job.name)]) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = text;
    head.append(cell);
  }
  const body = place.querySelector("tbody");
  const levels = found.map((matrix) => new Map(matrix.layers.map((layer, i) => [layer, median(matrix.values[i])])));
  const all = levels.flatMap((level) => [...level.values()]).filter((v) => v > 0).map(Math.log10);
  const [low, high] = [Math.min(...all), Math.max(...all)];
  for (const layer of layers) {
    const row = body.insertRow();
    const name = document.createElement("th");
    name.scope = "row";
    name.className = "mono";
    name.textContent = layer;
    row.append(name);
    levels.forEach((level, i) => {
      const value = level.get(layer);
      const cell = row.insertCell();
      if (!value) {
        cell.textContent = "frozen";
        cell.className = "note";
        return;
      }
      const share = high > low ? 0.08 + (0.92 * (Math.log10(value) - low)) / (high - low) : 1;
      cell.innerHTML = '<meter min="0" max="1"></meter><span class="mono"></span>';
      cell.firstChild.value = share;
      cell.firstChild.className = `meter-${jobs[i].color + 1}`;
      cell.firstChild.setAttribute("aria-label", `${layer}, ${jobs[i].name}`);
      cell.lastChild.textContent = value.toExponential(1);
    });
  }
  place.hidden = layers.length === 0;
}

function median(values) {
  const numbers = values.filter(isNumber).sort((a, b) => a - b);
  return numbers.length ? numbers[Math.floor(numbers.length / 2)] : null;
}
