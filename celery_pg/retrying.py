"""How long does a result backend try again while the server is away?"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

from celery.utils.time import get_exponential_backoff_interval

__all__ = ["Retrying"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Retrying:
    """What Celery 5.7's backend has, and 5.6's has not; the same for both."""

    always_retry: bool
    max_retries: float
    base_sleep_between_retries_ms: int
    max_sleep_between_retries_ms: int

    def exception_safe_to_retry(self, exc: BaseException) -> bool:
        raise NotImplementedError

    def _ensure_retryable(
        self,
        func: Callable[..., T],
        *args: Any,
        fallback_exc: Callable[[str | None], Exception] | None = None,
        fallback_msg: str | None = None,
        max_retries: float | None = None,
        deadline: float = math.inf,
        **kwargs: Any,
    ) -> T:
        """Call it again after errors that may pass, with growing pauses, at most `max_retries` times.

        No call begins after `deadline`, a time of the monotonic clock; the last one is at that moment.

        Raises:
            fallback_exc: it failed every time.
        """
        limit = self.max_retries if max_retries is None else max_retries
        retries = 0
        while True:
            try:
                return func(*args, **kwargs)
            except Exception as exc:
                if not (self.always_retry and self.exception_safe_to_retry(exc)):
                    raise
                left = deadline - time.monotonic()
                if retries >= limit or left <= 0:
                    if fallback_exc is None:
                        raise
                    raise fallback_exc(fallback_msg) from exc
                retries += 1
                logger.warning("trying again, %s more times: %s", limit - retries, exc)
                pause = get_exponential_backoff_interval(
                    self.base_sleep_between_retries_ms, retries, self.max_sleep_between_retries_ms, True
                )
                time.sleep(max(0.0, min(pause / 1000, left)))
