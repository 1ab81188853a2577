"""The training options as a document."""

import math

import pytest

from app.freezing.errors import InvalidDocument
from app.training.recipe import (
    OPTIONS,
    Recipe,
    learning_rate_factor,
    parse_recipe,
    recipe_document,
)


def test_an_empty_document_trains() -> None:
    assert parse_recipe({}) == Recipe()
    assert parse_recipe({}).rate == 1e-3
    assert parse_recipe({"optimizer": "sgd"}).rate == 0.01


def test_every_option_has_a_description_and_comes_back() -> None:
    assert {option.name for option in OPTIONS} == set(Recipe.__dataclass_fields__)
    document = recipe_document(parse_recipe({"lr": 1, "epochs": 2}))
    assert parse_recipe(document) == parse_recipe({"lr": 1.0, "epochs": 2})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0), ("epochs", 10**6 + 1), ("epochs", 1.5), ("epochs", True), ("epochs", "3"),
        ("max_steps", -1), ("max_steps", 10**9 + 1), ("batch_size", 0), ("batch_size", None),
        ("grad_accumulation", 10**4 + 1), ("lr", 0), ("lr", -1), ("lr", math.inf), ("lr", math.nan),
        ("momentum", 1), ("momentum", -0.1), ("weight_decay", -1), ("weight_decay", math.inf),
        ("seed", -1), ("seed", 2**63), ("optimizer", "lion"), ("optimizer", None),
        ("optimizer", []), ("precision", "fp8"), ("device", "tpu"), ("device", "cuda:"),
        ("device", "cuda:1\n"), ("compile", 1), ("patience", 0),
        pytest.param("lr", 10**400, id="lr-too-large-for-a-float"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_under_its_name(name: str, value: object) -> None:
    with pytest.raises(InvalidDocument) as refused:
        parse_recipe({name: value})
    ((field, message),) = refused.value.errors
    assert field == f"training.{name}"
    assert message.endswith(".")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("batchsize", "batch_size"), ("lerning_rate", "lr"), ("num_epochs", "epochs"),
        ("epoch", "epochs"), ("optimiser", "optimizer"), ("lr_rate", "lr"),
    ],
)  # fmt: skip
def test_an_unknown_option_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(InvalidDocument, match=f"the nearest is '{nearest}'"):
        parse_recipe({name: 3})


@pytest.mark.parametrize("name", ["action", "match", "config", "lion"])
def test_an_unknown_option_names_none_that_is_not_near(name: str) -> None:
    with pytest.raises(InvalidDocument) as refused:
        parse_recipe({name: 3})
    assert str(refused.value) == f"{name!r} is not an option."


def test_warm_up_rises_and_schedules_fall() -> None:
    def factors(**options: object) -> list[float]:
        recipe = parse_recipe({"max_steps": 10, **options})
        return [learning_rate_factor(recipe, step, 10) for step in range(1, 11)]

    assert factors() == [1.0] * 10
    assert factors(warmup_steps=3)[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors(lr_schedule="linear") == pytest.approx([1 - i / 10 for i in range(10)])
    cosine = factors(lr_schedule="cosine", warmup_steps=2)
    assert cosine[2] == 1.0
    assert cosine[6] == pytest.approx(0.5)
    assert cosine == [*cosine[:3], *sorted(cosine[3:], reverse=True)]
