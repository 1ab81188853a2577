"""Every page, light and dark, wide and narrow: no axe violation, no sideways scrolling."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.browser.conftest import find_violations, look_over, photograph, serving

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
# What the pages say where there is nothing to list.
EMPTY = {
    "models": "No models yet",
    "configs": "No freeze configs yet",
    "jobs": "No jobs yet",
    "compare": "Nothing to compare yet",
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
def test_a_page_is_accessible_and_fits(page: Page, name: str) -> None:
    page.goto(PAGES[name])
    look_over(page, name)


def test_pages_with_nothing_on_them_say_what_to_do(browser: Browser, tmp_path: Path) -> None:
    with serving(tmp_path, 0) as (_, link):
        context = browser.new_context(base_url=link.partition("/login")[0])
        page = context.new_page()
        page.goto(link)
        look_over(page, "login")
        page.get_by_role("button", name="Log in").click()
        page.locator("#workbench").wait_for()
        assert (
            page.evaluate("fetch('/api/models/1', {method: 'DELETE'}).then((a) => a.status)") == 204
        )
        for name, words in EMPTY.items():
            page.goto(f"/{name}")
            expect(page.get_by_role("main")).to_contain_text(words)
            look_over(page, f"empty-{name}")
        context.close()


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
