// Layers × steps on a canvas of its own: log colours, empty where there is no value, hover and arrow keys read a cell.
import uPlot from "./vendor/uplot.js";
import { css } from "./charts.js";

const POINTS = 500;
const SERIES = ["series-1", "series-2", "series-3", "series-4", "series-5", "series-6"];
// Anchors of a perceptual ramp without the two colours that mean frozen and trained.
const RAMP = [[38, 24, 66], [73, 41, 121], [99, 68, 160], [104, 109, 180], [92, 152, 176], [98, 190, 154], [156, 220, 116], [238, 240, 120]];

function color(share) {
  const at = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
  const low = Math.min(Math.floor(at), RAMP.length - 2);
  return RAMP[low].map((c, i) => Math.round(c + (RAMP[low + 1][i] - c) * (at - low)));
}
const LUT = Array.from({ length: 256 }, (_, i) => color(i / 255));
const finite = (value) => typeof value === "number" && Number.isFinite(value);
const show = (value) => (value == null ? "no value" : finite(value) ? value.toPrecision(4) : String(value));

export function startHeatmap(section) {
  const address = section.dataset.heatmap;
  const canvas = section.querySelector(".heat canvas");
  const output = section.querySelector("output");
  const lines = section.querySelector(".layer-lines");
  let stat = "grad_norm";
  let data = { layers: [], steps: [], values: [] };
  let range = [0, 1];
  let rowHeight = 12;
  let gutter = 0;
  let cursor = null;
  let picked = [];
  let plot = null;
  let turn = 0;

  async function read(query) {
    const response = await fetch(`${address}?${new URLSearchParams({ stat, points: POINTS, ...query })}`);
    if (!response.ok) throw new Error(`${address} answered ${response.status}`);
    return response.json();
  }

  let busy = false;
  let again = false;
  async function refresh() {
    if (busy) return void (again = true);
    busy = true;
    const mine = turn;
    const newest = data.steps.at(-1);
    const isWhole = newest === undefined || data.steps.length > 2 * POINTS;
    const fresh = await read(isWhole ? {} : { from: newest + 1 });
    if (mine === turn) {
      if (isWhole || fresh.layers.length !== data.layers.length) data = isWhole ? fresh : data;
      else {
        data.steps.push(...fresh.steps);
        fresh.values.forEach((row, i) => data.values[i].push(...row));
      }
      draw();
    }
    busy = false;
    if (again || mine !== turn) {
      again = false;
      refresh();
    }
  }

  function measure() {
    let low = Infinity;
    let high = -Infinity;
    for (const row of data.values) {
      for (const value of row) {
        if (!finite(value) || value <= 0) continue;
        if (value < low) low = value;
        if (value > high) high = value;
      }
    }
    // Six decades at most: one denormal must not flatten everything else.
    range = high > 0 ? [Math.log10(Math.max(low, high * 1e-6)), Math.log10(high)] : [0, 1];
    if (range[1] - range[0] < 1e-9) range = [range[0] - 0.5, range[1] + 0.5];
  }

  function draw() {
    const { layers, steps, values } = data;
    if (!layers.length) return;
    measure();
    const ratio = devicePixelRatio || 1;
    const width = canvas.parentElement.clientWidth;
    rowHeight = Math.max(3, Math.min(18, Math.floor(460 / layers.length)));
    gutter = rowHeight >= 11 && width > 480 ? 170 : 0;
    const height = rowHeight * layers.length;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    const plotWidth = Math.max(1, Math.round((width - gutter) * ratio));
    const image = context.createImageData(plotWidth, layers.length);
    const pixels = new Uint32Array(image.data.buffer);
    const table = LUT.map(([r, g, b]) => (255 << 24) | (b << 16) | (g << 8) | r);
    const bad = 0xff2a2ad0;
    const first = steps[0];
    const span = Math.max(1, steps.at(-1) - first + 1);
    // Each pixel column shows the largest value of the steps that fall into it: spikes stay.
    const columns = steps.map((step, i) => [Math.floor(((step - first) / span) * plotWidth), Math.max(Math.floor((((steps[i + 1] ?? steps.at(-1) + 1) - first) / span) * plotWidth), Math.floor(((step - first) / span) * plotWidth) + 1)]);
    const best = new Float64Array(plotWidth);
    values.forEach((row, y) => {
      best.fill(-Infinity);
      row.forEach((value, i) => {
        if (value == null) return;
        const level = finite(value) ? (value > 0 ? Math.log10(value) : -1e9) : 1e9;
        for (let x = columns[i][0]; x < columns[i][1] && x < plotWidth; x++) if (level > best[x]) best[x] = level;
      });
      for (let x = 0; x < plotWidth; x++) {
        if (best[x] === -Infinity) continue; // stays transparent: empty, not zero
        const share = (best[x] - range[0]) / (range[1] - range[0]);
        pixels[y * plotWidth + x] = best[x] === 1e9 ? bad : table[Math.max(0, Math.min(255, Math.round(share * 255)))];
      }
    });
    const strip = new OffscreenCanvas(plotWidth, layers.length);
    strip.getContext("2d").putImageData(image, 0, 0);
    hatch(context, gutter * ratio, canvas.width, canvas.height, ratio);
    context.imageSmoothingEnabled = false;
    context.drawImage(strip, gutter * ratio, 0, plotWidth, height * ratio);
    context.scale(ratio, ratio);
    if (gutter) {
      context.font = `${Math.min(11, rowHeight - 2)}px ${css("mono")}`;
      context.textBaseline = "middle";
      layers.forEach((name, y) => {
        context.fillStyle = values[y].some((v) => v != null) ? css("text") : css("muted");
        context.fillText(fit(context, name, gutter - 10), 0, (y + 0.5) * rowHeight);
      });
    }
    if (cursor) {
      context.strokeStyle = css("text");
      context.strokeRect(gutter + 0.5, cursor.y * rowHeight + 0.5, width - gutter - 1, rowHeight - 1);
    }
    legend();
    if (!cursor) output.textContent = `${layers.length} layers, steps ${first} to ${steps.at(-1)}`;
    drawLines();
  }

  // What has no value is hatched, so that nobody reads it as a small one.
  function hatch(context, left, right, bottom, ratio) {
    context.save();
    context.beginPath();
    context.rect(left, 0, right - left, bottom);
    context.clip();
    context.strokeStyle = css("line");
    context.lineWidth = ratio;
    context.beginPath();
    for (let x = left - bottom; x < right; x += 7 * ratio) {
      context.moveTo(x, bottom);
      context.lineTo(x + bottom, 0);
    }
    context.stroke();
    context.restore();
  }

  function fit(context, name, room) {
    if (context.measureText(name).width <= room) return name;
    let from = 1;
    while (from < name.length && context.measureText(`…${name.slice(from)}`).width > room) from += 1;
    return `…${name.slice(from)}`;
  }

  function legend() {
    const bar = section.querySelector(".legend-bar");
    const context = bar.getContext("2d");
    for (let x = 0; x < bar.width; x++) {
      context.fillStyle = `rgb(${color(x / bar.width)})`;
      context.fillRect(x, 0, 1, bar.height);
    }
    section.querySelector(".legend-low").textContent = (10 ** range[0]).toExponential(0);
    section.querySelector(".legend-high").textContent = `${(10 ** range[1]).toExponential(0)} log`;
  }

  // ---- reading a cell
  function point(y, i) {
    cursor = { y: Math.max(0, Math.min(y, data.layers.length - 1)), i: Math.max(0, Math.min(i, data.steps.length - 1)) };
    const value = data.values[cursor.y][cursor.i];
    output.textContent = `${data.layers[cursor.y]}  step ${data.steps[cursor.i]}  ${show(value)}`;
  }
  function locate(event) {
    const box = canvas.getBoundingClientRect();
    const first = data.steps[0];
    const span = Math.max(1, data.steps.at(-1) - first + 1);
    const step = first + ((event.clientX - box.left - gutter) / (box.width - gutter)) * span;
    let i = data.steps.findIndex((s) => s > step);
    i = i < 0 ? data.steps.length - 1 : Math.max(0, i - 1);
    return [Math.floor((event.clientY - box.top) / rowHeight), i];
  }
  canvas.addEventListener("pointermove", (event) => data.layers.length && point(...locate(event)));
  canvas.addEventListener("pointerleave", () => {
    cursor = null;
    draw();
  });
  canvas.addEventListener("click", (event) => data.layers.length && (point(...locate(event)), pick()));
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (!data.layers.length) return;
    if (event.key === "Enter" && cursor) return pick();
    if (!moves[event.key]) return;
    event.preventDefault();
    const [dy, di] = moves[event.key];
    point((cursor?.y ?? 0) + (cursor ? dy : 0), (cursor?.i ?? data.steps.length - 1) + (cursor ? di : 0));
    draw();
  });

  // ---- the lines of the layers that were clicked
  function pick() {
    const name = data.layers[cursor.y];
    picked = picked.includes(name) ? picked.filter((other) => other !== name) : [...picked, name].slice(-SERIES.length);
    drawLines();
  }
  function drawLines() {
    plot?.destroy();
    plot = null;
    if (!picked.length) return;
    const axis = { stroke: css("muted"), grid: { stroke: css("grid"), width: 1 }, ticks: { show: false }, font: `11px ${css("sans")}` };
    const rows = picked.map((name) => data.values[data.layers.indexOf(name)].map((v) => (finite(v) ? v : null)));
    plot = new uPlot(
      {
        width: lines.clientWidth || 300,
        height: 170,
        scales: { x: { time: false } },
        axes: [{ ...axis, size: 26 }, { ...axis, size: 56, values: (_, ticks) => ticks.map((v) => Number(v.toPrecision(3))) }],
        series: [{ label: "step" }, ...picked.map((name, i) => ({ label: name, stroke: css(SERIES[i]), width: 1.5, points: { show: false }, value: (_, v) => (v == null ? "–" : v.toPrecision(4)) }))],
      },
      [data.steps, ...rows],
      lines,
    );
  }

  section.addEventListener("click", (event) => {
    const button = event.target.closest("[data-stat]");
    if (!button) return;
    for (const each of section.querySelectorAll("[data-stat]")) each.setAttribute("aria-pressed", each === button);
    stat = button.dataset.stat;
    turn += 1;
    data = { layers: [], steps: [], values: [] };
    refresh();
  });
  new ResizeObserver(draw).observe(canvas.parentElement);
  document.addEventListener("theme:changed", draw);
  document.body.addEventListener("job:numbers", refresh);
  refresh();
}
