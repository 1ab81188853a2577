// Starts each island by its data- attribute, and what every page shares: local times, questions, quick buttons.
import { startKeys, startQuestions } from "./keys.js";
import { startLive } from "./live.js";

const islands = {
  "[data-workbench]": () => import("./workbench.js").then((module) => module.startWorkbench),
  "[data-charts]": () => import("./metrics.js").then((module) => module.startCharts),
  "[data-compare]": () => import("./metrics.js").then((module) => module.startCompare),
  "[data-heatmap]": () => import("./heatmap.js").then((module) => module.startHeatmap),
};

// What somebody opened or ticked stays so when the server sends that part again.
Idiomorph.defaults.callbacks.beforeAttributeUpdated = (name) => !["open", "checked", "data-started", "data-ready"].includes(name);

const format = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

function start(within) {
  for (const time of within.querySelectorAll("time[datetime]")) time.textContent = format.format(new Date(time.dateTime));
  for (const log of within.querySelectorAll("[data-tail]")) log.scrollTop = log.scrollHeight;
  for (const [selector, load] of Object.entries(islands)) {
    for (const element of within.querySelectorAll(`${selector}:not([data-started])`)) {
      element.dataset.started = "";
      load().then((begin) => {
        begin(element);
        element.dataset.ready = "";
      });
    }
  }
}

startQuestions(); // before every other listener of submit

// A job's buttons without a whole page: post, then let the parts that show the state ask again.
document.addEventListener("submit", async (event) => {
  const form = event.target;
  if (!("quick" in form.dataset) || event.defaultPrevented) return;
  event.preventDefault();
  const response = await fetch(form.action, { method: "POST", body: new URLSearchParams(new FormData(form, event.submitter)) });
  document.querySelector("main > .refusal")?.remove();
  if (!response.ok) {
    // The answer is a page that says why: its words stand above this one, which goes on as it is.
    const page = new DOMParser().parseFromString(await response.text(), "text/html");
    const said = page.querySelector("main [role=alert]") ?? page.querySelector("main p");
    const notice = Object.assign(document.createElement("div"), { className: "refusal notice bad", role: "alert" });
    notice.append(...said.childNodes);
    document.querySelector("main").prepend(notice);
    notice.scrollIntoView({ block: "nearest" });
  }
  document.body.dispatchEvent(new Event(form.dataset.quick || (document.querySelector("[data-job]") ? "job:status" : "jobs:changed")));
});

// One menu at a time, closed by Escape or a click elsewhere.
document.addEventListener("click", (event) => {
  for (const menu of document.querySelectorAll("details.menu[open]")) {
    if (!menu.contains(event.target) || event.target.closest(".menu-body button")) menu.open = false;
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  const menu = document.querySelector("details.menu[open]");
  if (!menu) return;
  menu.open = false;
  menu.querySelector("summary").focus();
});

document.addEventListener("htmx:afterSwap", () => start(document));
startKeys();
start(document);
startLive();
