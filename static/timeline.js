// When what was frozen or unfrozen in the job of this page: asked for once, and again when the job says more.
import { read } from "./charts.js";

let asked = null;
let known = { changes: [], layers: {} };

function words(change) {
  const what = change.match || `type=${change.type}`;
  return `${change.action} ${what}${change.by === "live" ? ", by hand" : ""}`;
}

let text = "";
async function ask(address) {
  const fresh = await read(address);
  // What changed is how it is frozen, not the step.
  const said = JSON.stringify([fresh.frozen, fresh.changes, fresh.waiting]);
  known = fresh;
  if (said === text) return;
  const isFirst = text === "";
  text = said;
  document.dispatchEvent(new Event("timeline:changed"));
  if (!isFirst) document.body.dispatchEvent(new Event("timeline:changed"));
}

export function startTimeline() {
  const address = document.querySelector("[data-timeline]")?.dataset.timeline;
  if (!address || asked) return asked;
  for (const name of ["job:side", "job:tree"]) document.body.addEventListener(name, () => ask(address));
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
