"""Settings: one frozen object, read once from options, FROSTLINE_* variables and defaults."""

import os
import secrets
import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


def default_data_dir() -> Path:
    """Where the platform keeps a user's application data."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "frostline"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "frostline"
    home = os.environ.get("XDG_DATA_HOME", "")
    # The XDG rule: a path that is not absolute counts as none.
    base = Path(home) if Path(home).is_absolute() else Path.home() / ".local" / "share"
    return base / "frostline"


def _split_list(value: Any) -> Any:
    """Lists in variables are separated like PATH; empty means none."""
    return [item for item in value.split(os.pathsep) if item] if isinstance(value, str) else value


def _resolve(value: Path) -> Path:
    return value.expanduser().resolve()


Folder = Annotated[Path, BeforeValidator(lambda value: _resolve(Path(value)))]
Folders = Annotated[tuple[Folder, ...], NoDecode, BeforeValidator(_split_list)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_list)]


class Settings(BaseSettings):
    """What the whole server is told from outside; keyword arguments win over the environment."""

    model_config = SettingsConfigDict(
        env_prefix="FROSTLINE_", env_ignore_empty=True, frozen=True, populate_by_name=True
    )

    data_dir: Folder = Field(default_factory=default_data_dir)
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    token: str | None = Field(default=None, repr=False)
    allowed_hosts: Names = ()
    code_dirs: Folders = ()
    file_dirs: Folders = ()
    # Not resolved: a virtual environment's interpreter is a link, and what it links to is not it.
    worker_python: Path | None = None
    cpu_slots: int = Field(default=1, ge=1, le=1024)
    behind_proxy: bool = Field(
        default=False, validation_alias=AliasChoices("FROSTLINE_PROXY", "behind_proxy")
    )
    root_path: str = ""
    insecure_http: bool = False
    stall_seconds: float = Field(default=600.0, gt=0)
    restart_seconds: float = Field(default=5.0, ge=0)  # before a job that was cut short goes on
    keep_stats_days: float | None = Field(default=None, ge=0)  # layer statistics of ended jobs
    min_free_bytes: int = Field(default=100_000_000, ge=0)  # below which no job is started


def read_token(settings: Settings) -> str:
    """The bearer token that scripts send: the one set, else the data folder's, made when missing.

    Raises:
        ValueError: the file is there and empty.
    """
    if settings.token is not None:
        return settings.token
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = settings.data_dir / "token"
    try:
        # Linked into place complete: two processes that start at once agree on one token.
        draft = path.with_name(f"token.{os.getpid()}.{secrets.token_hex(4)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        os.link(draft, path)
    except FileExistsError:
        path.chmod(0o600)
    finally:
        draft.unlink(missing_ok=True)
    token = path.read_text("ascii").strip()
    if not token:
        raise ValueError(f"{path} is empty. Delete it; the next start writes a new token there.")
    return token
