"""Somebody who has never seen it: from the first page to a proved job and a downloaded config."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import find_violations, photograph


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_a_newcomer_gets_to_a_finished_job_and_a_config(
    page: Page, tmp_path: Path, scheme: str, width: int
) -> None:
    """Only what is written on the page is used: visible labels, in the order of the first steps."""
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.set_viewport_size({"width": width, "height": 900})
    page.goto("/models/1")
    expect(page.locator("#workbench[data-ready]")).to_be_visible()
    page.get_by_role("checkbox", name="Freeze stem", exact=True).click()
    box = page.get_by_role("checkbox", name="Freeze layer1", exact=True)
    box.click()
    expect(page.get_by_role("row").filter(has=box)).to_contain_text("idle")
    expect(page.get_by_role("row", name=re.compile("^backward"))).to_contain_text("%")
    photograph(page, f"newcomer-plan-{scheme}-{width}")
    with page.expect_download() as caught:
        page.get_by_role("link", name="JSON", exact=True).click()
    caught.value.save_as(tmp_path / "config.json")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["frozen"]
    assert all(name.startswith(("stem.", "layer1.")) for name in config["frozen"])
    page.get_by_role("button", name="Start job").click()
    expect(page.get_by_text("succeeded").first).to_be_visible(timeout=90_000)
    expect(page.get_by_text("bit-identical").first).to_be_visible()
    photograph(page, f"newcomer-proof-{scheme}-{width}")
    assert find_violations(page) == []


def test_the_first_steps_are_shown_until_hidden_or_done(page: Page) -> None:
    page.goto("/models/1")
    expect(page.locator("#workbench[data-ready]")).to_be_visible()
    steps = page.get_by_role("region", name="First steps")
    if steps.count():  # gone as soon as there is a job, which other tests may have started
        page.get_by_role("button", name="Hide").click()
        expect(steps).to_have_count(0)
        page.reload()
        expect(page.locator("#workbench[data-ready]")).to_be_visible()
    expect(steps).to_have_count(0)


def test_the_keyboard_alone_gets_anywhere(page: Page) -> None:
    page.goto("/models/1")
    expect(page.locator("#workbench[data-ready]")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard")).to_be_visible()
    page.get_by_role("checkbox", name=re.compile("Keys without Ctrl")).uncheck()
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard")).to_be_hidden()
    page.get_by_role("button", name="Keyboard and help").click()
    page.get_by_role("checkbox", name=re.compile("Keys without Ctrl")).check()
    page.keyboard.press("Escape")
    page.locator("#main").focus()
    page.keyboard.press("g")
    page.keyboard.press("c")
    expect(page).to_have_url(re.compile("/configs$"))


def test_phases_groups_and_rules_are_edited_and_stay(page: Page) -> None:
    page.goto("/models/1?rule=freeze:**&rule=unfreeze:fc")
    expect(page.locator("#workbench[data-ready]")).to_be_visible()
    page.get_by_text("Phases: what changes").click()
    page.get_by_label("What phase 1 matches").fill("layer3.**")
    page.get_by_label("What phase 1 matches").press("Tab")
    expect(page.get_by_label("What phase 2 matches")).to_be_visible()
    page.get_by_text("Groups: rates and decay").click()
    page.get_by_label("Learning-rate factor of group 1").fill("10")
    page.get_by_label("What group 1 matches").fill("fc")
    page.get_by_label("What group 1 matches").press("Tab")
    expect(page.get_by_label("What group 2 matches")).to_be_visible()
    page.get_by_label("What rule 2 matches").focus()
    page.keyboard.press("Alt+ArrowUp")
    expect(page.get_by_label("What rule 1 matches")).to_have_value("fc")
    expect(page.get_by_label("What rule 2 matches")).to_have_value("**")
    expect(page).to_have_url(re.compile("phase=epoch.*group=10"))
    page.reload()
    expect(page.get_by_label("What phase 1 matches")).to_have_value("layer3.**")
    expect(page.get_by_label("What group 1 matches")).to_have_value("fc")
    page.get_by_role("button", name="Remove phase 1").click()
    expect(page.get_by_label("What phase 1 matches")).to_have_value("")
    page.get_by_label("What phase 1 matches").fill("layer2.**")
    page.get_by_label("mechanism").select_option("zero_lr")
    expect(page.locator(".phases .fault")).to_contain_text("requires_grad")


def test_why_a_row_is_as_it_is_stands_below_the_tree(page: Page) -> None:
    page.goto("/models/1?rule=freeze:layer1.**")
    expect(page.locator("#workbench[data-ready]")).to_be_visible()
    page.get_by_role("row", name=re.compile("layer1 ResidualBlock")).hover()
    expect(page.locator("#why")).to_contain_text("layer1 ResidualBlock · passes: frozen;")
    page.get_by_role("searchbox").fill("type=BatchNorm2d")
    expect(page.locator(".found")).to_have_text(re.compile(r"\d+ found"))
    page.get_by_role("button", name="Make it a rule").click()
    expect(page.get_by_label("What the new rule matches")).to_have_value("type=BatchNorm2d")
    expect(page.locator("#matches")).to_contain_text("tensors")


def test_two_saved_configs_are_compared_renamed_and_deleted(page: Page) -> None:
    for name, rule in (("first of two", "stem"), ("second of two", "{stem,layer1}.**")):
        page.goto(f"/models/1?rule=freeze:{rule}")
        page.get_by_label("Name of the freeze config").fill(name)
        page.get_by_role("button", name="Save", exact=True).click()
        page.wait_for_url(re.compile(r"config=\d+"))
    page.goto("/configs")
    page.get_by_role("checkbox", name="Compare first of two").check()
    page.get_by_role("checkbox", name="Compare second of two").check()
    page.get_by_role("button", name="Compare the two ticked").click()
    alone = page.get_by_role("row", name=re.compile("^frozen here alone"))
    expect(alone).to_contain_text("6 tensors")
    page.goto("/configs")
    page.get_by_label("Rename first of two").click()
    page.get_by_label("New name of first of two").fill("renamed")
    page.get_by_role("button", name="Rename", exact=True).click()
    page.get_by_role("button", name="Duplicate renamed").click()
    expect(page.get_by_role("link", name="renamed (copy)", exact=True)).to_be_visible()
    page.get_by_role("button", name="Delete renamed (copy)").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_role("link", name="renamed (copy)", exact=True)).to_have_count(0)
