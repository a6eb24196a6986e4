"""What is a row, and for how long is it measured?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["WARM_UP", "Figure", "Form", "Row", "Target", "repeat"]

#: Steps before the clock starts.
WARM_UP = 30


@dataclass(frozen=True)
class Form:
    """How long a row measures: whichever of seconds and count is reached first ends one measurement."""

    rounds: int
    seconds: float
    count: int
    #: Seconds for the whole row: no round is begun that would not end within them; there is always one.
    limit: float = 60.0


@dataclass(frozen=True)
class Target:
    """Ours divided by the best of these peers' is at least, or at most, this."""

    bound: float
    peers: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    name: str
    title: str
    unit: str
    more_is_better: bool = True
    targets: tuple[Target, ...] = ()


@dataclass(frozen=True)
class Row:
    name: str
    title: str
    #: What exactly happens, and what is batched.
    story: str
    #: What has survived a loss of power, and what has not.
    durable: str
    figures: tuple[Figure, ...]
    measure: Callable[[Any, str, Form], dict[str, float | None]]


def repeat(step: Callable[[], object], form: Form) -> int:
    """Do the step until the time or the count is over, at least once. -> how often."""
    deadline = time.monotonic() + form.seconds
    for done in range(1, form.count + 1):
        step()
        if time.monotonic() >= deadline:
            return done
    return form.count
