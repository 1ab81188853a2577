// The tree grid: keys, type-ahead, opening, searching, and painting onto visible rows what a plan changed.

const BOXES = { 0: "false", 1: "true", 2: "mixed" };
const FLOWS = {
  t: ["trained", "flame", "at least one of its own trainable parameters gets a gradient"],
  u: ["unreached", "circle-dashed", "trainable, but no gradient ever arrives"],
  p: ["passes", "arrow-left", "frozen; backward runs through it to something before it"],
  i: ["idle", "snowflake", "frozen; backward does not come here"],
};
const SEARCH_MS = 120;
const TYPE_AHEAD_MS = 600;
const PAGE_ROWS = 15;

export function startTree(form, { rows, tick, opened }) {
  const grid = form.querySelector("[data-tree]");
  const body = grid.querySelector(".rows");
  const search = form.elements.search;
  const found = form.querySelector(".found");
  const asRule = form.querySelector("[data-as-rule]");
  const why = form.querySelector(".why");
  let line = { above: [], inside: [] };
  let unsearched = search.value ? [] : null; // what is open below a search, to come back to

  const all = () => [...body.querySelectorAll(".row[data-kind]")];
  const isOpen = (row) => row.getAttribute("aria-expanded") === "true";
  const level = (row) => Number(row.getAttribute("aria-level"));
  const openIndices = () => all().filter(isOpen).map((row) => Number(row.dataset.index));
  const below = (row) => {
    const list = [];
    for (let next = row.nextElementSibling; next && level(next) > level(row); next = next.nextElementSibling) list.push(next);
    return list;
  };

  // ---- painting: one pass over the visible rows finds those that the answer speaks of
  function paint(states) {
    for (const row of body.children) {
      const kind = row.dataset.kind;
      const state = kind && states[`${kind}s`][row.dataset.index];
      if (state) paintRow(row, state);
    }
    line = states;
    drawLine();
    explain(grid.contains(document.activeElement) ? document.activeElement.closest(".row") : null);
  }

  function paintRow(row, [box, share, flow, because]) {
    const its = row.querySelector(".box");
    if (its && box in BOXES) {
      its.setAttribute("aria-checked", BOXES[box]);
      truth.set(its, BOXES[box]);
    }
    const bar = row.querySelector(".share svg");
    bar?.querySelector(".bar-frozen").setAttribute("width", bar.dataset.full * share);
    if (row.dataset.kind === "module") paintFlow(row.querySelector(".flow-cell"), flow, because);
  }

  function paintFlow(cell, code, because) {
    const flow = FLOWS[code];
    if (!flow) return cell.replaceChildren();
    if (!cell.firstElementChild?.classList.contains(`flow-${flow[0]}`)) {
      const template = document.createElement("template");
      const root = document.body.dataset.root;
      template.innerHTML = `<span class="flow flow-${flow[0]}"><svg class="icon" aria-hidden="true"><use href="${root}/static/vendor/icons.svg#${flow[1]}"/></svg>${flow[0]}</span>`;
      cell.replaceChildren(template.content);
    }
    cell.firstElementChild.title = because || flow[2];
  }

  // The frost line: above the outermost visible row that begins beyond it, else inside the row that hides it.
  function drawLine() {
    const row = (index) => body.querySelector(`.row.module[data-index="${index}"]`);
    for (const old of body.querySelectorAll(".line-above, .line-inside")) old.classList.remove("line-above", "line-inside");
    if (search.value) return;
    const above = line.above.map(row).find(Boolean);
    if (above) above.classList.add("line-above");
    else line.inside.map(row).filter(Boolean).at(-1)?.classList.add("line-inside");
  }

  // ---- why: the row under the pointer or with the focus, in words
  function explain(row) {
    if (!row?.dataset.kind) return;
    const flow = row.querySelector(".flow");
    const state = flow ? `${flow.textContent.trim()}: ${flow.title}` : { true: "frozen", false: "trainable", mixed: "partly frozen" }[row.querySelector(".box")?.getAttribute("aria-checked")];
    const name = Object.assign(document.createElement("b"), { textContent: row.dataset.path || "the whole model" });
    const facts = [row.querySelector(".detail").textContent.trim(), row.querySelector(".tied")?.title, state];
    why.replaceChildren(name, document.createTextNode(` ${facts.filter(Boolean).join(" · ")}`));
  }
  why.hidden = false;
  why.textContent = "Point at a row, or walk to it, to read why it is as it is.";
  grid.addEventListener("pointerover", (event) => explain(event.target.closest(".row")));
  grid.addEventListener("focusin", (event) => explain(event.target.closest(".row")));

  // ---- focus: one row is in the tab order, and moves
  function focus(row) {
    if (!row) return;
    for (const old of body.querySelectorAll('.row[tabindex="0"]')) {
      old.setAttribute("tabindex", "-1");
      old.removeAttribute("aria-describedby");
    }
    row.setAttribute("tabindex", "0");
    row.setAttribute("aria-describedby", "why");
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
      for (const marked of body.querySelectorAll(".line-above, .line-inside")) if (marked !== row) marked.classList.remove("line-above", "line-inside");
    } else {
      const gone = below(row);
      if (gone.some((each) => each.contains(document.activeElement))) focus(row);
      for (const child of gone) child.remove();
    }
    settle();
    drawLine();
    opened(openIndices());
  }

  // ---- ticking: the box answers at once, the plan corrects it
  const truth = new WeakMap(); // box → what the server last said, where it was flipped before an answer
  async function flip(row) {
    const box = row?.querySelector(".box");
    if (!box) return;
    const freeze = box.getAttribute("aria-checked") !== "true";
    const touched = [row, ...(row.dataset.kind === "module" ? below(row) : [])]
      .map((each) => [each, each.querySelector(".box")])
      .filter(([, its]) => its);
    for (const [, its] of touched) {
      if (!truth.has(its)) truth.set(its, its.getAttribute("aria-checked"));
      its.setAttribute("aria-checked", freeze);
    }
    const states = await tick(row.dataset.path, freeze);
    // What the answer does not speak of is as it was: a parameter that cannot be trained, or a refusal.
    for (const [each, its] of touched) {
      if (!states?.[`${each.dataset.kind}s`][each.dataset.index]) its.setAttribute("aria-checked", truth.get(its));
    }
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
  function typeAhead(letter, list, at) {
    if (performance.now() - typedAt > TYPE_AHEAD_MS) typed = "";
    typedAt = performance.now();
    typed += letter.toLowerCase();
    const from = typed.length === 1 ? at + 1 : at;
    const order = [...list.slice(from), ...list.slice(0, from)];
    focus(order.find((row) => row.querySelector(".label").textContent.toLowerCase().startsWith(typed)));
  }

  grid.addEventListener("keydown", (event) => {
    const row = event.target.closest(".row[data-kind]");
    if (!row || event.altKey || event.ctrlKey || event.metaKey) return;
    const list = all();
    const at = list.indexOf(row);
    const keys = {
      ArrowDown: () => focus(list[at + 1]),
      ArrowUp: () => focus(list[at - 1]),
      Home: () => focus(list[0]),
      End: () => focus(list.at(-1)),
      PageDown: () => focus(list[Math.min(at + PAGE_ROWS, list.length - 1)]),
      PageUp: () => focus(list[Math.max(at - PAGE_ROWS, 0)]),
      ArrowRight: () => (isOpen(row) ? focus(below(row)[0]) : toggle(row, true)),
      ArrowLeft: () => (isOpen(row) ? toggle(row, false) : focus(list.slice(0, at).findLast((r) => level(r) < level(row)))),
      Enter: () => toggle(row),
      " ": () => flip(row),
    };
    if (keys[event.key]) {
      event.preventDefault();
      keys[event.key]();
    } else if (event.key.length === 1 && !"/?".includes(event.key)) {
      event.preventDefault();
      typeAhead(event.key, list, at);
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
    const count = Number(body.querySelector("[data-found]")?.dataset.found ?? all().length);
    found.textContent = text ? `${count} found` : "";
    asRule.hidden = !text || !count;
    drawLine();
    settle();
  }

  // The rows as another page has them: after going back, or where an answer was lost.
  function replaceRows(html) {
    const path = document.activeElement.closest?.(".row")?.dataset.path;
    body.innerHTML = html;
    drawLine();
    settle();
    if (path !== undefined) focus(all().find((row) => row.dataset.path === path));
  }

  line = JSON.parse(document.getElementById("answer").dataset.states);
  settle();
  return { openIndices: () => unsearched ?? openIndices(), paint, replaceRows };
}
