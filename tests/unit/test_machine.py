"""What is said of the machine: of workers, queue, disk and database, in words."""

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from app.jobs.devices import find_devices, find_kernels
from app.store import damage
from app.store.files import remove_folder
from tests.worker.silly_house import House


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path, min_free_bytes=0)
    made.add_model()
    yield made
    made.db.close()


def found(house: House) -> dict[str, tuple[bool, str]]:
    report: dict[str, Any] = house.service.system_report()
    return {one["subject"]: (one["is_well"], one["words"]) for one in report["findings"]}


def test_a_quiet_machine_is_well(house: House) -> None:
    house.tick()
    assert all(is_well for is_well, _ in found(house).values())
    assert found(house)["queue"][1] == "0 jobs running, nobody waits."


def test_who_runs_who_waits_and_for_what(house: House) -> None:
    house.tick()
    for _ in range(2):
        house.launch()
    house.tick()
    house.tick()
    report = house.service.system_report()
    assert [(one["id"], one["device"]) for one in report["running"]] == [(1, "cpu")]
    assert [one["id"] for one in report["queue"]] == [2]
    assert (
        "Next is job 2: It waits for cpu, where job 1 must end first." in found(house)["queue"][1]
    )
    assert report["devices"][0]["jobs"] == [1]


def test_what_is_wrong_is_said(house: House) -> None:
    house.tick()
    damage.marker_of(house.db.path).write_text("malformed")
    is_well, words = found(house)["database"]
    assert (is_well, "Restart the server" in words) == (False, True)
    damage.marker_of(house.db.path).unlink()


def test_a_disk_that_is_too_full_starts_nothing_and_says_so(tmp_path: Path) -> None:
    house = House(tmp_path, min_free_bytes=10**18)
    house.add_model()
    house.tick()
    house.launch()
    house.tick()
    assert house.keeper.started == []
    assert house.job()["waiting_for"].startswith(f"The disk of {tmp_path} is full")
    is_well, words = found(house)["disk"]
    assert (is_well, "No job starts below" in words) == (False, True)
    house.db.close()


def test_where_the_space_went(house: House) -> None:
    house.tick()
    house.launch()
    house.tick()
    folder = house.directory().parents[1]
    checkpoint = folder / "checkpoints" / "step-000000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(bytes(5000))
    (house.settings.data_dir / "frostline.db.v0001_first").write_bytes(bytes(700))
    space = house.service.system_report()["space"]
    (largest,) = space["largest"]
    assert (largest["checkpoints"], largest["checkpoint_bytes"]) == (1, 5000)
    assert largest["bytes"] > 5000
    assert [(one["name"], one["bytes"]) for one in space["copies"]] == [
        ("frostline.db.v0001_first", 700)
    ]


def test_a_folder_that_goes_while_space_is_counted_is_no_fault(house: House) -> None:
    house.tick()
    job, is_over = house.settings.data_dir / "jobs" / "7", threading.Event()

    def come_and_go() -> None:
        while not is_over.is_set():
            (job / "attempts" / "1" / "deeper").mkdir(parents=True)
            (job / "attempts" / "1" / "deeper" / "log.txt").touch()
            (job / "checkpoints" / "step-000000001").mkdir(parents=True)
            remove_folder(job)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(300):
            assert house.service.system_report()["space"]["jobs_bytes"] == 0
    finally:
        is_over.set()
        thread.join()


@pytest.mark.parametrize(
    ("capability", "kernels"),
    [((8, 9), "cuda"), ((9, 0), "hopper"), ((12, 0), "hopper"), (None, "cuda")],
)
def test_a_gpu_is_known_by_what_its_driver_tells(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, kernels: str
) -> None:
    """A part of a GPU has no capability of its own, and is there all the same."""

    def tell(_: object) -> tuple[int, int]:
        if capability is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return capability

    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=2**34),
        "nvmlDeviceGetName": lambda _: "silly GPU",
        "nvmlDeviceGetCudaComputeCapability": tell,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cpu, gpu = find_devices()
    assert (gpu.id, gpu.memory_bytes, gpu.kernels) == ("cuda:0", 2**34, kernels)
    assert find_kernels([cpu, gpu]) == kernels
    assert find_kernels([cpu]) == "cpu"
