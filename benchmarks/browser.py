"""What a person waits for in a real browser: a tree of 10,000 modules, opened and ticked."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Page, sync_playwright

BLOCKS = 1_111  # of nine modules each, and three more: 10,002 modules
ROUNDS = 5
TICKS = 12
MODEL = """
from torch import nn, zeros


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.act = nn.GELU()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.out(self.query(y) * self.key(y).sigmoid() + self.value(y))
        return x + self.down(self.act(self.up(x)))


def build():
    model = nn.Sequential()
    model.add_module("layer", nn.Sequential(*(Block(4) for _ in range(BLOCKS))))
    model.add_module("head", nn.Linear(4, 2))
    return {"model": model, "example": zeros(2, 4)}
"""
# Resolves with the milliseconds from a click to the frame that shows the plan's answer.
TICK = """
(path) => new Promise((resolve) => {
  const box = document.querySelector(`.row[data-path="${path}"] .box`);
  const from = performance.now();
  const seen = new MutationObserver(() => {
    seen.disconnect();
    requestAnimationFrame(() => setTimeout(() => resolve(performance.now() - from)));
  });
  seen.observe(document.getElementById("side"), {
    subtree: true, attributes: true, attributeFilter: ["data-address"],
  });
  box.click();
})
"""
# Resolves with the milliseconds of every task over 50 ms while the page scrolls through the tree.
SCROLL = """
() => new Promise((resolve) => {
  const long = [];
  const watch = new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) long.push(Math.round(entry.duration));
  });
  watch.observe({ type: "longtask" });
  let frames = 0;
  const step = () => {
    scrollBy(0, 400);
    if (++frames < 90) return requestAnimationFrame(step);
    setTimeout(() => { watch.disconnect(); resolve(long); }, 200);
  };
  requestAnimationFrame(step);
})
"""


@contextmanager
def serve(code: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """A server with an empty data folder and these modules. Yields (login link, address, token)."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, text in code.items():
            (root / f"{name}.py").write_text(text)
        environment = {
            **os.environ,
            "FROSTLINE_DATA_DIR": str(root / "data"),
            "FROSTLINE_CODE_DIRS": folder,
        }
        command = [sys.executable, "-m", "app", "serve", "--port", "0", "--no-open", "--stop-jobs"]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            try:
                link = next(
                    found.group()
                    for line in process.stdout
                    if (found := re.search(r"http://\S+/login\?link=\S+", line))
                )
                parts = urlsplit(link)
                yield link, f"{parts.scheme}://{parts.netloc}", (root / "data/token").read_text()
            finally:
                process.send_signal(signal.SIGTERM)
                process.communicate(timeout=60)


def ask(address: str, token: str, path: str, body: object = None) -> dict:
    """One call of the interface, its JSON answer."""
    request = urllib.request.Request(
        f"{address}/api{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {token.strip()}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def write_model(blocks: int) -> str:
    """The source of a module `many` whose `build` makes a model of so many blocks."""
    return f"BLOCKS = {blocks}\n{MODEL}"


def add_model(address: str, token: str) -> dict:
    """The model of `many`, when it has been inspected."""
    model = ask(address, token, "/models", {"uri": "python:many:build"})
    while (model := ask(address, token, f"/models/{model['id']}"))["state"] == "inspecting":
        time.sleep(1)
    assert model["state"] == "ready", model["error"]
    return model


@contextmanager
def browse(link: str) -> Iterator[Page]:
    """A page of a headless Chromium that has logged in."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        page.goto(link)
        page.get_by_role("button", name="Log in").click()
        page.locator("nav").wait_for()
        yield page
        browser.close()


def measure_tree(page: Page, path: str) -> None:
    """Opening, ticking and scrolling, first as the tree comes, then with a thousand rows open."""
    opened = []
    for _ in range(ROUNDS):
        page.goto(path)
        page.locator("#workbench[data-ready]").wait_for()
        opened.append(page.evaluate("performance.now()"))
    print(f"open: {describe(opened)}")
    ticked = [page.evaluate(TICK, target) for target in ["head", "layer"] * (TICKS // 2)]
    print(f"tick, {page.locator('.row').count()} rows: {describe(ticked)}")
    page.locator('.row[data-path="layer"]').focus()
    began = time.perf_counter()
    page.keyboard.press("ArrowRight")
    page.locator(f'.row[data-path="layer.{BLOCKS - 1}"]').wait_for(state="attached")
    print(f"open {BLOCKS} rows: {1000 * (time.perf_counter() - began):.0f} ms")
    ticked = [page.evaluate(TICK, f"layer.{index}") for index in range(TICKS)]
    print(f"tick one of {page.locator('.row').count()} rows: {describe(ticked)}")
    ticked = [page.evaluate(TICK, "layer") for _ in range(TICKS)]
    print(f"tick all of them: {describe(ticked)}")
    long = page.evaluate(SCROLL)
    print(f"scroll: {len(long)} tasks over 50 ms {long or ''}")


def describe(samples: list[float]) -> str:
    return f"median {statistics.median(samples):.0f} ms, slowest {max(samples):.0f} ms"


def main() -> None:
    """Start a server, have it read the model, and measure."""
    with serve({"many": write_model(BLOCKS)}) as (link, address, token):
        model = add_model(address, token)
        print(f"{model['module_count']:,} modules, {model['tensor_count']:,} tensors")
        with browse(link) as page:
            measure_tree(page, f"{address}/models/{model['id']}")


if __name__ == "__main__":
    main()
