// The tree grid: keys, type-ahead, opening, searching, and painting one plan's states onto the visible rows.

const BOXES = { 0: "false", 1: "true", 2: "mixed" };
const FLOWS = {
  t: ["trained", "flame", "at least one of its own trainable parameters gets a gradient"],
  u: ["unreached", "circle-dashed", "trainable, but no gradient ever arrives"],
  p: ["passes", "arrow-left", "frozen; backward runs through it to something before it"],
  i: ["idle", "snowflake", "frozen; backward does not come here"],
};
const SEARCH_MS = 120;
const TYPE_AHEAD_MS = 600;

let states = null;

export function applyStates(form, next) {
  if (next) states = next;
  for (const row of form.querySelectorAll(".rows > .row[data-kind]")) paint(row);
  drawLine(form);
}

function paint(row) {
  const index = Number(row.dataset.index);
  const isModule = row.dataset.kind === "module";
  const code = isModule ? states.boxes[index] : states.parameters[index];
  const box = row.querySelector(".box");
  if (box && code in BOXES) {
    box.setAttribute("aria-checked", BOXES[code]);
    box.value = `${code === "1" ? "unfreeze" : "freeze"}:${row.dataset.path}`;
  }
  const bar = row.querySelector(".share svg");
  const share = isModule ? states.shares[index] : Number(code);
  bar?.querySelector(".bar-frozen").setAttribute("width", bar.dataset.full * share);
  if (isModule) paintFlow(row.querySelector(".flow-cell"), states.flows[index]);
}

function paintFlow(cell, code) {
  const flow = FLOWS[code];
  const shown = cell.firstElementChild;
  if (!flow) return cell.replaceChildren();
  if (shown?.classList.contains(`flow-${flow[0]}`)) return;
  const template = document.createElement("template");
  const root = document.body.dataset.root;
  template.innerHTML = `<span class="flow flow-${flow[0]}"><svg class="icon" aria-hidden="true"><use href="${root}/static/vendor/icons.svg#${flow[1]}"/></svg>${flow[0]}</span>`;
  template.content.firstChild.title = flow[2];
  cell.replaceChildren(template.content);
}

// The frost line: above the outermost visible row that begins beyond it, else inside the row that hides it.
function drawLine(form) {
  const row = (index) => form.querySelector(`.rows > .row.module[data-index="${index}"]`);
  for (const old of form.querySelectorAll(".line-above, .line-inside")) old.classList.remove("line-above", "line-inside");
  if (form.elements.search.value) return;
  const above = states.above.map(row).find(Boolean);
  if (above) return above.classList.add("line-above");
  states.inside.map(row).filter(Boolean).at(-1)?.classList.add("line-inside");
}

export function startTree(form, { rows, tick, opened }) {
  const grid = form.querySelector("[data-tree]");
  const body = grid.querySelector(".rows");
  const search = form.elements.search;
  const found = form.querySelector(".found");
  let unsearched = null;

  const all = () => [...body.querySelectorAll(":scope > .row[data-kind]")];
  const isOpen = (row) => row.getAttribute("aria-expanded") === "true";
  const level = (row) => Number(row.getAttribute("aria-level"));
  const openIndices = () => all().filter(isOpen).map((row) => Number(row.dataset.index));
  const below = (row) => {
    const rows = [];
    for (let next = row.nextElementSibling; next && level(next) > level(row); next = next.nextElementSibling) rows.push(next);
    return rows;
  };

  // ---- focus: one row is in the tab order, and moves
  function focus(row) {
    if (!row) return;
    body.querySelector('.row[tabindex="0"]')?.setAttribute("tabindex", "-1");
    row.setAttribute("tabindex", "0");
    row.focus();
  }
  const settle = () => {
    if (!body.querySelector('.row[tabindex="0"]')) body.querySelector(".row")?.setAttribute("tabindex", "0");
  };

  async function toggle(row, open = !isOpen(row)) {
    if (!row.hasAttribute("aria-expanded") || open === isOpen(row)) return;
    row.setAttribute("aria-expanded", open);
    if (open) {
      row.insertAdjacentHTML("afterend", await rows({ parent: row.dataset.index }));
      for (const child of below(row)) paint(child);
    } else {
      for (const child of below(row)) child.remove();
    }
    settle();
    drawLine(form);
    opened(openIndices());
  }

  // ---- ticking: the box answers at once, the plan corrects it
  function flip(row, to) {
    const box = row?.querySelector(".box");
    if (!box) return;
    const freeze = to ?? box.getAttribute("aria-checked") !== "true";
    const isModule = row.dataset.kind === "module";
    for (const each of [row, ...(isModule ? below(row) : [])]) each.querySelector(".box")?.setAttribute("aria-checked", freeze);
    return tick(row.dataset.path, freeze);
  }

  grid.addEventListener("click", (event) => {
    const row = event.target.closest(".row[data-kind]");
    if (!row) return;
    if (event.target.closest(".box")) {
      event.preventDefault();
      flip(row);
      focus(row);
    } else if (event.target.closest(".twisty")) {
      event.preventDefault();
      toggle(row);
      focus(row);
    } else if (!getSelection().toString()) {
      focus(row);
      if (event.detail === 2) toggle(row);
    }
  });

  let typed = "";
  let typedAt = 0;
  function typeAhead(letter, rows, at) {
    if (performance.now() - typedAt > TYPE_AHEAD_MS) typed = "";
    typedAt = performance.now();
    typed += letter.toLowerCase();
    const from = typed.length === 1 ? at + 1 : at;
    const order = [...rows.slice(from), ...rows.slice(0, from)];
    focus(order.find((row) => row.querySelector(".label").textContent.toLowerCase().startsWith(typed)));
  }

  grid.addEventListener("keydown", (event) => {
    const row = event.target.closest(".row[data-kind]");
    if (!row || event.altKey || event.ctrlKey || event.metaKey) return;
    const rows = all();
    const at = rows.indexOf(row);
    const keys = {
      ArrowDown: () => focus(rows[at + 1]),
      ArrowUp: () => focus(rows[at - 1]),
      Home: () => focus(rows[0]),
      End: () => focus(rows.at(-1)),
      PageDown: () => focus(rows[Math.min(at + 15, rows.length - 1)]),
      PageUp: () => focus(rows[Math.max(at - 15, 0)]),
      ArrowRight: () => (isOpen(row) ? focus(below(row)[0]) : toggle(row, true)),
      ArrowLeft: () => (isOpen(row) ? toggle(row, false) : focus(rows.slice(0, at).findLast((r) => level(r) < level(row)))),
      Enter: () => toggle(row),
      " ": () => flip(row),
    };
    if (keys[event.key]) {
      event.preventDefault();
      keys[event.key]();
    } else if (event.key.length === 1 && !"/?".includes(event.key)) {
      event.preventDefault();
      typeAhead(event.key, rows, at);
    }
  });

  // ---- searching: the rows found stand in for the tree until the box is empty
  let timer = 0;
  let asked = 0;
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(look, SEARCH_MS);
  });
  search.addEventListener("keydown", (event) => {
    if (event.key === "Enter") event.preventDefault();
    if (event.key === "ArrowDown") focus(all()[0]);
    if (event.key === "Escape" && search.value) {
      search.value = "";
      look();
    }
  });
  async function look() {
    const mine = ++asked;
    const text = search.value.trim();
    unsearched ??= openIndices();
    const html = await rows(text ? { search: text } : { open: unsearched.join(",") });
    if (mine !== asked) return; // something newer was typed meanwhile
    body.innerHTML = html;
    if (!text) unsearched = null;
    const count = all().length;
    found.textContent = text ? `${count} found` : "";
    applyStates(form);
    settle();
  }

  states = JSON.parse(document.getElementById("answer").dataset.states);
  settle();
  return { openIndices: () => unsearched ?? openIndices() };
}
