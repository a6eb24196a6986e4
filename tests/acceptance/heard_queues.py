"""Which queues do the tests about dead letters have? Sender and worker must declare them alike."""

from kombu import Queue

__all__ = ["queues"]

ARGUMENTS = {
    "celery": {},
    "bench": {},
    "paused": {},
    "elsewhere": {},
    "limited": {"x-delivery-limit": 2},
    "short": {"x-max-length": 1},
    "later": {"x-max-length": 1},
    "diverted": {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "elsewhere"},
}


def queues() -> list[Queue]:
    return [Queue(name, routing_key=name, queue_arguments=arguments) for name, arguments in ARGUMENTS.items()]
