"""How quickly jobs start, stop, die and are adopted: a real server, real workers, the demo network.

python -m benchmarks.jobs
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2

from tests.contract.path_driver import Script

ENDLESS = {"epochs": 10**6, "eval_every": 10**6, "checkpoint_every": 200}


def launch(script: Script, model: int, **training: Any) -> int:
    request = {"model_id": model, "config": {"rules": [{"action": "freeze", "match": "layer1.**"}]}}
    request |= {"dataset": {"uri": "demo:digits"}, "training": {**ENDLESS, **training}}
    return int(script.call("POST", "/jobs", 201, request)["id"])


def wait(script: Script, job: int, is_so: Callable[[dict[str, Any]], bool]) -> float:
    """Seconds until a job is as wanted, asked 100 times a second."""
    began = time.perf_counter()
    while not is_so(script.get(f"/jobs/{job}")):
        time.sleep(0.01)
    return time.perf_counter() - began


def stop(script: Script, job: int) -> float:
    script.call("POST", f"/jobs/{job}/stop", 202)
    return wait(script, job, lambda one: one["state"] == "stopped")


def main() -> None:
    """Print each figure beside what is promised."""
    with tempfile.TemporaryDirectory() as place:
        data_dir = Path(place) / "data"
        server, script = serve(data_dir)
        while not script.get("/health")["workers"]:
            time.sleep(0.05)
        model = script.add_model(uri="demo:digits")["id"]
        starts, stops, deaths = [], [], []
        for _ in range(10):
            job = launch(script, model)
            starts.append(wait(script, job, lambda one: one["step"] > 0))
            stops.append(stop(script, job))
        for _ in range(5):
            job = launch(script, model)
            wait(script, job, lambda one: one["step"] > 20)
            os.kill(script.get(f"/jobs/{job}")["worker_pid"], signal.SIGKILL)
            deaths.append(wait(script, job, lambda one: one["state"] == "interrupted"))
        tell("start to the first stored step", starts, "2 s")
        tell("stop", stops, "5 s")
        tell("a death is seen", deaths, "2 s")
        adopt(server, script, data_dir, model)


def serve(data_dir: Path) -> tuple[subprocess.Popen[str], Script]:
    """A server on a free port, once it answers."""
    settings = {"DATA_DIR": str(data_dir), "CPU_SLOTS": "3", "RESTART_SECONDS": "600"}
    server = subprocess.Popen(
        [sys.executable, "-m", "app", "serve", "--port", "0", "--no-open", "--stop-jobs"],
        env={**os.environ, **{f"FROSTLINE_{name}": value for name, value in settings.items()}},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    address = next(line.split()[1] for line in server.stdout if line.startswith("Open "))
    token = (data_dir / "token").read_text().strip()
    http = httpx2.Client(
        base_url=address.partition("/login")[0],
        headers={"Authorization": f"Bearer {token}"},
        timeout=60,
        trust_env=False,
    )
    return server, Script(http, server)  # type: ignore[arg-type]


def adopt(server: subprocess.Popen[str], script: Script, data_dir: Path, model: int) -> None:
    """Kill the server over three jobs, look at their step time meanwhile, and start another one."""
    jobs = [launch(script, model) for _ in range(3)]
    for job in jobs:
        wait(script, job, lambda one: one["step"] > 100)
    spools = [data_dir / "jobs" / str(job) / "attempts/1/telemetry.spool" for job in jobs]
    rates = [rate(spools)]
    server.kill()
    server.communicate()
    rates.append(rate(spools))
    began = time.perf_counter()
    server, script = serve(data_dir)
    seen = [script.get(f"/jobs/{job}")["step"] for job in jobs]
    for job, step in zip(jobs, seen, strict=True):
        wait(script, job, lambda one, step=step: one["step"] > step)  # type: ignore[misc]
    tell("three jobs adopted", [time.perf_counter() - began], "10 s, start of the server included")
    rates.append(rate(spools))
    shares = " / ".join(f"{one / rates[0]:.2f}" for one in rates)
    print(f"steps a second while served / without a server / adopted: {shares}")
    server.terminate()
    server.communicate()


def rate(spools: list[Path], seconds: float = 3.0) -> float:
    """Bytes that all workers record a second: the inverse of their step time."""
    before, began = sum(path.stat().st_size for path in spools), time.perf_counter()
    time.sleep(seconds)
    after = sum(path.stat().st_size for path in spools)
    return (after - before) / (time.perf_counter() - began)


def tell(what: str, seconds: list[float], promised: str) -> None:
    median, worst = statistics.median(seconds), max(seconds)
    counted = f"median {median:.2f} s, worst of {len(seconds)} {worst:.2f} s"
    print(f"{what:<32}{counted} (promised {promised})", flush=True)


if __name__ == "__main__":
    main()
