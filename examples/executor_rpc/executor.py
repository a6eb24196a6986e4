"""What does the executor run?

EXTRACTION_MODEL names the function that does the work, as `module:function`.
"""

import os
from typing import Any

from kombu.utils.imports import symbol_by_name

from examples.executor_rpc.app import EXTRACT, app


@app.task(name=EXTRACT)
def execute_extraction(document: Any, **options: Any) -> Any:
    return symbol_by_name(os.environ.get("EXTRACTION_MODEL", "examples.executor_rpc.executor:count_words"))(
        document, **options
    )


def count_words(document: str) -> dict[str, int]:
    """Stands for the expensive model.

    Raises:
        ValueError: there is nothing to extract.
    """
    if not document.strip():
        raise ValueError("the document is empty")
    return {"words": len(document.split())}
