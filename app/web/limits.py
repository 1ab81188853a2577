"""How often and how many: failed logins in a minute, event streams at once. In memory only."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from fastapi import HTTPException

FAILED_LOGINS = 10
WINDOW_S = 60.0
# A browser uses one stream for all its tabs; far more than this is a loop that forgets to close.
STREAMS = 512


class FailedLogins:
    """Counts failures by where they come from; a success forgets them.

    Only links and sessions are counted: a wrong bearer token stays a 401, because every script on
    this machine comes from one address, and a forgotten one must not lock the others out.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._failures: dict[str, deque[float]] = {}

    def check(self, client: str) -> None:
        """Raises HTTPException (429) where too many failed within the last minute."""
        self._forget_old()
        failures = self._failures.get(client)
        if failures and len(failures) >= FAILED_LOGINS:
            wait = max(1, round(failures[0] + WINDOW_S - self._clock()))
            raise HTTPException(
                429,
                f"Too many failed logins from this address. Wait {wait} s, then open a fresh link "
                "('frostline link' prints one).",
                {"Retry-After": str(wait)},
            )

    def add(self, client: str) -> None:
        self._failures.setdefault(client, deque(maxlen=FAILED_LOGINS)).append(self._clock())

    def forget(self, client: str) -> None:
        self._failures.pop(client, None)

    def _forget_old(self) -> None:
        oldest = self._clock() - WINDOW_S
        for client, failures in list(self._failures.items()):
            while failures and failures[0] <= oldest:
                failures.popleft()
            if not failures:
                del self._failures[client]


class OpenStreams:
    """Counts the event streams that are open."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def one_more(self) -> Iterator[None]:
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1

    def check(self) -> None:
        """Raises HTTPException (429) where another one would be too many."""
        if self.count >= STREAMS:
            raise HTTPException(
                429,
                f"{STREAMS} event streams are open already; close some and try again.",
                {"Retry-After": "5"},
            )
