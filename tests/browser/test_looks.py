"""Every page, light and dark, wide and narrow: no axe violation, no sideways scrolling."""

from __future__ import annotations

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.conftest import find_violations, photograph

PAGES = {
    "models": "/models",
    "model": "/models/1?rule=freeze:{stem,layer1}.**&rule=freeze:nothing",
    "import": "/models/1/import",
    "configs": "/configs",
    "jobs": "/jobs",
    "compare": "/compare",
    "system": "/system",
    "patterns": "/patterns",
    "docs": "/api/docs",
}


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


def test_what_does_not_exist_says_so(context: BrowserContext) -> None:
    page = context.new_page()  # a browser itself logs a 404 as an error
    page.goto("/models/999")
    expect(page.get_by_role("main")).to_contain_text("999")
    assert find_violations(page) == []
