"""A real server on a free port with an empty data folder, a real Chromium; what no page may do."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    Request,
    expect,
    sync_playwright,
)

ROOT = Path(__file__).resolve().parents[2]
expect.set_options(timeout=20_000)  # a busy machine with two cores is not a fault

SCREENSHOTS = ROOT / "screenshots"
AXE = ROOT / "node_modules" / "axe-core" / "axe.min.js"
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/browser" in item.nodeid:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def login_link(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The one-time link that a freshly started server prints."""
    command = [sys.executable, "-m", "app", "serve", "--port", "0", "--no-open", "--stop-jobs"]
    environment = {
        **os.environ,
        "FROSTLINE_DATA_DIR": str(data_dir),
        "FROSTLINE_CPU_SLOTS": "1",
        "FROSTLINE_FILE_DIRS": f"{ROOT}{os.pathsep}{tmp_path_factory.getbasetemp()}",
    }
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield next(_links(process.stdout))
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


def _links(lines: Iterator[str]) -> Iterator[str]:
    printed = []
    for line in lines:
        printed.append(line)
        found = re.search(r"http://\S+/login\?link=\S+", line)
        if found:
            yield found.group()
    pytest.fail("The server ended without printing its address:\n" + "".join(printed))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_ARGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def address(login_link: str, browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The server's address, after the browser has logged in; its cookie is kept for every page."""
    parts = urlsplit(login_link)
    base = f"{parts.scheme}://{parts.netloc}"
    context = browser.new_context()
    page = context.new_page()
    page.goto(login_link)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url(re.compile(r"/models/\d+$"))  # a first run lands on the demo model
    page.locator("#workbench").wait_for()  # the model has been read
    os.environ["FROSTLINE_TEST_STATE"] = str(tmp_path_factory.mktemp("state") / "state.json")
    context.storage_state(path=os.environ["FROSTLINE_TEST_STATE"])
    context.close()
    return base


@pytest.fixture
def context(browser: Browser, address: str) -> Iterator[BrowserContext]:
    context = browser.new_context(
        base_url=address,
        storage_state=os.environ["FROSTLINE_TEST_STATE"],
        viewport={"width": 1280, "height": 900},
    )
    context.set_default_timeout(15_000)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, address: str) -> Iterator[Page]:
    """A page that must log no error and ask no other host."""
    page = context.new_page()
    wrong: list[str] = []

    def hear(message: ConsoleMessage) -> None:
        # A refused form is a page with a 4xx status, which the browser itself calls an error.
        is_refusal = re.search(r"status of (409|422) ", message.text)
        if message.type in ("error", "warning") and not is_refusal:
            wrong.append(f"console: {message.text}")

    def see(request: Request) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            wrong.append(f"another host: {request.url}")

    page.on("console", hear)
    page.on("pageerror", lambda error: wrong.append(f"page error: {error}"))
    page.on("request", see)
    yield page
    assert wrong == []


def find_violations(page: Page) -> list[str]:
    """What axe-core finds wrong with the page as it is now, a line each."""
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{violation['id']}: {violation['help']}: {node['html'][:160]}"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]


def photograph(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def look_over(page: Page, name: str) -> None:
    """The page as it is, light and dark, wide and narrow: photographed, accessible, and it fits."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            photograph(page, f"{name}-{scheme}-{width}")
            assert find_violations(page) == [], (name, scheme, width)
            too_wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert too_wide <= 0, (name, scheme, width)
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 1280, "height": 900})


@contextmanager
def serving(data_dir: Path, port: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of this test alone, which leaves its jobs running; with its login link."""
    command = [sys.executable, "-m", "app", "serve", "--port", str(port), "--no-open"]
    environment = {**os.environ, "FROSTLINE_DATA_DIR": str(data_dir)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        links = (re.search(r"http://\S+link=\S+", line) for line in process.stdout)
        yield process, next(found.group() for found in links if found)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
