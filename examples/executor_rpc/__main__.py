"""What does it look like? A web backend, an executor and a callback worker; this process is the browser, too."""

import json
import sys
import urllib.request
from typing import Any

from examples.executor_rpc.app import CALLBACKS, EXTRACTIONS, FLAG, app, events
from examples.executor_rpc.web import make_web
from examples.http import post, serving
from examples.running import worker

PACKAGE = "examples.executor_rpc"


def main() -> int:
    if not FLAG.exists():
        FLAG.parent.mkdir(parents=True, exist_ok=True)
        FLAG.write_text("on")
    executor = worker(f"{PACKAGE}.executor", "-n", "executor", "--concurrency", "2", "-Q", EXTRACTIONS)
    callbacks = worker(f"{PACKAGE}.callbacks", "-n", "callbacks", "--concurrency", "1", "-Q", CALLBACKS)
    with executor, callbacks, serving(make_web(app, events)) as url:
        if "--serve" in sys.argv:
            input(f"{url} (Enter ends it)\n")
            return 0
        print("wait:", *post(f"{url}/prompts", mode="wait", document="to be or not to be", timeout=60))
        status, told = post(f"{url}/prompts", mode="async", document="that is the question")
        print("async:", status, sorted(told))
        for document in ("whether 'tis nobler in the mind", " "):
            status, told = post(f"{url}/prompts", mode="callback", document=document)
            print("callback:", status, *listen(f"{url}/prompts/{told['prompt_id']}/events"))
    return 0


def listen(url: str, timeout: float = 60.0) -> tuple[str, dict[str, Any]]:
    """The first server-sent event, as a browser's EventSource gives it. -> name, data."""
    with urllib.request.urlopen(url, timeout=timeout) as stream:
        said = dict(line.decode().rstrip("\n").split(": ", 1) for line in stream if line[:1] not in (b":", b"\n"))
    return said["event"], json.loads(said["data"])


if __name__ == "__main__":
    sys.exit(main())
