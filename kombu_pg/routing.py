"""Which queues get this message?

The answer is one index probe in the server (`enqueue` in migration 0002); here is what a binding stores for it.
"""

from __future__ import annotations

import re

__all__ = ["topic_pattern"]


def topic_pattern(routing_key: str) -> str | None:
    """The regular expression that a topic binding stands for, None if it has no wildcard.

    It is matched against the words of the published key with a dot before each (`a.b` -> `.a.b`, the empty key -> the
    empty string), so that `#` can stand for no word at all: `*` = one word, `#` = any number of words, none included.
    """
    words = routing_key.split(".")
    if not {"*", "#"} & set(words):
        return None
    return "^" + "".join(_WILDCARDS.get(word, rf"\.{_literal(word)}") for word in words) + "$"


_WILDCARDS = {"*": r"\.[^.]*", "#": r"(\.[^.]*)*"}


def _literal(word: str) -> str:
    return re.sub(r"([^\w])", r"\\\1", word)
