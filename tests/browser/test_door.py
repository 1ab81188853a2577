"""What another site in the same browser can do (nothing), and what a hostile name becomes (text)."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Page

from tests.browser.hostile import MARKUP
from tests.unit.own_files import write_images, write_model

# Whatever a page of another port can try with the reader's cookie in the same browser.
ATTACK = """
<!doctype html><title>another site</title>
<form id="form" method="post" action="{target}/models" target="frame"><input name="uri" value="demo:three-layers"></form>
<form id="login" method="post" action="{target}/login" target="frame"><input name="link" value="guess"></form>
<iframe name="frame" id="frame" src="{target}/models"></iframe>
<script>
window.found = {{}};
async function attempt(name, act) {{
  try {{ window.found[name] = await act(); }} catch (error) {{ window.found[name] = "refused"; }}
}}
async function read(path, options) {{
  const answer = await fetch("{target}" + path, {{credentials: "include", ...options}});
  return answer.type === "opaque" ? "opaque" : `${{answer.status}} ${{await answer.text()}}`;
}}
const body = JSON.stringify({{uri: "demo:three-layers"}});
window.attack = async () => {{
  await attempt("read", () => read("/api/jobs"));
  await attempt("read without cors", () => read("/api/jobs", {{mode: "no-cors"}}));
  await attempt("simple post", () => read("/api/models", {{method: "POST", mode: "no-cors", body}}));
  await attempt("json post", () => read("/api/models",
    {{method: "POST", body, headers: {{"Content-Type": "application/json"}}}}));
  await attempt("delete", () => read("/api/models/1", {{method: "DELETE"}}));
  await attempt("beacon", async () => navigator.sendBeacon("{target}/api/models", body) && "sent");
  await attempt("stream", () => new Promise((resolve) => {{
    const source = new EventSource("{target}/api/events", {{withCredentials: true}});
    source.onmessage = source.onopen = () => resolve("opened");
    source.onerror = () => {{ source.close(); resolve("refused"); }};
  }}));
  await attempt("image", () => new Promise((resolve) => {{
    const image = new Image();
    image.onload = image.onerror = () => resolve("asked");
    image.src = "{target}/api/jobs";
  }}));
  document.getElementById("form").submit();
  return window.found;
}};
</script>
"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def elsewhere(address: str, tmp_path: Path) -> Iterator[str]:
    """A page of another port, and so of another origin of the same site."""
    (tmp_path / "index.html").write_text(ATTACK.format(target=address))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_a_page_of_another_port_reads_and_changes_nothing(
    context: BrowserContext, address: str, elsewhere: str
) -> None:
    def state() -> list[Any]:
        paths = ("/api/models", "/api/jobs", "/api/configs")
        return [context.request.get(address + path).json() for path in paths]

    before = state()
    assert before[0], "the reader is logged in, in this very browser"
    page = context.new_page()
    page.goto(elsewhere)
    with page.expect_response(lambda answer: answer.url == f"{address}/models") as sent:
        found = page.evaluate("window.attack()")
    assert sent.value.status == 403  # the form, which goes through as any navigation does
    assert found.pop("image") == "asked"
    assert found.pop("beacon") in ("sent", "refused")  # sent is not taken
    assert found.pop("read without cors") in ("opaque", "refused")
    assert found.pop("simple post") in ("opaque", "refused")
    assert found == dict.fromkeys(("read", "json post", "delete", "stream"), "refused")
    page.evaluate("document.getElementById('login').submit()")
    frame = page.frame(name="frame")
    assert frame is not None
    assert MARKUP not in frame.url
    assert page.evaluate("document.getElementById('frame').contentDocument") is None
    assert state() == before


def test_names_do_not_become_markup(context: BrowserContext, page: Page, address: str) -> None:
    """Names of a module, a config, a job, its notes and rules, on every page that shows them."""
    alerts: list[str] = []
    page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
    send = partial(
        context.request.fetch, headers={"Sec-Fetch-Site": "same-origin", "Origin": address}
    )
    added = send("/api/models", method="POST", data={"uri": "python:tests.browser.hostile:build"})
    hostile = added.json()["id"]
    page.goto(f"/models/{hostile}")
    page.locator("#workbench").wait_for()
    rules = [{"action": "freeze", "match": MARKUP}, {"action": "freeze", "match": "has:stem"}]
    config = {"name": MARKUP, "rules": rules, "groups": [{"match": MARKUP, "lr_scale": 2.0}]}
    saved = send("/api/configs", method="POST", data={**config, "model_id": 1})
    assert saved.status == 201, saved.text()
    number_of_config = saved.json()["id"]
    job = {
        "model_id": 1,
        "config": number_of_config,
        "dataset": {"uri": "demo:digits", "eval": {MARKUP: "demo:digits-shifted"}},
        "training": {"max_steps": 4, "eval_every": 2},
        "name": MARKUP,
        "notes": MARKUP,
    }
    launched = send("/api/jobs", method="POST", data=job)
    assert launched.status == 201, launched.text()
    number = launched.json()["id"]
    page.goto(f"/jobs/{number}")
    page.get_by_text("succeeded").first.wait_for()
    paths = [
        f"/models/{hostile}", "/models", "/configs", "/jobs", f"/jobs/{number}", f"/compare?jobs={number},{number}",
        f"/compare?jobs={number}", f"/models/1?config={number_of_config}", "/system",
        "/models/1/import", f"/configs/compare?config={number_of_config}&config={number_of_config}",
    ]  # fmt: skip
    shown = 0
    for path in paths:
        page.goto(path)
        assert page.locator("img[src='x']").count() == 0, path
        assert page.locator("[onerror]").count() == 0, path
        shown += page.content().count("&lt;img src=x onerror=alert(1)&gt;") > 0
    assert shown >= 5
    assert alerts == []
    assert json.loads(context.request.get(f"/api/jobs/{number}").text())["name"] == MARKUP


def test_files_and_classes_do_not_become_markup(
    context: BrowserContext, page: Page, address: str, tmp_path: Path
) -> None:
    """A folder, a class and a model's folder of that name: the data's page, the job's, the list."""
    alerts: list[str] = []
    page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
    send = partial(
        context.request.fetch, headers={"Sec-Fetch-Site": "same-origin", "Origin": address}
    )
    images = write_images(tmp_path / MARKUP, ("dark", MARKUP))
    folder = write_model(tmp_path / f"model {MARKUP}", "vit")
    task = {"task": "image-classification", "num_classes": 2, "random_init": True}
    added = send("/api/models", method="POST", data={"uri": f"hf:{folder}", **task})
    assert added.status == 202, added.text()
    model = added.json()["id"]
    page.goto(f"/models/{model}")
    page.locator("#workbench").wait_for(timeout=60_000)
    wanted = {"model_id": model, "dataset": {"uri": f"folder:{images}"}}
    looked = send("/api/datasets/preview", method="POST", data=wanted)
    assert looked.status == 202, looked.text()
    job = {**wanted, "config": {}, "training": {"max_steps": 2, "device": "cpu"}}
    launched = send("/api/jobs", method="POST", data=job)
    assert launched.status == 201, launched.text()
    number = launched.json()["id"]
    page.goto(f"/models/{model}/preview/{looked.json()['id']}")
    page.locator("#preview img").first.wait_for(timeout=60_000)
    assert page.locator("#preview").get_by_text(MARKUP).count() > 0
    for path in (page.url, f"/jobs/{number}", "/jobs", "/models", f"/models/{model}"):
        page.goto(path)
        assert page.locator("img[src='x']").count() == 0, path
        assert page.locator("[onerror]").count() == 0, path
        assert "&lt;img src=x onerror=alert(1)&gt;" in page.content(), path
    page.goto(f"/jobs/{number}")
    page.get_by_text("succeeded").first.wait_for()
    assert alerts == []
