"""Twenty rounds of the kill loop; `make kill-loop` plays two hundred."""

import random
from pathlib import Path

from tests.worker.kill_loop import KillLoop


def test_twenty_rounds_of_killing_lose_nothing(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"python -m tests.worker.kill_loop --rounds 20 --seed {seed}")
    KillLoop(tmp_path / "data", seed, rounds=20).run()
