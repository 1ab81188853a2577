"""The demo table: one of its jobs through the shipped loop."""

import pytest

from app.sources.demo.table import FREEZE_SETS, TASKS, measure_accuracies


@pytest.mark.parametrize("task", TASKS)
def test_a_job_of_the_table_gives_every_column_before_and_after(task: str) -> None:
    before, after = measure_accuracies(task, FREEZE_SETS["nothing"], seed=0)
    assert list(before) == list(after) == list(TASKS[task])
    assert after["eval"] > before["eval"] + 0.2
    if task == "digits":  # what was known is partly forgotten for what is new
        assert after["known"] < before["known"]
        assert after["new"] > before["new"] == 0
