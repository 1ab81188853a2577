// The workbench: ticks, rules and presets go to the server one after another; rules, plan and tree follow the answer.
import { isTyping, singleKeysAct } from "./keys.js";
import { startTree } from "./tree.js";

const TYPING_MS = 250;
const TYPING_SIZE_MS = 700; // a worker traces the model at every size that is asked for
const TRACING_MS = 400;

export function startWorkbench(form) {
  const model = form.dataset.model;
  const home = form.getAttribute("action");
  const answer = () => document.getElementById("answer");
  const main = form.querySelector(".workbench-main");
  const undo = form.querySelector("[data-undo]");
  const redo = form.querySelector("[data-redo]");
  const tree = startTree(form, { rows, tick, opened });
  const tips = `workbench-${model}-newest`;

  // ---- one request at a time: each is made from the form that the one before it left behind
  let last = Promise.resolve();
  function ask(extra, { remember = true } = {}) {
    const mine = last.then(async () => {
      const body = new URLSearchParams(new FormData(form));
      body.set("seen", answer().dataset.address);
      for (const [name, value] of Object.entries(extra)) body.set(name, value);
      try {
        const states = show(await (await send(`${home}/plan`, { method: "POST", body })).text());
        if (remember) push();
        return states;
      } catch (error) {
        complain(error);
        return null;
      }
    });
    last = mine;
    return mine;
  }

  async function send(url, options) {
    // Asked like htmx, a server that wants a login says so instead of sending its page.
    const response = await fetch(url, { ...options, headers: { "HX-Request": "true" } }).catch(() => {
      throw new Error("The server does not answer. What you see is as it was; try again in a moment.");
    });
    if (response.status === 401) throw new Error("This session has ended. Log in again in another tab, then go on here.");
    if (!response.ok) throw new Error(await refusal(response));
    return response;
  }

  function show(html) {
    // Somebody may be typing in a rule: what has the focus keeps its value, as does a new rule.
    const typed = form.elements.add_text.value;
    Idiomorph.morph(answer(), html, { morphStyle: "outerHTML", ignoreActiveValue: true });
    form.elements.add_text.value = typed;
    htmx.process(answer());
    const states = JSON.parse(answer().dataset.states);
    tree.paint(states);
    main.querySelector(":scope > .notice")?.remove();
    lookAgain();
    return states;
  }

  // ---- the model is being traced at another size: its figures come by themselves
  let look = 0;
  function lookAgain() {
    clearTimeout(look);
    if (!answer().querySelector("[data-tracing]")) return;
    look = setTimeout(isTraced, TRACING_MS);
  }
  const isFilling = () => document.activeElement?.matches(".phases li :is(input, select)");
  async function isTraced() {
    // Of the address, not of the form: what somebody is filling in is neither sent nor replaced.
    const body = new URLSearchParams(answer().dataset.address);
    try {
      const text = await (await send(`${home}/plan`, { method: "POST", body })).text();
      if (text.includes("data-tracing")) lookAgain();
      else if (isFilling()) form.addEventListener("focusout", () => setTimeout(lookAgain), { once: true });
      else ask({ add_text: "" }, { remember: false });
    } catch (error) {
      complain(error);
    }
  }
  lookAgain();

  function complain(error) {
    main.querySelector(":scope > .notice")?.remove();
    const notice = Object.assign(document.createElement("div"), { className: "notice bad", textContent: error.message });
    notice.setAttribute("role", "alert");
    main.prepend(notice);
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
      const page = new DOMParser().parseFromString(await (await send(location.href)).text(), "text/html");
      show(page.getElementById("answer").outerHTML);
      tree.replaceRows(page.querySelector(".rows").innerHTML);
      openField.value = tree.openIndices().join(",");
      marks();
    }).catch(complain);
  });

  // ---- what the tree asks for
  async function rows(query) {
    const params = new URLSearchParams(answer().dataset.address);
    for (const [name, value] of Object.entries(query)) params.set(name, value);
    if (!("search" in query)) params.delete("search");
    try {
      return await (await send(`${home}/rows?${params}`)).text();
    } catch (error) {
      complain(error);
      return "";
    }
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
    if (name !== "rule_text" && !/^(train|assume)\./.test(name)) return;
    clearTimeout(timer);
    const wait = /\.(sequence_length|image_size)$/.test(name) ? TYPING_SIZE_MS : TYPING_MS;
    timer = setTimeout(() => ask({ add_text: "" }, { remember: !event.target.matches(":focus") }), wait);
  });
  form.addEventListener("change", (event) => {
    if (!/^(rule_|phase_|group_|mechanism|norm_statistics|dropout|train\.|assume\.)/.test(event.target.name)) return;
    // A new phase or group is none before it says what it matches.
    const text = event.target.closest(".phases li")?.querySelector('[name$="_text"]');
    if (text && text !== event.target && !text.value.trim()) return;
    clearTimeout(timer);
    ask({ add_text: "" });
  });

  // The model has been timed: its plans predict the time of a step from now on.
  document.body.addEventListener("model:timed", () => ask({ add_text: "" }, { remember: false }));

  // ---- the first steps, hidden once and for all
  const guide = document.querySelector("[data-guide]");
  guide?.querySelector("[data-guide-hide]").addEventListener("click", () => {
    document.cookie = "frostline-guide=hidden; path=/; max-age=31536000; samesite=lax";
    guide.remove();
  });

  // ---- a search as a rule
  form.querySelector("[data-as-rule]").addEventListener("click", () => {
    const text = form.elements.search.value.trim();
    const field = form.elements.add_text;
    field.value = /[*?{]|^(re|has):|^type=/.test(text) ? text : `has:${text}`;
    field.focus();
    htmx.trigger(field, "input");
  });

  // ---- keys
  form.addEventListener("keydown", (event) => {
    const rule = event.altKey && event.target.closest(".rule:not(.add)");
    if (!rule || !["ArrowUp", "ArrowDown"].includes(event.key)) return;
    event.preventDefault();
    const rules = [...rule.parentElement.children];
    const at = rules.indexOf(rule) + (event.key === "ArrowDown" ? 1 : 0);
    if (at < 1 || at >= rules.length) return;
    const to = at - (event.key === "ArrowUp" ? 1 : 0);
    document.activeElement.blur();
    ask({ up: `rule:${at}`, add_text: "" }).then(() => form.querySelectorAll('[name="rule_text"]')[to]?.focus());
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
