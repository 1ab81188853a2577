// Copies the named files of our npm dependencies to static/vendor/, icons as one sprite. Run by `npm run vendor`.
import { copyFileSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

const root = fileURLToPath(new URL("..", import.meta.url));
const target = `${root}static/vendor/`;
const files = {
  "htmx.org/dist/htmx.min.js": "htmx.js",
  "idiomorph/dist/idiomorph-ext.min.js": "idiomorph-ext.js",
  "uplot/dist/uPlot.esm.js": "uplot.js",
  "uplot/dist/uPlot.min.css": "uplot.css",
};
const icons = [
  "snowflake", "flame", "circle-dashed", "arrow-left", "pause", "play", "square", "rotate-cw", "trash-2", "download",
  "upload", "search", "undo-2", "redo-2", "sun-moon", "chevron-right", "chevron-down", "plus", "triangle-alert",
  "octagon-alert", "check", "x", "shield-check", "shield-alert", "shield-ellipsis", "save", "copy", "clock", "moon",
  "log-out", "link-2", "minus", "lock", "keyboard", "arrow-right", "arrow-up", "arrow-down", "pencil", "info",
  "git-compare", "layers", "eye", "file-braces", "sparkles", "list-checks", "chevron-up",
  "bell", "refresh-cw", "zoom-in", "zoom-out", "maximize", "file-text", "trophy",
];

mkdirSync(target, { recursive: true });
for (const [from, to] of Object.entries(files)) copyFileSync(`${root}node_modules/${from}`, target + to);

const symbols = icons.map((name) => {
  const svg = readFileSync(`${root}node_modules/lucide-static/icons/${name}.svg`, "utf8");
  const inner = svg.slice(svg.indexOf(">", svg.indexOf("<svg")) + 1, svg.lastIndexOf("</svg>")).trim();
  return `<symbol id="${name}" viewBox="0 0 24 24">${inner}</symbol>`;
});
writeFileSync(
  `${target}icons.svg`,
  `<svg xmlns="http://www.w3.org/2000/svg" fill="none" stroke="currentColor" stroke-width="2"
  stroke-linecap="round" stroke-linejoin="round">${symbols.join("\n")}</svg>\n`,
);
