"""What a real browser takes to open, read and move over a job: page, heatmap, charts, rest.

Run alone: python -m benchmarks.browser_charts [steps of the job with 2,000 layers] [rounds].
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import psutil
from playwright.sync_api import Page, sync_playwright
from sqlmodel import Session

from app.freezing.graph import ModelGraph, Module, Parameter
from app.jobs import folder as job_folder
from app.jobs.spool import Record
from app.service import Service
from app.settings import Settings
from app.store import jobs, samples
from app.store.db import Database
from app.store.tables import Attempt, Job, Model, Task

PORTION = 500
ROUNDS = 7
# Notes by the page's own clock in which frame the charts and the heatmap are there.
NOTE = """
window.seen = {};
(function look() {
    const reading = document.getElementById("heat-reading")?.textContent ?? "";
    if (document.querySelector("figure.chart canvas")) seen.charts ??= performance.now();
    if (/layers?, steps/.test(reading)) seen.heatmap ??= performance.now();
    if (!seen.charts || !seen.heatmap) requestAnimationFrame(look);
})();
"""
# What was noted, and what the browser notes of every page; the finest matrix is the last one.
NOTED = """() => {
    const [page] = performance.getEntriesByType("navigation");
    const [paint] = performance.getEntriesByName("first-contentful-paint");
    const all = performance.getEntriesByType("resource");
    const matrices = all.filter((entry) => entry.name.includes("/layers?"));
    return {
        html: page.responseEnd,
        paint: paint?.startTime ?? NaN,
        ready: page.domContentLoadedEventEnd,
        ...seen,
        finest: Math.max(...matrices.map((entry) => entry.responseEnd)),
    };
}"""
WATCH = """() => {
    window.long = [];
    window.watch = new PerformanceObserver((list) => {
        for (const entry of list.getEntries()) long.push(Math.round(entry.duration));
    });
    watch.observe({type: "longtask"});
}"""
# Levels, colours and pixels of 500 layers × 2,000 steps, as the page draws them: median of seven.
DRAW = """async () => {
    const { measure, paint, toMatrix } = await import("/static/heatpaint.js");
    const [layers, steps] = [500, 2000];
    const floats = new Float32Array(layers * steps).map(() => Math.exp(4 * Math.random()));
    const given = {
        layers: Array.from({length: layers}, (_, i) => `layer.${i}`),
        steps: Array.from({length: steps}, (_, i) => i + 1),
    };
    const view = {from: 1, to: steps + 1, top: 0, bottom: layers, width: 900, height: 480};
    const canvas = document.createElement("canvas");
    canvas.width = 900; canvas.height = 480;
    const context = canvas.getContext("2d");
    const taken = [];
    for (let i = 0; i < 7; i++) {
        const began = performance.now();
        const matrix = toMatrix(given, floats);
        context.putImageData(paint(matrix, measure(matrix), view), 0, 0);
        context.getImageData(0, 0, 1, 1);
        taken.push(performance.now() - began);
    }
    return taken;
}"""


class Nobody:
    """A runner that runs nothing: the jobs here are made of numbers."""

    def devices(self) -> list[dict[str, Any]]:
        return [{"id": "cpu", "name": "CPU", "kind": "cpu", "bytes": 2**33, "busy": False}]

    def slots(self) -> dict[str, dict[str, int]]:
        return {}

    def keeper(self) -> dict[str, Any]:
        return {}

    def wake(self) -> None:
        pass


def make_graph(layers: int) -> ModelGraph:
    """Blocks of eight layers below one another, as large models are built."""
    modules = [Module("", "Net", 0), Module("encoder", "Encoder", 1)]
    weights = []
    for i in range(layers):
        block, part = f"encoder.layer{i // 8}", f"part{i % 8}"
        if i % 8 == 0:
            modules.append(Module(block, "Block", 2))
        name = f"{block}.{part}.weight"
        modules.append(Module(f"{block}.{part}", "Linear", 3, (name,)))
        weights.append(Parameter(name, (8, 8), "float32", 64, 256, True, True))
    return ModelGraph(tuple(modules), tuple(weights))


def add_job(folder: Path, db: Database, layers: int, metrics: int, steps: int) -> int:
    """An ended job of made-up numbers, with a model of as many layers."""
    service = Service(Settings(data_dir=folder), db, Nobody())
    model_id = service.add_model({"uri": "demo:digits", "kwargs": {}})["id"]
    (folder / "graphs").mkdir(exist_ok=True)
    graph = make_graph(layers)
    job_folder.write_document(folder / "graphs" / f"{model_id}.json", graph.to_document())

    def be_ready(session: Session) -> None:
        for row in (session.get_one(Model, model_id), session.get_one(Task, model_id)):
            row.state = "ready" if isinstance(row, Model) else "succeeded"
            session.add(row)

    db.write(be_ready)
    config = {"rules": [{"action": "freeze", "match": "encoder.layer0.part0"}]}
    job_id = service.launch_job(
        {"model_id": model_id, "config": config, "dataset": {"uri": "demo:digits"}}
    )["id"]
    rng = random.Random(0)
    pool = [rng.lognormvariate(0, 1) for _ in range(10_007)]

    def begin(session: Session) -> None:
        jobs.start_attempt(session, session.get_one(Job, job_id), "cpu", None)

    db.write(begin)
    paths = [module.path for module in graph.layers]
    records = [Record(1, 1, "start", {"layers": paths, "step": 0, "total_steps": steps})]
    for step in range(1, steps + 1):
        values = {f"eval/set{i}/loss": pool[(step * 31 + i) % 10_007] for i in range(metrics)}
        told = {"step": step, "epoch": step / steps, "values": values, "step_ms": 1.0}
        records.append(Record(1, 2 * step, "metrics", told))
        if layers > 8:
            first = step * 37 % (10_007 - layers)
            column = pool[first : first + layers]
            norms = dict.fromkeys(("grad_norm", "update_norm", "weight_norm"), column)
            records.append(Record(1, 2 * step + 1, "layers", {"step": step, **norms}))
        if step % PORTION == 0 or step == steps:
            portion, records = records, []

            def store(session: Session, portion: list[Record] = portion) -> None:
                rows = session.get_one(Job, job_id), session.get_one(Attempt, (job_id, 1))
                samples.ingest(session, *rows, portion, 0)

            db.write(store)

    def end(session: Session) -> None:
        rows = session.get_one(Job, job_id), session.get_one(Attempt, (job_id, 1))
        jobs.end_attempt(session, *rows, "succeeded")

    db.write(end)
    return int(job_id)


class Served(NamedTuple):
    link: str
    process: psutil.Process

    @property
    def address(self) -> str:
        return self.link.partition("/login")[0]


@contextmanager
def serve_folder(folder: Path, port: int = 0) -> Iterator[Served]:
    """A server of that data folder, once it says that it serves."""
    command = [sys.executable, "-m", "app", "serve", "--no-open", "--stop-jobs"]
    command += ["--port", str(port)]
    environment = {**os.environ, "FROSTLINE_DATA_DIR": str(folder)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        try:
            links = (re.search(r"http://\S+/login\?link=\S+", line) for line in process.stdout)
            link = next(found.group() for found in links if found)
            yield Served(link, psutil.Process(process.pid))
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


@contextmanager
def browse(address: str, state: Any = None) -> Iterator[Page]:
    """A page of a headless Chromium that nobody used before, for the server at that address.

    Args:
        state: the cookies of somebody who has logged in.
    """
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(
            viewport={"width": 1280, "height": 900}, base_url=address, storage_state=state
        )
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def log_in(page: Page, link: str) -> None:
    page.goto(link)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url(lambda url: "/login" not in url)


def long_tasks(page: Page) -> str:
    """The tasks over 50 ms since the watch began."""
    page.evaluate("() => new Promise((done) => setTimeout(done, 300))")
    found = sorted(page.evaluate("watch.takeRecords().forEach(() => 0), long"), reverse=True)
    return f"{len(found)} tasks over 50 ms{f', the longest {found[0]} ms' if found else ''}"


def open_job(page: Page, job_id: int) -> None:
    """Open a job's page and wait until its heatmap is drawn."""
    page.goto(f"/jobs/{job_id}")
    page.wait_for_function(
        "() => document.getElementById('heat-reading')?.textContent.includes('layers, steps')"
    )


def time_opening(page: Page, job_id: int, server: psutil.Process) -> dict[str, float]:
    """Milliseconds until each part of a job's page is there, and what the server took of a core."""
    before = sum(server.cpu_times()[:2])
    # A finer matrix follows the first one; the next page must not meet it.
    with page.expect_request_finished(lambda request: _is_fine(request.url)):
        page.goto(f"/jobs/{job_id}")
        page.wait_for_function("() => seen.charts && seen.heatmap")
    noted: dict[str, float] = page.evaluate(NOTED)
    return {**noted, "server's CPU": 1000 * (sum(server.cpu_times()[:2]) - before)}


def _is_fine(url: str) -> bool:
    points = re.search(r"/layers\?.*points=(\d+)", url)
    return points is not None and int(points[1]) > 50


def measure_openings(folder: Path, job_id: int, what: str, rounds: int) -> None:
    """A job's page on a server that has shown it before, and on one that has just been started."""
    with serve_folder(folder) as served, browse(served.address) as page:
        log_in(page, served.link)
        state, port = page.context.storage_state(), urlsplit(served.address).port
        page.add_init_script(NOTE)
        time_opening(page, job_id, served.process)
        warm = [time_opening(page, job_id, served.process) for _ in range(rounds)]
    print_openings(f"{what} opened again", warm)
    for forget, words in ((False, "after a start"), (True, "after a start, read from the disk")):
        first = []
        for _ in range(rounds):
            if forget:
                forget_file(folder / "frostline.db")
            # The browser waits for the server, not the other way round.
            with browse(served.address, state) as page, serve_folder(folder, port or 0) as served:
                page.add_init_script(NOTE)
                first.append(time_opening(page, job_id, served.process))
        print_openings(f"{what} {words}", first)


def print_openings(what: str, rounds: list[dict[str, float]]) -> None:
    print(f"{what}, ms, median (and most) of {len(rounds)}")
    for name in rounds[0]:
        taken = [noted[name] for noted in rounds]
        print(f"    {name:14}{statistics.median(taken):6.0f} ({max(taken):.0f})")


def forget_file(path: Path) -> None:
    """Have the next one who reads a file read it from the disk, not from the system's memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_heatmap(page: Page, job_id: int) -> None:
    taken = page.evaluate(DRAW)
    median = statistics.median(taken)
    print(f"heatmap of 500 × 2,000 drawn: {median:.0f} ms median, {max(taken):.0f} ms at most")
    open_job(page, job_id)
    box = page.locator(".heat canvas").first
    box.scroll_into_view_if_needed()
    bounds = box.bounding_box()
    assert bounds is not None
    page.evaluate(WATCH)
    for i in range(200):
        share = i / 200
        page.mouse.move(bounds["x"] + bounds["width"] * share, bounds["y"] + 20 + 440 * share)
    print(f"hovering over it, 200 moves: {long_tasks(page)}")


def measure_charts(page: Page, job_id: int) -> None:
    page.goto(f"/jobs/{job_id}")
    over = page.locator("figure.chart .u-over").first
    over.wait_for()
    over.scroll_into_view_if_needed()
    bounds = over.bounding_box()
    assert bounds is not None
    y = bounds["y"] + bounds["height"] / 2

    def drag(begin: float, end: float) -> None:
        page.mouse.move(bounds["x"] + begin, y)
        page.mouse.down()
        page.mouse.move(bounds["x"] + end, y, steps=60)
        page.mouse.up()

    with page.expect_response(re.compile(r"/metrics\?.*from=")):
        drag(60, 160)
    page.evaluate(WATCH)
    page.keyboard.down("Shift")
    for _ in range(3):
        with page.expect_response(re.compile(r"/metrics\?.*from=")):
            drag(150, 40)
    page.keyboard.up("Shift")
    print(f"twenty series of 50,000 points panned, 180 moves: {long_tasks(page)}")


def measure_rest(page: Page) -> None:
    """CPU time of every process of the browser while a job is held and nothing changes."""
    send = """async ([path, body]) => {
        const headers = {"Content-Type": "application/json"};
        const answer = await fetch(path, {method: "POST", headers, body: JSON.stringify(body)});
        return await answer.json();
    }"""
    model = page.evaluate(send, ["/api/models", {"uri": "demo:digits"}])

    def until(path: str, state: str, step: int = 0) -> None:
        page.evaluate(
            """async ([path, state, step]) => {
                for (;;) {
                    const found = await (await fetch(path)).json();
                    if (found.state === state && !(found.step < step)) return;
                    await new Promise((done) => setTimeout(done, 300));
                }
            }""",
            [path, state, step],
        )

    until(f"/api/models/{model['id']}", "ready")
    job = page.evaluate(
        send,
        ["/api/jobs", {"model_id": model["id"], "config": {"rules": []},
                       "dataset": {"uri": "demo:digits"}, "training": {"epochs": 100_000}}],
    )  # fmt: skip
    address = f"/api/jobs/{job['id']}"
    until(address, "running", step=20)
    page.evaluate(send, [f"{address}/pause", {"mode": "hold"}])
    until(address, "paused")
    open_job(page, job["id"])
    time.sleep(5)  # what opening the page took is not what it takes at rest
    assert page.context.browser is not None
    session = page.context.browser.new_browser_cdp_session()

    def busy() -> float:
        return sum(p["cpuTime"] for p in session.send("SystemInfo.getProcessInfo")["processInfo"])

    before, began = busy(), time.perf_counter()
    time.sleep(15)
    share = (busy() - before) / (time.perf_counter() - began)
    print(f"a page of a job that is held: {share:.1%} of one core, all of the browser's processes")
    page.evaluate(send, [f"{address}/stop", {}])


def main(large_steps: int = 10_000, rounds: int = ROUNDS) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        db = Database(folder / "frostline.db")
        heat = add_job(folder, db, layers=500, metrics=1, steps=2_000)
        lines = add_job(folder, db, layers=4, metrics=20, steps=50_000)
        large = add_job(folder, db, layers=2_000, metrics=1, steps=large_steps)
        db.close()
        measure_openings(folder, large, f"2,000 layers × {large_steps:,} steps", rounds)
        with serve_folder(folder) as served, browse(served.address) as page:
            log_in(page, served.link)
            measure_heatmap(page, heat)
            measure_charts(page, lines)
            measure_rest(page)


if __name__ == "__main__":
    main(*(int(given) for given in sys.argv[1:3]))
