"""Model and dataset specs: what to load, checked without loading it. No torch."""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from app.freezing.errors import MAX_SHOWN, InvalidDocument, describe_unknown
from app.sources.demo import DEMO_DATASETS, DEMO_MODELS

INPUT_DTYPES = (
    "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip
MAX_INPUT_NUMEL = 10**8
MAX_URI_LENGTH = 1_000
MAX_EVAL_SETS = 100
MAX_FAULTS = 100  # a document of nothing but unknown keys gets no longer answer

_MODEL_FORMS = (
    "demo:NAME, hf:ORG/NAME, hf:/FOLDER, timm:NAME, torchvision:NAME or "
    "python:PACKAGE.MODULE:FACTORY"
)
_DATASET_FORMS = (
    "demo:NAME, folder:PATH, csv:PATH, json:PATH, parquet:PATH, hf:NAME or "
    "python:PACKAGE.MODULE:FACTORY"
)
FILE_SCHEMES = ("folder", "csv", "json", "parquet")
_LIBRARIES = ("timm", "torchvision")
_HUB_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?")

TASKS: dict[str, str] = {
    "image-classification": "image-classification",
    "text-classification": "text-classification",
    "sentiment-analysis": "text-classification",
    "token-classification": "token-classification",
    "ner": "token-classification",
    "text-generation": "text-generation",
    "causal-lm": "text-generation",
    "fill-mask": "fill-mask",
    "masked-lm": "fill-mask",
    "text2text-generation": "text2text-generation",
    "seq2seq-lm": "text2text-generation",
    "summarization": "text2text-generation",
    "translation": "text2text-generation",
    "feature-extraction": "feature-extraction",
}
"""What 'task' may say → the hub's own name of it, by which the head is picked."""

ROLES = ("text", "text_pair", "label", "image", "target", "tokens", "labels")
"""What a column of a table can be to a model."""


@dataclass(frozen=True)
class InputSpec:
    """One input of a model that gives no example of its own, without the batch."""

    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class ModelSpec:
    """Which model, from where, with which weights.

    Attributes:
        revision: branch, tag or commit of an ``hf:`` model; None is its main branch.
        task: which head an ``hf:`` model gets; None is the one that its configuration names.
        num_classes: of the head; None keeps the head as it is.
        weights: absolute path of what is loaded over the model, None for nothing.
        new_head: `weights` may lack tensors of the model or have them in another shape; those keep
            their initial values.
        random_init: build without the pretrained weights.
        kwargs: what a ``python:`` factory is called with, or what overrides a configuration.
        input: wins over the example that a factory gives.
        allow_pickle: `weights` may be a pickle file, read with ``weights_only=True``.
    """

    uri: str
    revision: str | None = None
    task: str | None = None
    num_classes: int | None = None
    weights: str | None = None
    random_init: bool = False
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    input: InputSpec | None = None
    allow_pickle: bool = False
    new_head: bool = False


@dataclass(frozen=True)
class DatasetSpec:
    """Which data to train on, and which to hold out.

    Attributes:
        columns: role (one of `ROLES`) → column of a table; guessed where it is not named.
        max_length: tokens after which a text is cut; None is what the model takes, 512 at most.
        image_size: pixels of a side; None is what the model takes.
        eval: further evaluation sets, name → URI.
        eval_fraction: share of the training set that is split off for evaluation where the dataset
            brings none; None means a tenth, unless `eval` names a set.
        num_workers: processes that load batches; 0 loads them in the training process.
        kwargs: what a ``python:`` factory of `uri` (not of `eval`) is called with.
    """

    uri: str
    columns: Mapping[str, Any] | None = None
    eval: Mapping[str, str] = field(default_factory=dict)
    eval_fraction: float | None = None
    max_length: int | None = None
    image_size: int | None = None
    num_workers: int = 0
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def spec_document(spec: ModelSpec | DatasetSpec) -> dict[str, Any]:
    """The spec as JSON values, every option present; parsing it gives an equal spec."""
    document = asdict(spec)
    if isinstance(spec, ModelSpec) and spec.input:
        document["input"] = {"shape": list(spec.input.shape), "dtype": spec.input.dtype}
    return document


def split_uri(uri: str) -> tuple[str, str]:
    """``demo:digits`` → (``demo``, ``digits``)."""
    scheme, _, rest = uri.partition(":")
    return scheme, rest


def find_module_file(module: str, code_dirs: Sequence[Path]) -> Path | None:
    """The file that ``python:MODULE:…`` would load, looked up and not imported.

    Returns:
        The first of DIR/a/b/__init__.py and DIR/a/b.py that is a file below its folder when links
        are resolved; None where there is none.
    """
    for folder in code_dirs:
        stem = folder.joinpath(*module.split("."))
        for file in (stem / "__init__.py", stem.with_name(f"{stem.name}.py")):
            if (path := _resolve_inside(file, folder)) and path.is_file():
                return file
    return None


def parse_model_spec(
    document: Any, *, code_dirs: Sequence[Path], file_dirs: Sequence[Path]
) -> ModelSpec:
    """Read a model spec; nothing is loaded and no user code is touched.

    Args:
        document: JSON values in the shape of `ModelSpec`; only ``uri`` is required.
        code_dirs: folders in which the module of a ``python:`` URI may lie.
        file_dirs: folders below which `weights` may lie; a relative path is looked up in each.

    Raises:
        InvalidDocument: with every unknown key (naming the nearest) and every bad value.
    """
    reader = _Reader(document, ModelSpec, "")
    uri = reader.required_uri(code_dirs, file_dirs)
    scheme = split_uri(uri)[0]
    if scheme != "hf":
        for name in ("revision", "task"):
            reader.refuse(name, "is for hf: models; leave it out")
    if scheme == "python":
        for name in ("num_classes", "random_init"):
            reader.refuse(name, "is up to the factory; give it in 'kwargs'")
    elif scheme == "demo":
        reader.refuse("kwargs", "is for models that are not built in; leave it out")
    allow_pickle = reader.truth("allow_pickle")
    spec = ModelSpec(
        uri=uri,
        revision=reader.revision(),
        task=reader.task(),
        num_classes=reader.whole("num_classes", 1, 10**7, None),
        weights=reader.weights(file_dirs, allow_pickle),
        random_init=reader.truth("random_init"),
        kwargs=reader.keywords("kwargs"),
        input=reader.input(),
        allow_pickle=allow_pickle,
        new_head=reader.truth("new_head"),
    )
    reader.finish()
    return spec


def parse_dataset_spec(
    document: Any, *, code_dirs: Sequence[Path], file_dirs: Sequence[Path]
) -> DatasetSpec:
    """Read a dataset spec; nothing is loaded and no user code is touched.

    Args:
        document: JSON values in the shape of `DatasetSpec`; only ``uri`` is required.
        code_dirs: folders in which the modules of ``python:`` URIs may lie.
        file_dirs: folders below which data files may lie.

    Raises:
        InvalidDocument: with every unknown key (naming the nearest) and every bad value; its
            fields begin with ``dataset``.
    """
    reader = _Reader(document, DatasetSpec, "dataset")
    uri = reader.required_uri(code_dirs, file_dirs)
    scheme = split_uri(uri)[0]
    if scheme in ("demo", "python"):
        reader.refuse("columns", "is for tables; leave it out")
        reader.refuse("max_length", "is for texts that Frostline tokenises; leave it out")
        reader.refuse("image_size", "is for images that Frostline resizes; leave it out")
    if scheme != "python":
        reader.refuse("kwargs", "is for python: datasets; leave it out")
    if scheme == "demo":
        reader.refuse("eval_fraction", f"must be left out: {uri} brings its own held-out examples")
    eval_sets = reader.eval_sets(code_dirs, file_dirs)
    fraction = reader.fraction("eval_fraction")
    if fraction is not None and "eval" in eval_sets:
        reader.fault("eval_fraction", "'eval_fraction' and 'eval' both give the set named 'eval'.")
    spec = DatasetSpec(
        uri=uri,
        columns=reader.columns(),
        eval=eval_sets,
        eval_fraction=fraction,
        max_length=reader.whole("max_length", 1, 10**6, None),
        image_size=reader.whole("image_size", 1, 10**4, None),
        num_workers=reader.whole("num_workers", 0, 256, 0) or 0,
        kwargs=reader.keywords("kwargs"),
    )
    reader.finish()
    return spec


class _Reader:
    """Takes values out of a document one by one and gathers what is wrong with them."""

    def __init__(self, document: Any, spec: type[ModelSpec | DatasetSpec], prefix: str) -> None:
        noun = "dataset" if spec is DatasetSpec else "model"
        if not isinstance(document, Mapping):
            raise InvalidDocument(
                [(prefix, f"A {noun} is an object with a 'uri'; this is {_show(document)}.")]
            )
        self._document, self._noun, self._prefix = document, noun, prefix
        self._errors: list[tuple[str, str]] = []
        known = [option.name for option in fields(spec)]
        for key in [key for key in document if key not in known][:MAX_FAULTS]:
            message = describe_unknown(key, known, f"an option of a {noun}")
            self.fault(str(key)[:MAX_SHOWN], message)

    def fault(self, name: str, message: str) -> None:
        field = f"{self._prefix}.{name}" if self._prefix else name
        self._errors.append((field, message))

    def finish(self) -> None:
        if self._errors:
            raise InvalidDocument(self._errors)

    def _take(self, name: str, default: Any, is_good: Callable[[Any], object], words: str) -> Any:
        """The value where it is good, else `default`; null and absence mean the default."""
        value = self._document.get(name)
        if value is None:
            return default
        if not is_good(value):
            self.fault(name, f"'{name}' must be {words}; this is {_show(value)}.")
            return default
        return value

    def refuse(self, name: str, why: str) -> None:
        """Refuse an option that would be ignored; null, false and {} ask for nothing."""
        value = self._document.get(name)
        if value is not None and value is not False and value != {}:
            self.fault(name, f"'{name}' {why}.")

    def truth(self, name: str) -> bool:
        return self._take(name, False, lambda value: isinstance(value, bool), "true or false")

    def whole(self, name: str, least: int, most: int, default: int | None) -> int | None:
        words = f"a whole number from {least} to {most:,}"
        return self._take(name, default, lambda value: _is_whole(value, least, most), words)

    def fraction(self, name: str) -> float | None:
        words = "a number from 0 to below 1 (0 holds nothing out)"
        return self._take(name, None, _is_fraction, words)

    def keywords(self, name: str) -> Mapping[str, Any]:
        def is_good(value: Any) -> bool:
            return isinstance(value, Mapping) and all(isinstance(k, str) for k in value)

        return dict(self._take(name, {}, is_good, "an object of keyword arguments"))

    def revision(self) -> str | None:
        words = "a branch, a tag or a commit"
        return self._take("revision", None, _is_revision, words)

    def task(self) -> str | None:
        """The task by the hub's name of it."""
        words = f"one of {', '.join(TASKS)}"
        task = self._take("task", None, lambda v: isinstance(v, str) and v in TASKS, words)
        return task and TASKS[task]

    def columns(self) -> Mapping[str, str] | None:
        words = f"an object of roles ({', '.join(ROLES)}) and columns"
        return self._take("columns", None, _names_columns, words)

    def required_uri(self, code_dirs: Sequence[Path], file_dirs: Sequence[Path]) -> str:
        try:
            return _read_uri(self._document.get("uri"), self._noun, code_dirs, file_dirs)
        except ValueError as error:
            self.fault("uri", str(error))
        self.finish()  # what the other options may be depends on the URI
        raise AssertionError("a fault was added")

    def eval_sets(self, code_dirs: Sequence[Path], file_dirs: Sequence[Path]) -> Mapping[str, str]:
        words = f"an object of at most {MAX_EVAL_SETS} names and URIs"
        given = self._take(
            "eval", {}, lambda v: isinstance(v, Mapping) and len(v) <= MAX_EVAL_SETS, words
        )
        sets: dict[str, str] = {}
        for name, uri in given.items():
            if not is_set_name(name):
                self.fault("eval", f"{_show(name)} cannot name a set: {SET_NAME_WORDS}.")
            try:
                sets[name] = _read_uri(uri, "dataset", code_dirs, file_dirs)
            except ValueError as error:
                self.fault(f"eval.{name}", str(error))
        return sets

    def input(self) -> InputSpec | None:
        words = "an object like {'shape': [3, 6, 6], 'dtype': 'float32'}"
        value = self._take("input", None, lambda v: isinstance(v, Mapping) and "shape" in v, words)
        if value is None:
            return None
        shape, dtype = value["shape"], value.get("dtype", "float32")
        if unknown := set(value) - {"shape", "dtype"}:
            self.fault("input", f"{_show(sorted(map(str, unknown))[0])} is not a key of 'input'; "
                       "it has 'shape' and 'dtype'.")  # fmt: skip
        if not (
            isinstance(shape, list | tuple)
            and len(shape) <= 16
            and all(_is_whole(size, 1, MAX_INPUT_NUMEL) for size in shape)
            and math.prod(shape) <= MAX_INPUT_NUMEL
        ):
            self.fault("input.shape", "'shape' must be a list of sizes without the batch, with "
                       f"{MAX_INPUT_NUMEL:,} values at most; this is {_show(shape)}.")  # fmt: skip
            shape = ()
        if dtype not in INPUT_DTYPES:
            self.fault("input.dtype", f"'dtype' must be one of {', '.join(INPUT_DTYPES)}; "
                       f"this is {_show(dtype)}.")  # fmt: skip
        return InputSpec(tuple(shape), dtype)

    def weights(self, file_dirs: Sequence[Path], allow_pickle: bool) -> str | None:
        given = self._take(
            "weights", None, lambda v: isinstance(v, str) and v and "\0" not in v, "a path"
        )
        if given is None:
            return None
        try:
            path = resolve_below(given, file_dirs)
            _check_weights(path, given, allow_pickle)
        except ValueError as error:
            self.fault("weights", str(error))
            return None
        return str(path)


def resolve_below(given: str, file_dirs: Sequence[Path]) -> Path:
    """The real path of `given`, which exists and lies below one of `file_dirs`, links resolved.

    Raises:
        ValueError: it does not; the sentence is the same whether a path outside exists or not.
    """
    if not file_dirs:
        raise ValueError("No folder is open for reading files; name one in FROSTLINE_FILE_DIRS.")
    for folder in file_dirs:
        if path := _resolve_inside(folder / given, folder):
            return path
    folders = ", ".join(str(folder) for folder in file_dirs)
    raise ValueError(f"There is no {_show(given)} below the folders open for reading: {folders}.")


def _resolve_inside(path: Path, folder: Path) -> Path | None:
    """The real path where it exists and lies below the real folder, else None."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # absent, a loop of links, not a possible name
        return None
    return real if real.is_relative_to(folder.resolve()) else None


def _check_weights(path: Path, given: str, allow_pickle: bool) -> None:
    """Raise ValueError unless `path` is a kind of file or folder that weights are read from."""
    if path.is_dir():
        if not any((path / name).is_file() for name in WEIGHT_FILES):
            raise ValueError(f"{_show(given)} holds neither {' nor '.join(WEIGHT_FILES)}.")
    elif not path.is_file():
        raise ValueError(f"{_show(given)} is neither a regular file nor a folder.")
    elif path.suffix != ".safetensors" and not allow_pickle:
        raise ValueError(
            f"{_show(given)} is not a .safetensors file. If it is a pickle file that you trust, "
            "say 'allow_pickle': true; it is then read with weights_only."
        )


WEIGHT_FILES = ("model.safetensors.index.json", "model.safetensors")
"""What a folder of weights holds: an index of shards, or a single file."""

SET_NAME_WORDS = "1 to 100 printable characters without '/'"


def is_set_name(name: Any) -> bool:
    """Whether `name` can stand in a metric's name, between slashes."""
    return isinstance(name, str) and 0 < len(name) <= 100 and name.isprintable() and "/" not in name


def _read_uri(uri: Any, noun: str, code_dirs: Sequence[Path], file_dirs: Sequence[Path]) -> str:
    """The URI, its path made real where it names one.

    Raises:
        ValueError: what is wrong with it, in a sentence.
    """
    is_model = noun == "model"
    forms = f"A {noun} is named by {_MODEL_FORMS if is_model else _DATASET_FORMS}"
    if not isinstance(uri, str) or not uri:
        raise ValueError(
            f"{forms}; " + ("there is no 'uri'." if uri is None else f"this is {_show(uri)}.")
        )
    if len(uri) > MAX_URI_LENGTH:
        raise ValueError(
            f"A URI has at most {MAX_URI_LENGTH:,} characters; this one has {len(uri):,}."
        )
    scheme, rest = split_uri(uri)
    if scheme == "demo":
        demos = DEMO_MODELS if is_model else DEMO_DATASETS
        if rest not in demos:
            built_in = ", ".join(f"demo:{name}" for name in demos)
            raise ValueError(f"{_show(uri)} is not built in; built in are {built_in}.")
    elif scheme == "python":
        if fault := _find_entry_point_fault(uri, rest, code_dirs):
            raise ValueError(fault)
    elif scheme == "hf":
        return f"hf:{_read_hub_name(uri, rest, file_dirs)}"
    elif is_model and scheme in _LIBRARIES:
        if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", rest):
            raise ValueError(f"{_show(uri)} must have the form {scheme}:NAME.")
    elif not is_model and scheme in FILE_SCHEMES:
        return f"{scheme}:{_read_data_path(scheme, rest, file_dirs)}"
    else:
        raise ValueError(f"{forms}; this is {_show(uri)}.")
    return uri


def _read_hub_name(uri: str, rest: str, file_dirs: Sequence[Path]) -> str:
    """ORG/NAME as it is, a folder as its real path."""
    if rest.startswith(("/", ".", "~")):
        path = resolve_below(rest, file_dirs)
        if not path.is_dir():
            raise ValueError(f"{_show(uri)} names no folder.")
        return str(path)
    for folder in file_dirs if "/" in rest else ():  # a folder wins, as Transformers has it
        inside = _resolve_inside(folder / rest, folder)
        if inside and (inside / "config.json").is_file():
            return str(inside)
    if not _HUB_NAME.fullmatch(rest):
        raise ValueError(f"{_show(uri)} must have the form hf:ORG/NAME or hf:/FOLDER.")
    return rest


def _read_data_path(scheme: str, rest: str, file_dirs: Sequence[Path]) -> Path:
    if not rest or "\0" in rest:
        raise ValueError(f"{scheme}: needs a path, like {scheme}:/DATA/NAME.")
    path = resolve_below(rest, file_dirs)
    if scheme == "folder" and not path.is_dir():
        raise ValueError(f"{_show(rest)} is not a folder; folder: wants one sub-folder a class.")
    if scheme != "folder" and not path.is_file():
        raise ValueError(f"{_show(rest)} is not a regular file; {scheme}: wants one.")
    return path


def _is_revision(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w][\w./-]{0,199}", value) is not None


def _names_columns(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        role in ROLES and isinstance(column, str) and column for role, column in value.items()
    )


def _find_entry_point_fault(uri: str, rest: str, code_dirs: Sequence[Path]) -> str | None:
    module, _, factory = rest.partition(":")
    names = [*module.split("."), factory]
    if not all(name.isidentifier() and not keyword.iskeyword(name) for name in names):
        return f"{_show(uri)} must have the form python:PACKAGE.MODULE:FACTORY, in Python names."
    if not code_dirs:
        return "No folder is open for python: entry points; name one in FROSTLINE_CODE_DIRS."
    if find_module_file(module, code_dirs) is None:
        path = module.replace(".", "/")
        folders = ", ".join(str(folder) for folder in code_dirs)
        return f"There is no {path}.py and no {path}/__init__.py below {folders}."
    return None


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_fraction(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:99] + "…"
