"""The service's verbs: what they refuse in words, what they keep, and the stream of news."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import Session

from app.freezing.errors import InvalidDocument
from app.freezing.graph import ModelGraph, Module, Parameter
from app.jobs import folder as job_folder
from app.jobs.spool import Record
from app.service import Conflict, NotFound, Service
from app.service.news import STEPS_A_CALL
from app.settings import Settings
from app.store import jobs, samples
from app.store.db import Database
from app.store.tables import Attempt, Job, Model, Task
from app.training.places import checkpoint_path

NAMES = ("body.weight", "body.bias", "head.weight")
GRAPH = ModelGraph(
    modules=(
        Module("", "Net", 0),
        Module("body", "Linear", 1, NAMES[:2]),
        Module("head", "Linear", 1, NAMES[2:]),
    ),
    parameters=tuple(Parameter(name, (2,), "float32", 2, 8, True, True) for name in NAMES),
)
FREEZE_BODY = {"rules": [{"action": "freeze", "match": "body"}]}


@dataclass
class Quiet:
    """A runner that runs nothing on one CPU, and counts how often it was woken."""

    wakes: list[None] = field(default_factory=list)

    def devices(self) -> list[dict[str, Any]]:
        return [{"id": "cpu", "name": "silly", "kind": "cpu", "bytes": 2**30, "busy": False}]

    def kernels(self) -> str:
        return "cpu"

    def slots(self) -> dict[str, dict[str, int]]:
        return {kind: {"total": kind != "cuda", "busy": 0} for kind in ("cpu", "cuda", "tasks")}

    def keeper(self) -> dict[str, Any]:
        return {"ready": True, "error": None, "pid": 7}

    def measure_devices(self) -> dict[str, dict[str, Any]]:
        return {"cpu": {"bytes_used": 2**20, "utilization": 3.0}}

    def usage(self) -> dict[int, dict[str, int | None]]:
        return {}

    def troubles(self) -> dict[str, str]:
        return {}

    def wake(self) -> None:
        self.wakes.append(None)


@dataclass
class Desk:
    """A service with its store, and the moves that a runner would make."""

    service: Service
    db: Database
    data_dir: Path

    def launch(self, **more: Any) -> int:
        document = {"model_id": 1, "config": FREEZE_BODY, "dataset": {"uri": "demo:digits"}}
        return int(self.service.launch_job({**document, **more})["id"])

    def begin(self, job_id: int, resume_step: int | None = None) -> Attempt:
        def begin(session: Session) -> Attempt:
            job = session.get_one(Job, job_id)
            attempt = jobs.start_attempt(session, job, "cpu", resume_step)
            assert attempt is not None
            assert jobs.move_job(session, job, "running")
            return attempt

        return self.db.write(begin)

    def tell(self, job_id: int, *records: Record) -> None:
        def store(session: Session) -> None:
            job = session.get_one(Job, job_id)
            attempt = session.get_one(Attempt, (job_id, job.attempt))
            samples.ingest(session, job, attempt, records, 0)

        self.db.write(store)

    def end(self, job_id: int, outcome: str) -> None:
        def end(session: Session) -> None:
            job = session.get_one(Job, job_id)
            attempt = session.get_one(Attempt, (job_id, job.attempt))
            jobs.end_attempt(session, job, attempt, outcome)

        self.db.write(end)

    def state(self, job_id: int = 1) -> str:
        return str(self.service.get_job(job_id)["state"])


def make_ready(session: Session) -> None:
    model, task = session.get_one(Model, 1), session.get_one(Task, 1)
    model.state, task.state = "ready", "succeeded"
    session.add_all([model, task])


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    db = Database(tmp_path / "frostline.db")
    service = Service(Settings(data_dir=tmp_path), db, Quiet())
    service.add_model({"uri": "demo:digits"})
    (tmp_path / "graphs").mkdir()
    job_folder.write_document(tmp_path / "graphs" / "1.json", GRAPH.to_document())
    db.write(make_ready)
    yield Desk(service, db, tmp_path)
    db.close()


def faults(error: pytest.ExceptionInfo[InvalidDocument]) -> dict[str, str]:
    return dict(error.value.errors)


# models and configs


def test_a_model_is_inspected_before_it_is_used(desk: Desk) -> None:
    model = desk.service.add_model({"uri": "demo:simple-model"})
    assert model["state"] == "inspecting"
    assert desk.service.get_task(model["task_id"])["state"] == "queued"
    with pytest.raises(Conflict, match="still being inspected") as error:
        desk.service.read_tree(model["id"])
    assert error.value.extra == {"state": "inspecting"}


@pytest.mark.parametrize("missing", [0, -1, 99, 2**63])
def test_what_is_not_there_is_not_found(desk: Desk, missing: int) -> None:
    for verb in (
        desk.service.get_model,
        desk.service.get_config,
        desk.service.get_job,
        desk.service.get_task,
        desk.service.read_proof,
        desk.service.stop_job,
    ):
        with pytest.raises(NotFound, match="There is no"):
            verb(missing)


def test_lists_come_newest_first_in_portions(desk: Desk) -> None:
    for _ in range(4):
        desk.service.add_model({"uri": "demo:digits"})
    assert [model["id"] for model in desk.service.list_models(limit=2)] == [5, 4]
    assert [model["id"] for model in desk.service.list_models(limit=2, before=4)] == [3, 2]


def test_a_model_in_use_is_not_deleted(desk: Desk) -> None:
    desk.launch()
    with pytest.raises(Conflict, match="used by 1 job"):
        desk.service.delete_model(1)
    desk.service.delete_job(1)
    desk.service.save_config({"model_id": 1, **FREEZE_BODY})
    desk.service.delete_model(1)
    assert desk.service.list_models() == desk.service.list_configs() == []
    assert not (desk.data_dir / "graphs" / "1.json").exists()


def test_a_saved_config_is_expanded_and_comes_back(desk: Desk) -> None:
    saved = desk.service.save_config({"model_id": 1, "name": "body", **FREEZE_BODY})
    assert saved["frozen"] == list(NAMES[:2])
    assert saved["trainable"] == list(NAMES[2:])
    assert saved["model"] == {"uri": "demo:digits", "fingerprint": GRAPH.fingerprint}
    assert desk.service.get_config(saved["id"]) == saved
    listed = desk.service.list_configs(model_id=1)[0]
    assert (listed["frozen_count"], listed["trainable_count"]) == (2, 1)
    assert "frozen" not in listed
    replaced = desk.service.replace_config(saved["id"], {**saved, "rules": []})
    assert replaced["frozen"] == []
    desk.service.delete_config(saved["id"])
    assert desk.service.list_configs() == []


def test_a_download_can_be_imported_again(desk: Desk) -> None:
    saved = desk.service.save_config({"model_id": 1, "name": "a/b c", **FREEZE_BODY})
    filename, media_type, text = desk.service.download_config(saved["id"])
    assert (filename, media_type) == ("a-b-c.json", "application/json")
    assert desk.service.import_config(1, json.loads(text))["rules"] == FREEZE_BODY["rules"]
    filename, _, code = desk.service.download_config(saved["id"], "python")
    assert filename == "a_b_c.py"
    compile(code, filename, "exec")


def test_an_import_that_differs_asks_whether_rules_or_names_count(desk: Desk) -> None:
    document = {"rules": [], "frozen": ["head.weight"], "trainable": list(NAMES[:2])}
    with pytest.raises(Conflict) as error:
        desk.service.import_config(1, document)
    assert error.value.extra["differing"]["frozen"] == ["head.weight"]
    assert desk.service.list_configs() == []
    assert desk.service.import_config(1, document, "rules")["frozen"] == []
    assert desk.service.import_config(1, document, "names")["frozen"] == ["head.weight"]


# jobs


def test_a_job_is_queued_with_everything_resolved(desk: Desk) -> None:
    job = desk.service.get_job(desk.launch(name="first", training={"epochs": 2}))
    assert job["state"] == "queued"
    assert (job["name"], job["attempt"], job["step"], job["error"]) == ("first", 0, 0, None)
    assert job["training"]["epochs"] == 2
    assert job["training"]["batch_size"] >= 1
    assert job["config"]["frozen_count"] == 2
    assert desk.service.read_job_config(1)["frozen"] == list(NAMES[:2])
    assert desk.service.read_proof(1)["verdict"] == "pending"


def test_every_fault_of_a_job_is_told_at_once(desk: Desk) -> None:
    with pytest.raises(InvalidDocument) as error:
        desk.service.launch_job(
            {
                "modelid": 1,
                "kind": "dance",
                "dataset": {"uri": "demo:nothing"},
                "training": {"lr": -1},
                "name": 3,
            }
        )
    assert set(faults(error)) == {
        "modelid", "kind", "model_id", "dataset.uri", "training.lr", "name"
    }  # fmt: skip


def test_a_bad_rule_is_found_below_config(desk: Desk) -> None:
    with pytest.raises(InvalidDocument) as error:
        desk.launch(config={"rules": [{"action": "melt", "match": "body"}]})
    assert list(faults(error)) == ["config.rules.0.action"]


@pytest.mark.parametrize(
    ("more", "at"),
    [
        ({"config": None}, "config"),
        ({"config": 77}, "config"),
        ({"config": "body"}, "config"),
        ({"model_id": 77}, "model_id"),
        ({"model_id": True}, "model_id"),
        ({"training": {"device": "cuda:7"}}, "training.device"),
        ({"config": {"rules": [{"action": "freeze", "match": "**"}]}}, "config"),
    ],
)
def test_what_cannot_be_launched_is_refused(desk: Desk, more: Mapping[str, Any], at: str) -> None:
    with pytest.raises(InvalidDocument) as error:
        desk.launch(**more)
    assert list(faults(error)) == [at]
    assert desk.service.list_jobs() == []


def test_with_nothing_trainable_an_evaluation_is_offered_and_accepted(desk: Desk) -> None:
    frozen = {"rules": [{"action": "freeze", "match": "**"}]}
    with pytest.raises(InvalidDocument, match="start an evaluation"):
        desk.launch(config=frozen)
    assert desk.service.get_job(desk.launch(config=frozen, kind="evaluate"))["state"] == "queued"


def test_stopping_twice_is_the_same_as_once(desk: Desk) -> None:
    desk.launch()
    assert desk.service.stop_job(1)["state"] == "stopped"
    assert desk.service.stop_job(1)["state"] == "stopped"
    desk.launch()
    desk.begin(2)
    assert desk.service.stop_job(2)["state"] == "stopping"
    assert desk.service.stop_job(2)["state"] == "stopping"
    desk.end(2, "succeeded")
    with pytest.raises(Conflict) as error:
        desk.service.stop_job(2)
    assert error.value.extra == {"state": "succeeded"}


def test_a_job_is_held_and_goes_on(desk: Desk) -> None:
    desk.launch()
    with pytest.raises(Conflict):
        desk.service.pause_job(1)
    desk.begin(1)
    assert desk.service.pause_job(1)["pause"] == "hold"
    desk.tell(1, Record(1, 1, "state", {"state": "paused", "seq": 1}))
    assert desk.state() == "paused"
    assert desk.service.resume_job(1)["state"] == "paused"  # until the loop says so
    desk.tell(1, Record(1, 2, "state", {"state": "running", "seq": 2}))
    assert desk.state() == "running"
    with pytest.raises(InvalidDocument, match="hold"):
        desk.service.pause_job(1, "nap")


def test_a_released_job_waits_for_its_turn_and_can_be_stopped(desk: Desk) -> None:
    desk.launch()
    desk.begin(1)
    desk.service.pause_job(1, "release")
    desk.end(1, "released")
    assert desk.state() == "paused"
    assert desk.service.resume_job(1)["state"] == "queued"
    assert desk.service.resume_job(1)["state"] == "queued"
    desk.begin(1)
    desk.service.pause_job(1, "release")
    desk.end(1, "released")
    assert desk.service.stop_job(1)["state"] == "stopped"


def test_an_evaluation_cannot_rest(desk: Desk) -> None:
    desk.launch(kind="evaluate")
    desk.begin(1)
    with pytest.raises(Conflict, match="Only training"):
        desk.service.pause_job(1)


FREEZE_WEIGHT = {"rules": [{"action": "freeze", "match": "head.weight"}]}
UNFREEZE_BIAS = {"rules": [{"action": "unfreeze", "match": "body.bias"}]}


def applied(sequence: int, seq: int, step: int, *changes: Mapping[str, Any]) -> Record:
    """What the loop says when a live change has taken effect."""
    schedule = [{"at": {"step": step}, **change} for change in changes]
    return Record(
        1, sequence, "freeze", {"seq": seq, "step": step, "config": {"schedule": schedule}}
    )


def test_a_live_change_becomes_part_of_the_config_as_trained(desk: Desk) -> None:
    desk.launch()
    desk.begin(1)
    edit = desk.service.change_freeze(1, UNFREEZE_BIAS)
    assert (edit["state"], edit["step"], edit["optimizer_state"]) == ("running", None, "fresh")
    desk.tell(1, loss(1, 7), applied(2, edit["seq"], 7, UNFREEZE_BIAS["rules"][0]))
    assert desk.service.find_edit(1, 1, edit["seq"])["step"] == 8
    config = desk.service.read_job_config(1)
    assert config["rules"] == FREEZE_BODY["rules"]
    assert config["schedule"] == [{"at": {"step": 7}, **UNFREEZE_BIAS["rules"][0]}]
    assert desk.service.get_job(1)["config"]["schedule"] == config["schedule"]


def test_a_live_change_never_freezes_the_last_layer(desk: Desk) -> None:
    desk.launch()
    desk.begin(1)
    with pytest.raises(Conflict, match="last trainable layer") as error:
        desk.service.change_freeze(1, FREEZE_WEIGHT)
    assert error.value.extra == {"state": "running"}
    first = desk.service.change_freeze(
        1, UNFREEZE_BIAS
    )  # not yet told of, and counted all the same
    second = desk.service.change_freeze(1, FREEZE_WEIGHT)
    desk.tell(1, applied(1, first["seq"], 0, UNFREEZE_BIAS["rules"][0]))
    desk.tell(1, applied(2, second["seq"], 0, UNFREEZE_BIAS["rules"][0]))  # the loop refused it
    with pytest.raises(Conflict, match="nothing was changed"):
        desk.service.find_edit(1, 1, second["seq"])
    assert len(desk.service.read_job_config(1)["schedule"]) == 1


def test_what_is_due_by_the_schedule_counts_before_a_live_change(desk: Desk) -> None:
    config = {
        **FREEZE_BODY,
        "schedule": [{"at": {"epoch": 1}, "action": "unfreeze", "match": "body.bias"}],
    }
    desk.launch(config=config)
    desk.begin(1)
    with pytest.raises(Conflict, match="last trainable layer"):
        desk.service.change_freeze(1, FREEZE_WEIGHT)
    payload = {"step": 3, "epoch": 1.0, "values": {}, "step_ms": 1.0}
    desk.tell(1, Record(1, 1, "metrics", payload))
    assert desk.service.change_freeze(1, FREEZE_WEIGHT)["step"] is None


@pytest.mark.parametrize(
    ("document", "at"),
    [
        ({}, "rules"),
        ({"rules": []}, "rules"),
        ({"rules": "body"}, "rules"),
        ({"rules": [{"action": "melt", "match": "body"}]}, "rules.0.action"),
        ({**UNFREEZE_BIAS, "optimizer_state": "old"}, "optimizer_state"),
        ({**UNFREEZE_BIAS, "rule": 1}, "rule"),
    ],
)
def test_a_live_change_is_checked_at_once(desk: Desk, document: Mapping[str, Any], at: str) -> None:
    desk.launch()
    desk.begin(1)
    with pytest.raises(InvalidDocument) as error:
        desk.service.change_freeze(1, document)
    assert list(faults(error)) == [at]


def test_only_a_job_that_trains_now_is_changed(desk: Desk) -> None:
    desk.launch()
    with pytest.raises(Conflict, match="queued"):
        desk.service.change_freeze(1, UNFREEZE_BIAS)
    desk.begin(1)
    edit = desk.service.change_freeze(1, UNFREEZE_BIAS)
    desk.end(1, "interrupted")
    with pytest.raises(Conflict, match="ended before the change"):
        desk.service.find_edit(1, 1, edit["seq"])
    with pytest.raises(Conflict, match="interrupted"):
        desk.service.change_freeze(1, UNFREEZE_BIAS)
    desk.launch(config={**FREEZE_BODY, "mechanism": "zero_lr"})
    desk.begin(2)
    with pytest.raises(Conflict, match="needs the mechanism 'requires_grad'"):
        desk.service.change_freeze(2, UNFREEZE_BIAS)


def test_an_ended_job_resumes_with_changes(desk: Desk) -> None:
    desk.launch(training={"epochs": 1})
    desk.begin(1)
    with pytest.raises(Conflict):
        desk.service.resume_job(1, {"training": {"epochs": 5}})
    desk.end(1, "succeeded")
    job = desk.service.resume_job(1, {"config": {}, "training": {"epochs": 5}})
    assert job["state"] == "queued"
    assert job["training"]["epochs"] == 5
    assert job["config"]["frozen_count"] == 0
    assert desk.service.read_job_config(1)["frozen"] == []


def start_record(total_steps: int) -> Record:
    return Record(1, 1, "start", {"layers": [], "total_steps": total_steps, "step": 0})


def finish(desk: Desk, step: int, total_steps: int, **training: Any) -> None:
    """A job that has taken `step` steps in two epochs and succeeded."""
    desk.launch(training=training)
    desk.begin(1)
    payload = {"step": step, "epoch": 2.0, "values": {}, "step_ms": 1.0}
    desk.tell(1, start_record(total_steps), Record(1, 2, "metrics", payload))
    desk.end(1, "succeeded")


@pytest.mark.parametrize(
    ("doc", "words"),
    [
        ({}, "has taken 8 steps and would end at step 8"),
        ({"config": {}}, "would end at step 8"),
        ({"training": {"epochs": 1}}, "would end at step 4"),
        ({"training": {"max_steps": 8}}, "would end at step 8"),
    ],
)
def test_a_resume_that_would_do_nothing_is_refused(
    desk: Desk, doc: dict[str, Any], words: str
) -> None:
    finish(desk, 8, 8, epochs=2)
    with pytest.raises(Conflict, match=words):
        desk.service.resume_job(1, doc)
    assert desk.state() == "succeeded"


def test_new_epochs_take_the_place_of_steps(desk: Desk) -> None:
    finish(desk, 8, 8, max_steps=8)
    job = desk.service.resume_job(1, {"training": {"epochs": 3}})
    assert (job["training"]["epochs"], job["training"]["max_steps"]) == (3, None)


def test_what_ended_early_goes_on_with_more_patience(desk: Desk) -> None:
    finish(desk, 4, 40, epochs=10, patience=2)
    with pytest.raises(Conflict, match="ended early after 2 evaluations"):
        desk.service.resume_job(1)
    job = desk.service.resume_job(1, {"training": {"patience": None}})
    assert (job["state"], job["training"]["patience"]) == ("queued", None)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"lr_scale": "much"}, "lr_scale"),
        ({"optimizer_state": "stale"}, "optimizer_state"),
    ],
)
def test_an_edit_is_checked_as_an_entry_of_a_schedule(
    desk: Desk, given: dict[str, Any], field: str
) -> None:
    desk.launch()
    desk.begin(1)
    with pytest.raises(InvalidDocument) as refused:
        desk.service.change_freeze(1, {**UNFREEZE_BIAS, **given})
    assert [where for where, _ in refused.value.errors] == [field]
    edit = desk.service.change_freeze(1, {**UNFREEZE_BIAS, "warmup_steps": 7})
    assert edit["warmup_steps"] == 7


def test_resuming_with_another_config_needs_requires_grad(desk: Desk) -> None:
    desk.launch()
    desk.service.stop_job(1)
    with pytest.raises(InvalidDocument, match="needs the mechanism 'requires_grad'"):
        desk.service.resume_job(1, {"config": {"mechanism": "zero_lr"}})


def test_a_job_is_renamed_and_removed_with_what_lies_on_disk(desk: Desk) -> None:
    desk.launch()
    assert desk.service.edit_job(1, {"notes": "good"})["notes"] == "good"
    with pytest.raises(InvalidDocument, match="nearest is 'name'"):
        desk.service.edit_job(1, {"nam": "x"})
    folder = desk.data_dir / "jobs" / "1"
    folder.mkdir(parents=True)
    desk.begin(1)
    with pytest.raises(Conflict, match="Stop it first"):
        desk.service.delete_job(1)
    desk.end(1, "succeeded")
    desk.service.delete_job(1)
    assert desk.service.list_jobs() == []
    assert list(folder.parent.iterdir()) == []


def test_checkpoints_are_listed_served_and_deleted(desk: Desk) -> None:
    desk.launch()
    path = checkpoint_path(desk.data_dir / "jobs" / "1" / "checkpoints", 5)
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"tensors")
    (path.parent / ".step-000000007.tmp").mkdir()
    (checkpoint,) = desk.service.list_checkpoints(1)
    assert (checkpoint["step"], checkpoint["bytes"]) == (5, 7)
    assert desk.service.checkpoint_file(1, 5).read_bytes() == b"tensors"
    desk.begin(1)
    with pytest.raises(Conflict):
        desk.service.delete_checkpoint(1, 5)
    desk.end(1, "succeeded")
    desk.service.delete_checkpoint(1, 5)
    with pytest.raises(NotFound, match="no checkpoint of step 5"):
        desk.service.checkpoint_file(1, 5)


# samples and news

START = {"layers": ["body", "=head"], "step": 0, "total_steps": 9, "warnings": []}


def loss(sequence: int, step: int) -> Record:
    payload = {"step": step, "epoch": 0.0, "values": {"loss": float(step)}, "step_ms": 1.0}
    return Record(1, sequence, "metrics", payload)


def stats(sequence: int, step: int) -> Record:
    column = {name: [1.0, 2.0] for name in ("grad_norm", "update_norm", "weight_norm")}
    return Record(1, sequence, "layers", {"step": step, **column})


def test_layers_are_chosen_by_glob(desk: Desk) -> None:
    desk.launch()
    desk.begin(1)
    desk.tell(1, Record(1, 1, "start", START), stats(2, 1))
    answer = desk.service.read_layers(1, match="bod*")
    assert (answer["layers"], answer["steps"], answer["values"]) == (["body"], [1], [[1.0]])
    for bad in ({"stat": "loss"}, {"reduce": "mean"}, {"match": "{"}):
        with pytest.raises(InvalidDocument):
            desk.service.read_layers(1, **bad)


def test_a_job_that_has_measured_nothing_has_no_insights(desk: Desk) -> None:
    desk.launch()
    desk.begin(1)
    nothing = {"steps": None, "findings": []}
    assert desk.service.read_insights(1) == nothing
    desk.tell(1, Record(1, 1, "start", START))
    assert desk.service.read_insights(1) == nothing


def test_what_became_of_the_optimizer_state_is_told_after_a_resume(desk: Desk) -> None:
    desk.launch()
    desk.begin(1)
    assert desk.service.list_attempts(1)[0]["resumed"] is None
    resumed = {"step": 3, "kept": ["head.weight"], "fresh": ["body.bias"], "dropped": []}
    desk.tell(1, Record(1, 1, "start", {**START, "resumed": resumed}))
    assert desk.service.list_attempts(1)[0]["resumed"] == resumed


def test_an_export_has_every_sample_and_no_formula(desk: Desk) -> None:
    desk.launch()
    desk.begin(1)
    desk.tell(1, Record(1, 1, "start", START), loss(2, 1), stats(3, 1))
    _, _, pieces = desk.service.export_job(1, "csv")
    lines = b"".join(pieces).decode().splitlines()
    assert lines[:2] == ["step,layer,name,value", "1,,loss,1.0"]
    assert "1,'=head,grad_norm,2.0" in lines
    _, _, pieces = desk.service.export_job(1, "json")
    document = json.loads(b"".join(pieces))
    assert document["job"]["id"] == 1
    assert len(document["samples"]) == 7
    with pytest.raises(InvalidDocument):
        desk.service.export_job(1, "xlsx")


def test_news_tell_everything_once_and_the_end_last(desk: Desk) -> None:
    desk.launch()
    desk.begin(1)
    log = desk.data_dir / "jobs" / "1" / "attempts" / "1" / "log.txt"
    log.parent.mkdir(parents=True)
    log.write_bytes(b"caf\xc3")  # half a character
    desk.tell(1, Record(1, 1, "start", START), loss(2, 1), stats(3, 1))
    events, cursor, finished = desk.service.news(1, None)
    assert [name for name, _, _ in events] == ["metrics", *["layers"] * 3, "log", "state"]
    assert events[0][1] == {"loss": {"steps": [1], "min": [1.0], "max": [1.0], "values": [1.0]}}
    assert events[1][1] == {
        "stat": "grad_norm", "layers": ["body", "=head"], "steps": [1], "values": [[1.0], [2.0]]
    }  # fmt: skip
    assert events[-2][1] == {"text": "caf"}
    assert events[-1][2] == cursor
    assert not finished
    assert desk.service.news(1, cursor)[0] == []
    log.write_bytes("café".encode())
    desk.tell(1, Record(1, 4, "proof", {"verdict": "holds", "step": 1}), loss(5, 2))
    desk.end(1, "succeeded")
    events, cursor, finished = desk.service.news(1, cursor)
    assert [name for name, _, _ in events] == ["metrics", "proof", "log", "state"]
    assert events[2][1] == {"text": "é"}
    assert events[3][1]["state"] == "succeeded"
    assert finished
    assert desk.service.news(1, cursor) == ([], cursor, True)
    assert desk.service.news(1, "now") == ([], cursor, True)


def test_a_reader_who_was_away_for_long_misses_no_step(desk: Desk) -> None:
    desk.launch()
    desk.begin(1)
    desk.tell(1, Record(1, 1, "start", START), stats(2, 1))
    _, cursor, _ = desk.service.news(1, None)
    desk.tell(1, *(stats(step + 1, step) for step in range(2, 2 * STEPS_A_CALL + 10)))
    desk.end(1, "succeeded")
    steps, portions, finished = [], 0, False
    while not finished:
        events, cursor, finished = desk.service.news(1, cursor)
        steps += [step for _, data, _ in events[:1] for step in data["steps"]]
        portions += 1
    assert steps == list(range(2, 2 * STEPS_A_CALL + 10))
    assert portions == 3
    newest = desk.service.news(1, None)[0][0][1]["steps"]
    assert (len(newest), newest[-1]) == (STEPS_A_CALL, steps[-1])


def test_a_loss_that_is_no_number_is_no_completed_step(desk: Desk) -> None:
    desk.launch()
    desk.begin(1)
    refused = {"step": 2, "epoch": 0.2, "values": {"loss": float("nan")}, "step_ms": None}
    desk.tell(1, loss(1, 1), Record(1, 2, "metrics", refused))
    assert desk.service.get_job(1)["step"] == 1
    assert desk.service.read_metrics(1)["loss"]["values"] == [1.0, "NaN"]


def test_news_go_on_from_any_event_and_survive_a_nonsense_cursor(desk: Desk) -> None:
    desk.launch()
    desk.begin(1)
    desk.tell(1, Record(1, 1, "start", START), loss(2, 1), stats(3, 1))
    events, _, _ = desk.service.news(1, None)
    names = [name for name, _, _ in events]
    assert [name for name, _, _ in desk.service.news(1, events[0][2])[0]] == names[1:]
    for nonsense in ("", "x", "1.2", "9" * 400, "1.2.3.4.5.x", "-5.0.0.0.0.0"):
        assert [name for name, _, _ in desk.service.news(1, nonsense)[0]] == names


def test_after_a_resume_the_steps_that_were_superseded_come_again(desk: Desk) -> None:
    desk.launch()
    desk.begin(1)
    desk.tell(1, Record(1, 1, "start", START), *(stats(n + 1, n) for n in range(1, 6)))
    _, cursor, _ = desk.service.news(1, None)
    desk.end(1, "interrupted")
    desk.service.resume_job(1)
    desk.begin(1, resume_step=3)
    desk.tell(1, Record(2, 1, "start", {**START, "step": 3}), stats(2, 4))
    events, _, _ = desk.service.news(1, cursor)
    assert next(data for name, data, _ in events if name == "layers")["steps"] == [4]


def test_news_of_all_jobs_are_their_newest_states(desk: Desk) -> None:
    desk.launch()
    desk.launch()
    events, cursor, finished = desk.service.news(None, None)
    assert [(name, data["id"]) for name, data, _ in events] == [("state", 1), ("state", 2)]
    assert not finished
    assert desk.service.news(None, "now") == ([], cursor, False)
    desk.service.stop_job(1)
    events, _, _ = desk.service.news(None, cursor)
    assert [(data["id"], data["state"]) for _, data, _ in events] == [(1, "stopped")]


# logins


def test_a_link_is_good_once_and_only_digests_are_kept(desk: Desk) -> None:
    link = desk.service.make_link()
    session = desk.service.use_link(link)
    assert session is not None
    assert desk.service.use_link(link) is None
    assert desk.service.check_session(session)
    assert not desk.service.check_session(link)
    assert desk.service.use_link(session) is None
    assert desk.service.check_session(session)
    with desk.db.read() as reader:
        kept = str(reader.connection().exec_driver_sql("SELECT * FROM login").all())
    assert link not in kept
    assert session not in kept
    desk.service.end_session(session)
    assert not desk.service.check_session(session)


def test_the_server_reports_itself(desk: Desk) -> None:
    assert desk.service.health()["workers"] == 1
    report = desk.service.system_report()
    assert report["jobs"] == {}
    assert report["database_bytes"] > 0
    json.dumps(report)


@pytest.mark.parametrize(
    ("rules", "schedule", "is_taken"),
    [
        ([], [("epoch", 1, "freeze", "**")], False),
        ([], [("epoch", 1, "freeze", "**"), ("epoch", 1, "unfreeze", "head")], True),
        ([("freeze", "**")], [("step", 0, "unfreeze", "head")], True),
        ([("freeze", "**")], [("step", 1, "unfreeze", "head")], False),
        ([], [("step", 1, "freeze", "{")], False),
    ],
)
def test_a_schedule_that_leaves_nothing_to_train_is_refused(
    desk: Desk, rules: list[Any], schedule: list[Any], is_taken: bool
) -> None:
    config = {
        "rules": [{"action": action, "match": match} for action, match in rules],
        "schedule": [
            {"at": {unit: count}, "action": action, "match": match}
            for unit, count, action, match in schedule
        ],
    }
    document = {"model_id": 1, "config": config, "dataset": {"uri": "demo:digits"}}
    if is_taken:
        assert desk.service.launch_job(document)["state"] == "queued"
    else:
        with pytest.raises(InvalidDocument):
            desk.service.launch_job(document)


def test_a_comparison_of_mechanisms_is_a_task_with_the_expanded_config(desk: Desk) -> None:
    body = {**FREEZE_BODY, "training": {"optimizer": "sgd"}}
    task = desk.service.compare_mechanisms(1, body)
    assert (task["kind"], task["state"]) == ("mechanisms", "queued")
    assert desk.service.get_task(task["id"])["result"] is None
    with desk.db.read() as session:
        spec = session.get_one(Task, task["id"]).spec
    assert spec["config"]["trainable"] == ["head.weight"]
    assert (spec["training"]["optimizer"], spec["training"]["max_steps"]) == ("sgd", 5)
    assert "dataset" not in spec
    wrong: dict[str, Any] = {"rules": [{"action": "freeze", "match": "**"}]}
    wrong |= {"dataset": {"uri": "x"}, "training": {"max_steps": 10**6}}
    with pytest.raises(InvalidDocument) as error:
        desk.service.compare_mechanisms(1, wrong)
    assert set(faults(error)) == {"rules", "training.max_steps", "dataset.uri"}
    with pytest.raises(NotFound):
        desk.service.compare_mechanisms(99, FREEZE_BODY)


def test_the_same_task_is_not_queued_twice_and_few_of_a_kind_wait(desk: Desk) -> None:
    first = desk.service.compare_mechanisms(1, FREEZE_BODY)
    assert desk.service.compare_mechanisms(1, FREEZE_BODY) == first
    numbers = {first["id"]}
    for seed in range(1, 20):
        body = {**FREEZE_BODY, "training": {"seed": seed}}
        numbers.add(desk.service.compare_mechanisms(1, body)["id"])
    assert len(numbers) == 20
    with pytest.raises(Conflict, match="20 tasks of this kind wait already"):
        desk.service.compare_mechanisms(1, {**FREEZE_BODY, "training": {"seed": 99}})
    assert desk.service.compare_mechanisms(1, FREEZE_BODY) == first
