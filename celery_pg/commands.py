"""What can an operator do from a shell?

`celery -A app pg ...`, and the same without an app: `celery-pg --url pg://... ...`. Exit codes: 0 = done, or all is
well; 1 = a problem was found; 2 = it was asked wrongly.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click

from celery_pg import letters, report
from celery_pg.screen import Cell, Screen, number
from celery_pg.store.dead_letters import Chosen, DeadLetterStore
from celery_pg.store.operator import Inspection
from celery_pg.store.results import Results
from kombu_pg import errors, schema
from kombu_pg.database import Database, Session, Statement
from kombu_pg.options import Options, redact
from kombu_pg.store import store_for
from kombu_pg.transport import Transport

__all__ = ["main", "pg"]

PROBLEM, USAGE = 1, 2
#: Messages that are dropped in one transaction.
PURGE_BATCH = 10_000
#: Dead letters that are retried or dropped in one transaction.
DEAD_BATCH = 1_000

_URL = "celery_pg.url"
_F = TypeVar("_F", bound=Callable[..., Any])


class _Misuse(click.ClickException):
    exit_code = USAGE


class _Group(click.Group):
    """Our errors as click's: a sentence and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except errors.PGError as exc:
            raise (_Misuse if isinstance(exc, errors.OptionError) else click.ClickException)(str(exc)) from exc


@click.group("pg", cls=_Group)
@click.option("--url", envvar="CELERY_PG_URL", metavar="URL", help="pg://user@host/database; else the app's broker.")
@click.pass_context
def pg(ctx: click.Context, url: str | None) -> None:
    """Look after queues in PostgreSQL."""
    ctx.meta[_URL] = url
    # What it logs (installed, migrated) is what we print.
    logging.getLogger("kombu_pg").addHandler(logging.NullHandler())


def main() -> None:
    """`celery-pg`: the commands without an app."""
    pg(prog_name="celery-pg")


def _as_json(command: _F) -> _F:
    return click.option("--json", "as_json", is_flag=True, help="For machines.")(command)


def _options(ctx: click.Context) -> Options:
    if ctx.meta[_URL]:
        return Options.parse(ctx.meta[_URL])
    app = getattr(ctx.find_root().obj, "app", None)
    if app is None:
        raise _Misuse("which database? give --url pg://user@host/database, or set CELERY_PG_URL")
    with app.connection_for_write() as connection:
        try:
            ours = issubclass(connection.get_transport_cls(), Transport)
        except (ImportError, KeyError):
            ours = False
        if not ours:
            url = redact(connection.as_uri())
            raise _Misuse(f"the app's broker is {url}, not PostgreSQL: name the app with -A, or give --url")
        options: Options = connection.transport.options()
        return options


@contextlib.contextmanager
def _session(options: Options) -> Iterator[Session]:
    with contextlib.closing(Database(options).connect()) as session:
        yield session


@contextlib.contextmanager
def _store(ctx: click.Context) -> Iterator[tuple[Options, Session]]:
    """A session to a store that fits this release."""
    options = _options(ctx)
    with _session(options) as session:
        schema.verify(session, options.schema)
        yield options, session


def _screen(ctx: click.Context) -> Screen:
    return Screen(sys.stdout, color=not getattr(ctx.find_root().obj, "no_color", False))


def _say(ctx: click.Context, as_json: bool, value: dict[str, Any], line: str, style: str = "") -> None:
    if as_json:
        _print_json(value)
    else:
        _screen(ctx).show(Cell(line, style))


def _print_json(value: object) -> None:
    # Plain ASCII: a NUL and a lone surrogate are escapes in it.
    click.echo(json.dumps(_plain(value), indent=2))


def _plain(value: Any) -> Any:
    """What JSON has no word for as text: bytes, dates, NaN."""
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    known = value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and value - value == 0)
    return value if known else str(value)


def _queue_id(session: Session, options: Options, name: str) -> int:
    known = session.run(Inspection(options).queue_ids())
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, sorted(known), n=1)
    hint = f": did you mean {close[0]!r}?" if close else ""
    raise _Misuse(f"there is no queue {name!r}{hint}")


@pg.command()
@_as_json
@click.pass_context
def migrate(ctx: click.Context, as_json: bool) -> None:
    """Install the schema, or bring it to this release's version."""
    options = _options(ctx)
    with _session(options) as session:
        before, after = schema.migrate(session, options.schema)
    if before == after:
        line = f'schema "{options.schema}" is at version {after}: nothing to do'
    elif before:
        line = f'schema "{options.schema}" was at version {before} and is now at {after}'
    else:
        line = f'schema "{options.schema}" is installed, at version {after}'
    _say(ctx, as_json, {"schema": options.schema, "before": before, "version": after}, line, "good")


@pg.command()
@_as_json
@click.pass_context
def check(ctx: click.Context, as_json: bool) -> None:
    """Say whether the schema fits this release; exit 1 if it does not."""
    options = _options(ctx)
    newest = max(schema.migrations())
    answer: dict[str, Any] = {
        "schema": options.schema,
        "version": None,
        "release": newest,
        "ok": False,
        "problem": None,
    }
    with _session(options) as session:
        installed = schema.installed(session, options.schema)
        answer["version"] = None if installed is None else installed[0]
        try:
            version, _ = schema.verify(session, options.schema)
        except errors.SchemaError as exc:
            if not as_json:
                raise
            _print_json({**answer, "problem": str(exc)})
            ctx.exit(PROBLEM)
    fits = "which is this release's" if version == newest else f"and serves this release, which is at {newest}"
    _say(ctx, as_json, {**answer, "ok": True}, f'schema "{options.schema}" is at version {version}, {fits}', "good")


@pg.command()
@click.option(
    "--since", type=click.IntRange(0), help="The version to start from; 0 = nothing is there. No server asked."
)
@click.pass_context
def sql(ctx: click.Context, since: int | None) -> None:
    """Print the SQL that migrate would run."""
    if since is not None:
        name = _options(ctx).schema if ctx.meta[_URL] or ctx.find_root().obj else Options.schema
    else:
        options = _options(ctx)
        name = options.schema
        with _session(options) as session:
            since = (schema.installed(session, name) or (0, 0))[0]
    click.echo(schema.deployment(name, since), nl=False)


@pg.command()
@click.option("--all", "everything", is_flag=True, help="Also the queues that come and go with their processes.")
@_as_json
@click.pass_context
def status(ctx: click.Context, everything: bool, as_json: bool) -> None:
    """Show queues, consumers and the schema on one screen."""
    with _store(ctx) as (options, session):
        inspection = Inspection(options)
        seen = report.Status(
            schema=options.schema,
            version=schema.verify(session, options.schema)[0],
            newest=max(schema.migrations()),
            server=session.run(inspection.server()),
            queues=session.run(inspection.queues()),
            consumers=session.run(inspection.consumers()),
            horizon=session.run(inspection.horizon()),
        )
    if as_json:
        _print_json(report.status_as_json(seen))
        return
    screen = _screen(ctx)
    for part in report.status(seen, everything=everything):
        screen.show(part)


@pg.command()
@_as_json
@click.pass_context
def queues(ctx: click.Context, as_json: bool) -> None:
    """List the queues as they are declared."""
    with _store(ctx) as (options, session):
        found = [queue for queue in session.run(Inspection(options).queues()) if queue.id is not None]
    if as_json:
        _print_json([report.declared_as_json(queue) for queue in found])
    else:
        _screen(ctx).show(report.declared(found))


@pg.command()
@click.argument("queue")
@click.option("-n", "limit", type=click.IntRange(1, 1000), default=10, show_default=True, help="How many messages.")
@_as_json
@click.pass_context
def peek(ctx: click.Context, queue: str, limit: int, as_json: bool) -> None:
    """Show the next messages of QUEUE, without claiming them."""
    with _store(ctx) as (options, session):
        queue_id = _queue_id(session, options, queue)
        waiting = session.run(Inspection(options).waiting(queue_id, limit))
    if as_json:
        _print_json([report.waiting_as_json(message) for message in waiting])
        return
    screen = _screen(ctx)
    for line in report.waiting(queue, waiting):
        screen.show(line)


@pg.command()
@click.argument("queue")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@_as_json
@click.pass_context
def purge(ctx: click.Context, queue: str, force: bool, as_json: bool) -> None:
    """Drop every message that waits in QUEUE; what workers hold stays."""
    with _store(ctx) as (options, session):
        queue_id = _queue_id(session, options, queue)
        if not force:
            click.confirm(f"drop every waiting message of queue {queue!r}? there is no undo", abort=True, err=True)
        batch = purged = session.run(store_for(options).purge(queue_id, PURGE_BATCH), timeout=None)
        while batch == PURGE_BATCH:  # not until nothing is left: somebody may publish as fast as this drops
            batch = session.run(store_for(options).purge(queue_id, PURGE_BATCH), timeout=None)
            purged += batch
    _say(ctx, as_json, {"queue": queue, "purged": purged}, f"dropped {number(purged)} messages of queue {queue!r}")


@pg.command()
@click.argument("queue")
@_as_json
@click.pass_context
def pause(ctx: click.Context, queue: str, as_json: bool) -> None:
    """Let nobody claim from QUEUE; what workers hold already still runs."""
    _set_paused(ctx, queue, as_json, paused=True)


@pg.command()
@click.argument("queue")
@_as_json
@click.pass_context
def resume(ctx: click.Context, queue: str, as_json: bool) -> None:
    """Let workers claim from QUEUE again, at once."""
    _set_paused(ctx, queue, as_json, paused=False)


def _set_paused(ctx: click.Context, queue: str, as_json: bool, *, paused: bool) -> None:
    with _store(ctx) as (options, session):
        queue_id = _queue_id(session, options, queue)
        changed = session.run(Inspection(options).pause(queue_id, paused=paused))
    state = "is paused: what waits there stays" if paused else "is open: what waits there is claimed"
    line = f"queue {queue!r} {state}" if changed else f"queue {queue!r} was {'paused' if paused else 'open'} already"
    _say(ctx, as_json, {"queue": queue, "paused": paused, "changed": changed}, line)


@pg.command()
@click.argument("task_ids", nargs=-1, metavar="[TASK_ID]...")
@click.option("-n", "limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="How many results.")
@click.option("--state", help="Only those in this state: FAILURE, STARTED, ...")
@click.option("--task", "name", help="Only those of the task with this name.")
@_as_json
@click.pass_context
def results(
    ctx: click.Context, task_ids: tuple[str, ...], limit: int, state: str | None, name: str | None, as_json: bool
) -> None:
    """Show the latest results, or those of TASK_ID with their tracebacks; exit 1 if there is none of them.

    Without a TASK_ID, --state and --task choose among the 100,000 results that were stored last.
    """
    options = _result_options(ctx)
    with _session(options) as session:
        schema.verify(session, options.schema)
        asked = Results(options).latest(max(limit, len(task_ids)), task_ids=task_ids, state=state, name=name)
        seen = session.run(asked)
    if as_json:
        _print_json(report.results_as_json(seen))
    else:
        screen = _screen(ctx)
        for part in report.results(seen, tracebacks=bool(task_ids)):
            screen.show(part)
    if task_ids and not seen:
        ctx.exit(PROBLEM)


def _result_options(ctx: click.Context) -> Options:
    """Where the app's results are; with --url that."""
    app = None if ctx.meta[_URL] else getattr(ctx.find_root().obj, "app", None)
    url = "" if app is None else str(app.conf.result_backend or "")
    if app is not None and "://" in url:
        from celery_pg.backend import PGBackend  # it imports Celery's backends: nobody else here needs them

        if not isinstance(app.backend, PGBackend):
            raise _Misuse(f"the app's results are in {redact(url)}, not in PostgreSQL: give --url")
        return app.backend.options
    return _options(ctx)


@pg.group()
def dead() -> None:
    """List, show, retry or delete dead letters."""


def _choice(command: _F) -> _F:
    for option in (
        click.option("--task-id", help="Of this task."),
        click.option("--task", help="Of tasks with this name."),
        click.option("--reason", help="That died for this reason: delivery_limit, rejected, unknown_task, ..."),
        click.option("--queue", help="That died in this queue."),
    ):
        command = option(command)
    return command


def _limits(command: _F) -> _F:
    for option in (
        click.option("-f", "--force", is_flag=True, help="Do not ask."),
        click.option("--all", "everything", is_flag=True, help="Every dead letter there is."),
        _choice,
        click.argument("ids", type=int, nargs=-1, metavar="[ID]..."),
    ):
        command = option(command)
    return command


@dead.command("list")
@_choice
@click.option("-n", "limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="How many.")
@click.option("--after", type=int, default=0, help="Only those with a greater id.")
@_as_json
@click.pass_context
def list_dead(ctx: click.Context, /, limit: int, after: int, as_json: bool, **choice: Any) -> None:
    """List dead letters, the oldest message first."""
    with _store(ctx) as (options, session):
        store = DeadLetterStore(options)
        ids = session.run(store.find(Chosen(**choice), after, limit + 1))
        found = session.run(store.listed(ids[:limit]))
    if as_json:
        _print_json([letters.listed_as_json(one) for one in found])
        return
    screen = _screen(ctx)
    for part in letters.letters(found, more=len(ids) > limit):
        screen.show(part)


@dead.command("show")
@click.argument("letter_id", type=int, metavar="ID")
@_as_json
@click.pass_context
def show_dead(ctx: click.Context, letter_id: int, as_json: bool) -> None:
    """Show one dead letter."""
    with _store(ctx) as (options, session):
        found = session.run(DeadLetterStore(options).get(letter_id))
    if found is None:
        raise click.ClickException(f"there is no dead letter {letter_id}")
    if as_json:
        _print_json(letters.letter_as_json(found))
        return
    screen = _screen(ctx)
    for line in letters.letter(found):
        screen.show(line)


@dead.command("retry")
@_limits
@click.option("--to", "target", metavar="QUEUE", help="Put them into this queue; else into the one they died in.")
@_as_json
@click.pass_context
def retry_dead(ctx: click.Context, /, target: str | None, as_json: bool, **choice: Any) -> None:
    """Put dead letters back into their queue, or into another one."""
    with _store(ctx) as (options, session):
        if target is not None:
            _queue_id(session, options, target)
        store = DeadLetterStore(options)
        where = f"queue {target!r}" if target else "their queues"
        looked_at, done = _in_batches(
            session, store, choice, f"put them into {where}?", lambda ids: store.redrive(ids, target)
        )
    left = looked_at - done
    line = f"put {number(done)} dead letters into {where}"
    line += f"; {number(left)} stay: the queue they died in is gone, use --to" if left else ""
    _say(ctx, as_json, {"retried": done, "left": left}, line, "warn" if left else "good")
    if left:
        ctx.exit(PROBLEM)


@dead.command("delete")
@_limits
@_as_json
@click.pass_context
def delete_dead(ctx: click.Context, /, as_json: bool, **choice: Any) -> None:
    """Drop dead letters; there is no undo."""
    with _store(ctx) as (options, session):
        store = DeadLetterStore(options)
        _, done = _in_batches(session, store, choice, "drop them? there is no undo", store.delete)
    _say(ctx, as_json, {"deleted": done}, f"dropped {number(done)} dead letters")


def _in_batches(
    session: Session,
    store: DeadLetterStore,
    choice: dict[str, Any],
    question: str,
    act: Callable[[list[int]], Statement[int]],
) -> tuple[int, int]:
    """Do it with what was chosen, and show how far it is. -> how many there were, how many it was done with."""
    force, everything, ids = choice.pop("force"), choice.pop("everything"), choice.pop("ids")
    if not everything and not ids and not any(choice.values()):
        raise _Misuse("which dead letters? give ids, --queue, --reason, --task or --task-id, or --all")
    chosen = Chosen(ids=ids or None, **choice)
    if not force:
        click.confirm(f"{_how_many(session, store, chosen)}: {question}", abort=True, err=True)
    looked_at = done = after = 0
    newest = session.run(store.newest())  # what dies again meanwhile has a new id, and is not for this round
    while batch := [i for i in session.run(store.find(chosen, after, DEAD_BATCH), timeout=None) if i <= newest]:
        done += session.run(act(batch), timeout=None)
        looked_at, after = looked_at + len(batch), batch[-1]
        if sys.stderr.isatty():
            click.echo(f"\r{number(looked_at)} ...", nl=False, err=True)
    if sys.stderr.isatty() and looked_at:
        click.echo("\r", nl=False, err=True)
    return looked_at, done


def _how_many(session: Session, store: DeadLetterStore, chosen: Chosen) -> str:
    count = len(session.run(store.find(chosen, 0, PURGE_BATCH + 1), timeout=None))
    return f"more than {number(PURGE_BATCH)} dead letters" if count > PURGE_BATCH else f"{number(count)} dead letters"


@pg.command()
@click.pass_context
def demo(ctx: click.Context) -> None:
    """Run orders on a private PostgreSQL, kill the worker, watch the recovery."""
    from celery_pg import demo as demonstration  # it makes an app, and `celery worker` imports this module, too

    sys.exit(demonstration.run(_screen(ctx)))
