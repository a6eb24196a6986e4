"""What does it mean to start a prompt in each of the three ways?"""

from enum import Enum
from typing import Any

from celery import signature

from examples.executor_rpc.app import COMPLETE, ERROR, EXTRACT
from examples.executor_rpc.dispatch import Dispatcher


class Mode(Enum):
    WAIT = "wait"
    ASYNC = "async"
    CALLBACK = "callback"


def start(dispatcher: Dispatcher, mode: Mode, prompt_id: str, document: Any, timeout: float) -> dict[str, Any]:
    """What the caller is told: the result where it waited for it, else the id of the task."""
    kwargs = {"document": document}
    if mode is Mode.WAIT:
        return {"result": dispatcher.dispatch(EXTRACT, kwargs, timeout=timeout)}
    if mode is Mode.ASYNC:
        return {"task_id": dispatcher.dispatch_async(EXTRACT, kwargs).task_id}
    about = {"prompt_id": prompt_id}
    handle = dispatcher.dispatch_with_callback(
        EXTRACT, kwargs, on_success=signature(COMPLETE, kwargs=about), on_error=signature(ERROR, kwargs=about)
    )
    return {"task_id": handle.task_id, "prompt_id": prompt_id}
