"""The tree of app/ as README.md shows it: one line a file, with the caption of its docstring.

``python -m tests.contract.house`` prints the block to paste between README's two markers.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
APP = ROOT / "app"
BEGIN, END = "<!-- tree -->", "<!-- /tree -->"


def code_files(folder: Path = APP) -> list[Path]:
    """Every Python file below a folder, in the order of the tree: a folder's files come first."""
    entries = sorted(folder.iterdir())
    files = [entry for entry in entries if entry.suffix == ".py"]
    folders = [entry for entry in entries if entry.is_dir()]
    return files + [file for inner in folders for file in code_files(inner)]


def caption(file: Path) -> str:
    """The first line of a file's docstring; empty where it has none."""
    docstring = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
    return docstring.partition("\n")[0]


def draw_tree() -> Iterator[str]:
    """Folders, and one line a file: ``name.py  caption``."""
    seen: set[Path] = set()
    for file in code_files():
        place = file.relative_to(ROOT)
        for folder in reversed(place.parents[:-1]):
            if folder not in seen:
                yield f"{'  ' * (len(folder.parts) - 1)}{folder.name}/"
                seen.add(folder)
        yield f"{'  ' * (len(place.parts) - 1)}{place.name}  {caption(file)}"


def tree_block() -> str:
    """What stands in README.md, with the markers around it."""
    return "\n".join([BEGIN, "```text", *draw_tree(), "```", END])


if __name__ == "__main__":
    print(tree_block())
