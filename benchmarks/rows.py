"""What is measured, and against which target?"""

from __future__ import annotations

from benchmarks import consuming, publishing, waiting, working
from benchmarks.form import Figure, Row, Target

__all__ = ["ROWS"]

_PER_SECOND = "1/s"
_BEST = ("rabbitmq", "redis")
_UNLESS = "Each message, when its publish returned, except where the peer's line below says otherwise."
_FLUSHED = ", except ours with `result_synchronous_commit=true` (celery-pg, results flushed)"
_NOT_ACKS = "The tasks, when they were sent. Acknowledgements wait for no disk"


def _rate(title: str, *targets: Target) -> tuple[Figure, ...]:
    return (Figure("rate", title, _PER_SECOND, targets=targets),)


_PUBLISHING = (
    Row(
        "publish",
        "Publish 1 KB, one connection",
        "kombu's Producer, one persistent message after the other, each answered before the next is sent "
        "(RabbitMQ without confirms: one round trip at the end). The floor of the target does the same row work: bare "
        "INSERTs of the two rows that a message is.",
        _UNLESS,
        _rate("messages published", Target(0.85, ("bare-rows",)), Target(1.7, ("rabbitmq",))),
        publishing.publish,
    ),
    Row(
        "publish16",
        "Publish 1 KB, 16 publishers",
        "The same from 16 processes at once, one connection each, into one queue.",
        _UNLESS,
        _rate("messages published", Target(0.8, ("bare-rows",))),
        publishing.publish16,
    ),
    Row(
        "transaction",
        "Publish 1 KB in one's own transaction",
        "psycopg2: begin, insert an order, publish with kombu's Producer inside `publish_in`, commit. The floor "
        "inserts as many bytes into a plain table in its place. No worker is idle, and nobody is told. At most 1.25 "
        "times the floor's time is at least 0.80 of its rate.",
        "The order and the message, together, when the commit returned.",
        _rate("transactions", Target(0.8, ("bare",))),
        publishing.transaction,
    ),
    Row(
        "transaction16",
        "Publish 1 KB in one's own transaction, 16 publishers",
        "The same from 16 processes at once, one connection of their own each.",
        "The order and the message, together, when the commit returned.",
        _rate("transactions", Target(0.8, ("bare",))),
        publishing.transaction16,
    ),
    Row(
        "cpu",
        "CPU of a publish of 1 KB",
        "The first row once more: time on a CPU of the server's process for the connection (/proc/<pid>/schedstat; "
        "PostgreSQL only), and of the publishing process.",
        _UNLESS,
        (
            Figure("server", "in the server", "µs", more_is_better=False),
            Figure("client", "in the client", "µs", more_is_better=False),
        ),
        publishing.cpu,
    ),
)

_CONSUMING = (
    Row(
        "consume",
        "Consume and ack at prefetch 100",
        "kombu's Consumer and drain_events over a full queue, message.ack() for each, from the end of the first window "
        "until the channel is closed. Each transport settles as always: RabbitMQ's and ours without waiting for "
        "each ack (ours claims and acks in batches), Redis's one by one; kombu's sqla has no acks.",
        "The messages, when they were published. Acknowledgements wait for no disk, except Redis's with appendfsync "
        "always and sqla's deletes: after a crash of the server the last ones may be delivered again.",
        _rate("messages acknowledged", Target(2.5, ("rabbitmq",))),
        consuming.consume,
    ),
    Row(
        "latency",
        "From publish to delivery, idle",
        "Published in one process, delivered by drain_events in another, which has been waiting for 10 to 30 ms. "
        "kombu's sqla looks once a second unless told otherwise, and is met at any moment of that second.",
        "The message before it is delivered, except where the peer's line below says otherwise.",
        (
            Figure("p50", "median", "ms", more_is_better=False, targets=(Target(1.3, ("redis",)),)),
            Figure("p95", "95th percentile", "ms", more_is_better=False),
        ),
        consuming.latency,
    ),
)

_TASKS = (
    Row(
        "apply_async",
        "apply_async of a Celery task",
        "One task without arguments after the other, by one process.",
        _UNLESS,
        _rate("tasks sent", Target(1.5, ("rabbitmq",)), Target(1.0, ("redis-always",))),
        working.apply_async,
    ),
    Row(
        "worker",
        "Tasks of a real worker",
        "celery worker -P prefork -c 2 with default settings and no results (without mingle, to start sooner), on "
        f"a queue that is full when it starts: from a first task, behind {working.SEGMENT} others, to the last one.",
        f"{_NOT_ACKS}, except those of Redis with appendfsync always and of sqla.",
        _rate("tasks done", Target(1.2, ("rabbitmq",))),
        working.worker,
    ),
    Row(
        "worker-results",
        "Tasks of a real worker that keeps results",
        "The row before, with results: ours in PostgreSQL, Redis's in the same Redis, RabbitMQ's by rpc:// in the "
        "queue of the process that sent the tasks. Nobody waits for them.",
        f"{_NOT_ACKS}, nor do results: ours go with the next flush (a lost result means a lost acknowledgement, too), "
        "rpc's are transient, Redis's are as durable as its messages. With `result_synchronous_commit=true` "
        "(celery-pg, results flushed) each is on disk.",
        _rate("tasks done", Target(1.0, _BEST)),
        working.worker_results,
    ),
    Row(
        "atomic",
        "Tasks that complete atomically",
        "celery worker -P prefork -c 2, tasks with acks_late and results. With pg_atomic_completion result and "
        "acknowledgement are one commit, which waits for the disk; plain, they are two, and neither does. As durable, "
        "but two commits: results flushed.",
        "With atomic completion (celery-pg): each result and its acknowledgement, together. Results flushed: each "
        "result. Plain: neither.",
        _rate("tasks done", Target(0.9, ("pg-plain",))),
        working.atomic,
    ),
    Row(
        "atomic-write",
        "Tasks that write a row, and complete atomically",
        "The row before with a task that inserts one row by SQLAlchemy: with pg_atomic_completion in "
        "`task_transaction()`, plain in a transaction of its own.",
        "With atomic completion (celery-pg): the row, its task's result and acknowledgement, together. Plain: the row; "
        "results flushed: the row, then the result.",
        _rate("tasks done", Target(0.9, ("pg-plain",))),
        working.atomic_write,
    ),
)

_RESULTS = (
    Row(
        "get",
        "delay().get()",
        "One call after the other by one process; a worker with one child answers. The rate is that of the median.",
        f"The task, except where the peer's line below says otherwise. Results wait for no disk{_FLUSHED}.",
        (
            Figure("speed", "calls answered", _PER_SECOND, targets=(Target(0.9, _BEST),)),
            Figure("p95", "95th percentile", "ms", more_is_better=False),
        ),
        waiting.get,
    ),
    Row(
        "group500",
        f"A group of {waiting.GROUP}, from apply_async to get",
        f"group({waiting.GROUP} tasks).apply_async().get(), again and again; a worker with two children, idle before.",
        f"The tasks, except where the peer's line below says otherwise. Results wait for no disk{_FLUSHED}.",
        _rate("tasks sent, done and read", Target(1.2, _BEST)),
        waiting.group500,
    ),
    Row(
        "chord200",
        f"A chord of {waiting.CHORD}, from apply_async to get",
        f"chord({waiting.CHORD} tasks)(sum).get(), again and again; a worker with two children, idle before. rpc:// "
        "has no chords.",
        "The tasks, except where the peer's line below says otherwise. Results and counted parts wait for no disk"
        f"{_FLUSHED}.",
        _rate("parts sent, done and summed", Target(1.2, ("redis",))),
        waiting.chord200,
    ),
    Row(
        "parts10000",
        "The parts of one large chord, 16 workers",
        "All parts of one chord are queued when 16 processes (one celery worker -P prefork -c 16) begin: until the "
        "body has run with every result. Plain is a group of as many. Sending is not in it. 10,000 parts in the full "
        "length, fewer in shorter ones.",
        "The tasks. Results and the count of parts wait for no disk.",
        _rate("parts done", Target(0.8, ("pg-plain",))),
        working.parts,
    ),
)

ROWS = {row.name: row for row in (*_PUBLISHING[:4], *_CONSUMING, *_TASKS, *_RESULTS, *_PUBLISHING[4:])}
