"""What happens when an extraction has ended, and nobody waits for it but a browser?"""

from typing import Any

from examples.executor_rpc.app import COMPLETE, ERROR, app, events
from examples.executor_rpc.dispatch import Dispatcher
from examples.executor_rpc.prompts import Mode, start


@app.task(name=COMPLETE)
def ide_prompt_complete(result: Any, **kwargs: Any) -> None:
    events.emit(kwargs["prompt_id"], "complete", result=result)


@app.task(name=ERROR)
def ide_prompt_error(failed_task_id: str, **kwargs: Any) -> None:
    error = app.AsyncResult(failed_task_id).result
    events.emit(kwargs["prompt_id"], "error", type=type(error).__name__, text=str(error))


@app.task(name="ide_repeat_prompt")
def ide_repeat_prompt(prompt_id: str, document: Any, mode: str, timeout: float = 30.0) -> Any:
    """A worker dispatches as the web backend does."""
    return start(Dispatcher(app), Mode(mode), prompt_id, document, timeout)
