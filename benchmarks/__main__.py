"""`python -m benchmarks`: measure, print, keep."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import machine, report
from benchmarks.children import Failed, alone
from benchmarks.lengths import LENGTHS
from benchmarks.peers import PEERS, Peer, Servers, every_peer, is_local
from benchmarks.rounds import measure_row
from benchmarks.rows import ROWS
from kombu_pg.options import redact

PG = "postgresql://postgres@127.0.0.1:5432/postgres"
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def main() -> int:
    asked = _arguments()
    if asked.render:
        results = json.loads(asked.render.read_text())
    else:
        servers = Servers(asked.pg, asked.amqp, asked.redis, run=f"bench_{os.getpid()}")
        results = measure(servers, asked.peers, asked.only, asked.length)
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=1) + "\n")
    if asked.report:
        report.write(results, asked.report)
    for name, row in results["rows"].items():
        print(f"\n{row['title']}\n\n{report.table(results, name)}")
    return 1 if any(row["failed"] for row in results["rows"].values()) else 0


def measure(servers: Servers, names: list[str], rows: list[str], length: str) -> dict[str, Any]:
    """Return the whole run as it stands in the JSON; everything that was started or created is gone."""
    started, began, cpu_before = datetime.now(timezone.utc), time.monotonic(), machine.cpu_times()
    described = machine.describe()
    with every_peer(servers, frozenset(names)) as peers:
        shown = {peer.name: _peer(peer) for peer in peers}
        reachable = [peer for peer in peers if not shown[peer.name]["unreachable"]]
        for peer in peers:
            _say(f"{peer.name:21} {redact(peer.url)}  {shown[peer.name]['unreachable']}")
        measured = {name: measure_row(ROWS[name], reachable, LENGTHS[length][name], servers.run, _say) for name in rows}
    return {
        "format": 1,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - began, 1),
        "length": length,
        "machine": described,
        "disturbance": machine.disturbance(cpu_before),
        "versions": machine.versions(),
        "peers": shown,
        "rows": measured,
    }


def _peer(peer: Peer) -> dict[str, Any]:
    shown: dict[str, Any] = {"title": peer.title, "durable": peer.durable, "server": {}, "unreachable": ""}
    try:
        return {**shown, "server": alone(peer.server, within=15)}
    except Failed as exc:
        return {**shown, "unreachable": redact(str(exc).splitlines()[0])}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ours and every peer that is reachable.")
    parser.add_argument("--length", choices=LENGTHS, default="short", help="short: about 8 minutes; full: about 25")
    parser.add_argument("--only", type=_names_of(ROWS), default=list(ROWS), help=f"rows: {','.join(ROWS)}")
    parser.add_argument("--peers", type=_names_of(PEERS), default=list(PEERS), help=f"peers: {','.join(PEERS)}")
    parser.add_argument("--json", type=Path, help="write everything that was measured here")
    parser.add_argument(
        "--report", type=Path, nargs="?", const=PAGE, help=f"write the page and its plots [{PAGE.name}]"
    )
    parser.add_argument("--render", type=Path, metavar="JSON", help="measure nothing: show an earlier run")
    parser.add_argument("--pg", type=_local, default=os.environ.get("CELERY_PG_TEST_URL") or PG)
    parser.add_argument("--amqp", type=_local, default="amqp://guest:guest@127.0.0.1:5672//")
    parser.add_argument("--redis", type=_local, default="redis://127.0.0.1:6379/15")
    return parser.parse_args()


def _names_of(known: Any) -> Any:
    def names(text: str) -> list[str]:
        asked = text.split(",")
        if unknown := sorted(set(asked) - set(known)):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
        return [name for name in known if name in asked]

    return names


def _local(url: str) -> str:
    if not is_local(url):
        raise argparse.ArgumentTypeError("only the loopback is measured: a network would be all that is seen")
    return url


if __name__ == "__main__":
    sys.exit(main())
