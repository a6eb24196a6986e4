"""How is a run shown to people?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.rounds import OURS

__all__ = ["plots", "table", "write"]

_HOW = """## How to run it again

```sh
pip install -e ".[bench]"
python -m benchmarks --json bench.json --report    # about 8 minutes; this page is written anew
python -m benchmarks --render bench.json --report  # measures nothing: the page of an earlier run
```

It wants PostgreSQL, RabbitMQ and Redis on this machine, and leaves out who is not there.
[README.md](../benchmarks/README.md) says how to name them, and how to read the figures."""

_OURS_COLOUR, _PEER_COLOUR, _INK = "#336791", "#b8bec6", "#22272e"


def write(results: dict[str, Any], page: Path) -> None:
    """The page and, in a directory beside it that is named like it, one plot per row."""
    directory = page.with_suffix("")
    directory.mkdir(parents=True, exist_ok=True)
    drawn = plots(results, directory)
    parts = [_head(results), _machine(results), _targets(results), _HOW]
    for name, row in results["rows"].items():
        shown = [f"## {row['title']}", row["story"], f"*Durable:* {row['durable']}", _measured(row)]
        shown += [f"![{row['title']}]({directory.name}/{drawn[name].name})"] if name in drawn else []
        parts.append("\n\n".join([*shown, table(results, name)]))
    parts += [_peers(results)]
    page.write_text("\n\n".join(part for part in parts if part) + "\n")


def table(results: dict[str, Any], name: str) -> str:
    """One row of the run as a markdown table: peers, figures, ratios of ours to each."""
    row = results["rows"][name]
    tables = []
    for figure in row["figures"].values():
        lines = [
            f"| {figure['title']} | {figure['unit']}, median | min - max | ours / this | min - max | target |",
            "|---|---:|---:|---:|---:|---|",
        ]
        tables.append("\n".join(lines + [_line(results, figure, peer) for peer in figure["peers"]]))
    tables += [f"{_title(results, peer)}: failed, {reason.splitlines()[0]}" for peer, reason in row["failed"].items()]
    return "\n\n".join(tables)


def _line(results: dict[str, Any], figure: dict[str, Any], peer: str) -> str:
    shown = figure["peers"][peer]
    ratio = shown.get("ours_to_this")
    cells = [
        f"**{_title(results, peer)}**" if peer == OURS else _title(results, peer),
        _number(shown["median"]),
        f"{_number(shown['min'])} - {_number(shown['max'])}",
        f"{ratio['median']:.2f}" if ratio else "",
        f"{ratio['min']:.2f} - {ratio['max']:.2f}" if ratio else "",
        "; ".join(_cell(target) for target in figure["targets"] if peer in target["peers"]),
    ]
    return f"| {' | '.join(cells)} |"


def _cell(target: dict[str, Any]) -> str:
    if len(target["peers"]) == 1:
        return f"{_sign(target)} {target['bound']:.2f}: {_verdict(target)}"
    ratio = "" if target["ratio"] is None else f" ({target['ratio']:.2f})"
    return f"best {_sign(target)} {target['bound']:.2f}: {_verdict(target)}{ratio}"


def _measured(row: dict[str, Any]) -> str:
    return (
        f"{row['rounds']} rounds; one measurement ends after {row['seconds_each']:g} s or {row['count_each']:,} steps, "
        "whichever is first."
    )


def _head(results: dict[str, Any]) -> str:
    rounds = {row["rounds"] for row in results["rows"].values()}
    # Later loads are the benchmark's own.
    quiet = results["machine"]["load_before"][0] <= results["machine"]["cores"] / 2
    return "\n\n".join(
        [
            "# How fast is it?",
            f"One run of [`python -m benchmarks`](../benchmarks/README.md): length {results['length']}, "
            f"{min(rounds, default=0)} to {max(rounds, default=0)} rounds, {results['seconds'] / 60:.1f} minutes, "
            f"{results['started'][:10]}. In each round each peer is measured in turn, in another order each time. "
            "Ratios are taken round by round, and their median is shown: they are what can be compared. The absolute "
            "numbers are this machine's. Nothing is batched unless the row says so.",
            ""
            if quiet
            else "**The machine was busy with other things when this began: these figures are not to be quoted.**",
        ]
    ).strip()


def _targets(results: dict[str, Any]) -> str:
    targets = [
        (row["title"], target)
        for row in results["rows"].values()
        for figure in row["figures"].values()
        for target in figure["targets"]
    ]
    counted = {met: sum(target["met"] is met for _, target in targets) for met in (True, False, None)}
    said = f"{counted[True]} of {len(targets)} targets are met, {counted[False]} missed"
    said += f", {counted[None]} not measured." if counted[None] else "."
    lines = ["| row | ours / | target | this run | |", "|---|---|---:|---:|---|"]
    lines += [
        f"| {title} | {_best(results, target)} | {_sign(target)} {target['bound']:.2f} "
        f"| {'' if target['ratio'] is None else format(target['ratio'], '.2f')} | {_verdict(target)} |"
        for title, target in targets
    ]
    return "\n\n".join(["## The targets", said, "\n".join(lines)]) if targets else ""


def _best(results: dict[str, Any], target: dict[str, Any]) -> str:
    titles = [_title(results, peer) for peer in target["peers"]]
    return titles[0] if len(titles) == 1 else f"the best of {' and '.join(titles)}"


def _peers(results: dict[str, Any]) -> str:
    lines = ["| peer | when a publish returned, what survives a loss of power | server |", "|---|---|---|"]
    for peer in results["peers"].values():
        server = ", ".join(f"{key} {value or 'none'}" for key, value in peer["server"].items())
        lines.append(f"| {peer['title']} | {peer['durable']} | {server or 'not reached: ' + peer['unreachable']} |")
    return "## Durable against durable\n\n" + "\n".join(lines)


def _machine(results: dict[str, Any]) -> str:
    machine, flush = results["machine"], results["machine"]["flush"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n".join(
        [
            "## The machine\n",
            f"{machine['cores']} cores ({machine['cpu']}), {machine['memory_gb']} GB, {machine['kernel']}; "
            "clients and servers share them.",
            f"Appending 4 KB and flushing it ({flush['filesystem']}) takes "
            f"{flush['median_us']:,.0f} µs, {flush['p95_us']:,.0f} µs at the 95th percentile.",
            f"Load before the run {machine['load_before'][0]}; {results['disturbance']['steal_percent']} % of the "
            "CPU time went to other virtual machines.",
            f"\n{versions}.",
        ]
    )


def plots(results: dict[str, Any], directory: Path) -> dict[str, Path]:
    """One SVG for each row that has figures. -> row: file."""
    import matplotlib  # only who wants plots needs it

    matplotlib.use("svg")
    # Text stays text, and the same numbers give the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "bench", "font.family": "sans-serif"})
    drawn = {}
    for name, row in results["rows"].items():
        if any(figure["peers"] for figure in row["figures"].values()):
            drawn[name] = directory / f"{name}.svg"
            _plot(results, row, drawn[name])
    return drawn


def _plot(results: dict[str, Any], row: dict[str, Any], file: Path) -> None:
    from matplotlib import pyplot

    figures = [figure for figure in row["figures"].values() if figure["peers"]]
    bars = sum(len(figure["peers"]) for figure in figures)
    heights = [len(figure["peers"]) for figure in figures]
    drawing, panels = pyplot.subplots(
        len(figures), 1, squeeze=False, figsize=(8, 0.42 * bars + 0.9 * len(figures)), height_ratios=heights
    )
    for figure, panel in zip(figures, panels[:, 0], strict=True):
        _panel(results, figure, panel)
    drawing.tight_layout()
    drawing.savefig(file, metadata={"Date": None})
    pyplot.close(drawing)


def _panel(results: dict[str, Any], figure: dict[str, Any], panel: Any) -> None:
    names = list(figure["peers"])
    medians = [figure["peers"][name]["median"] for name in names]
    right = max(figure["peers"][name]["max"] for name in names)
    logarithmic = right > 40 * min(medians)
    colours = [_OURS_COLOUR if name == OURS else _PEER_COLOUR for name in names]
    if logarithmic:
        # A bar has no length where there is no zero.
        panel.scatter(medians, range(len(names)), s=110, color=colours)
    else:
        panel.barh(range(len(names)), medians, height=0.62, color=colours)
    for place, name in enumerate(names):
        shown = figure["peers"][name]
        panel.plot([shown["min"], shown["max"]], [place, place], color=_INK, linewidth=1)
        panel.plot(shown["rounds"], [place] * len(shown["rounds"]), "o", color=_INK, markersize=2.5)
        panel.annotate(
            _number(shown["median"]), (shown["max"], place), (7, 0), textcoords="offset points", va="center", color=_INK
        )
    if logarithmic:
        panel.set_xscale("log")
        panel.set_xlim(min(figure["peers"][name]["min"] for name in names) / 2, right * 3)
    else:
        panel.set_xlim(0, right * 1.14)
    panel.set_yticks(range(len(names)), [_title(results, name) for name in names])
    panel.invert_yaxis()
    better = "more" if figure["more_is_better"] else "less"
    scale = "; logarithmic" if logarithmic else ""
    panel.set_title(
        f"{figure['title']}, {figure['unit']} ({better} is better{scale})", loc="left", fontsize=10, color=_INK
    )
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(left=False, labelsize=9, colors=_INK)


def _title(results: dict[str, Any], peer: str) -> str:
    return str(results["peers"].get(peer, {"title": peer})["title"])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _sign(target: dict[str, Any]) -> str:
    return {">=": "≥", "<=": "≤"}[target["relation"]]


def _verdict(target: dict[str, Any]) -> str:
    return {True: "met", False: "**missed**", None: "not measured"}[target["met"]]
