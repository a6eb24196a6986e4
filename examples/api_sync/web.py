"""How does somebody ask for a run over HTTP?"""

from flask import Flask

from examples.api_sync.app import Countries, run_policy
from examples.api_sync.runs import API

web = Flask(__name__)
POLICIES = {"countries": Countries}


@web.post("/policies/<policy>/run")
def trigger(policy: str) -> tuple[dict[str, str], int]:
    """202 with the task's id: it is stored. A publish that fails is a 500, and there is no task."""
    if policy not in POLICIES:
        return {"error": f"there is no policy {policy!r}"}, 404
    return {"task": run_policy.delay(policy, API).id}, 202
