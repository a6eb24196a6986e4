"""In which order is everything measured, and what do the numbers of one run say?"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.children import Failed, alone
from benchmarks.form import Figure, Form, Row, Target
from benchmarks.peers import Peer

__all__ = ["OURS", "judged", "measure_row", "summary"]

OURS = "pg"
#: Seconds between two measurements: servers finish what the last one left behind.
PAUSE = 0.15

Rounds = dict[str, list[dict[str, float | None]]]


def measure_row(row: Row, peers: Sequence[Peer], form: Form, run: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the row as it stands in the JSON. A peer that fails leaves the row, with its reason."""
    began, load = time.monotonic(), os.getloadavg()[0]
    peers = [peer for peer in peers if row.name in peer.rows]
    measured: Rounds = {peer.name: [] for peer in peers}
    failed: dict[str, str] = {}
    rounds = 0
    for number in range(form.rounds):
        # Whole rounds only: each ratio needs both of its peers.
        if number and (time.monotonic() - began) * (number + 1) / number > form.limit:
            say(f"{row.name:14} has no time for more than {number} of {form.rounds} rounds")
            break
        rounds = number + 1
        for peer in in_order(peers, number):
            if peer.name in failed:
                continue
            try:
                values = _measure(row, peer, form, f"{run}_{row.name}".replace("-", "_"))
            except Failed as exc:
                failed[peer.name] = str(exc)
                del measured[peer.name]
                say(f"{row.name:14} {peer.name:21} failed: {exc}")
                continue
            measured[peer.name].append(values)
            shown = "   ".join(f"{value:,.5g}" for value in values.values() if value is not None)
            say(f"{row.name:14} {peer.name:21} round {number + 1}/{form.rounds}   {shown}")
    return {
        "title": row.title,
        "story": row.story,
        "durable": row.durable,
        "rounds": rounds,
        "seconds_each": form.seconds,
        "count_each": form.count,
        "took": round(time.monotonic() - began, 1),
        "load_before": round(load, 2),
        "failed": failed,
        "figures": {figure.name: _figure(figure, measured) for figure in row.figures},
    }


def in_order(peers: Sequence[Peer], number: int) -> list[Peer]:
    """Rotate by one each round, and go backwards in every other: nobody always comes after the same peer."""
    first = number % max(1, len(peers))
    turned = [*peers[first:], *peers[:first]]
    return turned[::-1] if number % 2 else turned


def _measure(row: Row, peer: Peer, form: Form, queue: str) -> dict[str, float | None]:
    time.sleep(PAUSE)
    try:
        alone(peer.declare, queue)
        return row.measure(peer, queue, form)
    finally:
        alone(peer.remove, queue)


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and spread of the rounds, four digits of each."""
    rounded = [float(f"{value:.4g}") for value in values]
    return {
        "median": float(f"{statistics.median(values):.4g}"),
        "min": min(rounded),
        "max": max(rounded),
        "rounds": rounded,
    }


def _figure(figure: Figure, measured: Rounds) -> dict[str, Any]:
    series = {name: [values[figure.name] for values in rounds] for name, rounds in measured.items()}
    told = {name: [value for value in values if value is not None] for name, values in series.items()}
    peers = {name: summary(values) for name, values in told.items() if values and len(values) == len(series[name])}
    ours = peers.get(OURS, {}).get("rounds", [])
    for name, shown in peers.items():
        if ours and name != OURS:
            # Round by round: what disturbed one round disturbed both.
            shown["ours_to_this"] = summary(
                [mine / theirs for mine, theirs in zip(ours, shown["rounds"], strict=False)]
            )
    return {
        "title": figure.title,
        "unit": figure.unit,
        "more_is_better": figure.more_is_better,
        "peers": peers,
        "targets": [judged(target, figure.more_is_better, peers) for target in figure.targets],
    }


def judged(target: Target, more_is_better: bool, peers: dict[str, Any]) -> dict[str, Any]:
    """Return the target beside what this run says: ours by the best of its peers, round by round.

    Ratio and verdict are None where ours or one of the peers was not measured.
    """
    shown = {"peers": list(target.peers), "relation": ">=" if more_is_better else "<=", "bound": target.bound}
    if not peers.keys() >= {OURS, *target.peers}:
        return {**shown, "ratio": None, "met": None}
    best = max if more_is_better else min
    theirs = [best(values) for values in zip(*(peers[peer]["rounds"] for peer in target.peers), strict=False)]
    ratio = summary([mine / other for mine, other in zip(peers[OURS]["rounds"], theirs, strict=False)])["median"]
    return {**shown, "ratio": ratio, "met": ratio >= target.bound if more_is_better else ratio <= target.bound}
