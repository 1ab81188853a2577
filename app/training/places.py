"""Where checkpoints lie: their names in a folder, for who writes and who only lists. No torch."""

from __future__ import annotations

import re
from pathlib import Path


def checkpoint_path(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of the state after `step` lies, whether or not it exists."""
    return checkpoints / f"step-{step:09d}"


def checkpoint_steps(checkpoints: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first; none where there is no such folder.

    A checkpoint gets its name by one rename, so that what has one is complete.
    """
    try:
        names = [path.name for path in checkpoints.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = (re.fullmatch(r"step-(\d{9,15})", name) for name in names)
    return sorted(int(match[1]) for match in found if match)
