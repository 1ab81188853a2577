"""The soak: a real server under jobs that start and stop and pages that are polled; nothing grows.

    python -m tests.worker.soak --minutes 60

It prints a line a minute: resident memory, descriptors and threads of the server and of the keeper,
bytes of the database's journal, and how often "database is locked" was said. In the end the last
quarter is compared with the second one: what still grows by more than a tenth fails.
"""

import argparse
import random
import statistics
import tempfile
import threading
import time
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import psutil

from tests.contract.path_driver import ENDED, Script, serving
from tests.worker import scripted
from tests.worker.servers import find_keeper

PAGES = ("/", "/jobs", "/compare", "/system", "/configs", "/jobs/{job}", "/models/{model}")
READS = ("", "/metrics?points=500", "/layers?points=200", "/proof", "/checkpoints", "/log")
SLACK = {"server_mb": 10.0, "keeper_mb": 10.0, "descriptors": 12, "threads": 4, "wal_mb": 8.0}


@dataclass(frozen=True)
class Sample:
    """What the server and its keeper take at one moment."""

    server_mb: float
    keeper_mb: float
    descriptors: float
    threads: float
    wal_mb: float


def take_sample(script: Script, data_dir: Path) -> Sample:
    server, keeper_pid = psutil.Process(script.process.pid), find_keeper(data_dir)
    keeper = psutil.Process(keeper_pid) if keeper_pid else None
    wal = data_dir / "frostline.db-wal"
    return Sample(
        server.memory_info().rss / 2**20,
        keeper.memory_info().rss / 2**20 if keeper else 0.0,
        server.num_fds() + (keeper.num_fds() if keeper else 0),
        server.num_threads() + (keeper.num_threads() if keeper else 0),
        wal.stat().st_size / 2**20 if wal.exists() else 0.0,
    )


class Soak:
    """Three users at once: one starts and stops jobs, one polls pages, one reads numbers."""

    def __init__(self, script: Script, seed: int) -> None:
        self.script, self.dice = script, random.Random(seed)
        self.stop = threading.Event()
        self.failures: list[str] = []
        self.count = {"jobs": 0, "requests": 0}
        kwargs = {"script": [["train", 400, 50, 0.005]]}
        self.model = script.add_model(uri=scripted.URI, kwargs=kwargs)
        self.jobs: list[int] = []
        self.start_job()

    def start_job(self) -> None:
        request = {"model_id": self.model["id"], "config": {"rules": []}}
        request["dataset"] = {"uri": "demo:digits"}
        self.jobs.append(self.script.call("POST", "/jobs", 201, request)["id"])
        self.count["jobs"] += 1

    def run_jobs(self) -> None:
        """Start, stop, hold, resume and in the end delete: thirty jobs are there at most."""
        while not self.stop.wait(self.dice.uniform(0.2, 1.5)):
            live = [job for job in self.script.get("/jobs") if job["state"] not in ENDED]
            if len(live) < 4:
                self.start_job()
            elif live:
                verb = self.dice.choice(("stop", "pause", "resume"))
                self.script.http.post(f"/api/jobs/{self.dice.choice(live)['id']}/{verb}")
            if len(self.jobs) > 30:
                answer = self.script.http.delete(f"/api/jobs/{self.jobs[0]}")
                if answer.status_code == 204:
                    self.jobs.pop(0)
                else:
                    self.script.http.post(f"/api/jobs/{self.jobs[0]}/stop")

    def poll_pages(self) -> None:
        while not self.stop.wait(0.1):
            path = self.dice.choice(PAGES).format(job=self.jobs[-1], model=self.model["id"])
            self.ask(path)

    def poll_numbers(self) -> None:
        while not self.stop.wait(0.05):
            self.ask(f"/api/jobs/{self.dice.choice(self.jobs)}{self.dice.choice(READS)}")

    def ask(self, path: str) -> None:
        answer = self.script.http.get(path)
        self.count["requests"] += 1
        if answer.status_code >= 500:
            self.failures.append(f"{path}: {answer.status_code} {answer.text[:200]}")

    def guard(self, part: Any) -> None:
        try:
            part()
        except Exception as error:  # told at the end, with all others
            self.failures.append(f"{part.__name__}: {error!r}")


def judge(samples: list[Sample]) -> list[str]:
    """What has grown from the second quarter to the last one."""
    quarter = max(1, len(samples) // 4)
    grown = []
    for field in fields(Sample):
        before, after = (
            statistics.median(getattr(sample, field.name) for sample in part)
            for part in (samples[quarter : 2 * quarter] or samples, samples[-quarter:])
        )
        if after > 1.1 * before + SLACK[field.name]:
            grown.append(f"{field.name} grew from {before:.1f} to {after:.1f}")
    return grown


def main() -> None:
    """Soak, print, judge; exit status 1 where something grew or went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.worker.soak")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}, {arguments.minutes:g} minutes", flush=True)
    with tempfile.TemporaryDirectory() as place:
        data_dir = Path(place) / "data"
        variables = {
            "CODE_DIRS": str(Path(scripted.__file__).parent),
            "WORKER_PYTHON": str(scripted.write_shim(Path(place))),
            "CPU_SLOTS": "3",
        }
        with serving(data_dir, **variables) as script:
            soak = Soak(script, arguments.seed)
            parts = (soak.run_jobs, soak.poll_pages, soak.poll_numbers)
            threads = [threading.Thread(target=soak.guard, args=(part,)) for part in parts]
            for thread in threads:
                thread.start()
            samples = watch(script, data_dir, arguments.minutes * 60)
            soak.stop.set()
            for thread in threads:
                thread.join()
            said = data_dir.with_name("data.out").read_text()
        locked = said.count("database is locked")
        faults = [*judge(samples), *soak.failures[:5]]
        if locked:
            faults.append(f'"database is locked" {locked} times')
        print(f"{soak.count['jobs']} jobs, {soak.count['requests']} requests; locked {locked}")
    print("\n".join(faults) or "nothing grew, nothing failed")
    raise SystemExit(bool(faults))


def watch(script: Script, data_dir: Path, seconds: float) -> list[Sample]:
    """A sample each five seconds, a line each minute."""
    until, samples, between = time.monotonic() + seconds, [], threading.Event()
    print("  ".join(field.name for field in fields(Sample)), flush=True)
    while time.monotonic() < until:
        samples.append(take_sample(script, data_dir))
        if len(samples) % 12 == 1:
            print("  ".join(f"{value:.1f}" for value in astuple(samples[-1])), flush=True)
        between.wait(5)
    return samples


if __name__ == "__main__":
    main()
