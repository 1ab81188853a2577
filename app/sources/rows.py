"""Reads tables and folders of images: rows, columns, roles and classes. Knows no model's code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.sources.fetch import ask_hub
from app.sources.intake import Intake
from app.sources.libraries import load_library
from app.sources.spec import DatasetSpec, split_uri
from app.sources.user_code import refuse_answer

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

TASK_ROLES: dict[str, tuple[str, ...]] = {
    "image-classification": ("image", "label"),
    "text-classification": ("text", "label"),
    "token-classification": ("tokens", "labels"),
    "text-generation": ("text",),
    "fill-mask": ("text",),
    "text2text-generation": ("text", "target"),
}
"""What a model of each task needs of a row."""

_USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "label": ("label", "labels", "class", "category", "target", "sentiment", "y", "fine_label"),
    "text": ("text", "sentence", "sentence1", "premise", "question1", "question", "review",
             "content", "document", "article", "source", "input", "prompt"),
    "text_pair": ("text_pair", "sentence2", "hypothesis", "question2"),
    "target": ("target", "summary", "highlights", "translation", "output", "answer", "response"),
    "image": ("image", "img", "picture"),
    "tokens": ("tokens", "words"),
    "labels": ("labels", "ner_tags", "tags", "pos_tags"),
}  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """Named sets of one source, with the names of classes where it knows them."""

    sets: Mapping[str, Any]
    columns: tuple[str, ...]
    class_names: tuple[str, ...] = ()


def read_rows(uri: str) -> Rows:
    """Read ``folder:``, ``csv:``, ``json:``, ``parquet:`` or ``hf:``.

    Raises:
        InvalidDocument: unreadable, empty, or not in the cache and the hub cannot be reached.
    """
    scheme, rest = split_uri(uri)
    rows = _read_folder(Path(rest)) if scheme == "folder" else _read_table(scheme, rest, uri)
    for name, dataset in rows.sets.items():
        if len(dataset) == 0:
            raise refuse_answer(f"{uri} is empty: its set {name!r} has no rows.", "dataset.uri")
    return rows


def _read_folder(folder: Path) -> Rows:
    """One sub-folder a class, in the order of their names."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    rows = [
        {"image": str(file), "label": kind.name}
        for kind in classes
        for file in sorted(kind.rglob("*"))
        if file.suffix.lower() in IMAGE_ENDINGS and file.is_file()
    ]
    if not classes:
        raise refuse_answer(
            f"{folder} has no sub-folders; folder: wants one for each class.", "dataset.uri"
        )
    if not rows:
        raise refuse_answer(
            f"{folder} is empty: no image in its sub-folders; files may end in "
            f"{', '.join(IMAGE_ENDINGS)}.",
            "dataset.uri",
        )
    _check_images(rows)
    return Rows({"train": rows}, ("image", "label"), tuple(kind.name for kind in classes))


def _check_images(rows: Sequence[Mapping[str, str]]) -> None:
    """Refuse the first file that is no image, by its header; truncated ones show when loaded."""
    image = load_library("PIL.Image")
    for row in rows:
        try:
            image.open(row["image"]).close()
        except (OSError, ValueError, SyntaxError) as error:
            raise refuse_answer(
                f"{row['image']} cannot be read as an image; mend or remove it.", "dataset.uri"
            ) from error


def _read_table(scheme: str, rest: str, uri: str) -> Rows:
    datasets = load_library("datasets")
    datasets.disable_progress_bars()
    try:
        if scheme == "hf":
            ask_hub()
            datasets.config.HF_HUB_OFFLINE = load_library("huggingface_hub").is_offline_mode()
            name, _, part = rest.partition(":")
            loaded = datasets.load_dataset(name, part or None)
        else:
            loaded = datasets.load_dataset(scheme, data_files={"train": rest})
    except MemoryError:
        raise
    except Exception as error:
        link: BaseException = error
        while link.__cause__ is not None:
            link = link.__cause__
        line = next(iter(str(link).splitlines()), "")[:300].rstrip(".") or type(link).__name__
        if "corresponds to no data" in line:
            raise refuse_answer(f"{uri} is empty: it has no rows.", "dataset.uri") from error
        advice = " Download it first, or name a file." if scheme == "hf" else ""
        raise refuse_answer(f"{uri} cannot be read: {line}.{advice}", "dataset.uri") from error
    if "train" not in loaded:
        raise refuse_answer(
            f"{uri} has no set named 'train'; it has {', '.join(loaded)}.", "dataset.uri"
        )
    features = loaded["train"].features
    kinds = [f for f in features.values() if isinstance(f, datasets.ClassLabel)]
    names = tuple(kinds[0].names) if len(kinds) == 1 else ()
    return Rows(dict(loaded), tuple(features), names)


# ----------------------------------------------------------------------------------------- columns


def choose_columns(rows: Rows, intake: Intake, spec: DatasetSpec) -> dict[str, str]:
    """Role → column: as `spec` says, else by the usual names, else the only one of its kind.

    Raises:
        InvalidDocument: a column is not there, a role cannot be guessed, or the model of this
            task takes no such rows.
    """
    needed = TASK_ROLES.get(intake.task)
    if needed is None:
        raise refuse_answer(
            f"A model for {intake.task!r} has no head to train on {spec.uri}; choose a 'task' of "
            f"{', '.join(TASK_ROLES)}.",
            "task",
        )
    if split_uri(spec.uri)[0] == "folder" and intake.task != "image-classification":
        raise refuse_answer(
            f"{spec.uri} holds images, and a model for {intake.task} takes text; give a table, or "
            "a model for image-classification.",
            "dataset.uri",
        )
    given = dict(spec.columns or {})
    for role, column in given.items():
        if column not in rows.columns:
            raise refuse_answer(
                f"{spec.uri} has no column {column!r}; it has {', '.join(rows.columns)}.",
                f"dataset.columns.{role}",
            )
    first = rows.sets["train"][0]
    chosen = dict(given)
    wanted = [*needed, *(["text_pair"] if intake.task == "text-classification" else [])]
    train = rows.sets["train"]
    for role in sorted(wanted, key=_GUESS_ORDER.index):
        free = [column for column in rows.columns if column not in chosen.values()]
        if role in chosen:
            continue
        usual = [column for name in _USUAL_NAMES[role] for column in free if column.lower() == name]
        fitting = usual or [column for column in free if _may_be(role, first[column])]
        if role == "label" and len(fitting) > 1:
            fitting = [column for column in fitting if _repeats(train, column)]
        if role == "text_pair":
            if usual:
                chosen[role] = usual[0]
        elif usual or len(fitting) == 1:
            chosen[role] = fitting[0]
        else:
            raise refuse_answer(
                f"Which column of {spec.uri} is the {role}? It has {', '.join(rows.columns)}, and "
                f"a model for {intake.task} needs {' and '.join(needed)}; say it in 'columns': "
                f"{{{role!r}: NAME}}.",
                f"dataset.columns.{role}",
            )
    return {role: chosen[role] for role in wanted if role in chosen}


# A label before the text, which could be any other string; an image before all.
_GUESS_ORDER = ("image", "labels", "label", "target", "tokens", "text", "text_pair")
_LOOKED_AT = 1_000


def _repeats(rows: Any, column: str) -> bool:
    """Whether a column has at most half as many values as rows, as classes do."""
    values = rows[:_LOOKED_AT][column]
    return len(set(values)) * 2 <= len(values)


def _may_be(role: str, value: Any) -> bool:
    if role in ("text", "target"):
        return isinstance(value, str)
    if role == "label":
        return isinstance(value, str | int) and not isinstance(value, bool)
    if role in ("tokens", "labels"):
        return isinstance(value, list)
    return not isinstance(value, str | int | float | list | type(None))


def check_values(rows: Any, columns: Mapping[str, str], uri: str) -> None:
    """Refuse a column with a value of another kind than its role's, naming the row."""
    kinds: dict[str, tuple[Callable[[Any], bool], str]] = {
        "text": (lambda v: isinstance(v, str), "a text"),
        "text_pair": (lambda v: isinstance(v, str), "a text"),
        "target": (lambda v: isinstance(v, str), "a text"),
        "tokens": (lambda v: isinstance(v, list) and bool(v), "a list of words"),
        "image": (lambda v: hasattr(v, "convert"), "an image"),
    }
    for role, column in columns.items():
        if role not in kinds or (role == "image" and isinstance(rows, list)):
            continue
        is_good, words = kinds[role]
        values = [rows[0][column]] if role == "image" else rows[column]
        for number, value in enumerate(values, start=1):
            if not is_good(value):
                raise refuse_answer(
                    f"Row {number} of {uri} has {value!r:.60} in its column {column!r}, where "
                    f"{words} is needed; mend it, or name another column in 'columns'.",
                    f"dataset.columns.{role}",
                )


# ----------------------------------------------------------------------------------------- classes


def read_labels(rows: Any, column: str) -> list[Any]:
    return [row[column] for row in rows] if isinstance(rows, list) else list(rows[column])


def name_classes(labels: Sequence[Any], rows: Rows, intake: Intake, uri: str) -> dict[Any, int]:
    """Label → class id of the training set's labels, checked against the model's head.

    The source's own class names decide, then a pretrained head's where it knows every label, then
    whole numbers as they are, then the order of the labels.

    Raises:
        InvalidDocument: one class, labels that are no classes, or more of them than the head has.
    """
    flat = [x for label in labels for x in (label if isinstance(label, list) else [label])]
    for number, label in enumerate(flat, start=1):
        if label is None or isinstance(label, float | bytes | dict):
            raise refuse_answer(
                f"Label {number} of {uri} is {label!r:.60}; a class is a name or a whole number.",
                "dataset.columns.label",
            )
    found = sorted(set(flat), key=lambda label: (isinstance(label, str), label))
    if len(found) < 2:
        raise refuse_answer(
            f"{uri} has one class, {found[0]!r:.60}; there is nothing to tell apart. Add rows of "
            "another class, or name another label column.",
            "dataset.columns.label",
        )
    if all(isinstance(label, int) for label in found):
        ids = {label: int(label) for label in found}
    elif rows.class_names and set(found) <= set(rows.class_names):
        ids = {name: i for i, name in enumerate(rows.class_names)}
    else:
        ids = {label: i for i, label in enumerate(found)}
    heads_own = {name.lower(): i for i, name in enumerate(intake.class_names)}
    if intake.class_names and all(str(label).lower() in heads_own for label in found):
        ids = {label: heads_own[str(label).lower()] for label in found}
    least, most = min(ids.values()), max(ids.values())
    if least < 0:
        raise refuse_answer(
            f"{uri} has the label {least}; class ids count from 0.", "dataset.columns.label"
        )
    if intake.classes is not None and most >= intake.classes:
        raise refuse_answer(
            f"{uri} has labels up to class {most}, outside the model's head of {intake.classes} "
            f"classes; give the model 'num_classes': {most + 1}.",
            "dataset.columns.label",
        )
    return ids
