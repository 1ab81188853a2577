// The keyboard everywhere: `?` opens the help sheet, `g` and a letter go to a page; both can be switched off.

const PAGES = { m: "/models", c: "/configs", j: "/jobs", x: "/compare", s: "/system" };
const CHORD_MS = 1200;
const OFF = "single-keys-off";

export const isTyping = (target) => target.matches("input, textarea, select, [contenteditable]");

// Some people speak their input, or reach a key by accident: WCAG 2.1.4 asks for a switch.
export function singleKeysAct() {
  try {
    return !localStorage.getItem(OFF);
  } catch {
    return true; // storage is refused here: the keys act
  }
}

export function startKeys() {
  const help = document.getElementById("help");
  const keysSwitch = help.querySelector("[data-single-keys]");
  keysSwitch.checked = singleKeysAct();
  keysSwitch.addEventListener("change", () => {
    try {
      if (keysSwitch.checked) localStorage.removeItem(OFF);
      else localStorage.setItem(OFF, "yes");
    } catch {
      keysSwitch.checked = true; // storage is refused: nothing to remember it by
    }
  });
  document.querySelector("[data-help]").addEventListener("click", () => help.showModal());

  let chordAt = -Infinity;
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
    if (isTyping(event.target) || document.querySelector("dialog[open]") || !singleKeysAct()) return;
    const page = PAGES[event.key];
    if (event.key === "?") {
      event.preventDefault();
      help.showModal();
    } else if (page && performance.now() - chordAt < CHORD_MS) {
      location.href = `${document.body.dataset.root}${page}`;
    }
    chordAt = event.key === "g" ? performance.now() : -Infinity;
  });
}

// Destructive things ask first: the form's own button says what will be done.
export function startQuestions() {
  const dialog = document.getElementById("question");
  let asking = null;
  document.addEventListener("submit", (event) => {
    const form = event.target;
    const question = event.submitter?.dataset.confirm ?? form.dataset.confirm;
    if (!question || asking?.allowed === form) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    asking = { form, submitter: event.submitter };
    dialog.querySelector("p").textContent = question;
    const words = event.submitter?.textContent.trim() || event.submitter?.title || "Delete";
    dialog.querySelector("[data-answer]").textContent = words;
    dialog.returnValue = "";
    dialog.showModal();
  }, true);
  dialog.addEventListener("close", () => {
    if (dialog.returnValue === "yes" && asking) {
      asking.allowed = asking.form;
      asking.form.requestSubmit(asking.submitter);
    }
    asking = null;
  });
}
