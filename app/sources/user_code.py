"""Calls a user's own factory, ``python:PACKAGE.MODULE:FACTORY``. Knows not what it gives."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from app.freezing.errors import InvalidDocument
from app.sources.spec import find_module_file


class UserCodeError(Exception):
    """A user's own code failed; ``__cause__`` is what it raised.

    Attributes:
        reason: ``import_error`` where its module could not be imported, ``data_error`` where a
            row broke a library's code, else ``user_code``.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


# Not the user's mistake, and told apart by whoever runs the job: these pass as they are.
_NOT_WRAPPED = (UserCodeError, InvalidDocument, MemoryError, torch.OutOfMemoryError)


def call_factory(
    entry_point: str, kwargs: Mapping[str, Any], *, code_dirs: Sequence[Path]
) -> object:
    """Import ``PACKAGE.MODULE:FACTORY`` from a code folder and call the factory.

    Side effects: puts `code_dirs` first on ``sys.path`` for good, since user code may import later.

    Raises:
        InvalidDocument: no such module or factory, or a factory that does not take `kwargs`.
        UserCodeError: importing or calling it raised.
    """
    module_name, _, factory_name = entry_point.partition(":")
    module = _import_module(module_name, code_dirs)
    factory = getattr(module, factory_name, None)
    if not callable(factory) or isinstance(factory, torch.nn.Module):
        raise refuse_answer(_explain_factory(module, factory_name))
    _check_arguments(factory, factory_name, kwargs)
    return run_user_code(lambda: factory(**kwargs), f"python:{entry_point}")


def run_user_code(call: Callable[[], Any], where: str, reason: str = "user_code") -> Any:
    """Make a call into a user's code, naming `where` it was where that raises.

    Args:
        reason: what to blame; ``data_error`` where the code is a library's, and the data is theirs.

    Raises:
        UserCodeError: whatever it raised, as a sentence, but for running out of memory.
    """
    try:
        return call()
    except _NOT_WRAPPED:
        raise
    except Exception as error:
        raise UserCodeError(f"{where} raised {_describe(error)}", reason) from error


def _import_module(name: str, code_dirs: Sequence[Path]) -> ModuleType:
    file = find_module_file(name, code_dirs)
    if file is None:
        folders = ", ".join(str(folder) for folder in code_dirs) or "any folder: none is open"
        raise refuse_answer(f"There is no module {name!r} below {folders}.")
    first = [str(folder.resolve()) for folder in code_dirs]
    sys.path[:] = first + [entry for entry in sys.path if entry not in first]
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
    except _NOT_WRAPPED:
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise _refuse_taken_name(name, file) from error
        message = f"Importing {name!r} raised {_describe(error)}"
        raise UserCodeError(message, "import_error") from error
    if Path(getattr(module, "__file__", None) or "").resolve() != file.resolve():
        raise _refuse_taken_name(name, file)
    return module


def _refuse_taken_name(name: str, file: Path) -> InvalidDocument:
    """Some module that was imported before, ours or Python's, is in the way of the user's."""
    top = name.partition(".")[0]
    taken_by = getattr(sys.modules.get(top), "__file__", None) or "a module of Python itself"
    return refuse_answer(
        f"{name!r} cannot be imported from {file}: {top!r} is already the name of {taken_by}. "
        "Put the code into a package of another name."
    )


def _explain_factory(module: ModuleType, name: str) -> str:
    if hasattr(module, name):
        return f"{name!r} in {module.__name__} is {getattr(module, name)!r:.100}, not a function."
    own = [
        key
        for key, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    offered = f"it defines {', '.join(own[:10])}" if own else "it defines no functions"
    return f"The module {module.__name__!r} has no {name!r}; {offered}."


def _check_arguments(factory: Callable[..., Any], name: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse kwargs that do not fit, apart from a TypeError that is raised further in."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some callables made in C have none: the call itself will tell
        return
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        raise refuse_answer(
            f"The factory has the form {name}{signature}, which 'kwargs' do not fit: {error}.",
            "kwargs",
        ) from error


def check_answer_keys(answer: Mapping[Any, Any], known: Sequence[str], uri: str) -> None:
    """Refuse a key that would be ignored in the mapping that a factory returned.

    Raises:
        InvalidDocument: there is one; the nearest known key is named.
    """
    for key in answer:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0)[0]
            raise refuse_answer(f"{uri} returned a mapping with {key!r}; did it mean {near!r}?")


def name_type(value: object) -> str:
    """What came instead of what was asked for, for the middle of a sentence."""
    return "None" if value is None else f"an object of type {type(value).__name__}"


def refuse_answer(message: str, field: str = "uri") -> InvalidDocument:
    """The error to raise for what user code gave, under the option of the spec that is at fault."""
    return InvalidDocument([(field, message)])


def _describe(error: Exception) -> str:
    first_line = next(iter(str(error).splitlines()), "")
    return ": ".join(part for part in (type(error).__name__, first_line[:300]) if part)
