"""The server under load: many readers, streams, aborted ones, two jobs; then SIGTERM."""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import psutil

from tests.contract.path_driver import TOKEN, Script, serving

READERS, STREAMS, ABORTED = 50, 200, 1000
SECONDS = 20.0
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
# What a page of a running job asks for, over and over.
ASKED = ("/jobs/{job}", "/api/jobs/{job}", "/api/jobs/{job}/metrics?points=800",
         "/api/jobs/{job}/layers?stat=grad_norm&points=800", "/api/jobs/{job}/proof")  # fmt: skip


def main() -> None:
    """Print each figure beside what is wanted of it."""
    with tempfile.TemporaryDirectory(prefix="frostline-load-") as folder:
        data_dir = Path(folder) / "data"
        data_dir.mkdir()
        with serving(data_dir, CPU_SLOTS="2") as script:
            model = script.add_model(uri="demo:digits")["id"]
            jobs = [_launch(script, model) for _ in range(2)]
            asyncio.run(_load(script, jobs))
            took = asyncio.run(_end_with_streams(script))
    print(f"SIGTERM with {STREAMS} streams open: ended after {took:.1f} s (wanted: within 5)")


def _launch(script: Script, model: int) -> int:
    spec = {"model_id": model, "config": {}, "dataset": {"uri": "demo:digits"}}
    training = {"epochs": 10**6, "eval_every": 10**6, "device": "cpu"}
    job: int = script.call("POST", "/jobs", 201, {**spec, "training": training})["id"]
    script.until(f"/jobs/{job}", lambda job: job["state"] == "running" and job["step"] > 20)
    return job


def _client(script: Script) -> httpx2.AsyncClient:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx2.AsyncClient(
        base_url=str(script.http.base_url), headers=HEADERS, timeout=60, limits=limits,
        trust_env=False,
    )  # fmt: skip


async def _load(script: Script, jobs: list[int]) -> None:
    server = psutil.Process(script.process.pid)
    async with _client(script) as client:
        await _read(client, jobs[0], 2.0)  # warm: caches, threads, statements
    before = _footprint(server)
    async with _client(script) as client:
        alone = await _read(client, jobs[0], 5.0)
        print(f"1 reader, 2 jobs training: {_words(alone)} (wanted: median under 100 ms)")
        many = await _together([lambda: _read(client, jobs[0], SECONDS)] * READERS)
        print(f"{READERS} readers: {_words(many)}")
        async with asyncio.TaskGroup() as group:
            ready = asyncio.Barrier(STREAMS + 1)
            held = [
                group.create_task(_hold_stream(client, jobs[n % 2], ready)) for n in range(STREAMS)
            ]
            await ready.wait()
            open_now = _footprint(server)
            beside = await _read(client, jobs[1], 5.0)
            for task in held:
                task.cancel()
        print(f"{STREAMS} streams open: {_words(beside)}; server {open_now[0] / 1e6:.0f} MB")
        for start in range(0, ABORTED, 100):
            await asyncio.gather(*(_abort_stream(client, jobs[0]) for _ in range(100)))
            print(f"\r{start + 100} streams aborted", end="", file=sys.stderr)
        print(file=sys.stderr)
    after = await _settle(server, before)
    print(f"after {STREAMS} streams and {ABORTED} aborted ones, before → after:")
    print(f"  descriptors {before[1]} → {after[1]}, threads {before[2]} → {after[2]}")
    print(f"  memory {before[0] / 1e6:.0f} → {after[0] / 1e6:.0f} MB")


async def _read(client: httpx2.AsyncClient, job: int, seconds: float) -> list[float]:
    """Milliseconds of each request that one reader makes in that time, one after another."""
    took, until = [], time.perf_counter() + seconds
    while (begun := time.perf_counter()) < until:
        answer = await client.get(ASKED[len(took) % len(ASKED)].format(job=job))
        answer.raise_for_status()
        took.append(1000 * (time.perf_counter() - begun))
    return took


async def _together(acts: list[Callable[[], Awaitable[list[float]]]]) -> list[float]:
    return [value for values in await asyncio.gather(*(act() for act in acts)) for value in values]


async def _hold_stream(client: httpx2.AsyncClient, job: int, ready: asyncio.Barrier) -> None:
    async with client.stream("GET", f"/api/jobs/{job}/events?cursor=now") as answer:
        answer.raise_for_status()
        await ready.wait()
        async for _ in answer.aiter_lines():
            pass


async def _abort_stream(client: httpx2.AsyncClient, job: int) -> None:
    async with client.stream("GET", f"/api/jobs/{job}/events?cursor=now") as answer:
        answer.raise_for_status()


async def _settle(server: psutil.Process, before: tuple[int, int, int]) -> tuple[int, int, int]:
    """The footprint once descriptors are back where they were, or after ten seconds."""
    for _ in range(100):
        after = _footprint(server)
        if after[1] <= before[1]:
            break
        await asyncio.sleep(0.1)
    return after


async def _end_with_streams(script: Script) -> float:
    """Seconds from SIGTERM until the process is gone, with every stream still open."""
    for running in script.get("/jobs"):
        script.call("POST", f"/jobs/{running['id']}/stop", 202)
        script.until_ended(running["id"])
    async with _client(script) as client, asyncio.TaskGroup() as group:
        ready = asyncio.Barrier(STREAMS + 1)
        for _ in range(STREAMS):
            group.create_task(_hold_all(client, ready))
        await ready.wait()
        begun = time.perf_counter()
        script.process.terminate()
        await asyncio.to_thread(script.process.wait, 60)
        return time.perf_counter() - begun


async def _hold_all(client: httpx2.AsyncClient, ready: asyncio.Barrier) -> None:
    async with client.stream("GET", "/api/events?cursor=now") as answer:
        answer.raise_for_status()
        await ready.wait()
        try:
            async for _ in answer.aiter_lines():
                pass
        except httpx2.HTTPError as error:
            print(f"a stream was cut: {error!r}", file=sys.stderr)


def _footprint(server: psutil.Process) -> tuple[int, int, int]:
    """Resident bytes, descriptors, threads."""
    return server.memory_info().rss, server.num_fds(), server.num_threads()


def _words(took: list[float]) -> str:
    cut: list[Any] = statistics.quantiles(took, n=100)
    return f"{len(took)} requests, median {statistics.median(took):.0f} ms, p95 {cut[94]:.0f} ms"


if __name__ == "__main__":
    main()
