"""What is known of a run? RUNNING is committed before anything is done, and one end for each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import sqlalchemy
from celery import Celery
from sqlalchemy import Column, DateTime, Integer, MetaData, String, Table, func

from celery_pg import publish_in
from examples.api_sync.backends import Entity
from examples.api_sync.errors import IngestRejected, as_ingest_errors

#: Bytes of one chunk, as JSON.
CHUNK_BYTES = 3 * 1024 * 1024

RECEIVE = "receive_entities"
SCHEDULE, API = "schedule", "api"

tables = MetaData()
run = Table(
    "api_sync_run",
    tables,
    Column("id", Integer, primary_key=True),
    Column("policy", String, nullable=False),
    Column("source", String, nullable=False),
    Column("state", String, nullable=False),
    Column("error", String),
    Column("chunks", Integer),
    Column("began_at", DateTime(timezone=True), server_default=func.clock_timestamp()),
    Column("ended_at", DateTime(timezone=True)),
)


class Runs:
    """The one path of scheduled runs and of callbacks."""

    def __init__(self, engine: sqlalchemy.Engine, app: Celery) -> None:
        self._engine = engine
        self._app = app

    def install(self) -> None:
        tables.create_all(self._engine)

    def ingest(self, policy: str, source: str, produce: Callable[[], Iterable[Entity]]) -> int:
        """Run the producer and ship what it gives; returns the run's id.

        Afterwards the run is COMPLETED and its chunks are published, by one commit; or it is FAILED, and none is.

        Raises:
            IngestError: it has failed; see `errors`.
        """
        run_id = self._begin(policy, source)
        try:
            with as_ingest_errors():
                self._complete(run_id, policy, produce)
        except Exception as exc:
            if self._fail(run_id, exc):
                raise
            # It is COMPLETED: only the server's answer to the commit was lost.
        return run_id

    def callback(self, policy: str) -> Callable[..., None]:
        """What a backend is given to ship by itself, outside of a scheduled run."""

        def ingest(*, entities: Iterable[Entity] | None = None, error: Exception | None = None) -> None:
            if (entities is None) == (error is None):
                raise TypeError("the callback takes exactly one of entities and error")
            self.ingest(policy, API, lambda: entities if error is None else _raise(error))

        return ingest

    def _begin(self, policy: str, source: str) -> int:
        with as_ingest_errors(), self._engine.begin() as connection:
            began = connection.execute(run.insert().values(policy=policy, source=source, state="RUNNING"))
            return int(began.inserted_primary_key[0])

    def _complete(self, run_id: int, policy: str, produce: Callable[[], Iterable[Entity]]) -> None:
        with self._engine.begin() as connection:
            count = 0
            for chunk in chunks(produce()):
                with publish_in(connection, self._app):
                    self._app.send_task(RECEIVE, (run_id, policy, chunk))
                count += 1
            self._end(connection, run_id, "COMPLETED", chunks=count)

    def _fail(self, run_id: int, exc: Exception) -> bool:
        """False if it has ended already."""
        with as_ingest_errors(), self._engine.begin() as connection:
            return self._end(connection, run_id, "FAILED", error=f"{type(exc).__name__}: {exc}")

    def _end(self, connection: sqlalchemy.Connection, run_id: int, state: str, **values: Any) -> bool:
        """A run ends once: this waits for a commit that is still under way. False if it has ended already."""
        running = run.update().where(run.c.id == run_id, run.c.state == "RUNNING")
        ended = running.values(state=state, ended_at=func.clock_timestamp(), **values)
        return connection.execute(ended).rowcount == 1


def chunks(entities: Iterable[Entity]) -> Iterator[list[Entity]]:
    """Lists of entities, each of at most CHUNK_BYTES as JSON.

    Raises:
        IngestRejected: a single entity is larger than that.
    """
    chunk: list[Entity] = []
    size = 0
    for entity in entities:
        length = len(json.dumps(entity)) + 2
        if length > CHUNK_BYTES:
            raise IngestRejected(f"an entity of {length:,} bytes is larger than a chunk may be, {CHUNK_BYTES:,} bytes")
        if chunk and size + length > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(entity)
        size += length
    if chunk:
        yield chunk


def _raise(error: Exception) -> Iterable[Entity]:
    raise error
