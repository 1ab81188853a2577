"""Imports libraries that not everybody has, or says in words why not. Knows no models."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Any

import torch

from app.sources.user_code import refuse_answer

HUB_TIMEOUT_SECONDS = "10"


def load_library(name: str) -> Any:
    """Import a library that not everybody has.

    Raises:
        InvalidDocument: it is absent or broken, with the command that installs it.
    """
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", HUB_TIMEOUT_SECONDS)  # read when imported
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", HUB_TIMEOUT_SECONDS)
    _hide_broken_torchvision()
    try:
        return importlib.import_module(name)
    except Exception as error:  # a build for another torch raises RuntimeError, not ImportError
        raise refuse_answer(_explain_import(name.partition(".")[0], error)) from error


_broken: dict[str, Exception] = {}


def _hide_broken_torchvision() -> None:
    """Let a torchvision that does not import count as absent.

    Transformers looks only whether it is installed, and then none of its vision models, nor any
    image processor, imports; without torchvision all of them do.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        _broken["torchvision"] = error
        for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # which find_spec respects
        print(_explain_import("torchvision", error))


def _explain_import(name: str, error: Exception) -> str:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    broken = _broken.get("torchvision")
    if broken is not None and name in ("timm", "torchvision"):
        return (
            f"{name} cannot be used: torchvision is installed but does not import "
            f"({first_line(chain(broken)[-1])}). Install the one for torch {torch.__version__}: "
            f"{_pip('torchvision', '--force-reinstall --no-deps')}"
        )
    if missing and missing.partition(".")[0] == name:
        return f"{name} is not installed in the worker's Python; install it with: {_pip(name)}"
    return (
        f"{name} is installed but does not import ({first_line(chain(error)[-1])}). "
        f"Install it again: {_pip(name, '--force-reinstall --no-deps')}"
    )


def _pip(name: str, options: str = "") -> str:
    """The command that installs a library into the worker's Python, torchvision to fit its torch.

    Since torch 2.0 and torchvision 0.15 the two count their minor versions side by side.
    """
    version, _, build = torch.__version__.partition("+")
    major, minor = version.split(".")[:2]
    if name == "torchvision" and major == "2":
        name = f"'torchvision==0.{int(minor) + 15}.*'"
        if build:
            options += f" --index-url https://download.pytorch.org/whl/{build}"
    return " ".join(filter(None, (sys.executable, "-m pip install", name, options.strip())))


def chain(error: BaseException) -> list[BaseException]:
    """An error and what caused it, the first cause last."""
    links = [error]
    while (link := links[-1].__cause__ or links[-1].__context__) and link not in links:
        links.append(link)
    return links


def first_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason")
    return f"{type(error).__name__}: {line[:300]}"
