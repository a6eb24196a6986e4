"""How does somebody ask for a run over HTTP?"""

from celery import Celery
from flask import Flask
from kombu.exceptions import OperationalError

from examples.api_sync.app import BACKENDS, RUN_POLICY
from examples.api_sync.runs import API

Answer = tuple[dict[str, str], int]


def make_web(app: Celery) -> Flask:
    web = Flask(__name__)

    @web.post("/policies/<policy>/run")
    def trigger(policy: str) -> Answer:
        """202 with the task's id: it is stored."""
        if policy not in BACKENDS:
            return {"error": f"there is no policy {policy!r}"}, 404
        return {"task": app.send_task(RUN_POLICY, (policy, API)).id}, 202

    @web.errorhandler(OperationalError)
    def failed(error: OperationalError) -> Answer:
        """Nothing was sent: no 202 for a task that does not exist."""
        return {"error": str(error)}, 503

    return web
