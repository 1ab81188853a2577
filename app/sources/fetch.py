"""Fetches from the hub: with progress, with a time-out, and refused in words. Knows no tasks."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from app.freezing.errors import InvalidDocument
from app.sources.libraries import chain, first_line, load_library
from app.sources.user_code import refuse_answer

REACH_SECONDS = 5.0
REPORT_SECONDS = 2.0
SAFE_FILES = ("model.safetensors", "model.safetensors.index.json")
PICKLE_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def ask_hub() -> None:
    """Find out once whether the hub answers; from then on only the cache is read where it does not.

    The libraries alone would try each file again and again, for half a minute.
    """
    hub = load_library("huggingface_hub")
    if hub.constants.HF_HUB_OFFLINE or _asked:
        return
    _asked.append(True)
    try:
        hub.get_session().head(hub.constants.ENDPOINT, timeout=REACH_SECONDS)
    except Exception as error:
        print(f"The hub cannot be reached, so only its cache is used ({first_line(error)}).")
        hub.constants.HF_HUB_OFFLINE = True


_asked: list[bool] = []


def fetch_weights(name: str, revision: str | None, *, allow_pickle: bool) -> None:
    """Bring a model's weights into the hub's cache, telling in the log how far it is.

    A folder, and a model of which the cache has everything, cost nothing.
    """
    if Path(name).is_dir():
        return
    hub = load_library("huggingface_hub")
    for file in SAFE_FILES + PICKLE_FILES * allow_pickle:
        try:
            path = hub.hf_hub_download(name, file, revision=revision, tqdm_class=SaidProgress)
        except hub.errors.EntryNotFoundError:  # LocalEntryNotFoundError too: it is not in the cache
            continue
        if file.endswith(".index.json"):
            shards = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values()
            for shard in sorted(set(shards)):
                hub.hf_hub_download(name, shard, revision=revision, tqdm_class=SaidProgress)
        return


class SaidProgress:
    """A download's progress as lines in the log, in the form of a tqdm bar."""

    def __init__(
        self, *_: Any, desc: str = "", total: int | None = None, initial: int = 0, **__: Any
    ) -> None:
        self.desc, self.total, self.n = desc.rpartition("/")[2], total, initial
        self._said_at = time.monotonic()

    def update(self, n: float | None = 1) -> None:
        self.n += int(n or 0)
        now = time.monotonic()
        if now - self._said_at >= REPORT_SECONDS:
            self._said_at = now
            self.say()

    def say(self) -> None:
        of = f" of {self.total / 1e6:,.1f} MB ({self.n / self.total:.0%})" if self.total else " MB"
        print(f"Downloading {self.desc or 'a file'}: {self.n / 1e6:,.1f}{of}", flush=True)

    def close(self) -> None:
        if self.n:
            self.say()

    def __enter__(self) -> SaidProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        """What else a bar can do shows nothing here: set_description, refresh, reset."""
        return lambda *_, **__: None


@contextlib.contextmanager
def in_words(name: str, revision: str | None) -> Iterator[None]:
    """Whatever Transformers raises on its way to a model, as one sentence."""
    try:
        yield
    except (InvalidDocument, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise refuse_answer(_explain(name, revision, error)) from error


def _explain(name: str, revision: str | None, error: Exception) -> str:
    causes = chain(error)
    kinds = {type(cause).__name__ for cause in causes}
    text = " ".join(str(cause) for cause in causes)
    where = f"{name} at revision {revision}" if revision else name
    if "trust_remote_code" in text:
        return f"{where} brings code of its own, which Frostline never runs; use another model."
    if "GatedRepoError" in kinds:
        return f"{where} is gated: ask for access on its page, then set HF_TOKEN and try again."
    if "RevisionNotFoundError" in kinds:
        return f"{name} has no revision {revision!r}."
    if "RepositoryNotFoundError" in kinds:
        return (
            f"There is no model {name} on the hub, or it is private and HF_TOKEN may not read it."
        )
    if "safetensors" in text and "no file named" in text:
        return (
            f"{where} has no model.safetensors. If it has a pickle file that you trust, say "
            "'allow_pickle': true; or say 'random_init': true to start without weights."
        )
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            return f"{name} has no config.json; an hf: folder is what save_pretrained() writes."
        return f"{name} cannot be loaded: {first_line(error)}"
    if kinds & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectTimeout",
                "ReadTimeout", "ConnectionError"} or "connect" in text:  # fmt: skip
        asked = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        why = "HF_HUB_OFFLINE is set" if asked else "the hub cannot be reached"
        return f"{where} is not in the cache and {why}; download it first, or name a folder."
    return f"{where} cannot be loaded: {first_line(error)}"
