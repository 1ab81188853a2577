// When what was frozen or unfrozen in the job of this page: asked for once, and again when the job says more.
import { read } from "./charts.js";

let asked = null;
let known = { changes: [], layers: {} };

function words(change) {
  const what = change.match || `type=${change.type}`;
  return `${change.action} ${what}${change.by === "live" ? ", by hand" : ""}`;
}

async function ask(address) {
  known = await read(address);
  document.dispatchEvent(new Event("timeline:changed"));
}

export function startTimeline() {
  const address = document.querySelector("[data-timeline]")?.dataset.timeline;
  if (!address || asked) return asked;
  document.body.addEventListener("job:side", () => ask(address));
  asked = ask(address);
  return asked;
}

// The changes that have taken effect, as marks on an axis of steps.
export const marks = () => known.changes.filter((change) => change.step !== null && change.step <= known.step + 1).map((change) => ({ step: change.step, action: change.action, words: words(change), layers: change.layers }));

// Whether a layer was frozen at a step: as it began, and every change since.
export function isFrozen(layer, step) {
  let frozen = known.layers[layer] ?? false;
  for (const change of known.changes) {
    if (change.step !== null && change.step <= step && change.layers.includes(layer)) frozen = change.action === "freeze";
  }
  return frozen;
}
