"""Topic patterns, judged by PostgreSQL itself."""

import contextlib
from collections.abc import Callable, Iterator

import psycopg2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kombu_pg.routing import topic_pattern

Match = Callable[[str, str], bool]

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6)
PUNCTUATION = st.text(".*#+?()[]{}^$|\\&/=!<>:-_'\"%\n\t ax1é", max_size=6)


@pytest.fixture(scope="module")
def match(server_url: str) -> Iterator[Match]:
    """Does a binding with this key get a message with that one, as `enqueue` compares them?"""
    with contextlib.closing(psycopg2.connect(server_url)) as connection, connection.cursor() as cursor:

        def ask(binding: str, key: str) -> bool:
            pattern = topic_pattern(binding)
            if pattern is None:
                return binding == key
            cursor.execute("SELECT CASE WHEN %(key)s = '' THEN '' ELSE '.' || %(key)s END ~ %(pattern)s", locals())
            matched: bool = cursor.fetchone()[0]
            return matched

        yield ask


def expected(pattern: list[str], words: list[str]) -> bool:
    """The definition of AMQP 0-9-1, word by word."""
    if not pattern:
        return not words
    if pattern[0] == "#":
        return expected(pattern[1:], words) or (bool(words) and expected(pattern, words[1:]))
    return bool(words) and pattern[0] in ("*", words[0]) and expected(pattern[1:], words[1:])


def words(key: str) -> list[str]:
    return key.split(".") if key else []


@st.composite
def bindings_and_keys(draw: st.DrawFn) -> tuple[str, str]:
    """A key, and a binding made of it by putting wildcards here and there: about half of them match."""
    key = draw(st.lists(st.sampled_from(["", "a", "b"]) | TEXT | PUNCTUATION, max_size=6))
    binding: list[str] = []
    for word in key:
        binding += draw(st.sampled_from([[word], [word], ["*"], ["#"], [], ["#", word], [word, "#"], ["#", "*"]]))
    return ".".join(binding), ".".join(key)


@settings(max_examples=1000, deadline=None)
@given(bindings_and_keys())
def test_a_pattern_matches_what_amqp_says(match, case):
    binding, key = case

    assert match(binding, key) is expected(words(binding), words(key))


@settings(max_examples=300, deadline=None)
@given(TEXT | PUNCTUATION, TEXT | PUNCTUATION)
def test_a_word_in_a_pattern_stands_for_itself(match, word, other):
    assert match(f"#.{word}", f"x.{word}")
    assert match(f"#.{word}", f"x.{other}") is expected(words(f"#.{word}"), words(f"x.{other}"))


@pytest.mark.parametrize("key", ["", "a", "a.b", "a*", "#a", "a.*b", "**", "*#.a"])
def test_a_key_without_wildcard_words_needs_no_pattern(key):
    assert topic_pattern(key) is None


@pytest.mark.parametrize(
    ("binding", "matches"),
    [
        (".".join("#" * 128), True),
        (".".join("*" * 128), True),
        (".".join(["#", "*"] * 63), True),
        ("*." * 127, False),
        ("#." + "é" * 126, False),
    ],
)
def test_the_longest_patterns_are_understood_by_postgresql(match, binding, matches):
    assert match(binding, ".".join("a" * 128)) is matches
