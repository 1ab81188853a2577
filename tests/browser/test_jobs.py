"""Jobs in a real browser: list, live boxes, heatmap, charts, sweeps, reports, lost connections."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect
from sqlmodel import Session

from app.store import rollups
from app.store.db import Database
from tests.browser.conftest import find_violations, look_over, photograph, serving

EARLY = {"rules": [{"action": "freeze", "match": "{stem,layer1}.**"}]}
SEND = """async ([method, path, body]) => {
    const headers = {"Content-Type": "application/json"};
    const answer = await fetch(path, {method, headers, body: body && JSON.stringify(body)});
    return answer.status === 204 ? null : await answer.json();
}"""
UNTIL = """async ([path, states]) => {
    for (const end = performance.now() + 90_000; performance.now() < end;) {
        const {state} = await (await fetch(path)).json();
        if (states.includes(state)) return;
        await new Promise((done) => setTimeout(done, 150));
    }
    throw new Error(`${path} did not come to ${states}`);
}"""
GET = "async (path) => (await (await fetch(path)).json())"


def send(page: Page, method: str, path: str, body: Any = None) -> Any:
    """One request of the interface, with the cookie of the page that is open."""
    if not page.url.startswith("http"):
        page.goto("/system")
    return page.evaluate(SEND, [method, path, body])


def launch(page: Page, name: str, config: Any = EARLY, model_id: int = 1, **training: Any) -> int:
    document = {
        "model_id": model_id,
        "config": config,
        "dataset": {"uri": "demo:digits"},
        "training": {"batch_size": 16, **training},
        "name": name,
    }
    return int(send(page, "POST", "/api/jobs", document)["id"])


def wait_for(page: Page, job_id: int, *states: str) -> None:
    """Until the interface says that the job is in one of the states."""
    page.evaluate(UNTIL, [f"/api/jobs/{job_id}", list(states)])


def end(page: Page, job_id: int) -> None:
    send(page, "POST", f"/api/jobs/{job_id}/stop")
    wait_for(page, job_id, "stopped", "succeeded", "failed")


def open_job(page: Page, job_id: int) -> None:
    page.goto(f"/jobs/{job_id}")
    expect(page.locator("[data-charts][data-ready]")).to_be_visible()


@pytest.fixture
def running(page: Page) -> Iterator[int]:
    """A job that runs for as long as the test needs it."""
    job_id = launch(page, "runs for long", epochs=50_000)
    wait_for(page, job_id, "running")
    yield job_id
    end(page, job_id)


@pytest.fixture(scope="module")
def ended(browser: Browser, address: str) -> int:
    """A job with a schedule that got to its end: what was frozen changed twice."""
    context = browser.new_context(
        base_url=address, storage_state=os.environ["FROSTLINE_TEST_STATE"]
    )
    page = context.new_page()
    schedule = [
        {"at": {"step": 20}, "action": "freeze", "match": "stem.**"},
        {"at": {"step": 40}, "action": "unfreeze", "match": "layer1.**"},
    ]
    config = {"rules": [{"action": "freeze", "match": "layer1.**"}], "schedule": schedule}
    job_id = launch(page, "with phases", config, max_steps=60)
    wait_for(page, job_id, "succeeded")
    context.close()
    return job_id


# Of each column of a chart's plot the share of coloured pixels between a fifth and four fifths of
# its height; grid and axes are grey.
COLOURED = """(figure) => {
    const canvas = figure.querySelector("canvas");
    const inside = figure.querySelector(".u-over").getBoundingClientRect();
    const whole = canvas.getBoundingClientRect();
    const scale = canvas.width / whole.width;
    const [left, top, width, height] = [
        inside.left - whole.left, inside.top - whole.top + inside.height / 5,
        inside.width, inside.height * 0.6,
    ].map((length) => Math.round(length * scale));
    const {data} = canvas.getContext("2d").getImageData(left, top, width, height);
    const isColoured = (at) => {
        const [red, green, blue, alpha] = data.slice(4 * at, 4 * at + 4);
        return alpha > 60 && Math.max(red, green, blue) - Math.min(red, green, blue) > 40;
    };
    return Array.from({length: width}, (_, x) => {
        let count = 0;
        for (let y = 0; y < height; y++) count += isColoured(y * width + x);
        return count / height;
    });
}"""


def test_one_step_of_a_million_is_seen_in_the_whole_chart(page: Page, data_dir: Path) -> None:
    """A loss of 1 to 2 over a million steps, and 900 in one of them, as rows in the database."""
    job = launch(page, "a spike", max_steps=2)
    wait_for(page, job, "succeeded")
    steps, spike = 1_000_000, 437_123
    db = Database(data_dir / "frostline.db")

    def fill(session: Session) -> None:
        connection = session.connection()
        connection.exec_driver_sql(
            "INSERT INTO metric (series_id, step, value)"
            " WITH RECURSIVE n (i) AS (SELECT 3 UNION ALL SELECT i + 1 FROM n WHERE i < :steps)"
            " SELECT s.id, i, CASE i WHEN :spike THEN 900.0 ELSE 1 + i % 97 / 97.0 END"
            " FROM n, series AS s WHERE s.job_id = :job AND s.name = 'loss'",
            {"steps": steps, "spike": spike, "job": job},
        )
        rollups.extend_metrics(connection, job, 0, steps)

    db.write(fill)
    db.close()
    open_job(page, job)
    figure = page.locator("figure.chart", has=page.locator("figcaption", has_text="loss")).first
    expect(figure.locator(".u-over")).to_be_visible()
    columns = figure.evaluate(COLOURED)
    tall = [x for x, share in enumerate(columns) if share > 0.9]
    assert tall, max(columns)
    assert len(tall) <= 3, tall
    assert abs(sum(tall) / len(tall) / len(columns) - spike / steps) < 0.01
    photograph(page, "spike")
    page.goto("/jobs")  # a page of a job that is gone asks for it in vain
    send(page, "DELETE", f"/api/jobs/{job}")


def test_the_list_steers_filters_and_keeps_itself_current(page: Page, running: int) -> None:
    page.goto("/jobs")
    row = page.locator(f"#job-{running}")
    steps = row.locator(".progress-cell .under")
    expect(steps).not_to_contain_text(re.compile(r"^0\b"))
    before = steps.inner_text()
    expect(steps).not_to_have_text(before)  # nobody reloaded
    row.get_by_role("button", name="Pause runs for long").click()
    expect(row).to_contain_text("model held")
    row.get_by_role("button", name="Resume runs for long").click()
    expect(row).to_contain_text("running")
    search = page.get_by_role("searchbox", name="Filter jobs")
    search.fill("no such job")
    expect(page.get_by_text("No job is like that")).to_be_visible()
    assert find_violations(page) == []
    search.fill("LONG demo:digits")
    expect(row).to_be_visible()
    page.get_by_label("state").select_option("failed")
    expect(row).to_have_count(0)
    page.get_by_label("state").select_option("running")
    expect(row).to_be_visible()


def test_a_box_ticked_while_it_runs_holds_from_the_next_step(page: Page, running: int) -> None:
    open_job(page, running)
    box = page.locator('#live_tree tr[data-path="layer2"]').get_by_role("checkbox")
    expect(box).to_have_attribute("aria-checked", "false")
    box.click()
    expect(box).to_have_attribute("aria-checked", "true")
    expect(page.locator('#live_tree tr[data-path="layer2"]')).to_contain_text("idle")
    page.locator("#live_tree summary").click()
    expect(page.locator("#live_tree")).to_contain_text(re.compile(r"from step \d.*by hand"))
    timeline = page.evaluate(GET, f"/api/jobs/{running}/freeze")
    assert [change["by"] for change in timeline["changes"]] == ["live"]
    assert "layer2.conv1.weight" in timeline["frozen"]
    # The last trainable ones cannot be frozen: the page says so and nothing changes.
    root = page.locator('#live_tree tr[data-path=""]').get_by_role("checkbox")
    root.click()
    expect(page.get_by_role("alert").first).to_contain_text("last trainable layer")
    assert page.evaluate(GET, f"/api/jobs/{running}/freeze")["trainable"] != []
    # And it stays live: numbers go on, and the next change that is taken ends what was said.
    gauge = page.locator(".gauge.wide b")
    before = gauge.inner_text()
    expect(gauge).not_to_have_text(before)
    box.click()
    expect(box).to_have_attribute("aria-checked", "false")
    expect(page.get_by_role("alert")).to_have_count(0)
    page.reload()
    trained = page.locator('section[aria-labelledby="config-title"]')
    expect(trained).to_contain_text(
        re.compile(r"freeze\s*layer2.*after step \d+.*unfreeze\s*layer2")
    )


def test_pause_is_explained_held_released_and_resumed(page: Page, running: int) -> None:
    open_job(page, running)
    head = page.locator("#status")
    head.get_by_text("Pause").click()
    page.get_by_role("button", name=re.compile("Hold")).click()
    expect(head).to_contain_text("the model stays loaded")
    expect(page.locator("#live_tree").get_by_role("checkbox").first).to_be_visible()
    head.get_by_role("button", name="Resume").click()
    expect(head).to_have_attribute("data-state", "running")
    head.get_by_text("Pause").click()
    page.get_by_role("button", name=re.compile("Release")).click()
    expect(head).to_contain_text("the device is free", timeout=30_000)
    expect(page.get_by_role("link", name=re.compile("Download the checkpoint"))).to_be_visible()
    head.get_by_role("button", name="Resume").click()
    expect(head).to_have_attribute("data-state", "running", timeout=30_000)
    head.get_by_role("link", name="Run again with changes").click()
    expect(page.locator('[name="train.epochs"]')).to_have_value("50000")
    expect(page.locator('[name="rule_text"]')).to_have_value("{stem,layer1}.**")


def test_the_heatmap_is_read_zoomed_and_drawn_from_by_keys(page: Page, ended: int) -> None:
    open_job(page, ended)
    heat = page.get_by_role("application", name=re.compile("norm of each layer"))
    reading = page.locator("#heat-reading")
    expect(reading).to_have_text(re.compile(r"19 layers, steps 1 to 60"))
    heat.focus()
    page.keyboard.press("ArrowRight")
    expect(reading).to_have_text(re.compile(r"stem\.conv\s+step 60\s+frozen, no value"))
    page.keyboard.press("Home")
    expect(reading).to_have_text(re.compile(r"stem\.conv\s+step 1\s+[\d.]+"))
    page.keyboard.press("Enter")
    lines = page.locator(".layer-lines .chart")
    expect(lines).to_contain_text("stem.conv")
    whole = page.get_by_role("button", name="All steps and layers")
    expect(whole).to_be_disabled()
    with page.expect_request(re.compile(r"/layers\?.*from=.*to=")):
        page.keyboard.press("+")
    expect(whole).to_be_enabled()
    page.keyboard.press("0")
    expect(whole).to_be_disabled()
    page.get_by_role("button", name="Update / weight").click()
    expect(lines).to_contain_text("Update / weight of the layers")
    page.get_by_text("The same as a table").click()
    table = page.locator(".heat-table")
    expect(table.locator("tr", has_text="stem.conv")).to_contain_text("frozen")
    expect(table.locator("tr", has_text="layer1.conv1")).to_contain_text("trained")
    look_over(page, "job-with-phases")


def test_what_a_page_asks_for_ahead_is_asked_for_once(page: Page, ended: int) -> None:
    asked: list[str] = []
    page.on(
        "request", lambda request: asked.append(request.url.partition(f"/api/jobs/{ended}/")[2])
    )
    open_job(page, ended)
    expect(page.locator("#heat-reading")).to_contain_text("19 layers")
    assert asked.count("freeze?") == 1
    assert sum(address.startswith("layers?") for address in asked) == 1


def test_pointing_reads_a_cell_and_dragging_zooms(page: Page, ended: int) -> None:
    open_job(page, ended)
    canvas = page.locator(".heat canvas").first
    expect(page.locator("#heat-reading")).to_contain_text("19 layers")
    canvas.scroll_into_view_if_needed()
    bounds = canvas.bounding_box()
    assert bounds is not None
    x, y = bounds["x"] + bounds["width"] * 0.4, bounds["y"] + 60
    page.mouse.move(x, y)
    expect(page.locator("#heat-reading")).to_have_text(re.compile(r"^\S+\s+step \d+"))
    page.mouse.down()
    with page.expect_request(re.compile(r"/layers\?.*from=.*to=")):
        page.mouse.move(x + 120, y, steps=5)
        page.mouse.up()
    expect(page.get_by_role("button", name="All steps and layers")).to_be_enabled()


def test_a_chart_zooms_by_asking_for_more_and_draws_logarithms(page: Page, ended: int) -> None:
    open_job(page, ended)
    chart = page.locator("figure.chart").first
    over = chart.locator(".u-over")
    expect(over).to_be_visible()
    over.scroll_into_view_if_needed()
    bounds = over.bounding_box()
    assert bounds is not None
    y = bounds["y"] + bounds["height"] / 2
    page.mouse.move(bounds["x"] + 40, y)
    page.mouse.down()
    with page.expect_request(re.compile(r"/metrics\?.*from=.*to=")):
        page.mouse.move(bounds["x"] + 160, y, steps=5)
        page.mouse.up()
    chart.get_by_role("button", name=re.compile("whole")).click()
    expect(chart.get_by_role("button", name=re.compile("whole"))).to_be_hidden()
    log = chart.get_by_role("button", name=re.compile("^log"))
    log.click()
    expect(log).to_have_attribute("aria-pressed", "true")
    expect(chart.get_by_role("group")).to_have_attribute("aria-label", re.compile("training from"))


def test_a_failure_says_why_and_a_loss_that_is_no_number_is_marked(page: Page) -> None:
    model = send(page, "POST", "/api/models", {"uri": "demo:three-layers"})
    page.evaluate(UNTIL, [f"/api/models/{model['id']}", ["ready"]])
    job_id = launch(page, "does not fit", {"rules": []}, model["id"], epochs=1)
    wait_for(page, job_id, "failed")
    open_job(page, job_id)
    expect(page.get_by_role("alert").first).to_be_visible()
    expect(page.locator("#status")).to_contain_text("Ended by a failure")
    look_over(page, "job-failed")


def test_a_job_that_ends_is_told_on_other_pages_and_outside(context: BrowserContext) -> None:
    context.grant_permissions(["notifications"])
    context.add_init_script("""
        window.told = [];
        window.Notification = class {
            static permission = "granted";
            static requestPermission = async () => "granted";
            constructor(title, more) { window.told.push([title, more.tag]); }
        };
        if (location.search.includes("away")) document.hasFocus = () => false;
    """)
    page = context.new_page()
    page.goto("/jobs")
    wish = page.get_by_role("button", name="Notify me when jobs end")
    wish.click()
    expect(wish).to_have_attribute("aria-pressed", "true")
    page.goto("/system?away=1")
    job_id = launch(page, "short and told", max_steps=5)
    toast = page.get_by_role("log", name="Jobs that ended")
    expect(toast).to_contain_text("short and told has succeeded", timeout=60_000)
    assert page.evaluate("told") == [["short and told has succeeded", f"frostline-{job_id}"]]
    assert find_violations(page) == []
    toast.get_by_role("button", name="Dismiss").click()
    expect(toast.locator(".toast")).to_have_count(0)


def test_all_tabs_share_one_connection(context: BrowserContext, page: Page, running: int) -> None:
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    other = context.new_page()
    other.goto("/jobs")
    open_job(page, running)
    for tab, place in ((page, ".gauge.wide b"), (other, f"#job-{running} .progress-cell")):
        tab.bring_to_front()
        before = tab.locator(place).inner_text()
        expect(tab.locator(place)).not_to_have_text(before)
    # The tabs themselves hold no stream: a worker that they share does.
    assert not [url for url in asked if "/events" in url]


def test_a_sweep_fills_one_table_and_is_sent_as_one_file(
    page: Page, browser: Browser, tmp_path: Path
) -> None:
    page.goto("/models/1")
    expect(page.locator("#workbench[data-ready]")).to_be_visible()
    page.locator('[name="train.epochs"]').fill("2")
    page.get_by_text("try several freeze sets").click()
    page.get_by_role("textbox", name="name", exact=True).fill("three ways")
    page.get_by_role("button", name="Start sweep").click()
    page.wait_for_url(re.compile(r"/sweeps/\d+$"))
    table = page.locator("#sweep_table")
    expect(table.locator("tbody tr")).to_have_count(3)
    expect(table.get_by_text("succeeded")).to_have_count(3, timeout=90_000)
    expect(table.locator(".is-best")).not_to_have_count(0)
    expect(table).to_contain_text("accuracy, new")
    expect(page.locator(".curves .chart").first).to_be_visible()
    page.get_by_role("button", name="by time").click()
    expect(page.get_by_text("Time is estimated")).to_be_visible()
    # The page was opened before any of them had taken a step.
    seconds = page.locator(".curves .chart").first.locator(".u-legend .u-value").first
    expect(seconds).not_to_have_text("0")
    look_over(page, "sweep")
    with page.expect_download() as caught:
        page.get_by_role("link", name="Report").click()
    path = tmp_path / "report.html"
    caught.value.save_as(path)
    alone = browser.new_context(offline=True)
    report = alone.new_page()
    asked: list[str] = []
    report.on("request", lambda request: asked.append(request.url))
    report.goto(path.as_uri())
    expect(report.get_by_role("heading", name="three ways")).to_be_visible()
    expect(report.locator("svg").first).to_be_visible()
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    look_over(report, "report")
    alone.close()
    page.goto("/compare")
    expect(page.get_by_role("link", name="three ways")).to_be_visible()


def test_a_sweep_without_a_set_is_refused_in_words(page: Page) -> None:
    page.goto("/models/1")
    expect(page.locator("#workbench[data-ready]")).to_be_visible()
    page.get_by_text("try several freeze sets").click()
    ticked = page.locator('[name="sweep.set"]:checked')
    while ticked.count():
        ticked.first.click()
    page.get_by_role("button", name="Start sweep").click()
    expect(page.get_by_role("alert").first).to_contain_text("at least one freeze set")


def test_jobs_side_by_side_show_what_differs_and_the_best(page: Page, ended: int) -> None:
    other = launch(page, "nothing frozen", {"rules": []}, max_steps=60)
    wait_for(page, other, "succeeded")
    page.goto("/compare")
    page.get_by_role("checkbox", name=re.compile("with phases")).first.check()
    page.get_by_role("checkbox", name=re.compile("nothing frozen")).first.check()
    page.get_by_role("button", name="Compare", exact=True).click()
    page.wait_for_url(re.compile(r"jobs="))
    expect(page.locator("tr.differs", has_text="rules")).to_contain_text("freeze layer1.**")
    expect(page.locator("tr", has_text="loss, held out").locator(".best")).to_have_count(1)
    expect(page.locator(".curves .chart").first).to_be_visible()
    expect(page.locator(".ratios tbody tr")).to_have_count(19)
    look_over(page, "compare-jobs")


def test_pages_of_jobs_are_accessible_and_fit(page: Page, ended: int) -> None:
    running = launch(page, "runs meanwhile", epochs=50_000)
    queued = launch(page, "waits", epochs=1)
    wait_for(page, running, "running")
    pages = {"list": "/jobs", "running": f"/jobs/{running}", "queued": f"/jobs/{queued}"}
    pages |= {"ended": f"/jobs/{ended}", "pair": f"/compare?jobs={ended},{running}"}
    try:
        for name, path in pages.items():
            page.goto(path)
            look_over(page, f"jobs-{name}")
        send(page, "POST", f"/api/jobs/{running}/pause", {"mode": "hold"})
        wait_for(page, running, "paused")
        open_job(page, running)
        look_over(page, "jobs-paused")
    finally:
        send(page, "POST", f"/api/jobs/{queued}/stop")
        end(page, running)


def test_nothing_jumps_while_a_page_is_live(page: Page, running: int) -> None:
    open_job(page, running)
    expect(page.locator("#heat-reading")).to_contain_text("19 layers")
    expect(page.locator(".chart").nth(3)).to_be_visible()
    page.evaluate("""() => {
        window.shifted = 0;
        new PerformanceObserver((list) => {
            for (const one of list.getEntries()) if (!one.hadRecentInput) shifted += one.value;
        }).observe({type: "layout-shift", buffered: false});
    }""")
    gauge = page.locator(".gauge.wide b")
    for _ in range(3):
        before = gauge.inner_text()
        expect(gauge).not_to_have_text(before)
    assert page.evaluate("shifted") < 0.01


def test_a_page_outlives_its_server(browser: Browser, tmp_path: Path) -> None:
    with serving(tmp_path, 0) as (server, link):
        parts = urlsplit(link)
        context = browser.new_context(base_url=f"{parts.scheme}://{parts.netloc}")
        page = context.new_page()
        page.goto(link)
        page.get_by_role("button", name="Log in").click()
        page.locator("#workbench").wait_for()
        job_id = launch(page, "outlives", epochs=50_000)
        wait_for(page, job_id, "running")
        open_job(page, job_id)
        gauge = page.locator(".gauge.wide b")
        expect(gauge).not_to_have_text(re.compile(r"^0\b"))
        server.kill()
        server.wait()
        banner = page.get_by_role("status").filter(has_text="Reconnecting")
        expect(banner).to_be_visible()
        photograph(page, "reconnecting")
    assert parts.port is not None
    with serving(tmp_path, parts.port):
        expect(banner).to_be_hidden(timeout=40_000)
        before = gauge.inner_text()
        expect(gauge).not_to_have_text(before)  # it goes on, and nobody reloaded
        end(page, job_id)
        expect(page.locator("#status")).to_have_attribute("data-state", "stopped")
        context.close()


NO_WORKER = """window.SharedWorker = class extends SharedWorker {
    constructor(path, options) { super(path.replace("shared-stream", "nowhere"), options); }
};"""


def test_a_page_without_its_shared_worker_is_live_all_the_same(
    context: BrowserContext, running: int
) -> None:
    page = context.new_page()
    page.add_init_script(NO_WORKER)
    with page.expect_request("**/api/events*"):  # a worker's requests are not the page's
        open_job(page, running)
    gauge = page.locator(".gauge.wide b")
    before = gauge.inner_text()
    expect(gauge).not_to_have_text(before)


def test_a_report_of_a_job_holds_what_was_trained(page: Page, ended: int) -> None:
    open_job(page, ended)
    with page.expect_download() as caught:
        page.get_by_role("link", name="Report").click()
    text = Path(caught.value.path()).read_text()
    assert "freeze</span> <code>stem.**</code> from step 21" in text
    config = page.evaluate(GET, f"/api/jobs/{ended}/config")
    assert json.dumps(config["rules"][0]["match"]).strip('"') in text
