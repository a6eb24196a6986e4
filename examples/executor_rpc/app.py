"""Who talks to whom, over which broker?

One app for the web backend and for both workers. Everything that it sends passes the gate; results are in PostgreSQL,
whichever broker carried the call.
"""

import os
import tempfile
from pathlib import Path

from celery import Celery

from examples.executor_rpc.events import Events
from examples.executor_rpc.flags import Flag
from examples.running import store_url

EXTRACT = "execute_extraction"
COMPLETE = "ide_prompt_complete"
ERROR = "ide_prompt_error"
EXTRACTIONS = "extractions"
CALLBACKS = "ide_callback"


def make_app(store: str, rabbitmq: str, flag: Path) -> Celery:
    """The flag decides at each call; nobody needs the broker to which no call goes."""
    app = Celery("executor_rpc", set_as_current=False)
    reads = os.environ.get("CELERY_BROKER_READ_URL", store)
    app.conf.update(
        broker_read_url=reads,
        broker_write_url="pg-gate://",
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "confirm_publish": True
        },  # RabbitMQ's answer to each publish; PostgreSQL needs no asking
        pg_gate={
            "brokers": {"rabbitmq": rabbitmq, "postgres": store},
            "default": "rabbitmq",
            "choose": Flag(flag).broker_for,
        },
        result_backend=store,
        task_routes={EXTRACT: {"queue": EXTRACTIONS}, "ide_*": {"queue": CALLBACKS}},
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        # One commit for result, callback and acknowledgement: where they are in one store.
        pg_atomic_completion=reads == store,
    )
    return app


STORE = store_url("executor_rpc")
FLAG = Path(os.environ.get("PG_QUEUE_ENABLED", Path(tempfile.gettempdir()) / "celery-pg-examples" / "pg_queue_enabled"))
app = make_app(STORE, os.environ.get("RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672//"), FLAG)
events = Events(STORE)
