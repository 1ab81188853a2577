"""The house rules that no other tool keeps: captions, names, templates, and what comes along."""

import ast
import importlib.resources
import re
import subprocess
import sys
import tomllib
from pathlib import Path, PurePosixPath

import pytest
from jinja2 import meta

from app.sources.demo import DEMO_MODELS
from app.web.render import TEMPLATES, environment
from tests.contract.house import APP, BEGIN, END, ROOT, caption, code_files, tree_block

NEVER_NAMES = re.compile(r"_?(utils?|helpers?|common|core|managers?|base)")
NOT_OURS = {"vendor", "__pycache__"}
PAGES = sorted(TEMPLATES.rglob("*.html"))
SERVED = PAGES + sorted(
    file
    for file in (ROOT / "static").rglob("*")
    if file.is_file() and not NOT_OURS.intersection(file.parts)
)
# An address of another host: with a scheme, or without one where a browser would fetch it.
FOREIGN = re.compile(r"(?:https?:)//[^\s\"'<>)]+|(?:src|href|action)=[\"']//|url\([\"']?//")
ALLOWED = re.compile(r"http://www\.w3\.org/\S+")  # a name for a vocabulary, which nobody fetches
INLINE = {
    "a script without a src": re.compile(r"<script(?![^>]*\ssrc=)", re.IGNORECASE),
    "a style element": re.compile(r"<style\b", re.IGNORECASE),
    "a style attribute": re.compile(r"<[^>]*\sstyle\s*=", re.IGNORECASE),
    "a handler in an attribute": re.compile(r"<[^>]*\s(?:hx-)?on[a-z:-]+\s*=", re.IGNORECASE),
    "a javascript: address": re.compile(r"javascript:", re.IGNORECASE),
}


def _name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def test_readme_has_the_tree_of_app() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    found = re.findall(f"{re.escape(BEGIN)}.*?{re.escape(END)}", readme, re.DOTALL)
    assert found == [tree_block()], "Paste what `python -m tests.contract.house` prints."


def test_every_file_has_a_caption() -> None:
    captions = {_name(file): caption(file) for file in code_files()}
    assert len(captions) > 40
    bad = {
        name: text
        for name, text in captions.items()
        if not re.fullmatch(r".{1,99}\.", text) or text != text.strip()
    }
    assert not bad, "A docstring's first line is at most 100 characters and ends with a period."


def test_the_server_starts_without_what_only_workers_need() -> None:
    code = """if True:
        import sys
        import app.main
        heavy = ("torch", "numpy", "safetensors", "transformers", "datasets", "pandas")
        print(sorted(set(heavy) & set(sys.modules)))
    """
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_no_room_imports_what_it_must_not_know() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_no_name_hides_what_is_in_it() -> None:
    folders = [ROOT / name for name in ("app", "templates", "static", "tests", "benchmarks")]
    places = [place for folder in folders for place in folder.rglob("*")]
    ours = [place for place in places if not NOT_OURS.intersection(place.parts)]
    assert len(ours) > 100
    hiding = [_name(place) for place in ours if NEVER_NAMES.fullmatch(place.name.split(".")[0])]
    assert not hiding


def test_every_template_is_used() -> None:
    """From Python, or by another template that is."""
    constants = (
        node.value
        for file in code_files()
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    wanted = {text for text in constants if re.fullmatch(r"[\w/]+\.html", text)}
    assert wanted
    used: set[str] = set()
    while wanted:
        name = wanted.pop()
        used.add(name)
        source = (TEMPLATES / name).read_text("utf-8")
        for other in meta.find_referenced_templates(environment().parse(source)):
            assert other is not None, f"{name} takes a template by a computed name."
            if other not in used:
                wanted.add(other)
    assert used == {page.relative_to(TEMPLATES).as_posix() for page in PAGES}


@pytest.mark.parametrize("file", SERVED, ids=_name)
def test_nothing_is_fetched_from_another_host(file: Path) -> None:
    found = FOREIGN.findall(file.read_text("utf-8"))
    assert not [address for address in found if not ALLOWED.fullmatch(address)]


@pytest.mark.parametrize(
    ("line", "is_fetched"),
    [
        ('<script src="https://cdn.example/x.js">', True),
        ('<img src="//cdn.example/x.png">', True),
        ("background: url(//cdn.example/x.png)", True),
        ('import x from "http://cdn.example/x.js";', True),
        ('<a href="/models//1"> // a comment', False),
        ('<svg xmlns="http://www.w3.org/2000/svg">', False),
    ],
)
def test_another_host_would_be_found(line: str, is_fetched: bool) -> None:
    found = FOREIGN.findall(line)
    assert any(not ALLOWED.fullmatch(address) for address in found) == is_fetched


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_no_script_or_style_is_inline(page: Path) -> None:
    # Expressions and comments may have ">" in them, which would end a tag too early.
    source = re.sub(r"{{.*?}}|{%.*?%}|{#.*?#}", "", page.read_text("utf-8"), flags=re.DOTALL)
    assert not [what for what, pattern in INLINE.items() if pattern.search(source)]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('<script type="module">x()</script>', "a script without a src"),
        ("<style>p { top: 0 }</style>", "a style element"),
        ('<p class="a"\n style="top: 0">', "a style attribute"),
        ('<b hx-on:click="x()">', "a handler in an attribute"),
        ('<b onclick="x()">', "a handler in an attribute"),
        ('<a href="javascript:x()">', "a javascript: address"),
    ],
)
def test_what_is_inline_would_be_found(line: str, what: str) -> None:
    assert INLINE[what].search(line)
    assert not any(
        pattern.search('<script src="/a.js" defer></script>') for pattern in [*INLINE.values()]
    )


def test_the_demo_comes_along() -> None:
    """Data, weights and attribution lie in the package, and are installed with it."""
    package = importlib.resources.files("app.sources.demo")
    for name in ("digits.npz", "digits.safetensors", "digits-shifted.safetensors"):
        assert package.joinpath(name).read_bytes()
    attribution = package.joinpath("ATTRIBUTION.md").read_text("utf-8")
    assert re.search(r"creativecommons\.org/licenses/by/4\.0|CC BY 4\.0", attribution)
    assert {"digits", "digits-shifted"} <= DEMO_MODELS.keys()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    declared = project["tool"]["setuptools"].get("package-data", {})
    others = [
        file
        for file in APP.rglob("*")
        if file.is_file() and file.suffix != ".py" and not NOT_OURS.intersection(file.parts)
    ]
    assert others
    left_out = [
        _name(file)
        for file in others
        if not any(
            PurePosixPath(file.name).match(pattern)
            for pattern in declared.get(".".join(file.relative_to(ROOT).parent.parts), ())
        )
    ]
    assert not left_out, "Name them in pyproject.toml under tool.setuptools.package-data."
