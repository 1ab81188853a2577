"""How a verb is declared: a function becomes a command with the options that all share."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from app import __version__
from app.client import Failure
from app.training.recipe import OPTIONS, Option

# What takes long to import is imported where it is used: `frostline --help` answers at once.
if TYPE_CHECKING:
    from app.settings import Settings

app = typer.Typer(
    name="frostline",
    help="Decide, apply, prove and profit from freezing layers of PyTorch models.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"frostline {__version__}")
        raise typer.Exit


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function whose first argument is the settings.

    Instead of the settings it gets --data-dir and --debug, and instead of ``**training`` one
    option for each option of a recipe.
    """
    own = list(inspect.signature(function).parameters.values())[1:]
    if own and own[-1].kind is inspect.Parameter.VAR_KEYWORD:
        own[-1:] = [_training_parameter(option) for option in OPTIONS]
    shared = [
        _keyword("data_dir", Path | None, None, "--data-dir", "Where the database and jobs lie."),
        _keyword("debug", bool, False, "--debug", "Show the traceback of a failure."),
    ]

    def command(data_dir: Path | None, debug: bool, **options: Any) -> None:  # noqa: ARG001
        function(read_settings(data_dir=data_dir), **options)

    parameters = [*own, *shared]
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app.command(function.__name__.rstrip("_"), cls=_OrderedRules)(command)
    return function


def _keyword(name: str, kind: Any, default: Any, flag: str, words: str) -> inspect.Parameter:
    annotation = Annotated[kind, typer.Option(flag, help=words, show_default=default is not None)]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _training_parameter(option: Option) -> inspect.Parameter:
    kinds: dict[str, Any] = {"int": int, "float": float, "bool": bool}
    kind = Literal[option.choices] if option.choices else kinds.get(option.kind, str)
    flag = f"--{option.name.replace('_', '-')}"
    if option.kind == "bool":
        flag = f"{flag}/--no-{flag[2:]}"
    usual = "" if option.default is None else f" [{option.default}]"
    return _keyword(option.name, kind | None, None, flag, option.help + usual)


class _OrderedRules(TyperCommand):
    """Remembers in which order --freeze and --unfreeze came: the last rule that matches decides."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        flags = (argument.partition("=")[0] for argument in args)
        ctx.obj = [flag[2:] for flag in flags if flag in ("--freeze", "--unfreeze")]
        return super().parse_args(ctx, args)


def read_settings(**given: Any) -> "Settings":
    """Options, then FROSTLINE_* variables, then defaults; the current folder may be read too."""
    from pydantic import ValidationError

    from app.settings import Settings

    try:
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        fault = error.errors()[0]
        name = "_".join(["FROSTLINE", *map(str, fault["loc"])]).upper()
        raise Failure(f"{name}: {fault['msg']}.") from error
    here = Path.cwd()
    return settings.model_copy(
        update={
            "code_dirs": (*settings.code_dirs, here),
            "file_dirs": (*settings.file_dirs, here),
        }
    )
