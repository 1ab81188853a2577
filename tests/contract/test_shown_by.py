"""Pages that say which test shows what: every row names one, and it is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"truths.md": 31, "reliability.md": 18}  # with as many rows at least
TESTS = {file: file.read_text("utf-8") for file in (ROOT / "tests").rglob("*.py")}
NAMES = set(re.findall(r"^def (test_\w+)\(", "\n".join(TESTS.values()), flags=re.MULTILINE))
FILES = {file.name for file in TESTS}


def read_rows(page: str) -> list[list[str]]:
    """The cells of every row below a heading that ends in "shown by"."""
    rows: list[list[str]] = []
    is_shown = False
    for line in (ROOT / "docs" / page).read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|"):
            is_shown = False
        elif is_shown and not set(line) <= set("|- "):
            rows.append(cells)
        else:
            is_shown = is_shown or cells[-1].rstrip(" |") == "shown by"
    return rows


@pytest.mark.parametrize("page", PAGES)
def test_every_row_names_a_test_that_is_there(page: str) -> None:
    rows = read_rows(page)
    assert len(rows) >= PAGES[page]
    for said, *_, shown in rows:
        named = re.findall(r"`(test_\w+(?:\.py)?)`", shown)
        assert [name for name in named if not name.endswith(".py")], said
        assert set(named) <= NAMES | FILES, said
