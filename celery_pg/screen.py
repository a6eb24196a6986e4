"""What does a person see?

Tables and lines, on a terminal with rich where that is installed, and as aligned plain text everywhere else: in a pipe,
on a dumb terminal, without rich. What comes out of the store is shown so that it cannot move the cursor.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

__all__ = ["Cell", "Column", "Screen", "Table", "duration", "number", "shortened", "visible"]

#: What a style looks like in rich's words.
_STYLES = {"": "", "bad": "bold red", "dim": "dim", "good": "green", "strong": "bold", "warn": "yellow"}


@dataclass(frozen=True, slots=True)
class Cell:
    """A text and what it means: bad, dim, good, strong, warn."""

    text: str
    style: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A heading; numbers stand to the right, and are never broken."""

    title: str
    right: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells; a bare text is a cell of no style. `empty` is said where there are no rows."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell | str]]
    empty: str = ""


class Screen:
    """Where output goes."""

    def __init__(self, stream: TextIO, *, color: bool = True) -> None:
        self._stream = stream
        self.console = _console(stream, color)

    def show(self, part: Table | Cell | str) -> None:
        """Print a table, or a line."""
        if self.console is not None:
            self.console.print(rich_table(part) if isinstance(part, Table) else _rich_text(part), soft_wrap=False)
            return
        text = plain_table(part) if isinstance(part, Table) else _cell(part).text
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        self._stream.flush()


def _console(stream: TextIO, color: bool) -> Any:
    """Return rich's console, or None where plain text is better."""
    if not stream.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        return None
    try:
        from rich.console import Console  # optional: the extra "cli"
    except ImportError:
        return None
    return Console(file=stream, no_color=True if not color else None, highlight=False)


def visible(text: str) -> str:
    """The text with everything that is not printable as an escape: control characters, lone surrogates, bidi marks."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def shortened(text: str, length: int) -> str:
    """The visible text, at most so many characters of it."""
    shown = visible(text[: length + 1])
    return shown if len(shown) <= length and len(text) <= length else shown[: length - 3] + "..."


def number(value: int, cap: int | None = None) -> str:
    """With commas; "10,000+" for what was counted no further."""
    return f"{value:,}" if cap is None or value <= cap else f"{cap:,}+"


def duration(seconds: float | None) -> str:
    """Two digits and a unit; nothing for None."""
    if seconds is None:
        return ""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{max(seconds, 0):.1f} s"


def _cell(cell: Cell | str) -> Cell:
    return cell if isinstance(cell, Cell) else Cell(cell)


def plain_table(table: Table) -> str:
    """Aligned text, as wide as it needs to be."""
    lines = [table.title] if table.title else []
    if not table.rows:
        return "\n".join([*lines, f"  {table.empty}"])
    texts = [[column.title for column in table.columns]]
    texts += [[_cell(cell).text for cell in row] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        cells = zip(row, widths, table.columns, strict=True)
        aligned = (text.rjust(width) if column.right else text.ljust(width) for text, width, column in cells)
        lines.append(("  " + "  ".join(aligned)).rstrip())
    return "\n".join(lines)


def rich_table(table: Table) -> Any:
    """The same for rich, as wide as the terminal allows."""
    from rich import box  # only where there is a console
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    title = [Text(table.title, style="bold")] if table.title else []
    if not table.rows:
        return Group(*title, Text(f"  {table.empty}", style="dim"))
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for column in table.columns:
        drawn.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=column.right,
            overflow="fold",
        )
    for row in table.rows:
        drawn.add_row(*map(_rich_text, row))
    return Group(*title, drawn)


def _rich_text(cell: Cell | str) -> Any:
    from rich.text import Text  # never markup: a queue may be called "[red]"

    cell = _cell(cell)
    return Text(cell.text, style=_STYLES[cell.style])
