"""What does the web backend answer?

`POST /prompts` starts a prompt in one of three ways, `GET /results/ID` asks for one, `GET /prompts/ID/events` streams
what the callback worker says.
"""

import uuid
from typing import Any

from celery import Celery
from celery.exceptions import TimeoutError
from flask import Flask, Response, request
from kombu.exceptions import OperationalError
from kombu.utils.json import dumps
from werkzeug.exceptions import HTTPException

from examples.executor_rpc.dispatch import Dispatcher
from examples.executor_rpc.events import Events
from examples.executor_rpc.prompts import Mode, start

#: Everything else that is raised is a failed extraction. Nothing was sent: no 202 for a task that does not exist.
STATUS = {OperationalError: 503, TimeoutError: 504}

PAGE = """<!doctype html><title>executor_rpc</title>
<form><input name=document size=60><button>extract</button></form><pre></pre>
<script>
const say = text => document.querySelector("pre").append(text + "\\n")
document.querySelector("form").onsubmit = async submitted => {
  submitted.preventDefault()
  const prompt = {mode: "callback", document: submitted.target.elements.document.value}
  const answer = await fetch("/prompts", {
    method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(prompt)
  })
  say(answer.status + " " + await answer.clone().text())
  const source = new EventSource(`/prompts/${(await answer.json()).prompt_id}/events`)
  for (const name of ["complete", "error"]) source.addEventListener(name, event => {
    source.close()
    say(name + " " + event.data)
  })
}
</script>"""


def make_web(app: Celery, events: Events) -> Flask:
    web = Flask(__name__)
    dispatcher = Dispatcher(app)

    @web.get("/")
    def page() -> str:
        return PAGE

    @web.post("/prompts")
    def prompt() -> Response:
        asked = request.get_json()
        mode, prompt_id = Mode(asked["mode"]), str(uuid.uuid4())
        if mode is Mode.CALLBACK:
            events.expect(prompt_id)
        told = start(dispatcher, mode, prompt_id, asked["document"], float(asked.get("timeout", 30)))
        return _answer(200 if mode is Mode.WAIT else 202, told)

    @web.get("/results/<task_id>")
    def result(task_id: str) -> Response:
        found = app.AsyncResult(task_id)
        return _answer(200, {"state": found.state, "result": found.result if found.successful() else str(found.result)})

    @web.get("/prompts/<uuid:prompt_id>/events")
    def stream(prompt_id: uuid.UUID) -> Response:
        return Response(events.stream(str(prompt_id)), mimetype="text/event-stream")

    @web.errorhandler(Exception)
    def failed(error: Exception) -> Any:
        if isinstance(error, HTTPException):
            return error
        status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)
        return _answer(status, {"error": type(error).__name__, "text": str(error)})

    return web


def _answer(status: int, told: dict[str, Any]) -> Response:
    return Response(dumps(told), status, mimetype="application/json")
