"""Sweeps, the timeline of what was frozen, and the report: what they hold and what they refuse."""

import re
import struct
import zlib
from html.parser import HTMLParser
from typing import Any

import pytest

from app.freezing.errors import InvalidDocument
from app.jobs.spool import Record
from app.service import Conflict, NotFound
from app.web.drawing import Line, draw_curves, draw_heatmap, encode_png, nice_ticks
from app.web.report import write_job_report, write_sweep_report
from tests.unit.test_service import FREEZE_BODY, Desk, desk, faults  # noqa: F401

SETS = [
    {"preset": "nothing"},
    {"name": "the body", "config": FREEZE_BODY},
]


def sweep_of(desk: Desk, **more: Any) -> dict[str, Any]:  # noqa: F811
    document = {"model_id": 1, "sets": SETS, "dataset": {"uri": "demo:digits"}, "name": "both"}
    return desk.service.launch_sweep({**document, **more})


def start(total: int = 4) -> Record:
    payload = {"layers": ["body", "head"], "total_steps": total, "step": 0, "warnings": []}
    return Record(1, 1, "start", payload)


def metrics(sequence: int, step: int, step_ms: float | None = 5.0, **values: float) -> Record:
    named = {name.replace("__", "/"): value for name, value in values.items()}
    payload = {"step": step, "epoch": step / 2, "values": named, "step_ms": step_ms}
    return Record(1, sequence, "metrics", payload)


def layers(sequence: int, step: int, grad: list[float | None], update: list[float]) -> Record:
    payload = {"step": step, "grad_norm": grad, "update_norm": update, "weight_norm": [1.0, 1.0]}
    return Record(1, sequence, "layers", payload)


def test_a_sweep_is_jobs_that_differ_in_what_they_freeze_alone(desk: Desk) -> None:  # noqa: F811
    sweep = sweep_of(desk, training={"epochs": 2, "seed": 7})
    assert [sweep["state"], len(sweep["jobs"])] == ["running", 2]
    first, second = (desk.service.get_job(job) for job in sweep["jobs"])
    assert first["training"] == second["training"]
    assert first["training"]["seed"] == 7
    assert first["dataset"] == second["dataset"]
    assert [first["config"]["frozen_count"], second["config"]["frozen_count"]] == [0, 2]
    assert [first["name"], second["name"]] == ["both: Freeze nothing", "both: the body"]
    assert first["sweep_id"] == second["sweep_id"] == sweep["id"]
    assert desk.service.list_sweeps()[0] == sweep


def test_the_table_of_a_sweep_fills_as_its_jobs_go_on(desk: Desk) -> None:  # noqa: F811
    sweep = sweep_of(desk)
    job_id = sweep["jobs"][1]
    row = desk.service.get_sweep(sweep["id"])["table"][1]
    assert (row["set"], row["state"], row["metrics"]) == ("the body", "queued", {})
    desk.begin(job_id)
    desk.tell(
        job_id,
        start(),
        metrics(2, 0, None, eval__new__accuracy=0.25),
        metrics(3, 1, loss=2.0),
        metrics(4, 2, loss=1.0, eval__new__accuracy=0.75),
    )
    row = desk.service.get_sweep(sweep["id"])["table"][1]
    assert row["metrics"] == {"eval/new/accuracy": {"before": 0.25, "after": 0.75}}
    assert (row["step"], row["step_ms"]) == (2, 5.0)
    assert row["predicted"]["peak_bytes"] is None  # the graph has no trace to know it from


def test_what_is_wrong_with_a_sweep_is_told_at_once_and_nothing_starts(
    desk: Desk,  # noqa: F811
) -> None:
    sets = [{"preset": "hed"}, {"preset": "everything"}, {"name": "empty"}, {"config": 99}]
    with pytest.raises(InvalidDocument) as refused:
        sweep_of(desk, sets=sets, training={"epochs": 0})
    assert set(faults(refused)) == {
        "training.epochs", "sets.0.preset", "sets.1.config", "sets.2.", "sets.3.config",
    }  # fmt: skip
    assert desk.service.list_jobs() == []
    assert desk.service.list_sweeps() == []
    with pytest.raises(InvalidDocument, match="1 to 32"):
        sweep_of(desk, sets=[])


def test_a_sweep_is_stopped_and_deleted_with_its_jobs(desk: Desk) -> None:  # noqa: F811
    sweep = sweep_of(desk)
    with pytest.raises(Conflict, match="stop it first"):
        desk.service.delete_sweep(sweep["id"])
    assert desk.service.stop_sweep(sweep["id"])["state"] == "ended"
    desk.service.delete_sweep(sweep["id"])
    assert desk.service.list_jobs() == []
    with pytest.raises(NotFound):
        desk.service.get_sweep(sweep["id"])


def test_a_sweep_goes_with_the_last_of_its_jobs(desk: Desk) -> None:  # noqa: F811
    sweep = sweep_of(desk)
    desk.service.stop_sweep(sweep["id"])
    desk.service.delete_job(sweep["jobs"][0])
    assert len(desk.service.get_sweep(sweep["id"])["table"]) == 1
    desk.service.delete_job(sweep["jobs"][1])
    assert desk.service.list_sweeps() == []


def test_the_timeline_tells_which_layers_turned_at_which_step(desk: Desk) -> None:  # noqa: F811
    schedule = [
        {"at": {"step": 2}, "action": "unfreeze", "match": "body"},
        {"at": {"epoch": 2}, "action": "freeze", "match": "body.weight"},
    ]
    job_id = desk.launch(config={**FREEZE_BODY, "schedule": schedule}, training={"epochs": 4})
    timeline = desk.service.read_freeze(job_id)
    assert timeline["layers"] == {"body": True, "head": False}
    assert [change["step"] for change in timeline["changes"]] == [3, None]
    desk.begin(job_id)
    desk.tell(job_id, start(total=12), metrics(2, 1, loss=1.0), metrics(3, 7, loss=1.0))
    timeline = desk.service.read_freeze(job_id)
    # Four epochs of three steps: the second change holds from step 7 on. A layer with a trained
    # bias is no frozen layer.
    assert [(c["step"], c["layers"]) for c in timeline["changes"]] == [(3, ["body"]), (7, [])]
    assert timeline["frozen"] == ["body.weight"]
    assert desk.service.plan_job(job_id, now=True)["frozen"] == ["body.weight"]  # type: ignore[index]
    assert len(desk.service.plan_job(job_id)["frozen"]) == 2  # type: ignore[index]


class Addresses(HTMLParser):
    """Every address that a page would fetch or lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "action")]


def test_a_report_stands_alone_and_escapes_names(desk: Desk) -> None:  # noqa: F811
    sweep = sweep_of(desk, name="<script>alert(1)</script>")
    job_id = sweep["jobs"][1]
    desk.begin(job_id)
    desk.tell(
        job_id,
        start(),
        metrics(2, 1, loss=2.0),
        layers(3, 1, [None, 0.5], [0.0, 0.1]),
        metrics(4, 2, loss=float("nan")),
        layers(5, 2, [None, 0.25], [0.0, 0.1]),
    )
    for page in (
        write_job_report(desk.service, job_id),
        write_sweep_report(desk.service, sweep["id"]),
    ):
        addresses = Addresses()
        addresses.feed(page)
        assert addresses.found
        assert all(address.startswith("data:image/png") for address in addresses.found)
        assert "<script" not in page
        assert "&lt;script&gt;" in page
        assert "url(" not in page
        assert "<polyline" in page
        assert re.search(r"freeze</span> <code>body</code>", page)


def decode(png: bytes) -> list[list[int]]:
    """The palette entries of an 8-bit PNG without filters, a list a row."""
    width, height = struct.unpack(">II", png[16:24])
    at = png.index(b"IDAT")
    (size,) = struct.unpack(">I", png[at - 4 : at])
    raw = zlib.decompress(png[at + 4 : at + 4 + size])
    return [list(raw[y * (width + 1) + 1 : (y + 1) * (width + 1)]) for y in range(height)]


def test_a_drawn_cell_is_empty_bad_or_as_high_as_its_logarithm() -> None:
    cells = decode(encode_png([[None, "NaN", 1.0], [10.0, 100.0, 0.0]], 0.0, 2.0))
    assert cells == [[0, 1, 2], [128, 255, 2]]


def test_drawings_of_nothing_say_so_and_odd_values_do_no_harm() -> None:
    assert "No steps" in draw_heatmap([], [], [])
    assert "No numbers" in draw_curves([Line("loss", [1], ["NaN"], ["NaN"], ["NaN"])])
    line = Line("a <b>", [1, 2], [1.0, "Infinity"], [1.0, 1.0], [1.0, "Infinity"])
    assert "a &lt;b&gt;" in draw_curves([line])
    assert "svg" in draw_heatmap(["x"], [3], [[0.0]])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3e-9, 4e-9), (5, 5), (0, 1e300), (1, 14000)])
def test_ticks_are_round_few_and_within(low: float, high: float) -> None:
    ticks = nice_ticks(low, high, 5)
    assert len(ticks) <= 12
    slack = (high - low) * 1e-6
    assert all(low - slack <= tick <= high + slack for tick in ticks)
