"""What does a chord ask of Postgres?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kombu_pg.database import Rows, Statement
from kombu_pg.options import Options

__all__ = ["ChordStore", "Expression", "Part", "Returned"]

#: An SQL expression that has an effect when it is evaluated, and its parameters.
Expression = tuple[str, tuple[Any, ...]]

_LAST = "last"


@dataclass(frozen=True, slots=True)
class Part:
    """What a task of a chord's header returns. position: its place in the header, None if it does not know."""

    chord_id: str
    task_id: str
    position: int | None
    state: str
    result: bytes


@dataclass(frozen=True, slots=True)
class Returned:
    """The parts of a complete chord, in order, as (task id, state, encoded result), and how they are nested."""

    parts: list[tuple[str, str, bytes]]
    structure: bytes | None


class ChordStore:
    """The statements for one schema. time_to_live: seconds that a chord is kept, None = for ever."""

    def __init__(self, options: Options, time_to_live: float | None) -> None:
        self._sql = options.schema
        self._time_to_live = time_to_live

    def count(self, part: Part, result: Expression | None, *, complete: bool) -> Statement[bool]:
        """Count the part, once, and store the task's result with it. -> False: it is the last one, nothing was changed.

        Commits alone, without waiting for the flush. `complete`: it is counted even if it is the last; runs in the
        transaction that then finishes the chord.
        """
        # An expression, not a FROM: that would cost the planner more.
        stored, parameters = result or ("''", ())
        return Statement(
            f"SELECT CASE WHEN {self._sql}.count_part(%s, %s, %s, %s, %s, %s, %s) = '{_LAST}' THEN '{_LAST}' "
            f"ELSE ({stored})::text END",
            (
                part.chord_id, part.task_id, part.position, part.state, part.result, self._time_to_live, complete,
                *parameters,
            ),
            lambda rows: rows[0][0] != _LAST,
        )  # fmt: skip

    def store(self, result: Expression) -> Statement[None]:
        """Store the result of a task, without a part."""
        return Statement(f"SELECT {result[0]}", result[1], _nothing)

    def finish(self, chord_id: str) -> Statement[Returned | None]:
        """If all parts have come, the chord is done; they are returned once. None: some are missing, or it was done."""
        return Statement(f"SELECT * FROM {self._sql}.finish_chord(%s)", (chord_id,), _read_returned)

    def size(self, chord_id: str, size: int, *, complete: bool) -> Statement[bool]:
        """Say how many parts it has; one that is done begins anew. -> False: all have come, nothing was changed.

        `complete`: it is changed even so; runs in the transaction that then finishes the chord.
        """
        return Statement(
            f"SELECT {self._sql}.size_chord(%s, %s, %s, %s)",
            (chord_id, size, self._time_to_live, complete),
            lambda rows: bool(rows[0][0]),
        )

    def grow(self, chord_id: str) -> Statement[None]:
        """One more part will come than its size says."""
        return Statement(f"SELECT {self._sql}.grow_chord(%s, %s)", (chord_id, self._time_to_live), _nothing)

    def restart(self, chord_id: str) -> Statement[None]:
        """If it is done, it begins anew: its header is about to be published again."""
        return Statement(
            f"UPDATE {self._sql}.chord SET done_at = NULL, size = NULL, added = 0 "
            "WHERE id = %s AND done_at IS NOT NULL",
            (chord_id,),
            _nothing,
        )

    def shape(self, chord_id: str, structure: bytes) -> Statement[None]:
        """Keep how the results of its header are nested."""
        return Statement(
            f"SELECT {self._sql}.shape_chord(%s, %s, %s)", (chord_id, structure, self._time_to_live), _nothing
        )

    def flush(self) -> Statement[None]:
        """Whatever was committed before this is flushed when it returns. Commits, alone."""
        return Statement(
            "SELECT set_config('synchronous_commit', 'on', true) "
            "WHERE current_setting('synchronous_commit') NOT IN ('on', 'remote_apply');"
            "SELECT pg_logical_emit_message(true, 'kombu_pg', '')",
            None,
            _nothing,
        )

    def sweep(self, limit: int) -> Statement[int]:
        """Remove chords that have expired. -> how many were looked at: fewer than the limit = that was all."""
        return Statement(f"SELECT {self._sql}.sweep_chords(%s)", (limit,), lambda rows: int(rows[0][0]))


def _read_returned(rows: Rows) -> Returned | None:
    if not rows:
        return None
    structure = rows[0][3]
    return Returned(
        [(task_id, state, bytes(result)) for task_id, state, result, _ in rows],
        None if structure is None else bytes(structure),
    )


def _nothing(_: Rows) -> None:
    return None
