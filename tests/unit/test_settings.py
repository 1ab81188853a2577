"""Settings: what the environment says, what options say over it, and the token's file."""

import os
import stat
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.settings import Settings, read_token


def test_variables_are_read_and_lists_are_split_like_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = [tmp_path / "a", tmp_path / "b"]
    monkeypatch.setenv("FROSTLINE_CODE_DIRS", os.pathsep.join(map(str, code)))
    monkeypatch.setenv("FROSTLINE_FILE_DIRS", "")
    monkeypatch.setenv("FROSTLINE_ALLOWED_HOSTS", "one.example")
    monkeypatch.setenv("FROSTLINE_PROXY", "1")
    monkeypatch.setenv("FROSTLINE_CPU_SLOTS", "2")
    settings = Settings(data_dir=tmp_path)
    assert settings.code_dirs == tuple(path.resolve() for path in code)
    assert settings.file_dirs == ()
    assert settings.allowed_hosts == ("one.example",)
    assert settings.behind_proxy
    assert settings.cpu_slots == 2


def test_options_win_over_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FROSTLINE_PORT", "1234")
    monkeypatch.setenv("FROSTLINE_PROXY", "0")
    settings = Settings(data_dir=tmp_path, port=4321, behind_proxy=True)
    assert settings.port == 4321
    assert settings.behind_proxy


def test_settings_are_frozen_and_hide_the_token(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, token="secret")
    assert "secret" not in repr(settings)
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]


def test_the_data_folder_follows_the_platforms_rule(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FROSTLINE_DATA_DIR", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert Settings().data_dir == (tmp_path / "frostline").resolve()
    monkeypatch.setenv("XDG_DATA_HOME", "not/absolute")
    assert Settings().data_dir == Path.home() / ".local/share/frostline"


def test_the_token_is_made_once_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "new", token=None)
    token = read_token(settings)
    assert len(token) >= 32
    assert read_token(settings) == token
    assert stat.S_IMODE((tmp_path / "new" / "token").stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["token"]


def test_a_token_that_is_set_is_not_written(tmp_path: Path) -> None:
    assert read_token(Settings(data_dir=tmp_path, token="given")) == "given"
    assert not (tmp_path / "token").exists()


def test_an_empty_token_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("\n")
    with pytest.raises(ValueError, match="Delete it"):
        read_token(Settings(data_dir=tmp_path, token=None))
