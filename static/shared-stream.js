// Runs once for all tabs: holds the one event stream and passes on what it says. It knows no page.
import { openStream } from "./stream.js";

const LIVE = ["queued", "starting", "running", "paused", "stopping"];
const JUST_NOW_MS = 120_000;

// Who listens: tab → what it last said of itself. `tell` may be a port's or, without shared workers, the page's own.
const tabs = new Map();
const states = new Map();
let stream = null;
let last = null;

export function join(tell, root) {
  tabs.set(tell, { visible: true, focused: true });
  if (!stream) stream = openStream(root, hear);
  else if (last) tell(last);
}

export function listen(tell, said) {
  if (said.kind === "leave") return tabs.delete(tell);
  if (said.kind === "knock") return stream.knock();
  tabs.set(tell, said);
}

function hear(message) {
  if (message.kind !== "state") last = message;
  for (const tell of tabs.keys()) tell(message);
  if (message.kind === "state" && hasEnded(message.job)) announce(message.job);
}

// Whether a job has ended just now, and not only been renamed long after.
function hasEnded(job) {
  const before = states.get(job.id);
  states.set(job.id, job.state);
  if (LIVE.includes(job.state)) return false;
  if (before !== undefined) return LIVE.includes(before);
  return Math.abs(Date.now() - Date.parse(job.ended_at)) < JUST_NOW_MS;
}

// Seen by every tab that can be seen; where nobody looks at any, one tab tells the system.
function announce(job) {
  const isWatched = [...tabs.values()].some((tab) => tab.focused);
  let outside = !isWatched;
  for (const tell of tabs.keys()) {
    tell({ kind: "ended", job, outside });
    outside = false;
  }
}

if (typeof SharedWorkerGlobalScope !== "undefined") {
  const root = new URL(location).searchParams.get("root");
  self.onconnect = ({ ports: [port] }) => {
    const tell = (message) => port.postMessage(message);
    port.onmessage = ({ data }) => listen(tell, data);
    join(tell, root);
  };
}
