"""The main path in a real browser: tick, save, download, start, watch, stop, read the proof."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from playwright.sync_api import BrowserContext, Locator, Page, expect

from tests.browser.conftest import find_violations, photograph


def row(page: Page, path: str) -> Locator:
    return page.locator(f'.row[data-path="{path}"]').first


def box(page: Page, path: str) -> Locator:
    return row(page, path).get_by_role("checkbox")


def open_demo(page: Page, query: str = "") -> None:
    page.goto(f"/models/1{query}")
    expect(page.locator("#workbench[data-ready]")).to_be_visible()
    expect(page.get_by_role("treegrid")).to_be_visible()


def start_job(page: Page, name: str, **options: object) -> None:
    page.locator('[name="train.name"]').fill(name)
    for option, value in options.items():
        page.locator(f'[name="train.{option}"]').fill(str(value))
    page.get_by_role("button", name="Start job").click()
    page.wait_for_url(re.compile(r"/jobs/\d+$"))


def test_a_tick_becomes_a_rule_and_the_plan_answers(page: Page) -> None:
    open_demo(page)
    expect(box(page, "layer1")).to_have_attribute("aria-checked", "false")
    box(page, "layer1").click()
    expect(box(page, "layer1")).to_have_attribute("aria-checked", "true")
    expect(box(page, "layer1.conv1")).to_have_attribute("aria-checked", "true")
    expect(box(page, "")).to_have_attribute("aria-checked", "mixed")
    expect(page.locator('[name="rule_text"]')).to_have_value("layer1.**")
    expect(page).to_have_url(re.compile(r"rule=freeze%3Alayer1"))
    box(page, "stem").click()
    expect(row(page, "layer2")).to_have_class(re.compile("line-above"))
    expect(row(page, "stem")).to_contain_text("idle")
    expect(row(page, "layer2")).to_contain_text("trained")
    photograph(page, "workbench")


def test_two_quick_ticks_both_hold(page: Page) -> None:
    open_demo(page)
    for path in ("stem", "layer1", "layer2", "fc"):
        box(page, path).click()
    expect(page.locator("#answer")).to_have_attribute("data-address", re.compile("fc"))
    for path in ("stem", "layer1", "layer2", "fc"):
        expect(box(page, path)).to_have_attribute("aria-checked", "true")


def test_undo_redo_and_reload_keep_the_choice(page: Page) -> None:
    open_demo(page)
    box(page, "layer1").click()
    expect(page).to_have_url(re.compile("layer1"))
    box(page, "layer2").click()
    page.get_by_role("button", name="Undo").click()
    expect(box(page, "layer2")).to_have_attribute("aria-checked", "false")
    expect(box(page, "layer1")).to_have_attribute("aria-checked", "true")
    page.get_by_role("button", name="Redo").click()
    expect(box(page, "layer2")).to_have_attribute("aria-checked", "true")
    page.reload()
    expect(box(page, "layer2")).to_have_attribute("aria-checked", "true")
    expect(box(page, "layer1")).to_have_attribute("aria-checked", "true")


def test_the_tree_works_by_keyboard(page: Page) -> None:
    open_demo(page)
    row(page, "").focus()
    page.keyboard.press("ArrowDown")
    expect(row(page, "stem")).to_be_focused()
    page.keyboard.press("ArrowLeft")
    expect(row(page, "stem")).to_have_attribute("aria-expanded", "false")
    page.keyboard.press("ArrowRight")
    expect(row(page, "stem")).to_have_attribute("aria-expanded", "true")
    expect(row(page, "stem.conv")).to_be_visible()
    page.keyboard.press("Space")
    expect(box(page, "stem")).to_have_attribute("aria-checked", "true")
    page.keyboard.type("layer3")
    expect(row(page, "layer3")).to_be_focused()
    page.keyboard.press("End")
    expect(row(page, "fc")).to_be_focused()
    page.keyboard.press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type("bn1.bias")
    expect(page.locator(".found")).to_have_text(re.compile(r"[1-9]\d* found"))
    page.keyboard.press("Escape")
    expect(row(page, "layer3")).to_be_visible()


def test_a_rule_that_matches_nothing_or_cannot_be_read_says_so(page: Page) -> None:
    open_demo(page)
    page.locator('[name="add_text"]').fill("nothing.*")
    expect(page.locator("#matches")).to_have_text("matches nothing")
    page.get_by_role("button", name="Add the rule").click()
    expect(page.locator(".rules")).to_contain_text("0 tensors")
    expect(page.locator(".findings")).to_contain_text("nothing.*")
    page.locator('[name="add_text"]').fill("layer.{0..")
    expect(page.locator("#matches .fault")).to_be_visible()
    page.get_by_role("button", name="Add the rule").click()
    expect(page.locator(".rules .fault")).to_be_visible()
    page.reload()
    expect(page.locator(".rules .fault")).to_be_visible()
    # A file with such a rule would be no file.
    keep = page.locator(".keep-panel")
    expect(keep).to_contain_text("JSON and Python come when every rule is right")
    expect(keep.get_by_role("link", name="JSON")).to_have_count(0)


def test_a_session_that_ended_elsewhere_loses_no_tick(context: BrowserContext) -> None:
    page = context.new_page()
    open_demo(page)
    box(page, "stem").click()
    expect(page).to_have_url(re.compile("stem"))
    cookies: Any = context.cookies()
    context.clear_cookies()
    box(page, "layer1").click()
    expect(page.get_by_role("alert")).to_contain_text("This session has ended. Log in again")
    expect(page.get_by_role("treegrid")).to_be_visible()
    context.add_cookies(cookies)
    box(page, "layer1").click()
    expect(page).to_have_url(re.compile("stem.*layer1"))
    expect(page.get_by_role("alert")).to_have_count(0)


def test_presets_save_download_and_import(page: Page, tmp_path: Path) -> None:
    open_demo(page)
    page.get_by_text("Presets").click()
    page.get_by_role("button", name="Train the head only").click()
    expect(box(page, "layer3")).to_have_attribute("aria-checked", "true")
    expect(box(page, "fc")).to_have_attribute("aria-checked", "false")
    page.locator('[name="config_name"]').fill("head only")
    page.get_by_role("button", name="Save", exact=True).click()
    page.wait_for_url(re.compile(r"config=\d+"))
    with page.expect_download() as caught:
        page.get_by_role("link", name="JSON").click()
    path = tmp_path / "config.json"
    caught.value.save_as(path)
    document = json.loads(path.read_text())
    assert document["format"] == "frostline.freeze-config"
    assert document["name"] == "head only"
    assert all(name.startswith("fc.") for name in document["trainable"])
    page.get_by_role("link", name="Import").click()
    page.get_by_label("a file").set_input_files(path)
    page.get_by_role("button", name="Show what it changes").click()
    expect(page.get_by_role("main")).to_contain_text("freezes what is frozen there already")
    page.get_by_role("button", name="Import and open").click()
    page.wait_for_url(re.compile(r"/models/\d+\?config=\d+$"))
    expect(box(page, "layer3")).to_have_attribute("aria-checked", "true")
    document["frozen"], document["trainable"] = (
        document["frozen"][1:],
        [
            document["frozen"][0],
            *document["trainable"],
        ],
    )
    page.get_by_role("link", name="Import").click()
    page.get_by_label("or pasted JSON").fill(json.dumps(document))
    page.get_by_role("button", name="Show what it changes").click()
    expect(page.get_by_role("alert")).to_contain_text("Nothing is stored yet")
    expect(page.get_by_role("row", name="become trainable")).to_contain_text(
        document["trainable"][0]
    )
    page.get_by_role("button", name="Keep the names").click()
    page.wait_for_url(re.compile(r"/models/\d+\?config=\d+$"))
    expect(box(page, "")).to_have_attribute("aria-checked", "mixed")


def test_wrong_options_stand_beside_their_field(page: Page) -> None:
    open_demo(page)
    page.locator('[name="train.epochs"]').fill("many")
    page.get_by_role("button", name="Start job").click()
    expect(page.locator(".field.wrong")).to_contain_text("many")
    expect(page.locator('[name="train.epochs"]')).to_have_value("many")


def test_a_frozen_model_offers_evaluation(page: Page) -> None:
    open_demo(page, "?rule=freeze:**")
    page.get_by_role("button", name="Start job").click()
    expect(page.get_by_role("alert").first).to_contain_text(re.compile("evaluat", re.I))


def test_a_job_runs_grows_its_chart_and_is_proved(page: Page) -> None:
    open_demo(page, "?rule=freeze:{stem,layer1}.**")
    start_job(page, "early blocks frozen", epochs=6, batch_size=16)
    expect(page.locator(".chart").first).to_be_visible()
    expect(page.locator(".chart figcaption", has_text="accuracy")).to_be_visible()
    expect(page.locator("#status")).to_have_attribute("data-state", "succeeded", timeout=60_000)
    expect(page.locator(".proof-holds")).to_contain_text("bit-identical")
    insights = page.locator("#insights")
    insights.scroll_into_view_if_needed()
    # To the end: htmx's own throttle would drop the last of its triggers.
    expect(insights.locator(".note").first).to_contain_text(re.compile(r"steps \d+ to 42"))
    expect(insights).not_to_contain_text(re.compile("Reading|No step"))
    expect(page.get_by_role("link", name=re.compile("Download the checkpoint"))).not_to_have_count(
        0
    )
    expect(page.locator(".heat-foot output")).to_have_text(
        re.compile(r"\d+ layers, steps 1 to \d+")
    )
    photograph(page, "job")
    assert find_violations(page) == []


def test_a_running_job_is_stopped_with_a_checkpoint(page: Page) -> None:
    open_demo(page)
    start_job(page, "ended by hand", epochs=5000)
    expect(page.locator("#status")).to_have_attribute("data-state", "running")
    gauge = page.locator(".gauge.wide b")
    expect(gauge).not_to_have_text(re.compile(r"^0\b"))
    before = gauge.inner_text()
    expect(gauge).not_to_have_text(before)
    expect(page.locator(".heat-foot output")).to_have_text(re.compile(r"\d+ layers"))
    photograph(page, "running-job")
    page.goto("/jobs")
    listed = page.locator("tr", has_text="ended by hand")
    expect(listed).to_contain_text("running")
    listed.get_by_role("button", name="Stop ended by hand").click()
    expect(listed).to_contain_text("stopped")
    listed.get_by_role("link").first.click()
    expect(page.get_by_role("link", name=re.compile("Download the checkpoint"))).not_to_have_count(
        0
    )
    page.get_by_role("link", name="Run again with changes").click()
    expect(page.locator('[name="train.epochs"]')).to_have_value("5000")


def test_a_job_is_started_without_javascript(page: Page, context: object) -> None:
    browser = page.context.browser
    assert browser is not None
    plain = browser.new_context(
        base_url=page.context.request.get("/models/1").url.removesuffix("/models/1"),
        storage_state=page.context.storage_state(),
        java_script_enabled=False,
    )
    plain_page = plain.new_page()
    plain_page.goto("/models/1")
    box(plain_page, "layer1").click()
    expect(box(plain_page, "layer1")).to_have_attribute("aria-checked", "true")
    plain_page.locator('[name="train.epochs"]').fill("1")
    plain_page.get_by_role("button", name="Start job").click()
    plain_page.wait_for_url(re.compile(r"/jobs/\d+$"))
    plain.close()
