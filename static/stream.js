// The one event stream of all jobs: opens it, notices when it is lost, also after sleep, and opens it again.

const LOOK_MS = 5_000;
const QUIET_MS = 30_000; // without a word for so long the server is asked whether it is there
const ASLEEP_MS = 20_000;
const LONGEST_WAIT_MS = 10_000;

// tell(message): {kind: "open" | "lost" | "signed-out"} or {kind: "state", job}.
export function openStream(root, tell) {
  let source = null;
  let retry = 0;
  let failures = 0;
  let heardAt = Date.now();
  let lookedAt = Date.now();
  let cursor = "now";

  function open() {
    clearTimeout(retry);
    source?.close();
    heardAt = Date.now();
    source = new EventSource(`${root}/api/events?cursor=${cursor}`);
    source.onopen = () => {
      failures = 0;
      heardAt = Date.now();
      tell({ kind: "open" });
    };
    source.addEventListener("state", (event) => {
      heardAt = Date.now();
      cursor = event.lastEventId || cursor; // a stream that is opened anew goes on from here
      tell({ kind: "state", job: JSON.parse(event.data) });
    });
    source.onerror = lose;
  }

  function lose() {
    source.close();
    tell({ kind: "lost" });
    failures += 1;
    clearTimeout(retry);
    retry = setTimeout(knock, Math.min(500 * 2 ** (failures - 1), LONGEST_WAIT_MS));
  }

  // An event source says nothing of why it was refused: ask as plainly as that.
  async function knock() {
    try {
      const answer = await fetch(`${root}/api/jobs?limit=1`, { signal: AbortSignal.timeout(LOOK_MS) });
      if (answer.status === 401) return tell({ kind: "signed-out" });
    } catch {
      return lose(); // the server is away, which the page says
    }
    open();
  }

  setInterval(() => {
    const now = Date.now();
    const slept = now - lookedAt > ASLEEP_MS;
    lookedAt = now;
    if (source.readyState === EventSource.CLOSED) return;
    if (slept) knock();
    else if (now - heardAt > QUIET_MS) {
      heardAt = now;
      fetch(`${root}/api/health`, { signal: AbortSignal.timeout(LOOK_MS) }).catch(lose);
    }
  }, LOOK_MS);
  addEventListener("online", knock);
  open();
  return { knock };
}
