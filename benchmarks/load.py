"""The server under load: fifty pages of a running job, streams, aborted ones; then SIGTERM.

Two jobs train on both cores all the while. A page is played as static/live.js and the charts have
it: it hears of its job by a stream, asks for its parts at their paces, for charts only what is new,
and less often where answers take long.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx2
import psutil

from tests.contract.path_driver import TOKEN, Script, serving

PAGES, STREAMS, ABORTED = 50, 200, 1000
OPENING, SECONDS = 12.0, 20.0  # a page comes with everything; what is counted comes after that
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
# The parts of a page that hears of its job, and the seconds between two askings at least.
PARTS = {"/jobs/{job}/status": 0.5, "/api/jobs/{job}/metrics?points=600": 0.5,
         "/api/jobs/{job}/layers?stat=grad_norm&points=800&as=float32": 0.5, "/jobs/{job}/log": 1.5,
         "/jobs/{job}/side": 3.0}  # fmt: skip
PATIENCE = 20  # as in static/live.js


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
    # Connections are left before the server, after 5 s, would close them under a request.
    limits = httpx2.Limits(
        max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0
    )
    return httpx2.AsyncClient(
        base_url=str(script.http.base_url), headers=HEADERS, timeout=60, limits=limits,
        trust_env=False,
    )  # fmt: skip


async def _load(script: Script, jobs: list[int]) -> None:
    server = psutil.Process(script.process.pid)
    async with _client(script) as client:
        print(f"1 page: {_words(await _open_pages(client, jobs[:1]))}")
        many = await _open_pages(client, jobs * (PAGES // 2))
        print(f"{PAGES} pages: {_words(many)} (wanted: a median under 100 ms)")
    before = await _settle(server, (0, 0, 0))
    async with _client(script) as client:
        async with asyncio.TaskGroup() as group:
            ready = asyncio.Barrier(STREAMS + 1)
            held = [
                group.create_task(_hold_stream(client, jobs[n % 2], ready)) for n in range(STREAMS)
            ]
            await ready.wait()
            beside = await _open_pages(client, jobs[1:])
            memory = _footprint(server)[0]
            for task in held:
                task.cancel()
        print(f"1 page beside {STREAMS} streams: {_words(beside)}; {memory / 1e6:.0f} MB")
        for _ in range(0, ABORTED, 100):
            await asyncio.gather(*(_abort_stream(client, jobs[0]) for _ in range(100)))
        again = await _open_pages(client, jobs * (PAGES // 2))
        print(f"{PAGES} pages after {ABORTED} aborted streams: {_words(again)}")
    after = await _settle(server, before)
    print("of the server before the streams → after them and once more the pages:")
    print(f"  descriptors {before[1]} → {after[1]}, threads {before[2]} → {after[2]}")
    print(f"  memory {before[0] / 1e6:.0f} → {after[0] / 1e6:.0f} MB")


async def _open_pages(client: httpx2.AsyncClient, jobs: list[int]) -> list[float]:
    """Milliseconds of every request, from when all pages have been open for a while."""
    counted = time.perf_counter() + OPENING
    pages = [_open_page(client, job) for job in jobs]
    return [ms for page in await asyncio.gather(*pages) for begun, ms in page if begun > counted]


async def _open_page(client: httpx2.AsyncClient, job: int) -> list[tuple[float, float]]:
    """When each request of one page began, and the milliseconds that it took."""
    took: list[tuple[float, float]] = []
    news = asyncio.Condition()
    mean = 0.0

    async def ask(address: str) -> httpx2.Response:
        nonlocal mean
        begun = time.perf_counter()
        answer = await client.get(address)
        answer.raise_for_status()
        took.append((begun, 1000 * (time.perf_counter() - begun)))
        mean += (took[-1][1] - mean) / 12
        return answer

    async def hear() -> None:
        async with client.stream("GET", "/api/events?cursor=now") as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data") and f'"id":{job},' in line.replace(" ", ""):
                    async with news:
                        news.notify_all()

    async def keep(address: str, pace: float) -> None:
        newest = None
        while True:
            begun = time.perf_counter()
            since = f"&from={newest + 1}" if newest is not None and "?" in address else ""
            answer = await ask(address + since)
            if "?" in address:
                found = json.loads(answer.content.partition(b"\n")[0])
                ends = (
                    [s["steps"] for s in found.values()]
                    if "steps" not in found
                    else [found["steps"]]
                )
                newest = max([newest or 0, *(steps[-1] for steps in ends if steps)])
            await asyncio.sleep(begun + max(pace, PATIENCE * mean / 1000) - time.perf_counter())
            async with news:
                await news.wait()

    await ask(f"/jobs/{job}")
    tasks = [asyncio.create_task(hear())]
    tasks += [asyncio.create_task(keep(part.format(job=job), pace)) for part, pace in PARTS.items()]
    done, _ = await asyncio.wait(
        tasks, timeout=OPENING + SECONDS, return_when=asyncio.FIRST_COMPLETED
    )
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in done:
        task.result()  # raises what went wrong
    return took


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
    cut = statistics.quantiles(took, n=100)
    return (
        f"{len(took) / SECONDS:.0f} requests a second, median {statistics.median(took):.0f} ms, "
        f"p95 {cut[94]:.0f} ms"
    )


if __name__ == "__main__":
    main()
