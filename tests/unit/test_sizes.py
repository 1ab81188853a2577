"""Examples at other sizes, lookups that a trace refuses, and what a plan says of a size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sqlmodel import Session
from torch import nn

from app.freezing.lookups import RefuseMissingRows
from app.freezing.trace import trace_model
from app.jobs import folder as job_folder
from app.service import Service
from app.service.plans import BEING_TRACED
from app.settings import Settings
from app.sources.sizes import size_example
from app.store import catalog
from app.store.db import Database
from app.store.tables import Model, Task
from tests.unit.test_service import Quiet

IMAGES, WORDS = torch.randn(2, 3, 8, 8), torch.arange(12).reshape(2, 6)
SHAPES: list[tuple[Any, dict[str, int], dict[str, int], Any]] = [
    (IMAGES, {"image_size": 5}, {"image_size": 8}, (2, 3, 5, 5)),
    (IMAGES, {"image_size": 20}, {"image_size": 8}, (2, 3, 20, 20)),
    (WORDS, {"sequence_length": 9}, {"sequence_length": 6}, (2, 9)),
    (torch.randn(2, 6, 5), {"sequence_length": 9}, {"sequence_length": 6}, (2, 9, 5)),
    (
        {"ids": WORDS, "mask": WORDS > 3, "boxes": WORDS[..., None].expand(2, 6, 4), "y": [WORDS]},
        {"sequence_length": 3},
        {"sequence_length": 6},
        {"ids": (2, 3), "mask": (2, 3), "boxes": (2, 3, 4), "y": [(2, 3)]},
    ),
    (
        (WORDS, torch.ones(2, 6), torch.ones(2, 6, 6, dtype=torch.bool), torch.ones(2, 6, 5)),
        {"sequence_length": 9},
        {"sequence_length": 6},
        ((2, 9), (2, 9), (2, 9, 9), (2, 6, 5)),
    ),
    (
        {"images": IMAGES, "classes": torch.zeros(2, 8, 8).long(), "name": "kept"},
        {"image_size": 4},
        {"image_size": 8},
        {"images": (2, 3, 4, 4), "classes": (2, 4, 4), "name": "kept"},
    ),
    (
        (IMAGES, WORDS),
        {"image_size": 4, "sequence_length": 2},
        {"image_size": 8, "sequence_length": 6},
        ((2, 3, 4, 4), (2, 2)),
    ),
]


def shapes(example: Any) -> Any:
    if isinstance(example, torch.Tensor):
        return tuple(example.shape)
    if isinstance(example, dict):
        return {name: shapes(value) for name, value in example.items()}
    if isinstance(example, list | tuple):
        return type(example)(map(shapes, example))
    return example


@pytest.mark.parametrize(("example", "wanted", "own", "after"), SHAPES)
def test_what_has_a_size_is_made_as_large_together(
    example: Any, wanted: dict[str, int], own: dict[str, int], after: Any
) -> None:
    assert size_example(example, {}).sizes == own
    sized = size_example(example, wanted)
    assert shapes(sized.example) == after
    assert sized.sizes == {**own, **wanted}
    assert sized.refused == {}


def test_what_is_repeated_ends_as_it_ended() -> None:
    words = torch.tensor([[5, 6, 7, 2], [8, 9, 7, 2]])
    longer = size_example(words, {"sequence_length": 9}).example
    assert longer.tolist() == [[5, 6, 7, 5, 6, 7, 5, 6, 2], [8, 9, 7, 8, 9, 7, 8, 9, 2]]
    assert size_example(words, {"sequence_length": 2}).example.tolist() == [[5, 2], [8, 2]]
    assert size_example(words, {"sequence_length": 1}).example.tolist() == [[2], [2]]


@pytest.mark.parametrize(
    ("example", "size", "why"),
    [
        (None, "image_size", "gives no example"),
        (torch.randn(2, 7), "sequence_length", "has no sequence"),
        (WORDS, "image_size", "has no images"),
        ((WORDS, WORDS[:, :4]), "sequence_length", "several lengths: 4 and 6"),
        ((IMAGES, IMAGES[..., :4, :4]), "image_size", "several sizes: (4, 4) and (8, 8)"),
        (torch.randn(2, 3, 8, 6), "image_size", "no squares: they are 8 by 6"),
    ],
)
def test_why_an_example_has_no_such_size(example: Any, size: str, why: str) -> None:
    sized = size_example(example, {size: 4})
    assert why in sized.refused[size]
    assert sized.example is example


def test_an_example_that_would_fill_the_memory_is_not_made() -> None:
    sized = size_example(IMAGES, {"image_size": 10**6})
    assert "more than the 1 GiB" in sized.refused["image_size"]
    assert sized.sizes == {"image_size": 8}


class Positions(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.table, self.words = how, nn.Embedding(8, 4), nn.Embedding(20, 4)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        places = torch.arange(words.shape[1])
        rows = {
            "embedding": lambda: self.table(places),
            "item": lambda: self.table.weight[places],
            "index_select": lambda: self.table.weight.index_select(0, places),
            "gather": lambda: self.table.weight.gather(0, places[:, None].expand(-1, 4)),
        }[self.how]()
        return self.words(words) + rows


@pytest.mark.parametrize("how", ["embedding", "item", "index_select", "gather"])
def test_a_row_that_is_not_there_is_refused_as_it_is_for_real(how: str) -> None:
    for length, is_there in ((8, True), (9, False)):
        model, words = Positions(how), torch.ones(2, length).long()
        with RefuseMissingRows():
            graph = trace_model(model, words, ways=("fake",))
        assert bool(graph.nodes) is is_there
        if not is_there:
            assert "IndexError: row 8 is looked up in a table of 8" in graph.trace_note
            with pytest.raises((IndexError, RuntimeError)):
                model(words)


@pytest.fixture
def service(tmp_path: Path) -> Any:
    db = Database(tmp_path / "frostline.db")
    service = Service(Settings(data_dir=tmp_path), db, Quiet())
    service.add_model({"uri": "demo:digits"})
    (tmp_path / "graphs").mkdir()
    graph = trace_model(Positions("item"), torch.ones(2, 4).long())
    job_folder.write_document(tmp_path / "graphs" / "1.json", graph.to_document())

    def make_ready(session: Session) -> None:
        model, task = session.get_one(Model, 1), session.get_one(Task, 1)
        model.state, model.fingerprint, task.state = "ready", graph.fingerprint, "succeeded"
        session.add_all([model, task])

    db.write(make_ready)
    yield service, db
    db.close()


def not_assumed(service: Service) -> list[str]:
    plan = service.make_plan(1, {"assume": {"sequence_length": 6}})
    return [w["message"] for w in plan["warnings"] if w["code"] == "not_assumed"]


def test_a_trace_that_fails_says_why_and_is_tried_again_after_a_while(service: Any) -> None:
    service, db = service
    assert BEING_TRACED in not_assumed(service)[0]
    assert BEING_TRACED in not_assumed(service)[0]
    assert service.is_tracing(1, {"assume": {"sequence_length": 6}})

    def tasks() -> list[Task]:
        with db.read() as session:
            return list(catalog.tasks_of_model(session, 1, "trace"))

    (task,) = tasks()
    assert task.spec["assumed"] == {"sequence_length": 6}
    db.write(
        lambda session: catalog.end_task(
            session, session.get_one(Task, task.id), "failed", "disk_full", "The disk is full."
        )
    )
    assert "its trace failed: The disk is full. FLOPs" in not_assumed(service)[0]
    assert not service.is_tracing(1, {"assume": {"sequence_length": 6}})
    assert len(tasks()) == 1

    def age(session: Session) -> None:
        row = session.get_one(Task, task.id)
        row.ended_at = "2020-01-01T00:00:00.000Z"
        session.add(row)

    db.write(age)
    assert BEING_TRACED in not_assumed(service)[0]
    assert len(tasks()) == 2


def test_a_graph_that_is_older_than_the_models_own_is_not_used(service: Any) -> None:
    service, _ = service
    folder = service._settings.data_dir / "graphs"
    longer = trace_model(Positions("item"), torch.ones(2, 6).long()).to_document()
    graph = {**longer, "sequence_length": 6, "modules": [], "parameters": []}
    path = folder / "1.sequence_length=6.json"
    job_folder.write_document(path, {"graph": graph, "refused": {}})
    assert not_assumed(service) == []
    own = folder / "1.json"
    job_folder.write_document(own, job_folder.read_document(own) or {})
    assert BEING_TRACED in not_assumed(service)[0]
