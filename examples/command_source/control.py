"""Which worker has a command? One row says so.

A message has one holder at a time. So whoever is handed the message by which a command was claimed may take it over:
its former holder has died, or given it back. Another message with the same command is a duplicate.
"""

import psycopg2

from examples.command_source.commands import AlreadyClaimed, Claimed, Command, Failed, Outcome, RetryLater

TABLE = """
CREATE TABLE IF NOT EXISTS claimed_command (
    command_id text PRIMARY KEY,
    message_id text NOT NULL,
    worker text NOT NULL,
    finished boolean NOT NULL DEFAULT false,
    claimed_at timestamptz NOT NULL DEFAULT clock_timestamp()
)"""

CLAIM = """
INSERT INTO claimed_command AS held (command_id, message_id, worker) VALUES (%s, %s, %s)
ON CONFLICT (command_id) DO UPDATE SET worker = excluded.worker, claimed_at = excluded.claimed_at
 WHERE held.message_id = excluded.message_id AND NOT held.finished
RETURNING worker"""

FINISH = "UPDATE claimed_command SET finished = true WHERE command_id = %s"


class Control:
    """The control table, for one worker; a connection for each claim, so that one that was lost costs one claim."""

    def __init__(self, dsn: str, worker: str) -> None:
        self._dsn = dsn
        self._worker = worker

    def install(self) -> None:
        self._run(TABLE)

    def claim(self, command: Command, message_id: str) -> Outcome:
        try:
            won = self._run(CLAIM, (command.command_id, message_id, self._worker))
        except (ValueError, psycopg2.DataError) as exc:
            return Failed(f"the control table cannot hold it: {exc}".strip())
        except psycopg2.Error as exc:
            return RetryLater(f"the control table cannot be asked: {exc}".strip())
        return Claimed(command) if won else AlreadyClaimed()

    def finish(self, command: Command) -> None:
        """From now on nobody claims it, whatever becomes of its message.

        Raises:
            psycopg2.Error: nobody knows.
        """
        self._run(FINISH, (command.command_id,))

    def _run(self, statement: str, parameters: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
        connection = psycopg2.connect(self._dsn)
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute(statement, parameters)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()
