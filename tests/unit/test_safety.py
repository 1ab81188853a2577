"""The security section of the doctor: what is red, and what is not."""

from pathlib import Path

import pytest

from app.safety import examine_safety
from app.settings import Settings, read_token


def red(settings: Settings) -> dict[str, str]:
    return {name: words for name, (good, words) in examine_safety(settings) if not good}


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    read_token(Settings(data_dir=folder))
    return folder


def test_a_fresh_installation_is_well(data_dir: Path) -> None:
    assert red(Settings(data_dir=data_dir)) == {}
    assert red(Settings(data_dir=data_dir.parent / "none")) == {}


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"host": "0.0.0.0", "insecure_http": True}, "address", "in clear text"),
        ({"host": "10.1.1.1"}, "address", "refuse to start"),
        ({"allowed_hosts": ("*.lab",)}, "host names", "exactly"),
        ({"token": "short"}, "token", "5 characters"),
    ],
)
def test_a_risky_setting_is_red_and_says_what_to_do(
    data_dir: Path, changes: dict[str, object], name: str, words: str
) -> None:
    found = red(Settings(data_dir=data_dir, **changes))
    assert list(found) == [name]
    assert words in found[name]
    assert "short" not in found[name]


def test_what_a_proxy_or_a_long_token_makes_safe_is_not_red(data_dir: Path) -> None:
    settings = Settings(data_dir=data_dir, host="0.0.0.0", behind_proxy=True, token="x" * 32)
    assert red(settings) == {}


def test_what_others_can_read_or_write_is_red(data_dir: Path) -> None:
    code = data_dir.parent / "code"
    code.mkdir()
    code.chmod(0o777)
    data_dir.chmod(0o755)
    (data_dir / "token").chmod(0o644)
    found = red(Settings(data_dir=data_dir, code_dirs=(code,)))
    assert list(found) == ["token", "data is private", "code is yours"]
    assert "chmod 700" in found["data is private"]
    assert "chmod o-w" in found["code is yours"]
