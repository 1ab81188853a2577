"""Trials on the workbench in a real browser: mechanisms side by side, a model timed, insights."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, Route, expect

from tests.browser.conftest import find_violations, photograph
from tests.browser.test_jobs import end, launch, open_job, wait_for

WORKBENCH = "/models/1?rule=freeze:{stem,layer1}.**"
LONG_MS = 90_000  # a worker times real steps


def open_workbench(page: Page, address: str = WORKBENCH) -> None:
    page.goto(address)
    expect(page.locator("#workbench[data-ready]")).to_be_visible()


def test_the_mechanisms_stand_beside_each_other_without_a_reload(page: Page) -> None:
    open_workbench(page)
    page.evaluate("window.same = true")
    page.get_by_text("the four ways to hold weights still").click()
    page.get_by_role("textbox", name="steps", exact=True).fill("3")
    page.get_by_role("button", name="Compare mechanisms").click()
    table = page.locator("#trial table").first
    expect(table).to_contain_text("peak memory", timeout=LONG_MS)
    heads = table.get_by_role("columnheader").all_inner_texts()
    assert heads[1:] == ["requires_grad", "exclude", "zero_lr", "zero_grad"]
    row = table.get_by_role("row", name=re.compile("gradients computed for nothing"))
    assert row.get_by_role("cell").all_inner_texts() == ["0", "9", "9", "9"]
    expect(page.locator("#trial")).to_contain_text("3 steps of AdamW on the example")
    assert page.evaluate("window.same")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            table.scroll_into_view_if_needed()
            photograph(page, f"mechanisms-{scheme}-{width}")
            assert find_violations(page) == []
            assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_a_comparison_that_cannot_be_says_why_beside_its_button(page: Page) -> None:
    open_workbench(page, "/models/1?rule=freeze:**")
    page.get_by_text("the four ways to hold weights still").click()
    page.get_by_role("button", name="Compare mechanisms").click()
    expect(page.locator("#trial").get_by_role("alert")).to_contain_text("Nothing is trainable")
    assert find_violations(page) == []


def test_a_model_that_was_timed_predicts_a_step_at_once(page: Page) -> None:
    open_workbench(page)
    plan = page.locator("#answer .measures").first
    expect(plan).to_contain_text("time it")
    page.get_by_role("button", name="Time this model").click()
    expect(page.locator("#timing")).to_contain_text("Timed.", timeout=LONG_MS)
    expect(plan.get_by_role("row", name=re.compile("predicted time"))).to_contain_text("ms")
    page.locator('.row[data-path="layer2"] .box').click()
    expect(page.locator('.row[data-path="layer2"] .box')).to_have_attribute("aria-checked", "true")
    expect(plan.get_by_role("row", name=re.compile("predicted time"))).to_contain_text("ms")


def test_a_plan_for_another_size_comes_by_itself(page: Page) -> None:
    open_workbench(page)
    page.evaluate("window.same = true")
    plan = page.locator("#answer .measures").first
    forward = plan.get_by_role("row", name=re.compile("forward"))
    before = forward.inner_text()
    page.get_by_role("button", name="Time this model").click()  # the trace waits behind this task
    expect(page.locator("#timing")).to_contain_text("A worker times the model")
    page.get_by_text("assume something else").click()
    page.locator("[name='assume.image_size']").fill("24")
    note = page.locator("[data-tracing]")
    expect(note).to_contain_text("Being traced for images of 24 × 24")
    assert forward.inner_text() == before
    held: list[Route] = []  # the page's next question: what is shown stays as it is
    page.route("**/models/1/plan", lambda route: held.append(route))
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            note.scroll_into_view_if_needed()
            photograph(page, f"tracing-{scheme}-{width}")
            assert find_violations(page) == []
            assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    page.set_viewport_size({"width": 1280, "height": 900})
    # Somebody goes on meanwhile, and keeps what was typed.
    page.locator("[name='add_text']").fill("fc")
    for route in held:
        route.continue_()
    page.unroute("**/models/1/plan")
    page.get_by_role("button", name="Add the rule").click()
    expect(page.locator(".rules [name='rule_text']")).to_have_count(2)
    expect(page.locator("#assume summary")).to_contain_text("image size 24", timeout=LONG_MS)
    expect(note).to_have_count(0)
    expect(forward).not_to_have_text(before)
    expect(page.locator("[name='assume.image_size']")).to_have_value("24")
    page.locator("[name='assume.image_size']").fill("1000000")
    expect(page.locator(".findings")).to_contain_text("An image size of 1,000,000 was not applied")
    photograph(page, "size-refused-light-1280")
    assert page.evaluate("window.same")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_layers_that_barely_move_are_told_and_frozen_by_one_button(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    rules = [{"action": "freeze", "match": "{stem,layer1,layer2}.**"}]
    schedule = [{"at": {"step": 1}, "action": "freeze", "match": "fc"}]
    slow = {"optimizer": "sgd", "lr": 1e-6, "momentum": 0.0, "max_steps": 120}
    job = launch(page, "barely moves", {"rules": rules, "schedule": schedule}, **slow)
    wait_for(page, job, "succeeded", "failed")
    open_job(page, job)
    insights = page.locator("#insights")
    expect(insights).to_contain_text("barely moved")
    insights.locator("summary").first.click()
    expect(insights.get_by_role("table").first).to_contain_text("%")
    page.set_viewport_size({"width": 390, "height": 900})
    photograph(page, f"insights-{scheme}-390")
    assert find_violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    insights.get_by_role("link", name=re.compile("Run again with")).first.click()
    expect(page.locator("#workbench[data-ready]")).to_be_visible()
    expect(page.locator('.row[data-path="layer3"] .box')).to_have_attribute("aria-checked", "true")


def test_a_job_that_waits_says_where_it_stands_and_offers_every_export(page: Page) -> None:
    first = launch(page, "holds the place", epochs=50_000)
    wait_for(page, first, "running")
    second = launch(page, "comes next", epochs=1)
    page.goto(f"/jobs/{second}")
    expect(page.locator("#status")).to_contain_text("It is the next to start.")
    for words in ("CSV", "JSON", "Parquet", "TensorBoard"):
        expect(page.get_by_role("link", name=words, exact=True).last).to_be_visible()
    assert find_violations(page) == []
    end(page, first)
    wait_for(page, second, "succeeded")
