// Sets the chosen theme before anything is painted; the switch goes on from the system's. A classic script on purpose.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  // The first click changes something to see, whatever the system's choice is.
  const order = () => (dark.matches ? ["system", "light", "dark"] : ["system", "dark", "light"]);
  const root = document.documentElement;
  const read = () => {
    try {
      return localStorage.getItem("theme") || "system";
    } catch {
      return "system"; // storage is refused here: the system's choice holds
    }
  };
  const apply = (theme) => {
    if (theme === "system") delete root.dataset.theme;
    else root.dataset.theme = theme;
    document.dispatchEvent(new Event("theme:changed"));
  };
  apply(read());
  dark.addEventListener("change", () => apply(read()));
  document.addEventListener("click", (event) => {
    if (!event.target.closest("[data-theme-switch]")) return;
    const next = order()[(order().indexOf(read()) + 1) % 3];
    try {
      localStorage.setItem("theme", next);
    } catch {
      // Storage is refused: the choice lasts for this page.
    }
    apply(next);
  });
})();
