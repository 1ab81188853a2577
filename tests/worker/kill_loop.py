"""The kill loop: servers, workers and keepers die at random moments, and nothing may be lost.

    python -m tests.worker.kill_loop --rounds 200 --seed 1

Three jobs train (a script, without torch) while in every round a die says who is killed or what is
asked for. In the end every job is let go on until it succeeds, and `history` checks the folder.
"""

import argparse
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from app.jobs import folder as job_folder
from tests.worker.history import ENDED, History, read_attempts, replay
from tests.worker.scripted import loss_at
from tests.worker.servers import ServerProcess, find_keeper, kill_everybody

JOBS = 3
DEEDS = {
    "kill a worker": 6,
    "kill the server": 5,
    "kill the keeper": 1,
    "kill all": 1,
    "stop": 2,
    "hold": 1,
    "release": 1,
    "resume": 4,
    "nothing": 2,
}


class KillLoop:
    """Rounds of killing on one data folder.

    Args:
        steps: of each job; long enough that none comes to its end while there are rounds left.
    """

    def __init__(self, data_dir: Path, seed: int, rounds: int) -> None:
        self.dice = random.Random(seed)
        self.steps = 150 + 12 * rounds
        self.rounds = rounds
        self.history = History(data_dir)
        self.data_dir = data_dir
        self.done: Counter[str] = Counter()
        self.acknowledged: dict[int, int] = {}
        self.server = ServerProcess(data_dir, RESTART_SECONDS="0.05", MIN_FREE_BYTES="0")

    def run(self) -> None:
        """All rounds, then to the end of every job, then the check."""
        try:
            script = [["train", self.steps, 10, 0.002]]
            self.jobs = [self.server.launch(script) for _ in range(JOBS)]
            for _ in range(self.rounds):
                threading.Event().wait(self.dice.uniform(0, 0.25))
                (deed,) = self.dice.choices(list(DEEDS), list(DEEDS.values()))
                self.do(deed)
                self.done[deed] += 1
                self.history.look()
            self.finish()
            self.history.check_end()
            self.check_nothing_lost()
        finally:
            self.server.process.kill()
            self.server._reap()
            kill_everybody(self.data_dir)

    def do(self, deed: str) -> None:
        job = self.dice.choice(self.jobs)
        match deed:
            case "kill a worker":
                self.kill_worker(job)
            case "kill the server":
                self.restart_server()
            case "kill the keeper":
                self.kill_keeper()
            case "kill all":
                for one in self.jobs:
                    self.kill_worker(one)
                self.kill_keeper()
                self.restart_server()
            case "stop":
                self.server.ask("stop_job", job)
            case "hold" | "release":
                self.server.ask("pause_job", job, deed)
            case "resume":
                for one in self.jobs:
                    self.server.ask("resume_job", one)

    def restart_server(self) -> None:
        for job in self.jobs:  # what a reader has been told must be there for good
            told = self.server.ask("get_job", job)
            self.acknowledged[job] = max(self.acknowledged.get(job, 0), told["step"])
        self.server.kill()
        threading.Event().wait(self.dice.uniform(0, 0.1))
        self.server.start()

    def kill_worker(self, job: int) -> None:
        newest = job_folder.newest_attempt(self.data_dir / "jobs" / str(job))
        holder = job_folder.read_holder(newest) if newest is not None else None
        if newest is not None and holder is not None and job_folder.is_held(newest):
            os.kill(holder.pid, signal.SIGKILL)

    def kill_keeper(self) -> None:
        keeper = find_keeper(self.data_dir)
        if keeper is not None:
            os.kill(keeper, signal.SIGKILL)

    def finish(self) -> None:
        """Let every job go on until it has succeeded."""
        deadline = time.monotonic() + 120 + self.rounds
        waiting = list(self.jobs)
        between_looks = threading.Event()
        while waiting:
            for job in list(waiting):
                document: dict[str, Any] = self.server.ask("get_job", job)
                assert time.monotonic() < deadline, document
                if document["state"] == "succeeded":
                    waiting.remove(job)
                elif document["state"] in (*ENDED, "paused"):
                    self.server.ask("resume_job", job)
            between_looks.wait(0.05)

    def check_nothing_lost(self) -> None:
        """Each step stands there once, with the value that it has in a run without any death."""
        for job in self.jobs:
            folder = self.data_dir / "jobs" / str(job)
            metrics, layers = replay(folder)
            every_step = range(1, self.steps + 1)
            assert metrics == {("loss", step): loss_at(step) for step in every_step}
            assert layers == set(every_step)
            reached = [
                record.payload["step"]
                for records in read_attempts(folder).values()
                for record in records
                if record.kind == "metrics"
            ]
            assert max(reached) >= self.acknowledged.get(job, 0)


def main() -> None:
    """Run it, and say with which seed."""
    parser = argparse.ArgumentParser(prog="python -m tests.worker.kill_loop")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}, {arguments.rounds} rounds", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        loop = KillLoop(Path(folder) / "data", arguments.seed, arguments.rounds)
        loop.run()
        attempts = [len(read_attempts(loop.data_dir / "jobs" / str(job))) for job in loop.jobs]
    deeds = ", ".join(f"{deed} {count}" for deed, count in sorted(loop.done.items()))
    print(f"{deeds}; attempts {attempts}; {loop.steps} steps each; nothing lost, doubled or left")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
