// What pages do about the stream of all jobs: signals to their parts, "reconnecting", and word of jobs that ended.
import { join, listen } from "./shared-stream.js";

const LIVE = ["queued", "starting", "running", "paused", "stopping"];
const WISH = "frostline-notify";
const SETTLED_MS = 3000; // an ended job has hardly changed since its page was made: its charts come first

// How long answers take, in milliseconds: a mean that follows the last dozen. Where they take long, pages ask
// less often, so that a server with many readers beside its jobs keeps answering each of them soon.
const PATIENCE = 20;
let answerMs = 0;
function watchAnswers() {
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) {
      if (["fetch", "xmlhttprequest"].includes(entry.initiatorType)) answerMs += (entry.duration - answerMs) / 12;
    }
  }).observe({ type: "resource" });
}

// At most one signal of a name per interval, the last one never lost; none while the page is hidden.
function throttled(name, interval) {
  let timer = 0;
  let sentAt = -Infinity;
  const send = () => {
    timer = 0;
    if (document.hidden) return;
    sentAt = performance.now();
    document.body.dispatchEvent(new Event(name));
  };
  return () => {
    if (!timer) timer = setTimeout(send, Math.max(0, sentAt + Math.max(interval, PATIENCE * answerMs) - performance.now()));
  };
}

// One connection for all tabs by a shared worker; where the browser has none, or cannot load it (the server may go
// away just then), one for this tab.
function connect(root, hear) {
  const self = () => ({ kind: "tab", visible: !document.hidden, focused: document.hasFocus() });
  let say;
  function connectAlone() {
    say = (message) => listen(hear, message);
    join(hear, root);
    say(self());
  }
  if ("SharedWorker" in window) {
    const worker = new SharedWorker(`${root}/static/shared-stream.js?root=${encodeURIComponent(root)}`, { type: "module", name: "frostline" });
    worker.onerror = connectAlone;
    worker.port.onmessage = ({ data }) => hear(data);
    say = (message) => worker.port.postMessage(message);
    say(self());
  } else connectAlone();
  for (const event of ["focus", "blur"]) window.addEventListener(event, () => say(self()));
  document.addEventListener("visibilitychange", () => {
    say(self());
    if (!document.hidden && !document.getElementById("connection").hidden) say({ kind: "knock" });
  });
  window.addEventListener("pagehide", () => say({ kind: "leave" }));
  window.addEventListener("pageshow", (event) => event.persisted && say(self()));
}

// ---- the connection, as far as somebody must know of it
function startBanner() {
  const banner = document.getElementById("connection");
  let timer = 0;
  return (kind) => {
    clearTimeout(timer);
    if (kind === "open") banner.hidden = true;
    // A blink of the network is nobody's business.
    else timer = setTimeout(() => {
      banner.querySelector("[data-lost]").hidden = kind !== "lost";
      banner.querySelector("[data-signed-out]").hidden = kind !== "signed-out";
      banner.hidden = false;
    }, kind === "lost" ? 1200 : 0);
  };
}

// ---- jobs that ended
const WORDS = { succeeded: "has succeeded", stopped: "has stopped", failed: "has failed", interrupted: "was interrupted" };
const named = (job) => job.name || `Job ${job.id}`;
const wantsNotices = () => "Notification" in window && Notification.permission === "granted" && localStorage.getItem(WISH) === "yes";

function announce(root, { job, outside }) {
  const address = `${root}/jobs/${job.id}`;
  if (outside && wantsNotices()) {
    const notice = new Notification(`${named(job)} ${WORDS[job.state]}`, { body: job.error?.message ?? `${job.step} steps`, tag: `frostline-${job.id}`, icon: `${root}/static/icon.svg` });
    notice.onclick = () => {
      window.focus();
      location.assign(address);
    };
  }
  if (location.pathname === address) return; // that page says it itself
  const toast = document.getElementById("toast").content.firstElementChild.cloneNode(true);
  const link = toast.querySelector("a");
  link.href = address;
  link.textContent = named(job);
  toast.querySelector("span").textContent = WORDS[job.state];
  if (job.state === "failed") toast.classList.add("bad");
  toast.querySelector("button").addEventListener("click", () => toast.remove());
  document.getElementById("toasts").append(toast);
  if (job.state !== "failed") setTimeout(() => toast.remove(), 12_000);
}

function startWish(button) {
  const show = () => button.setAttribute("aria-pressed", wantsNotices());
  button.hidden = !("Notification" in window) || Notification.permission === "denied";
  button.addEventListener("click", async () => {
    const wants = !wantsNotices() && (await Notification.requestPermission()) === "granted";
    localStorage.setItem(WISH, wants ? "yes" : "no");
    show();
  });
  show();
}

// ---- what the parts of a page are told
function jobSignals(id) {
  const status = throttled("job:status", 500);
  const numbers = throttled("job:numbers", 500);
  const slow = [throttled("job:log", 1500), throttled("job:side", 3000), throttled("job:insights", 20_000)];
  const now = [status, numbers, throttled("job:log", 0), throttled("job:side", 0), throttled("job:insights", 0)];
  const tree = throttled("job:tree", 0);
  let state = document.querySelector("[data-job]").dataset.state;
  return {
    all: () => now.forEach((signal) => signal()),
    hear(job) {
      if (job.id !== id) return;
      if (job.state !== state) {
        state = job.state;
        tree(); // whether its boxes can be ticked follows from the state
        return this.all();
      }
      [status, numbers, ...slow].forEach((signal) => signal());
    },
  };
}

function listSignals() {
  const signals = [throttled("jobs:changed", 700), throttled("sweep:curves", 2500)];
  const list = () => signals.forEach((signal) => signal());
  const rows = new Map();
  return {
    all: list,
    hear(job) {
      // A row of its own asks for itself alone; a job that is not listed may have to be.
      const row = document.getElementById(`job-${job.id}`);
      if (!row?.hasAttribute("hx-get") || (row.dataset.state !== job.state && !LIVE.includes(job.state))) return list();
      if (!rows.has(job.id)) rows.set(job.id, throttled(`job-${job.id}:changed`, 1000));
      rows.get(job.id)();
    },
  };
}

export function startLive() {
  watchAnswers();
  const root = document.body.dataset.root;
  for (const button of document.querySelectorAll("[data-notify]")) startWish(button);
  if (!document.getElementById("connection")) return;
  const job = document.querySelector("[data-job]");
  const page = job ? jobSignals(Number(job.dataset.job)) : document.querySelector("[data-live-list]") ? listSignals() : null;
  const banner = startBanner();
  let wait = job && !LIVE.includes(job.dataset.state) ? SETTLED_MS : 0;
  connect(root, (message) => {
    if (message.kind === "state") page?.hear(message.job);
    else if (message.kind === "ended") announce(root, message);
    else {
      banner(message.kind);
      if (message.kind !== "open") return;
      setTimeout(() => page?.all(), wait); // what happened before, or while it was lost
      wait = 0;
    }
  });
  document.addEventListener("visibilitychange", () => !document.hidden && page?.all());
}
