"""What does the worker of examples/api_sync run in its tests? Everything of the example, and backends that fail."""

from celery import current_task

from examples.api_sync.app import BACKENDS, Countries, app
from examples.api_sync.errors import IngestRejected, IngestUnavailable

app.conf.beat_schedule["countries"]["schedule"] = 1.0


class Away(Countries):
    """The service is there again at the second attempt."""

    def run(self, policy, **kwargs):
        if current_task.request.retries == 0:
            raise IngestUnavailable("the service is away")
        return super().run(policy, **kwargs)


class Refused(Countries):
    def run(self, policy, **kwargs):
        raise IngestRejected("the service does not take this")


BACKENDS |= {"away": Away, "refused": Refused}
