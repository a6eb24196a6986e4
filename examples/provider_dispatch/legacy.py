"""How were graphs synchronised before there were providers?

Imported where it is needed only: a worker on which every graph has its provider never loads it.
"""

from examples.provider_dispatch.providers import SyncContext, SyncResult


def sync(context: SyncContext) -> SyncResult:
    return SyncResult(engine="legacy", synced=len(context.options.get("entities", ())))
