// One heatmap of layers × steps: reads the server for what the pixels can show, and is read by pointer and by keys.
import { Chart, brief, css, glyph, readFloats } from "./charts.js";
import { color, join, measure, paint, toMatrix } from "./heatpaint.js";
import { isFrozen, marks, startTimeline } from "./timeline.js";

const CELLS = 250_000; // at most asked for at once
const PICKED = 6;
const LANE = 16; // above: where something was frozen or unfrozen
const AXIS = 18; // below: steps
const TALLEST = 480;

export function startHeatmap(section) {
  const address = section.dataset.heatmap;
  const box = section.querySelector(".heat");
  const [canvas, over] = box.querySelectorAll("canvas");
  const output = section.querySelector("output");
  const table = section.querySelector(".heat-table");
  let stat = "grad_norm";
  let whole = null; // the matrix of all steps
  let zoomed = null; // that of the steps that were zoomed into
  let range = null;
  let view = null; // {from, to, top, bottom}: the steps and layers in sight; null shows all
  let frame = null; // where things lie on the canvas, in CSS pixels
  let cursor = null; // {layer, at}: the cell that is read
  let drag = null;
  let picked = [];
  let lines = null;
  let turn = 0;
  let estimated = new Set(); // layers whose update norms are estimated from a sample, between exact passes

  const matrix = () => (view && zoomed) || whole;
  const first = Number(section.dataset.firstPoints); // of a first answer, which is drawn while the whole one is on its way
  const points = (layers) => Math.max(100, Math.min(Math.round((box.clientWidth || 900) * (devicePixelRatio || 1)), Math.floor(CELLS / Math.max(1, layers))));

  // ---- asking
  async function ask(query) {
    const [[head, floats]] = await Promise.all([readFloats(address, { stat, ...query }), startTimeline()]);
    estimated = new Set(head.estimated);
    return head.layers.length && head.steps.length ? blank(toMatrix(head, floats)) : null;
  }
  // A frozen layer that moved by nothing is empty, not zero; one that moved all the same is shown.
  function blank(found) {
    if (stat === "weight_norm") return found;
    found.rows.forEach((row, y) => row.forEach((level, i) => {
      if (level === -Infinity && isFrozen(found.layers[y], found.steps[i])) row[i] = NaN;
    }));
    return found;
  }

  let busy = false;
  let again = false;
  let isRough = true;
  async function refresh() {
    if (busy) return void (again = true);
    busy = true;
    const mine = turn;
    try {
      const layers = whole?.layers.length ?? Number(section.dataset.layers);
      const isFull = isRough || !whole?.steps.length || whole.steps.length > 2 * points(layers);
      isRough = !whole && first > 0;
      const asked = isRough ? first : points(layers);
      again ||= isRough;
      const fresh = await ask({ points: asked, ...(isFull ? {} : { from: whole.steps.at(-1) + 1 }) });
      if (mine === turn && fresh) {
        whole = isFull || fresh.layers.length !== whole.layers.length ? (isFull ? fresh : whole) : join(whole, fresh);
        draw();
      }
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // a lost network: its end asks again
    } finally {
      busy = false;
    }
    if (again || mine !== turn) {
      again = false;
      refresh();
    }
  }

  // ---- zooming
  let asking = 0;
  function show(next) {
    const all = everything();
    const span = Math.max(2, Math.min(next.to - next.from, all.to - all.from));
    const from = Math.max(all.from, Math.min(next.from, all.to - span));
    const rows = Math.max(1, Math.min(next.bottom - next.top, all.bottom));
    const top = Math.max(0, Math.min(next.top, all.bottom - rows));
    view = { from: Math.floor(from), to: Math.ceil(from + span), top, bottom: top + rows };
    if (view.from <= all.from && view.to >= all.to && rows === all.bottom) view = zoomed = null;
    section.querySelector("[data-zoom='whole']").disabled = !view;
    draw();
    clearTimeout(asking);
    if (view) asking = setTimeout(sharpen, 120);
  }
  async function sharpen() {
    const [mine, wanted] = [turn, view];
    if (!wanted) return;
    const fresh = await ask({ points: points(whole.layers.length), from: Math.max(0, wanted.from), to: wanted.to - 1 });
    if (mine !== turn || view !== wanted || !fresh) return;
    zoomed = fresh;
    draw();
  }
  const everything = () => ({ from: whole.steps[0], to: whole.steps.at(-1) + 1, top: 0, bottom: whole.layers.length });
  const sight = () => view ?? everything();
  function zoomBy(factor, share = 0.5) {
    const { from, to, top, bottom } = sight();
    const middle = from + (to - from) * share;
    show({ from: middle - (middle - from) * factor, to: middle + (to - middle) * factor, top, bottom });
  }
  function pan(share) {
    const { from, to, top, bottom } = sight();
    show({ from: from + (to - from) * share, to: to + (to - from) * share, top, bottom });
  }

  // ---- drawing
  function lay() {
    const { top, bottom } = sight();
    const ratio = devicePixelRatio || 1;
    const width = box.clientWidth;
    const rowHeight = Math.min(18, TALLEST / (bottom - top));
    const gutter = rowHeight >= 11 && width > 480 ? 176 : 0;
    const high = Math.round(rowHeight * (bottom - top));
    frame = { ratio, width, rowHeight, gutter, high, plot: width - gutter, height: LANE + high + AXIS };
    for (const each of [canvas, over]) {
      each.width = Math.round(width * ratio);
      each.height = Math.round(frame.height * ratio);
      each.style.height = `${frame.height}px`; // the box is higher where there are few layers
    }
    box.style.height = `${frame.height}px`;
  }
  const stepToX = (step) => frame.gutter + ((step - sight().from) / Math.max(1, sight().to - sight().from)) * frame.plot;

  function draw() {
    if (!whole || !box.clientWidth) return;
    lay();
    const { from, to, top, bottom } = sight();
    const { ratio, gutter, plot, high, rowHeight } = frame;
    range = measure(matrix());
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    hatch(context);
    const image = paint(matrix(), range, { from, to, top, bottom, width: Math.max(1, Math.round(plot * ratio)), height: Math.max(1, Math.round(high * ratio)) });
    const strip = new OffscreenCanvas(image.width, image.height);
    strip.getContext("2d").putImageData(image, 0, 0);
    context.drawImage(strip, gutter, LANE, plot, high);
    context.font = `11px ${css("mono")}`;
    context.textBaseline = "middle";
    if (gutter) {
      for (let y = top; y < bottom; y++) {
        context.fillStyle = isFrozen(whole.layers[y], to - 1) ? css("ice") : css("text");
        context.fillText(fit(context, whole.layers[y], gutter - 10), 0, LANE + (y - top + 0.5) * rowHeight);
      }
    }
    axis(context, from, to);
    marks().forEach((mark) => drawMark(context, mark));
    legend();
    if (!cursor) output.textContent = `${matrix().layers.length.toLocaleString()} layer${matrix().layers.length === 1 ? "" : "s"}, steps ${from.toLocaleString()} to ${(to - 1).toLocaleString()}`;
    point();
    drawLines();
    if (table.open) fillTable();
  }

  // What has no value is hatched, so that nobody reads it as a small one.
  function hatch(context) {
    const { gutter, width, high } = frame;
    context.save();
    context.beginPath();
    context.rect(gutter, LANE, width - gutter, high);
    context.clip();
    context.strokeStyle = css("line");
    context.beginPath();
    for (let x = gutter - high; x < width; x += 7) {
      context.moveTo(x, LANE + high);
      context.lineTo(x + high, LANE);
    }
    context.stroke();
    context.restore();
  }

  function axis(context, from, to) {
    const room = Math.max(2, Math.floor(frame.plot / 90));
    const rough = (to - from) / room;
    const power = 10 ** Math.floor(Math.log10(Math.max(1, rough)));
    const every = Math.max(1, [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough));
    context.fillStyle = css("muted");
    context.font = `11px ${css("sans")}`;
    context.textAlign = "center";
    for (let step = Math.ceil(from / every) * every; step < to; step += every) {
      const x = stepToX(step + 0.5);
      if (x > frame.gutter + 8 && x < frame.width - 14) context.fillText(step.toLocaleString(), x, LANE + frame.high + AXIS / 2 + 2);
    }
    context.textAlign = "start";
  }

  // A glyph in the lane above, and the boundary along the layers that were turned.
  function drawMark(context, mark) {
    const { from, to, top, bottom } = sight();
    if (mark.step < from || mark.step > to) return;
    const x = stepToX(mark.step);
    context.strokeStyle = context.fillStyle = css(mark.action === "freeze" ? "ice" : "ember");
    context.lineWidth = 1.5;
    glyph(context, mark.action, x, LANE / 2, 10);
    context.beginPath();
    const turned = new Set(mark.layers);
    for (let y = top; y < bottom; y++) {
      if (!turned.has(whole.layers[y])) continue;
      context.moveTo(x, LANE + (y - top) * frame.rowHeight);
      context.lineTo(x, LANE + (y - top + 1) * frame.rowHeight);
    }
    context.stroke();
    context.lineWidth = 1;
  }

  function fit(context, name, room) {
    if (context.measureText(name).width <= room) return name;
    const letters = Math.floor(room / context.measureText("m").width) - 1;
    return `…${name.slice(-letters)}`;
  }

  function legend() {
    const bar = section.querySelector(".legend-bar");
    const context = bar.getContext("2d");
    for (let x = 0; x < bar.width; x++) {
      context.fillStyle = `rgb(${color(x / bar.width)})`;
      context.fillRect(x, 0, 1, bar.height);
    }
    section.querySelector(".legend-low").textContent = (10 ** range.low).toExponential(0);
    section.querySelector(".legend-high").textContent = (10 ** range.high).toExponential(0);
    section.querySelector(".bad-key").parentElement.hidden = !range.lost;
    section.querySelector(".about-key").hidden = !estimated.size;
  }

  // ---- reading a cell: only the layer above is drawn anew
  function words(layer, at) {
    const level = matrix().rows[layer][at];
    if (Number.isNaN(level)) return isFrozen(whole.layers[layer], matrix().steps[at]) ? "frozen, no value" : "no value";
    const about = estimated.has(whole.layers[layer]) ? "≈ " : "";
    return level === Infinity ? "not a finite number" : level === -Infinity ? "0" : about + brief(10 ** level);
  }
  function point(layer, at) {
    if (layer !== undefined) cursor = { layer: clamp(layer, 0, whole.layers.length - 1), at: clamp(at, 0, matrix().steps.length - 1) };
    const context = over.getContext("2d");
    context.setTransform(frame.ratio, 0, 0, frame.ratio, 0, 0);
    context.clearRect(0, 0, frame.width, frame.height);
    context.strokeStyle = context.fillStyle = css("text");
    if (drag?.box) context.strokeRect(...drag.box);
    if (!cursor) return;
    cursor.at = Math.min(cursor.at, matrix().steps.length - 1);
    const { top, bottom } = sight();
    const y = LANE + (cursor.layer - top) * frame.rowHeight;
    const x = stepToX(matrix().steps[cursor.at]);
    if (cursor.layer >= top && cursor.layer < bottom) context.strokeRect(frame.gutter + 0.5, y + 0.5, frame.plot - 1, Math.max(1, frame.rowHeight - 1));
    context.fillRect(clamp(x, frame.gutter, frame.width), LANE, 1, frame.high);
    const mark = marks().find((one) => one.layers.includes(whole.layers[cursor.layer]) && Math.abs(stepToX(one.step) - x) < 4);
    output.textContent = `${whole.layers[cursor.layer] || "(model)"}  step ${matrix().steps[cursor.at].toLocaleString()}  ${words(cursor.layer, cursor.at)}${estimated.has(whole.layers[cursor.layer]) ? " estimated from a sample" : ""}${mark ? `  (${mark.words} from step ${mark.step.toLocaleString()})` : ""}`;
  }
  const clamp = (value, low, high) => Math.max(low, Math.min(value, high));

  // Where several layers share a pixel, the one that the pixel shows.
  function locate(event) {
    const bounds = canvas.getBoundingClientRect();
    const { from, to, top, bottom } = sight();
    const step = from + ((event.clientX - bounds.left - frame.gutter) / frame.plot) * (to - from);
    const { steps, rows } = matrix();
    let [low, high] = [0, steps.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (steps[middle] <= step) low = middle;
      else high = middle - 1;
    }
    const row = top + (event.clientY - bounds.top - LANE) / frame.rowHeight;
    let layer = clamp(Math.floor(row), top, bottom - 1);
    for (let y = layer + 1; y < Math.min(bottom, row + 1 / frame.rowHeight); y++) if (rows[y][low] > rows[layer][low]) layer = y;
    return [layer, low];
  }

  canvas.addEventListener("pointermove", (event) => {
    if (!whole || event.pointerType === "touch") return;
    if (drag) return stretch(event);
    point(...locate(event));
  });
  canvas.addEventListener("pointerleave", () => {
    if (!whole || drag) return;
    cursor = null;
    point();
  });
  canvas.addEventListener("pointerdown", (event) => {
    if (!whole || event.button || event.pointerType === "touch") return;
    canvas.setPointerCapture(event.pointerId);
    drag = { x: event.offsetX, y: event.offsetY, from: sight(), shift: event.shiftKey };
  });
  function stretch(event) {
    const [x, y] = [clamp(event.offsetX, frame.gutter, frame.width), clamp(event.offsetY, LANE, LANE + frame.high)];
    if (drag.shift) {
      const by = ((drag.x - event.offsetX) / frame.plot) * (drag.from.to - drag.from.from);
      drag.moved = true;
      return show({ ...drag.from, from: drag.from.from + by, to: drag.from.to + by });
    }
    if (Math.abs(x - drag.x) < 5 && Math.abs(y - drag.y) < 5) return;
    // Along the steps; across the layers too where somebody clearly draws a box, and there are many.
    const tall = Math.abs(y - drag.y) > 30 && drag.from.bottom - drag.from.top > 8;
    const [top, bottom] = tall ? [Math.min(y, drag.y), Math.max(y, drag.y)] : [LANE, LANE + frame.high];
    drag.box = [Math.min(x, drag.x), top, Math.abs(x - drag.x), bottom - top];
    point();
  }
  canvas.addEventListener("pointerup", (event) => {
    const done = drag;
    drag = null;
    if (!done) return;
    if (done.box) {
      const { from, to, top } = done.from;
      const step = (x) => from + ((x - frame.gutter) / frame.plot) * (to - from);
      const [x, y, w, h] = done.box;
      show({ from: step(Math.max(x, frame.gutter)), to: step(x + w), top: top + Math.floor((y - LANE) / frame.rowHeight), bottom: top + Math.ceil((y - LANE + h) / frame.rowHeight) });
    } else if (!done.moved) {
      point(...locate(event));
      pick();
    }
  });
  canvas.addEventListener("click", (event) => {
    if (whole && event.pointerType === "touch") {
      point(...locate(event));
      pick();
    }
  });
  canvas.addEventListener("dblclick", () => whole && view && show(everything()));
  canvas.addEventListener("wheel", (event) => {
    if (!whole || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    zoomBy(event.deltaY > 0 ? 1.25 : 0.8, clamp((event.offsetX - frame.gutter) / frame.plot, 0, 1));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    if (!whole || event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [-10, 0], PageDown: [10, 0], Home: [0, -Infinity], End: [0, Infinity] };
    if (event.key in moves) {
      const [down, right] = moves[event.key];
      point((cursor?.layer ?? sight().top) + (cursor ? down : 0), (cursor?.at ?? matrix().steps.length - 1) + (cursor ? right : 0));
      const { from, to, top, bottom } = sight();
      const step = matrix().steps[cursor.at];
      if (cursor.layer < top || cursor.layer >= bottom || step < from || step >= to) show({ from: step - (to - from) / 2, to: step + (to - from) / 2, top: cursor.layer - (bottom - top >> 1), bottom: cursor.layer + (bottom - top + 1 >> 1) });
    } else if (event.key === "Enter" && cursor) pick();
    else if (event.key === "+") zoomBy(0.5, cursor ? (matrix().steps[cursor.at] - sight().from) / (sight().to - sight().from) : 0.5);
    else if (event.key === "-") zoomBy(2);
    else if (event.key === "0") show(everything());
    else if (event.key === "<" || event.key === ">") pan(event.key === "<" ? -0.5 : 0.5);
    else return;
    event.preventDefault();
  });

  // ---- the lines of the layers that were picked
  function pick() {
    const name = whole.layers[cursor.layer];
    picked = picked.includes(name) ? picked.filter((other) => other !== name) : [...picked, name].slice(-PICKED);
    drawLines();
  }
  function drawLines() {
    if (!picked.length) {
      lines?.remove();
      return void (lines = null);
    }
    const title = section.querySelector(`[data-stat="${stat}"]`).textContent.trim();
    lines ??= new Chart(section.querySelector(".layer-lines"), "", { wide: true, log: true, ask: (asked) => asked && show({ ...sight(), from: asked[0], to: asked[1] + 1 }) });
    lines.caption.textContent = `${title} of the layers you clicked`;
    const { steps, rows } = matrix();
    lines.zoom = null;
    lines.show(
      picked.map((name, color) => {
        const values = [...rows[whole.layers.indexOf(name)]].map((level) => (Number.isNaN(level) ? null : level === Infinity ? "NaN" : 10 ** level));
        return { label: name || "(model)", color, steps, values, min: values, max: values };
      }),
      marks(),
    );
  }

  // ---- the same in words
  function fillTable() {
    const body = table.querySelector("tbody");
    body.replaceChildren();
    const { layers, steps, rows } = matrix();
    layers.forEach((name, y) => {
      let [top, last] = [-1, -1];
      rows[y].forEach((level, i) => {
        if (Number.isNaN(level)) return;
        last = i;
        if (top < 0 || level > rows[y][top]) top = i;
      });
      const row = body.insertRow();
      const head = document.createElement("th");
      head.scope = "row";
      head.textContent = name || "(model)";
      row.append(head);
      const cells = [isFrozen(name, steps.at(-1)) ? "frozen" : "trained", last < 0 ? "–" : words(y, last), top < 0 ? "–" : words(y, top), top < 0 ? "–" : steps[top].toLocaleString()];
      for (const text of cells) row.insertCell().textContent = text;
    });
  }
  table.addEventListener("toggle", () => whole && table.open && fillTable());

  section.addEventListener("click", (event) => {
    const button = event.target.closest("[data-zoom]");
    if (button && whole) return { in: () => zoomBy(0.5), out: () => zoomBy(2), whole: () => show(everything()) }[button.dataset.zoom]();
    const choice = event.target.closest("[data-stat]");
    if (!choice) return;
    for (const each of section.querySelectorAll("[data-stat]")) each.setAttribute("aria-pressed", each === choice);
    stat = choice.dataset.stat;
    turn += 1;
    zoomed = null;
    whole = null;
    refresh().then(() => view && sharpen());
  });
  let width = 0;
  new ResizeObserver(() => {
    if (box.clientWidth === width) return; // our own height
    width = box.clientWidth;
    draw();
  }).observe(box);
  document.addEventListener("theme:changed", draw);
  document.addEventListener("timeline:changed", () => {
    for (const found of [whole, zoomed]) if (found) blank(found);
    draw();
  });
  document.body.addEventListener("job:numbers", refresh);
  startTimeline();
  refresh();
}
