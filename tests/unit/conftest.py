"""Fixtures for user code on disk."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def code_dir(tmp_path: Path) -> Iterator[Path]:
    """A folder for user code; what was imported from it is forgotten again afterwards."""
    paths, modules = list(sys.path), set(sys.modules)
    folder = tmp_path / "code"
    folder.mkdir()
    yield folder
    sys.path[:] = paths
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]
