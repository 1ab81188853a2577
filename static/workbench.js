// The workbench: ticks, rules and presets go to the server one after another; rules, plan and tree follow the answer.
import { isTyping, singleKeysAct } from "./keys.js";
import { applyStates, startTree } from "./tree.js";

const TYPING_MS = 250;

export function startWorkbench(form) {
  const model = form.dataset.model;
  const home = form.getAttribute("action");
  const answer = () => document.getElementById("answer");
  const undo = form.querySelector("[data-undo]");
  const redo = form.querySelector("[data-redo]");
  const tree = startTree(form, { rows, tick, opened });
  const tips = `workbench-${model}-newest`;

  // ---- one request at a time: each is made from the form that the one before it left behind
  let last = Promise.resolve();
  function ask(extra, { remember = true } = {}) {
    last = last.then(async () => {
      const body = new URLSearchParams(new FormData(form));
      for (const [name, value] of Object.entries(extra)) body.set(name, value);
      try {
        const response = await fetch(`${home}/plan`, { method: "POST", body });
        if (!response.ok) throw new Error(await refusal(response));
        show(await response.text());
        if (remember) push();
      } catch (error) {
        complain(error);
      }
    });
    return last;
  }

  function show(html) {
    // Somebody may be typing in a rule: what has the focus keeps its value.
    Idiomorph.morph(answer(), html, { morphStyle: "outerHTML", ignoreActiveValue: true });
    htmx.process(answer());
    applyStates(form, JSON.parse(answer().dataset.states));
    form.querySelector(".workbench-main > .notice")?.remove();
  }

  function complain(error) {
    const notice = document.createElement("div");
    notice.className = "notice bad";
    notice.setAttribute("role", "alert");
    notice.textContent = error.message;
    form.querySelector(".workbench-main > .notice")?.remove();
    form.querySelector(".workbench-main").prepend(notice);
    applyStates(form, JSON.parse(answer().dataset.states));
  }

  // ---- the address is the state; undo and redo walk the browser's own history
  const place = () => history.state?.place ?? 0;
  function address() {
    const text = answer().dataset.address;
    return text ? `${home}?${text}` : home;
  }
  function push() {
    if (address() === location.pathname + location.search) return;
    history.pushState({ place: place() + 1 }, "", address());
    sessionStorage.setItem(tips, place());
    marks();
  }
  function marks() {
    undo.disabled = place() === 0;
    redo.disabled = place() >= Number(sessionStorage.getItem(tips) ?? 0);
  }
  history.replaceState({ place: place() }, "");
  if (place() === 0) sessionStorage.setItem(tips, 0);
  marks();
  // After what is under way: a tick that has not been answered yet is undone too.
  undo.addEventListener("click", () => last.then(() => history.back()));
  redo.addEventListener("click", () => last.then(() => history.forward()));
  window.addEventListener("popstate", () => {
    last = last.then(async () => {
      const page = new DOMParser().parseFromString(await (await fetch(location.href)).text(), "text/html");
      show(page.getElementById("answer").outerHTML);
      marks();
    });
  });

  // ---- what the tree asks for
  async function rows(query) {
    const params = new URLSearchParams(answer().dataset.address);
    for (const [name, value] of Object.entries(query)) params.set(name, value);
    if (!("search" in query)) params.delete("search");
    const response = await fetch(`${home}/rows?${params}`);
    if (!response.ok) throw new Error(await refusal(response));
    return response.text();
  }
  function tick(path, freeze) {
    return ask({ tick: `${freeze ? "freeze" : "unfreeze"}:${path}` });
  }
  function opened(indices) {
    const params = new URLSearchParams(answer().dataset.address);
    params.set("open", indices.join(","));
    answer().dataset.address = params;
    openField.value = indices.join(",");
    history.replaceState(history.state, "", address());
  }
  // Travels with every request, so that the address which comes back keeps what is open.
  const openField = Object.assign(document.createElement("input"), { type: "hidden", name: "open" });
  openField.value = tree.openIndices().join(",");
  form.append(openField);

  // ---- buttons, selects and typing
  form.addEventListener("submit", (event) => {
    const button = event.submitter;
    if (button && "leaves" in button.dataset) return;
    event.preventDefault();
    if (button?.classList.contains("box")) return; // the tree has answered the click
    ask(button?.name && button.name !== "plan" ? { [button.name]: button.value } : {}).then(() => {
      if (button?.name === "add" || form.elements.add_text?.value) {
        form.elements.add_text.value = "";
        document.getElementById("matches").textContent = "";
      }
    });
  });
  let timer = 0;
  form.addEventListener("input", (event) => {
    const { name } = event.target;
    if (name !== "rule_text" && !name.startsWith("train.")) return;
    clearTimeout(timer);
    timer = setTimeout(() => ask({ add_text: "" }, { remember: !event.target.matches(":focus") }), TYPING_MS);
  });
  form.addEventListener("change", (event) => {
    if (!/^(rule_|mechanism|norm_statistics|dropout|train\.)/.test(event.target.name)) return;
    clearTimeout(timer);
    ask({ add_text: "" });
  });

  document.addEventListener("keydown", (event) => {
    const typing = isTyping(event.target);
    if (event.key === "/" && !typing && singleKeysAct()) {
      event.preventDefault();
      form.elements.search.focus();
    }
    if (typing || !(event.ctrlKey || event.metaKey) || event.key.toLowerCase() !== "z") return;
    event.preventDefault();
    const button = event.shiftKey ? redo : undo;
    if (!button.disabled) button.click();
  });
}

async function refusal(response) {
  const page = new DOMParser().parseFromString(await response.text(), "text/html");
  return page.querySelector("main p")?.textContent ?? `The server answered ${response.status}.`;
}
