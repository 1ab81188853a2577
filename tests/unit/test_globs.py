"""Globs over dotted names."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.freezing.globs import compile_match


@pytest.mark.parametrize(
    ("match", "name", "covers"),
    [
        ("**", "a.b.weight", True),
        ("layer1", "layer1.weight", True),
        ("layer1", "layer10.weight", False),
        ("layer*", "layer10.weight", True),
        ("*", "layer1.0.weight", True),  # it names every top module, so all below them
        ("*.weight", "a.weight", True),
        ("*.weight", "a.b.weight", False),
        ("**.weight", "weight", True),
        ("**.weight", "a.b.weight", True),
        ("**.weight", "a.b.weighted", False),
        ("a.**.c", "a.c", True),
        ("a.**.c", "a.x.y.c", True),
        ("a.?.c", "a.xy.c", False),
        ("layer.{0..8}.**", "layer.8.w", True),
        ("layer.{0..8}.**", "layer.9.w", False),
        ("layer.{8..12}", "layer.10.w", True),
        ("layer.{08..12}", "layer.8.w", False),
        ("layer.{08..12}", "layer.08.w", True),
        ("{encoder.**,decoder}.bias", "encoder.x.bias", True),
        ("{a,b{c,d}}.w", "bd.w", True),
        ("{a,b{c,d}}.w", "bb.w", False),
        ("has:conv", "x.conv1.weight", True),
        ("has:conv", "x.fc.weight", False),
        ("re:.*\\.bias", "a.bias", True),
        ("re:bias", "a.bias", False),
        ("a[0]", "a0", False),
    ],
)
def test_a_match_covers_what_its_words_say(match: str, name: str, covers: bool) -> None:
    assert compile_match(match)(name) is covers


@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 3100))
def test_a_number_range_covers_exactly_the_numbers_in_it(low: int, high: int, n: int) -> None:
    expected = min(low, high) <= n <= max(low, high)
    assert compile_match(f"l{{{low}..{high}}}")(f"l{n}") is expected


@pytest.mark.parametrize(
    "match",
    [
        "",
        "{a",
        "a}",
        "{}",
        "{0..}",
        "{a..c}",
        "{1..2..3}",
        "{-1..3}",
        "re:(",
        "re:(?=a)",
        "has:",
        "{0..100000}",
        "{0..999}{0..999}",
    ],
)
def test_a_broken_match_is_refused_in_one_sentence(match: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+\.$"):
        compile_match(match)


def test_a_hundred_thousand_expansions_are_allowed() -> None:
    assert compile_match("{0..99999}")("77777.weight")


def test_a_catastrophic_expression_ends() -> None:
    started = time.monotonic()
    assert not compile_match("re:(a+)+$")("a" * 60 + "b")
    assert not compile_match("*a" * 30)("a" * 25 + "b")
    assert not compile_match("*****b")("a" * 300)
    assert not compile_match("*a*a*a*a*b")("a" * 300)
    assert time.monotonic() - started < 5
