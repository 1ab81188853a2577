"""Every page, light and dark, wide and narrow: no axe violation, no sideways scrolling."""

from __future__ import annotations

import os

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.browser.conftest import find_violations, photograph

# Names of the pages; the ids are those of the fixture below, which saves what they show.
PAGES = {
    "models": "/models",
    "model": "/models/1?rule=freeze:{stem,layer1}.**&rule=freeze:nothing",
    "model-edited": "/models/1?rule=freeze:**&rule=unfreeze:layer.{0..&search=bn"
    "&phase=epoch:2:unfreeze:fresh:layer1.**&phase=step:soon:freeze:keep:fc&group=10::fc.**",
    "import": "/models/1/import",
    "configs": "/configs",
    "configs-compared": "/configs/compare?config=1&config=2",
    "configs-refused": "/configs/compare?config=1",
    "jobs": "/jobs",
    "compare": "/compare",
    "system": "/system",
    "patterns": "/patterns",
    "docs": "/api/docs",
}


SAVE = """
(config) => fetch("/api/configs", {
  method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(config),
}).then((answer) => answer.status)
"""


@pytest.fixture(scope="module", autouse=True)
def saved_configs(browser: Browser, address: str) -> None:
    context = browser.new_context(storage_state=os.environ["FROSTLINE_TEST_STATE"])
    page = context.new_page()
    page.goto(f"{address}/configs")
    for name, match in (("early blocks", "{stem,layer1}.**"), ("head only", "{stem,layer*}.**")):
        rules = [{"action": "freeze", "match": match}]
        assert page.evaluate(SAVE, {"model_id": 1, "name": name, "rules": rules}) == 201
    context.close()


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_is_accessible_and_fits(page: Page, name: str, scheme: str) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(PAGES[name])
        photograph(page, f"{name}-{scheme}-{width}")
        assert find_violations(page) == []
        too_wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert too_wide <= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_opens_over_a_page_is_accessible_too(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        page.goto("/models/1")
        expect(page.locator("#workbench[data-ready]")).to_be_visible()
        page.get_by_role("button", name="Keyboard and help").click()
        expect(page.get_by_role("dialog")).to_contain_text("freeze or unfreeze the row")
        photograph(page, f"help-{scheme}-{width}")
        assert find_violations(page) == []
        page.keyboard.press("Escape")
        page.get_by_text("Presets").click()
        page.get_by_text("All options").click()
        photograph(page, f"presets-{scheme}-{width}")
        assert find_violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        page.goto("/configs")
        page.get_by_role("button", name="Delete early blocks").click()
        expect(page.get_by_role("dialog")).to_contain_text("early blocks")
        photograph(page, f"question-{scheme}-{width}")
        assert find_violations(page) == []
        page.get_by_role("button", name="Cancel").click()
        expect(page.get_by_role("link", name="early blocks", exact=True)).to_be_visible()


def test_what_does_not_exist_says_so(context: BrowserContext) -> None:
    page = context.new_page()  # a browser itself logs a 404 as an error
    page.goto("/models/999")
    expect(page.get_by_role("main")).to_contain_text("999")
    assert find_violations(page) == []
