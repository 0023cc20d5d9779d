"""Rows of results as text: aligned for a terminal, or Markdown for a results page."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["markdown_table", "text_table"]


def text_table(rows: Sequence[dict]) -> str:
    """Aligned columns, in the order in which names first appear; what a row lacks stays empty."""
    cells = _cells(rows)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(row, widths)) for row in cells)


def markdown_table(rows: Sequence[dict]) -> str:
    """The same as a Markdown table."""
    head, *body = _cells(rows)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(rows: Sequence[dict]) -> list[list[str]]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [names, *([_text(row.get(name, "")) for name in names] for row in rows)]


def _text(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
