"""Which worker has a command? One row says so."""

import psycopg2

from examples.command_source.commands import AlreadyClaimed, Claimed, Command, RetryLater

TABLE = """
CREATE TABLE IF NOT EXISTS command_claim (
    command_id text PRIMARY KEY,
    worker text NOT NULL,
    attempts integer NOT NULL,
    claimed_at timestamptz NOT NULL DEFAULT clock_timestamp()
)"""

# A message that came back has a higher count than the claim of whoever had it before, and died or gave it back.
CLAIM = """
INSERT INTO command_claim AS held (command_id, worker, attempts) VALUES (%s, %s, %s)
ON CONFLICT (command_id) DO UPDATE
   SET worker = excluded.worker, attempts = excluded.attempts, claimed_at = clock_timestamp()
 WHERE held.attempts < excluded.attempts
RETURNING worker"""


class Control:
    """The control table, for one worker; a connection for each claim, so that one that was lost costs one claim."""

    def __init__(self, dsn: str, worker: str) -> None:
        self._dsn = dsn
        self._worker = worker

    def install(self) -> None:
        self._run(TABLE)

    def claim(self, command: Command) -> Claimed | AlreadyClaimed | RetryLater:
        try:
            won = self._run(CLAIM, (command.command_id, self._worker, command.attempts))
        except psycopg2.OperationalError as exc:
            return RetryLater(f"the control table cannot be reached: {exc}".strip())
        return Claimed(command) if won else AlreadyClaimed()

    def _run(self, statement: str, parameters: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
        connection = psycopg2.connect(self._dsn)
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute(statement, parameters)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()
