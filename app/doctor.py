"""Examines an installation: what is there, which devices, what is wrong, in words."""

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from app import __version__
from app.safety import examine_safety
from app.settings import Settings
from app.store.damage import find_damage
from app.store.lock import read_holder

Finding = tuple[bool, str]


def examine(settings: Settings) -> Iterator[tuple[str, Finding]]:
    """Each thing by its name: whether it is well, and what there is to say."""
    yield "frostline", (True, f"{__version__}, Python {sys.version.split()[0]} ({sys.executable})")
    for package in ("torch", "numpy", "safetensors", "fastapi", "sqlmodel"):
        try:
            yield package, (True, version(package))
        except PackageNotFoundError:
            yield package, (False, f"is not installed: pip install {package}")
    yield "sqlite", (sqlite3.sqlite_version_info >= (3, 35), sqlite3.sqlite_version)
    yield "jobs run in", _examine_interpreter(settings.worker_python or Path(sys.executable))
    yield "data folder", _examine_data_folder(settings.data_dir)
    for kind, folders in (("code", settings.code_dirs), ("file", settings.file_dirs)):
        for folder in folders:
            there = folder.is_dir()
            yield f"{kind} folder", (there, str(folder) if there else f"{folder} does not exist")
    yield "database", _examine_database(settings.data_dir / "frostline.db")
    nearest = next(p for p in (settings.data_dir, *settings.data_dir.parents) if p.exists())
    free = shutil.disk_usage(nearest).free
    words = f"{free / 1e9:,.1f} GB free where the data folder lies"
    if free < 10 * settings.min_free_bytes:
        words += f"; no job starts below {settings.min_free_bytes / 1e6:,.0f} MB"
    yield "disk", (free >= 10 * settings.min_free_bytes, words)
    free_memory = psutil.virtual_memory().available
    words = f"{free_memory / 1e9:,.1f} GB available; a worker needs about 0.5 GB before any model"
    yield "memory", (free_memory > 1 << 30, words)
    yield from examine_safety(settings)


EXAMINATION = """
import importlib, sys
import torch
for name in ("numpy", "safetensors"):
    importlib.import_module(name)
names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
found = f"and finds {', '.join(names)}" if names else "and finds no GPU: jobs run on the CPU"
print(f"has torch {torch.__version__} on Python {sys.version.split()[0]} {found}")
"""


def _examine_interpreter(python: Path) -> Finding:
    try:
        done = subprocess.run(  # noqa: S603
            [python, "-c", EXAMINATION], capture_output=True, text=True, timeout=120, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, f"{python} does not run: {error}"
    if done.returncode != 0:
        last = (done.stderr.strip() or "it failed without a word").splitlines()[-1]
        return False, f"{python} cannot run jobs: {last}"
    return True, f"{python} {done.stdout.strip()}"


def _examine_database(path: Path) -> Finding:
    """Every page of the file is looked at, however long that takes."""
    if not path.exists():
        return True, "not there yet"
    try:
        damage = find_damage(path, is_thorough=True)
    except sqlite3.Error as error:
        return False, f"{path} cannot be read: {error}"
    if damage is not None:
        return False, f"{path} is damaged ({damage}); restart the server, which rebuilds it"
    return True, f"{path}: well, {path.stat().st_size / 1e6:,.1f} MB"


def _examine_data_folder(folder: Path) -> Finding:
    if not folder.exists():
        return True, f"{folder}: not there yet, the first start makes it"
    if not os.access(folder, os.W_OK | os.X_OK):
        return False, f"{folder}: this user may not write there"
    holder = read_holder(folder)
    if holder is None:
        return True, f"{folder}; no server runs on it"
    return True, f"{folder}; process {holder.pid} serves it at {holder.address}"
