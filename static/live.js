// One event stream while the page can be seen; what arrives becomes DOM events that htmx and the charts listen to.

const QUIET_MS = 500;

// At most one signal of a name per interval, the last one never lost.
function throttled(name) {
  let timer = 0;
  let sentAt = -Infinity;
  const send = () => {
    timer = 0;
    sentAt = performance.now();
    document.body.dispatchEvent(new Event(name));
  };
  return () => {
    if (!timer) timer = setTimeout(send, Math.max(0, sentAt + QUIET_MS - performance.now()));
  };
}

function follow(address, handlers) {
  let source = null;
  const open = () => {
    if (source || document.hidden) return;
    source = new EventSource(address);
    // What happened between the page and the stream, or while the connection was lost.
    source.addEventListener("open", () => handlers.resume());
    for (const [name, handler] of Object.entries(handlers)) source.addEventListener(name, handler);
    // The stream of a finished job ends by itself: ask once more, and do not knock again.
    source.onerror = () => {
      if (handlers.isOver?.()) close();
    };
  };
  const close = () => {
    source?.close();
    source = null;
  };
  // Hidden tabs hold no connection: a browser allows six to one server, and people keep eight tabs.
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) return close();
    if (handlers.isOver?.()) return;
    open();
    handlers.resume();
  });
  window.addEventListener("pagehide", close);
  // A job that had ended and was resumed on this page moves again.
  document.addEventListener("htmx:afterSwap", () => {
    if (source || document.hidden || !handlers.isOver || handlers.isOver()) return;
    open();
    handlers.resume();
  });
  open();
}

export function startLive() {
  const root = document.body.dataset.root;
  const job = document.querySelector("[data-job]");
  if (job) {
    const status = throttled("job:status");
    const numbers = throttled("job:numbers");
    const side = throttled("job:side");
    const log = throttled("job:log");
    const all = () => [status, numbers, side, log].forEach((signal) => signal());
    const ended = ["stopped", "failed", "interrupted", "succeeded"];
    const isOver = () => ended.includes(document.getElementById("status").dataset.state);
    follow(`${root}/api/jobs/${job.dataset.job}/events?cursor=now`, {
      state: all,
      metrics: () => (numbers(), status()),
      layers: () => (numbers(), status()),
      proof: side,
      log,
      resume: all,
      isOver,
    });
    return;
  }
  const list = document.querySelector("[data-live-list]");
  if (list) {
    const changed = throttled("jobs:changed");
    follow(`${root}/api/events?cursor=now`, { state: changed, resume: changed });
    // Progress is not an event of the stream of all jobs: ask while one of them moves.
    setInterval(() => {
      if (!document.hidden && document.querySelector("[data-live-list=running]")) changed();
    }, 1500);
  }
}
