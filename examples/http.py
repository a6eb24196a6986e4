"""How is a web part served, and asked?"""

import contextlib
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from flask import Flask
from werkzeug.serving import make_server


@contextlib.contextmanager
def serving(web: Flask) -> Iterator[str]:
    """The URL of a server with a thread for each request, until the block ends."""
    server = make_server("127.0.0.1", 0, web, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def get(url: str) -> tuple[int, Any]:
    """-> status, what was answered."""
    return _ask(urllib.request.Request(url))


def post(url: str, **told: Any) -> tuple[int, Any]:
    """-> status, what was answered."""
    return _ask(urllib.request.Request(url, json.dumps(told).encode(), {"Content-Type": "application/json"}))


def _ask(request: urllib.request.Request) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
