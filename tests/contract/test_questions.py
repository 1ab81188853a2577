"""docs/questions.md: every command in it is run, and says what the page says that it says."""

import json
import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.test_cli import run, start

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "questions.md").read_text()
LEFT_OUT = "…"


def read_sessions() -> Iterator[tuple[str, list[str]]]:
    """Every command of the page with the lines that it shows of its output."""
    for block in re.findall(r"^```console\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL):
        for session in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *lines = session.splitlines()
            yield command, lines


SESSIONS = list(read_sessions())
COMMANDS = list(dict.fromkeys(command for command, _ in SESSIONS))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("questions")
    config = {
        "mechanism": "exclude",
        "rules": [{"action": "freeze", "match": "layer1"}],
    }
    (folder / "exclude.json").write_text(json.dumps(config))
    with start(folder, "serve", "--port", "0") as server:
        assert server.stdout is not None
        server.stdout.readline()
        yield folder
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=20)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_what_the_page_says(served: Path, command: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "frostline"
    output = [" ".join(line.split()) for line in run(served, *arguments).splitlines()]
    for lines in (lines for other, lines in SESSIONS if other == command):
        shown = "".join(line_pattern(line) for line in lines)
        told = "".join(f"{line}\n" for line in output)
        assert re.fullmatch(shown, told), f"{lines}\n---\n{told}"


def line_pattern(line: str) -> str:
    """A line of the page as an expression; one of nothing but … stands for any number of lines."""
    if line == LEFT_OUT:
        return r"(?:.*\n)*?"
    words = re.escape(" ".join(line.split()))
    return words.replace(re.escape(LEFT_OUT), ".*") + r"\n"


def test_every_question_has_a_command_and_every_test_it_names_is_there() -> None:
    for section in PAGE.split("\n## ")[1:]:
        assert "```console" in section or "```sh" in section, section.splitlines()[0]
    for path, name in re.findall(r"^pytest (\S+) -k (\w+)$", PAGE, flags=re.MULTILINE):
        assert f"def {name}(" in (ROOT / path).read_text()
