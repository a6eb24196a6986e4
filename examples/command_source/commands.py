"""What is a command, and what can become of one that was pulled?"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

#: What the fields of a command are, in JSON, too.
KINDS: dict[str, type] = {
    **dict.fromkeys(("command_id", "execution_id", "step", "tool_kind"), str),
    **dict.fromkeys(("input", "render_context"), Mapping),
    "attempts": int,
}


@dataclass(frozen=True)
class Command:
    command_id: str
    execution_id: str
    step: str
    tool_kind: str
    input: Mapping[str, Any]
    render_context: Mapping[str, Any] = field(default_factory=dict)
    attempts: int = 0

    def __post_init__(self) -> None:
        for name, kind in KINDS.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} is {getattr(self, name)!r}, not a {kind.__name__}")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Command":
        """Fields that have a default may be missing.

        Raises:
            ValueError: it is not JSON, or not a command.
        """
        try:
            return cls(**json.loads(text))
        except (TypeError, RecursionError) as exc:
            raise ValueError(f"not a command: {exc}") from exc


@dataclass(frozen=True)
class Claimed:
    """It is this worker's: run it."""

    command: Command


@dataclass(frozen=True)
class AlreadyClaimed:
    """Another worker has it: acknowledge it without running it."""


@dataclass(frozen=True)
class RetryLater:
    """Nobody can tell now: it comes back."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """Nobody will ever be able to run it."""

    reason: str


Outcome = Claimed | AlreadyClaimed | RetryLater | Failed
