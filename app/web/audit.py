"""The audit log: who asked for which change, and the answer; never a body, never a secret."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

from starlette.types import Scope

FILE_BYTES = 1 << 20
OLD_FILES = 4


class AuditLog:
    """Lines of JSON in ``audit.log`` of the data folder, readable by its owner alone."""

    def __init__(self, path: Path) -> None:
        self._handler = _PrivateFile(
            path, maxBytes=FILE_BYTES, backupCount=OLD_FILES, encoding="utf-8", delay=True
        )

    def write(self, scope: Scope, status: int) -> None:
        """One request answered with `status`; its query is left out: a link may stand in it."""
        client = scope.get("client")
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "who": scope.get("state", {}).get("who", "nobody"),
            "from": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
        }
        text = json.dumps(line)
        self._handler.emit(logging.LogRecord("audit", logging.INFO, "", 0, text, None, None))

    def close(self) -> None:
        self._handler.close()


class _PrivateFile(RotatingFileHandler):
    def _open(self) -> TextIOWrapper:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        return open(os.open(self.baseFilename, flags, 0o600), "a", encoding="utf-8")  # noqa: PTH123
